import json
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from ..._check import check_bools
from ..._io import StrPath
from ._files import damaged, reading
from ._images import Images

_FORMAT = 1


_HEADER = "images.json"


# The names in our own files, then those that `numpy.savez` gives to bare arguments.
_NPZ_KEYS = (("images", "labels"), ("arr_0", "arr_1"))


def load_images(path: StrPath, *, checksums: bool = True) -> Images:
    """Loads images from NumPy's files.

    **Arguments:**

    - `path`: one of these, with images as uint8 of shape `(n, height, width, channels)`
      or, if grey, `(n, height, width)`:

        - an `.npz` with `images`, and optionally `labels` and `class_names`; or with
          `arr_0` and optionally `arr_1`, as `numpy.savez(path, images, labels)` writes
          it;
        - an `.npy` of images alone, which are mapped into memory rather than read;
        - a folder written by [`flowdiffrax.images.save_images`][], whose images are also
          mapped.
    - `checksums`: whether to verify the checksums of a folder, which reads it once.

    **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged or
    holds no images.
    """
    check_bools(checksums=checksums)
    path = pathlib.Path(path)
    if path.is_dir():
        return _load_folder(path, checksums)
    if path.suffix == ".npy":
        return Images(_with_channels(_mapped(path)), name=path.stem)
    arrays = read_npz(path)
    for images, labels in _NPZ_KEYS:
        if images in arrays:
            names = arrays.get("class_names")
            return Images(
                _with_channels(arrays[images]),
                arrays.get(labels),
                None if names is None else tuple(map(str, names)),
                name=path.stem,
            )
    raise ValueError(f"{path} has no array `images`; it has {sorted(arrays)}.")


class Header(NamedTuple):
    """What files say of images before their values: shape, dtype, and labels."""

    shape: tuple[int, ...]
    dtype: np.dtype
    has_labels: bool


def array_header(path: pathlib.Path) -> Header:
    """The header of what `load_images` reads, without the values.

    **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged,
    has no images, or another number of labels.
    """
    if path.is_dir():
        files = [path / "images.npy"]
        files += [file for file in [path / "labels.npy"] if file.is_file()]
        return _joined(path, [_array_in(file) for file in files])
    if path.suffix == ".npy":
        return _joined(path, [_array_in(path)])
    with reading(path, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        found = []
        for key in next((keys for keys in _NPZ_KEYS if keys[0] in names), ()):
            if key in names:
                with archive.open(f"{key}.npy") as file:
                    found.append(_shape_and_dtype(file))
    if not found:
        raise ValueError(f"{path} has no array `images`; it has {sorted(names)}.")
    return _joined(path, found)


def _array_in(path: pathlib.Path) -> tuple[tuple[int, ...], np.dtype]:
    with reading(path), open(path, "rb") as file:
        return _shape_and_dtype(file)


def _joined(
    path: pathlib.Path, arrays: Sequence[tuple[tuple[int, ...], np.dtype]]
) -> Header:
    """One header for images and, if there are any, labels."""
    (shape, dtype), *labels = arrays
    for of_labels, _ in labels:
        if of_labels != shape[:1]:
            raise ValueError(
                f"{path} has {shape[0]} images and labels of shape {of_labels}"
            )
    return Header(shape, dtype, len(labels) > 0)


def _shape_and_dtype(file: IO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of NumPy's format")
    shape, _, dtype = read[version](file)
    return shape, dtype


def is_saved(path: pathlib.Path) -> bool:
    """Whether `save_images` wrote this folder."""
    return (path / _HEADER).is_file()


def save_images(path: StrPath, images: Images) -> None:
    """Writes a folder from which `load_images` maps the images into memory.

    Use it for sets that are too large to read at every start. The folder appears whole or
    not at all.

    **Arguments:**

    - `path`: the folder, which must not exist yet.
    - `images`: the images to write.

    **Raises:** `FileExistsError` if the path exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists. Remove it, or choose another name.")
    arrays = {"images": images.images}
    if images.labels is not None:
        arrays["labels"] = images.labels
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for key, array in arrays.items():
            with open(temporary / f"{key}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                _to_disk(file)
        header = {
            "format": _FORMAT,
            "name": images.name,
            "num_classes": images.num_classes,
            "class_names": images.class_names,
            "crc32": {key: _crc32(temporary / f"{key}.npy") for key in arrays},
        }
        with open(temporary / _HEADER, "w", encoding="utf-8") as file:
            json.dump(header, file)
            _to_disk(file)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an `.npz`. NumPy verifies the checksums of its parts."""
    # NumPy leaves a file open that it opens itself and finds damaged.
    with reading(path), open(path, "rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("a single array instead of an .npz")
        return dict(arrays)


def _load_folder(path: pathlib.Path, checksums: bool) -> Images:
    if not is_saved(path):
        raise FileNotFoundError(
            f"The folder {path} was not written by `save_images`. For a folder of "
            "pictures, use `image_folder`."
        )
    with reading(path / _HEADER, KeyError, TypeError):
        header = json.loads((path / _HEADER).read_text(encoding="utf-8"))
        crc32, form = header["crc32"], header["format"]
    if form != _FORMAT:
        raise ValueError(f"{path} has format {form}; this version reads {_FORMAT}.")
    arrays: dict[str, Any] = {"images": None, "labels": None}
    for key, expected in crc32.items():
        file = path / f"{key}.npy"
        arrays[key] = _mapped(file)
        if checksums and (found := _crc32(file)) != expected:
            raise damaged(file, f"CRC-32 {found:08x} instead of {expected:08x}")
    names = header["class_names"]
    return Images(
        arrays["images"],
        None if arrays["labels"] is None else np.array(arrays["labels"]),
        None if names is None else tuple(names),
        header["num_classes"],
        header["name"],
    )


def _mapped(path: pathlib.Path) -> np.ndarray:
    with reading(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


def _crc32(path: pathlib.Path) -> int:
    # It detects damage, and takes a third of the time of a SHA on gigabytes.
    return zlib.crc32(np.memmap(path, mode="r").data)


def _to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
