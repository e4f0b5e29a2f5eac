import os
import pathlib


def write_whole(path: pathlib.Path, body: bytes) -> None:
    """Writes a file that appears whole or not at all, even if the machine stops.

    It is written beside its place and moved there. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
