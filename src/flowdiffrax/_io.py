"""Files, and optional imports."""

import importlib
import os
import pathlib
from typing import Any

from ._check import check_instance


def write_whole(path: pathlib.Path, body: bytes) -> None:
    """Writes a file completely or not at all, even if the machine stops.

    It writes a temporary file in the same folder and renames it. Missing folders are
    created.
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


StrPath = str | os.PathLike


def as_folder(folder: StrPath, name: str = "folder") -> pathlib.Path:
    """**Raises:** `TypeError` unless it is a path, `ValueError` for a file."""
    check_instance(folder, StrPath, name, 'a path, for example "out/run"')
    path = pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`{name}` must be a folder; got {path}, which is a file.")
    return path


def import_extra(module: str, extra: str, needed_by: str) -> Any:
    """Imports a module of an optional dependency.

    **Raises:** `ImportError` that names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{needed_by}` needs {module}, which could not be imported: {error}. Use "
            f'`pip install "flowdiffrax[{extra}]"`.'
        ) from error
