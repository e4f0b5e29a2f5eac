"""A lock that lets one process at a time train in a folder."""

import pathlib
from typing import IO


class FolderLock:
    """The system releases it when the process ends, even if it is killed."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._file: IO | None = None

    def acquire(self) -> None:
        """**Raises:** `ValueError` if another process holds the lock."""
        if self._file is not None:
            return
        try:
            import fcntl
        except ImportError:  # not available on Windows
            return
        file = open(self._folder / ".lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"Another process is training in {self._folder}. Wait for it to end, or "
                "use another folder."
            ) from error
        except OSError:  # some network drives do not support locks
            file.close()
            return
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
