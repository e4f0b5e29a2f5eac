"""Finds and checks the files of data sets, and says which files to fetch."""

import contextlib
import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from ..._io import StrPath


def missing(data_set: str, where: StrPath, cure: str) -> FileNotFoundError:
    """Returns the error for a missing data set, with what to fetch and from where."""
    return FileNotFoundError(
        f"{data_set} is not at {where}. {cure} Nothing is downloaded automatically."
    )


def damaged(path: StrPath, what: object, cure: str = "") -> ValueError:
    """Returns the error for a file that is not the expected one."""
    cure = f" {cure}" if cure else ""
    return ValueError(
        f"{path} is truncated, damaged or not the expected file: {what}. Fetch it "
        f"again.{cure}"
    )


@contextlib.contextmanager
def reading(path: StrPath, *errors: type[Exception], cure: str = "") -> Iterator[None]:
    """Turns the errors that readers raise for a bad file into that of `damaged`.

    A missing file stays a `FileNotFoundError`.

    **Arguments:**

    - `path`: the file.
    - `errors`: errors of this reader, in addition to those of the standard library.
    - `cure`: see `damaged`.
    """
    known = EOFError, OSError, ValueError, tarfile.TarError, zipfile.BadZipFile
    try:
        yield
    except FileNotFoundError:
        raise
    except (*known, zlib.error, *errors) as error:
        raise damaged(path, error, cure) from error


UNVERIFIED = "To read your own file in this format, pass `checksums=False`."


def provenance(name: str, checksums: bool) -> str:
    """Returns the name of a set for reports, which marks files that were not verified."""
    return name if checksums else f"{name} (unverified)"


def check_split(split: str, splits: tuple[str, ...]) -> None:
    """Checks that the data set has this split.

    **Raises:** `ValueError` if it does not.
    """
    if split not in splits:
        raise ValueError(f"`split` must be one of {splits}; got {split!r}.")


def check_md5(path: StrPath, file: io.BufferedIOBase, md5: str) -> None:
    """Checks that `file`, which is at `path`, is the known one.

    **Raises:** `ValueError` if it is not.
    """
    make = lambda: hashlib.md5(usedforsecurity=False)
    found = hashlib.file_digest(file, make).hexdigest()
    if found != md5:
        raise damaged(path, f"md5 {found} instead of {md5}", UNVERIFIED)
