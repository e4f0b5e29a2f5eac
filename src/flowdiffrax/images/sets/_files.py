"""Files of data sets: found, checked, and only then read."""

import hashlib
import pathlib

from ..._io import StrPath, chunks


def missing(data_set: str, where: StrPath, cure: str) -> FileNotFoundError:
    """The error for a data set that is not there, with what to fetch, from where."""
    return FileNotFoundError(
        f"{data_set} is not at {where}. {cure} Nothing is downloaded for you."
    )


def damaged(path: StrPath, what: object, cure: str = "") -> ValueError:
    """The error for a file that is not what it should be."""
    cure = f" {cure}" if cure else ""
    return ValueError(
        f"{path} is truncated, damaged or another file than expected: {what}. Fetch it "
        f"again.{cure}"
    )


UNVERIFIED = "For a file of your own in this format, pass `checksums=False`."


def provenance(name: str, checksums: bool) -> str:
    """What a report should call a set: files of a user's own may be anything."""
    return name if checksums else f"{name} (unverified)"


def check_split(split: str, splits: tuple[str, ...]) -> None:
    """**Raises:** `ValueError` for a split that the data set does not have."""
    if split not in splits:
        raise ValueError(f"`split` must be one of {splits}; got {split!r}.")


def check_bytes(path: StrPath, body: bytes, md5: str, size: int | None = None) -> None:
    """**Raises:** `ValueError` if `body`, read from `path`, is not the known file."""
    if size is not None and len(body) != size:
        raise damaged(path, f"{len(body)} bytes instead of {size}", UNVERIFIED)
    found = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if found != md5:
        raise damaged(path, f"md5 {found} instead of {md5}", UNVERIFIED)


def check_file(path: pathlib.Path, md5: str, size: int | None = None) -> None:
    """As `check_bytes`, of a file that is too large to keep in memory."""
    if size is not None and path.stat().st_size != size:
        raise damaged(path, f"{path.stat().st_size} bytes instead of {size}", UNVERIFIED)
    found = hashlib.md5(usedforsecurity=False)
    for chunk in chunks(path):
        found.update(chunk)
    if found.hexdigest() != md5:
        raise damaged(path, f"md5 {found.hexdigest()} instead of {md5}", UNVERIFIED)
