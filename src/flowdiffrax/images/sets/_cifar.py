import pathlib
import tarfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..._io import StrPath
from ._files import (
    UNVERIFIED,
    check_bytes,
    check_file,
    check_split,
    damaged,
    missing,
    provenance,
)
from ._images import Images
from ._planes import PIXELS, channels_last, read_pickle

_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


_BATCHES = {
    "train": [f"data_batch_{k}" for k in range(1, 6)],
    "test": ["test_batch"],
}


_PER_CLASS = {"train": 5000, "test": 1000}


# No file of either release is larger than 31 MB. An archive with one is not CIFAR-10.
_MAX_BYTES = 64_000_000


class _Release(NamedTuple):
    """One of the two forms in which CIFAR-10 is distributed."""

    archive: str
    size: int
    md5: str
    folder: str
    suffix: str
    batch_md5s: dict[str, str]  # of the unpacked files, if known


_BINARY = _Release(
    "cifar-10-binary.tar.gz",
    170_052_171,
    "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-batches-bin",
    ".bin",
    {},
)


_PYTHON = _Release(
    "cifar-10-python.tar.gz",
    170_498_071,
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    "",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)


_RELEASES = (_BINARY, _PYTHON)


def cifar10(path: StrPath, split: str = "train", *, checksums: bool = True) -> Images:
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32x32, in ten classes.

    Reads the binary release or the Python one, as an archive or unpacked. Nothing is
    unpacked to disk, and the pickles of the Python release are read without running any
    code in them.

    **Arguments:**

    - `path`: `cifar-10-binary.tar.gz` or `cifar-10-python.tar.gz`; the folder
      `cifar-10-batches-bin` or `cifar-10-batches-py`; or a folder that contains one of
      these.
    - `split`: `"train"` or `"test"`.
    - `checksums`: whether to require the files of the release. Their size and md5 are
      checked before anything else is read from them. We know no md5 of the unpacked
      binary files; for these, the sizes and the number of images per class are checked.

    **Raises:** `FileNotFoundError` if a file is missing; `ValueError` if a file is
    damaged or has another format, or if a label is out of range.
    """
    check_split(split, tuple(_BATCHES))
    release, place = _find(pathlib.Path(path), split)
    names = [f"{name}{release.suffix}" for name in _BATCHES[split]]
    if place.is_dir():
        bodies = {place / name: (place / name).read_bytes() for name in names}
    else:
        if checksums:
            check_file(place, release.md5, release.size)
        members = _read_members(place, names)
        bodies = {place / name: members[name] for name in names}
    read = _read_binary if release.suffix == ".bin" else read_pickle
    parts = []
    for file, body in bodies.items():
        if checksums and (md5 := release.batch_md5s.get(file.name)):
            check_bytes(file, body, md5)
        parts.append(read(file, body))
    rows, labels = map(np.concatenate, zip(*parts, strict=True))
    images = np.ascontiguousarray(channels_last(rows))
    name = provenance(f"CIFAR-10 {split}", checksums)
    found = Images(images, labels, _CLASSES, name=name)
    counts = np.bincount(labels, minlength=10).tolist()
    if checksums and counts != [_PER_CLASS[split]] * 10:
        raise damaged(place, f"{counts} images in the classes", UNVERIFIED)
    return found


def _find(path: pathlib.Path, split: str) -> tuple[_Release, pathlib.Path]:
    """Returns the release that is present, and its folder or archive."""
    for release in _RELEASES:
        names = [f"{name}{release.suffix}" for name in _BATCHES[split]]
        for folder in (path, path / release.folder):
            absent = [name for name in names if not (folder / name).is_file()]
            if absent == names:
                continue
            if absent:
                raise missing(f"Part of CIFAR-10 ({', '.join(absent)})", folder, _CURE)
            return release, folder
    for release in _RELEASES:
        if (path / release.archive).is_file():
            return release, path / release.archive
        if path.is_file() and path.name == release.archive:
            return release, path
    if path.is_file():
        raise ValueError(
            f"{path} is neither {_BINARY.archive} nor {_PYTHON.archive}. If it is one "
            "of them, restore its name."
        )
    raise missing("CIFAR-10", path, _CURE)


_CURE = (
    "Fetch "
    + " or ".join(f"{r.archive} ({r.size:,} bytes, md5 {r.md5})" for r in _RELEASES)
    + " from the CIFAR-10 page of Alex Krizhevsky, University of Toronto, and put it "
    "there, unpacked or not."
)


def _read_members(archive: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    try:
        # Read in the archive's order, since going back would decompress it again.
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                if name not in names or not member.isfile():
                    continue
                if member.size > _MAX_BYTES:
                    raise ValueError(f"{name} of {member.size} bytes")
                file = tar.extractfile(member)
                found[name] = b"" if file is None else file.read()
    except (EOFError, OSError, ValueError, tarfile.TarError, zlib.error) as error:
        raise damaged(archive, error) from error
    if absent := [name for name in names if name not in found]:
        raise damaged(archive, f"it has no {', '.join(absent)}")
    return found


def _read_binary(path: pathlib.Path, body: bytes) -> tuple[np.ndarray, np.ndarray]:
    # Each record is one label and one image.
    num_images, rest = divmod(len(body), 1 + PIXELS)
    if rest or num_images == 0:
        raise damaged(path, f"{len(body)} bytes, not a multiple of {1 + PIXELS}")
    records = np.frombuffer(body, np.uint8).reshape(num_images, 1 + PIXELS)
    return records[:, 1:], records[:, 0]
