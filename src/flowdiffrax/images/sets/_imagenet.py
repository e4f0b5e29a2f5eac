import pathlib

import numpy as np

from ..._check import check_bools
from ..._io import StrPath
from ._arrays import read_npz
from ._cifar import PIXELS, channels_last
from ._files import UNVERIFIED, check_md5, check_split, damaged, missing, provenance
from ._images import Images

_BATCHES = {
    "train": [f"train_data_batch_{k}.npz" for k in range(1, 11)],
    "val": ["val_data.npz"],
}


_NUM_IMAGES = {"train": 1_281_167, "val": 50_000}


# As listed by other loaders.
_MD5S = {
    "train_data_batch_1.npz": "464fde20de6eb44c28cc1a8c11544bb1",
    "train_data_batch_2.npz": "bdb56e71882c3fd91619d789d5dd7c79",
    "train_data_batch_3.npz": "83ff36d76ea26867491a281ea6e1d03b",
    "train_data_batch_4.npz": "98ff184fe109d5c2a0f6da63843880c7",
    "train_data_batch_5.npz": "62b8803e13c3e6de9498da7aaaae57c8",
    "train_data_batch_6.npz": "e0b06665f890b029f1d8d0a0db26e119",
    "train_data_batch_7.npz": "9731f469aac1622477813c132c5a847a",
    "train_data_batch_8.npz": "60aed934b9d26b7ee83a1a83bdcfbe0f",
    "train_data_batch_9.npz": "b96328e6affd718660c2561a6fe8c14c",
    "train_data_batch_10.npz": "1dc618d544c554220dd118f72975470c",
    "val_data.npz": "a8c04a389f2649841fb7a01720da9dd9",
}


_ZIPS = {
    "train": "Imagenet32_train_npz.zip (md5 3e3d1b7ddb901d59d1fbcba69b3676fa)",
    "val": "Imagenet32_val_npz.zip (md5 0300f7a8c5de0c82fb6fc6092b4858ed)",
}


def imagenet32(
    folder: StrPath, split: str = "train", *, checksums: bool = True
) -> Images:
    """ImageNet at 32x32 by Chrabaszcz, Loshchilov and Hutter, in 1000 classes.

    It has 1,281,167 training and 50,000 validation images, downsampled by a box filter.
    Two other data sets have the same name, one without labels and one with blurred faces.
    Likelihoods and distances are not comparable between them. The training images take
    3.9 GB; `save_images` writes them in a form that later runs map into memory.

    Labels start at 0 here, and at 1 in the files. Their order is the authors' own, in
    `map_clsloc.txt`, not that of the sorted synsets.

    **Arguments:**

    - `folder`: the folder with `train_data_batch_1.npz` to `10`, or `val_data.npz`.
    - `split`: `"train"` or `"val"`.
    - `checksums`: whether to require all images of the release, and the md5 of each
      file.

    **Raises:** `FileNotFoundError` if a file is missing; `ValueError` if a file is
    damaged or has another format, or if a label is out of range.

    ??? cite "Reference"

        [arXiv:1707.08819](https://arxiv.org/abs/1707.08819).
    """
    check_split(split, tuple(_BATCHES))
    check_bools(checksums=checksums)
    files = _find(pathlib.Path(folder), split)
    if checksums:
        # Check all files before decoding any, which takes longer.
        for file in files:
            with open(file, "rb") as opened:
                check_md5(file, opened, _MD5S[file.name])
    parts = [_read(file) for file in files]
    # Convert one batch at a time: all at once, they would be in memory twice.
    num_images = sum(len(rows) for rows, _ in parts)
    images = np.empty((num_images, 32, 32, 3), np.uint8)
    labels = np.concatenate([labels for _, labels in parts])
    row = 0
    while parts:
        rows, _ = parts.pop(0)
        images[row : row + len(rows)] = channels_last(rows)
        row += len(rows)
    name = provenance(f"ImageNet-32 {split}", checksums)
    found = Images(images, labels - 1, num_classes=1000, name=name)
    if checksums and len(found) != _NUM_IMAGES[split]:
        expected = _NUM_IMAGES[split]
        raise damaged(folder, f"{len(found)} images instead of {expected}", UNVERIFIED)
    return found


def _find(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    files = [folder / name for name in _BATCHES[split]]
    absent = [file.name for file in files if not file.is_file()]
    if not absent:
        return files
    if len(absent) < len(files):
        what = f"Part of ImageNet-32 ({', '.join(absent)})"
        raise missing(what, folder, _cure(split))
    # Name the other split too if it is missing, since training needs both.
    found = lambda name: (folder / name).is_file()
    absent = [part for part, names in _BATCHES.items() if not any(map(found, names))]
    raise missing("ImageNet-32", folder, _cure(*absent))


def _cure(*splits: str) -> str:
    return (
        f"Fetch {' and '.join(_ZIPS[split] for split in splits)}, the downsampled "
        "ImageNet of Chrabaszcz, Loshchilov and Hutter, from the download page of "
        "ImageNet, which requires registration, and unpack it there. The older files, "
        "without `.npz`, are not read, since they are pickles, which can run code."
    )


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_npz(path)
    data, labels = (arrays.get(key, np.empty(0)) for key in ("data", "labels"))
    # Other dtypes would be converted to uint8 without an error.
    if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
        held = {key: f"{array.dtype} {array.shape}" for key, array in arrays.items()}
        raise damaged(path, f"it holds {held}, not data and labels of 32x32 images")
    return data, labels
