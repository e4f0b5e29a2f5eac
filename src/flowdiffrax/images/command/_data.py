"""Images to train on, and images that are held out, from one path."""

import functools
import pathlib
from collections.abc import Callable

import numpy as np

from ..._io import StrPath
from ..sets._arrays import Header, array_header, is_saved, load_images
from ..sets._folders import (
    folder_header,
    image_folder,
    is_picture_folder,
    parquet_header,
    parquet_images,
)
from ..sets._images import Images


def load_split(
    path: StrPath | None,
    archive: Callable[..., Images] | None = None,
    test: str = "test",
    *,
    checksums: bool = True,
) -> tuple[Images, Images]:
    """Reads training and held-out images, whatever format they have.

    The format is a folder of Parquet files `train*.parquet` and `<test>*.parquet`; a
    folder with the folders `train` and `<test>`, or with `train.npz` and `<test>.npz`; an
    `.npz` or `.npy` file; a folder of pictures, or one written by
    [`flowdiffrax.images.save_images`][]; or anything that `archive` reads. Every tenth
    image is held out if the format has no split. Otherwise the held-out part is read
    first: if it is missing, no time is lost on the larger part.

    **Arguments:**

    - `path`: the file or folder, usually `options.data`.
    - `archive`: reads one part of a data set in a format of its own, such as
      [`flowdiffrax.images.cifar10`][]; called as `archive(path, split,
      checksums=checksums)`. `None` if there is no such format.
    - `test`: the name of the held-out part.
    - `checksums`: whether to verify the files; see the loaders.

    **Returns:** the training images and the held-out images.

    **Raises:** `ValueError` if `path` is `None`; otherwise as the loaders do, for example
    `FileNotFoundError` if there are no images, and `ValueError` if they are damaged.
    """
    if path is None:
        raise ValueError("--data is needed: a file or folder of images; see docs/data.md")
    path = pathlib.Path(path)
    if any(path.glob("train*.parquet")):
        read = functools.partial(parquet_images, path)
    elif (path / "train").is_dir() and (path / test).is_dir():
        read = lambda part: _read_folder(path / part, checksums)
    elif (path / "train.npz").is_file() and (path / f"{test}.npz").is_file():
        read = lambda part: load_images(path / f"{part}.npz")
    elif path.suffix in (".npz", ".npy"):
        return _one_in_ten(load_images(path))
    elif archive is None or (path.is_dir() and not any(path.glob("*batch*"))):
        return _one_in_ten(_read_folder(path, checksums))
    else:
        read = functools.partial(archive, path, checksums=checksums)
    held_out = read(test)
    return read("train"), held_out


def training_header(path: pathlib.Path) -> tuple[Header, int] | None:
    """What the files of training images say before they are read, and their number.

    Returns `None` for a format of a script's own.
    """
    if any(path.glob("train*.parquet")):
        header = parquet_header(path)
    elif is_picture_folder(path / "train"):
        header = folder_header(path / "train")
    elif is_saved(path / "train"):
        header = array_header(path / "train")
    elif (path / "train.npz").is_file():
        header = array_header(path / "train.npz")
    elif path.suffix in (".npz", ".npy") or is_saved(path):
        return _nine_in_ten(array_header(path))
    elif is_picture_folder(path) and not any(path.glob("*batch*")):
        return _nine_in_ten(folder_header(path))
    else:
        return None
    return header, header.shape[0]


def _nine_in_ten(header: Header) -> tuple[Header, int]:
    number = header.shape[0]
    return header, number - len(range(0, number, 10))


def _read_folder(path: pathlib.Path, checksums: bool) -> Images:
    try:
        return load_images(path, checksums=checksums)
    except FileNotFoundError:  # not written by `save_images`
        return image_folder(path)


def _one_in_ten(images: Images) -> tuple[Images, Images]:
    held_out = np.arange(len(images)) % 10 == 0
    return images[np.flatnonzero(~held_out)], images[np.flatnonzero(held_out)]
