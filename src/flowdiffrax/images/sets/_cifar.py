import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from ..._check import check_bools
from ..._io import StrPath
from ._files import (
    UNVERIFIED,
    check_md5,
    check_split,
    damaged,
    missing,
    provenance,
    reading,
)
from ._images import Images

PIXELS = 3 * 32 * 32


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
    "train": [f"data_batch_{k}.bin" for k in range(1, 6)],
    "test": ["test_batch.bin"],
}


_PER_CLASS = {"train": 5000, "test": 1000}


_ARCHIVE = "cifar-10-binary.tar.gz"


_FOLDER = "cifar-10-batches-bin"


_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


_CURE = (
    f"Fetch {_ARCHIVE} (170,052,171 bytes, md5 {_MD5}) from the CIFAR-10 page of Alex "
    "Krizhevsky, University of Toronto, and put it there under this name, unpacked or "
    "not. The Python version, cifar-10-python.tar.gz, is not read, since its pickles can "
    "run code. `parquet_images` reads the Parquet files of the Hugging Face hub."
)


def cifar10(path: StrPath, split: str = "train", *, checksums: bool = True) -> Images:
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32x32, in ten classes.

    Reads the binary version, as an archive or unpacked. Nothing is unpacked to disk.

    **Arguments:**

    - `path`: `cifar-10-binary.tar.gz`, the folder `cifar-10-batches-bin`, or a folder
      that contains one of these.
    - `split`: `"train"` or `"test"`.
    - `checksums`: whether to require the files of the release. The md5 of the archive is
      checked before anything else is read from it. We know no md5 of the unpacked files;
      for these, the number of images per class is checked.

    **Raises:** `FileNotFoundError` if a file is missing; `ValueError` if a file is
    damaged or has another format, or if a label is out of range.
    """
    check_split(split, tuple(_BATCHES))
    check_bools(checksums=checksums)
    place = _find(pathlib.Path(path), _BATCHES[split])
    if checksums and place.is_file():
        with open(place, "rb") as file:
            check_md5(place, file, _MD5)
    bodies = _read(place, _BATCHES[split])
    # Each record is one label and one image.
    records = np.concatenate([_records(place / name, bodies[name]) for name in bodies])
    labels = records[:, 0]
    images = np.ascontiguousarray(channels_last(records[:, 1:]))
    name = provenance(f"CIFAR-10 {split}", checksums)
    found = Images(images, labels, _CLASSES, name=name)
    counts = np.bincount(labels, minlength=10).tolist()
    if checksums and counts != [_PER_CLASS[split]] * 10:
        raise damaged(place, f"{counts} images in the classes", UNVERIFIED)
    return found


def channels_last(rows: UInt8[np.ndarray, "n pixels"]) -> np.ndarray:
    """Views rows as images. Each row holds the red, the green and the blue plane."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _find(path: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Returns the folder of the batches, or the archive."""
    for folder in (path, path / _FOLDER):
        absent = [name for name in names if not (folder / name).is_file()]
        if not absent:
            return folder
        if len(absent) < len(names):
            raise missing(f"Part of CIFAR-10 ({', '.join(absent)})", folder, _CURE)
    for archive in (path, path / _ARCHIVE):
        if archive.name == _ARCHIVE and archive.is_file():
            return archive
    raise missing("The binary version of CIFAR-10", path, _CURE)


def _read(place: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in names}
    # Read in the archive's order, since going back would decompress it again.
    with reading(place), tarfile.open(place, "r|gz") as tar:
        files = ((pathlib.PurePosixPath(m.name).name, tar.extractfile(m)) for m in tar)
        found = {name: file.read() for name, file in files if file and name in names}
    if absent := [name for name in names if name not in found]:
        raise damaged(place, f"it has no {', '.join(absent)}")
    return {name: found[name] for name in names}


def _records(path: pathlib.Path, body: bytes) -> UInt8[np.ndarray, "n values"]:
    if not body or len(body) % (1 + PIXELS):
        raise damaged(path, f"{len(body)} bytes, not a multiple of {1 + PIXELS}")
    return np.frombuffer(body, np.uint8).reshape(-1, 1 + PIXELS)
