import gzip
import io
import math
import pathlib

import numpy as np

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

_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


_PREFIX = {"train": "train", "test": "t10k"}


# Of the unpacked files, since mirrors compress them differently.
_MD5S = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def fashion_mnist(
    folder: StrPath, split: str = "train", *, checksums: bool = True
) -> Images:
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, in ten classes.

    The pictures are grey, 28x28. By Zalando SE, under the Expat (MIT) licence.

    **Arguments:**

    - `folder`: the folder with `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`,
      or the same files of `t10k`, each with or without `.gz`.
    - `split`: `"train"` or `"test"`.
    - `checksums`: whether to check the md5 of the unpacked files.

    **Raises:** `FileNotFoundError` if a file is missing; `ValueError` if a file is
    damaged or has another format, or if a label is out of range.
    """
    check_split(split, tuple(_PREFIX))
    check_bools(checksums=checksums)
    arrays = []
    for part, ndim in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
        name = f"{_PREFIX[split]}-{part}"
        path, body = _read(pathlib.Path(folder), name)
        if checksums:
            check_md5(path, io.BytesIO(body), _MD5S[name])
        arrays.append(_parse(path, body, ndim))
    images, labels = arrays
    name = provenance(f"Fashion-MNIST {split}", checksums)
    return Images(images[..., None], labels, _CLASSES, name=name)


def _read(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, bytes]:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        return plain, plain.read_bytes()
    if not packed.is_file():
        raise missing(
            f"{name} of Fashion-MNIST",
            folder,
            f"Fetch {name}.gz (md5 {_MD5S[name]} when unpacked) from the repository "
            "fashion-mnist of Zalando Research, and put it there; or install Debian's "
            "package dataset-fashion-mnist, and pass its folder, "
            "/usr/share/datasets/fashion-mnist.",
        )
    with reading(packed), gzip.open(packed) as file:
        return packed, file.read()


def _parse(path: pathlib.Path, body: bytes, ndim: int) -> np.ndarray:
    # The header is two zeros, the type (8 for uint8), the number of axes, and their
    # lengths in big-endian order.
    header = 4 + 4 * ndim
    if body[:4] != bytes([0, 0, 8, ndim]) or len(body) < header:
        raise damaged(path, f"not an IDX file of {ndim}-dimensional uint8", UNVERIFIED)
    shape = tuple(np.frombuffer(body, ">u4", ndim, offset=4).tolist())
    if len(body) != header + math.prod(shape):
        raise damaged(path, f"{len(body) - header} values for an array of shape {shape}")
    return np.frombuffer(body, np.uint8, offset=header).reshape(shape)
