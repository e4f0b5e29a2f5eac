"""Finds and checks the files of data sets, before they are read."""

import hashlib
import pathlib

from ..._io import StrPath, chunks


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


def check_bytes(path: StrPath, body: bytes, md5: str, size: int | None = None) -> None:
    """Checks that `body`, read from `path`, is the known file.

    **Raises:** `ValueError` if it is not.
    """
    if size is not None and len(body) != size:
        raise damaged(path, f"{len(body)} bytes instead of {size}", UNVERIFIED)
    found = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if found != md5:
        raise damaged(path, f"md5 {found} instead of {md5}", UNVERIFIED)


def check_file(path: pathlib.Path, md5: str, size: int | None = None) -> None:
    """Does the same as `check_bytes` for a file that is too large to keep in memory."""
    if size is not None and path.stat().st_size != size:
        raise damaged(path, f"{path.stat().st_size} bytes instead of {size}", UNVERIFIED)
    found = hashlib.md5(usedforsecurity=False)
    for chunk in chunks(path):
        found.update(chunk)
    if found.hexdigest() != md5:
        raise damaged(path, f"md5 {found.hexdigest()} instead of {md5}", UNVERIFIED)
