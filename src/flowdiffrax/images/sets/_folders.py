import contextlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..._io import StrPath, import_extra
from ._arrays import Header
from ._files import damaged, reading
from ._images import Images

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


_MODES = ("L", "RGB", "RGBA")


_IMAGE_COLUMNS = ("img", "image")


_LABEL_COLUMNS = ("label", "labels")


_ROWS_AT_ONCE = 1024


_NO_ROWS = "There are no pictures: the file has no rows."


def image_folder(path: StrPath, *, mode: str = "RGB") -> Images:
    """Reads picture files from one folder, or from one folder per class.

    Classes and files are in the order of their names, and all are read into memory.
    Needs Pillow: `pip install "flowdiffrax[images]"`.

    **Arguments:**

    - `path`: a folder with one folder per class; or a folder of pictures, which then have
      no labels. Files without the suffix of a picture format are skipped.
    - `mode`: the Pillow mode that pictures are converted to: `"RGB"`, which drops
      transparency, `"RGBA"`, or `"L"` for grey.

    **Raises:** `FileNotFoundError` if there are no pictures; `ImportError` without
    Pillow; `ValueError` if a picture is damaged, has more than 8 bits per value, or
    differs in size from the first, or if a class has no pictures.
    """
    path = pathlib.Path(path)
    classes, parts = _pictures_in(path)
    files = [file for part in parts for file in part]
    opened = ((file, file) for file in files)
    images = _decode(opened, len(files), mode, "image_folder")
    if not classes:
        return Images(images, name=path.name)
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Images(images, labels, tuple(p.name for p in classes), name=path.name)


def folder_header(path: pathlib.Path) -> Header:
    """What the headers of all pictures in a folder say, without decoding them.

    **Raises:** as `image_folder`.
    """
    classes, parts = _pictures_in(path)
    files = [file for part in parts for file in part]
    size = _common_size((file, file) for file in files)
    return Header((len(files), *size, 3), np.dtype(np.uint8), len(classes) > 0)


def parquet_images(path: StrPath, split: str = "train", *, mode: str = "RGB") -> Images:
    """Reads images from Parquet files, in the layout of Hugging Face's data sets.

    A column `img` or `image` holds encoded pictures, `{bytes, path}`. An optional column
    `label` or `labels` holds their classes. Class names come from the schema's metadata.
    Needs pyarrow and Pillow: `pip install "flowdiffrax[images]"`.

    **Arguments:**

    - `path`: one file; or a folder, of which all files `{split}*.parquet` are read.
    - `split`: the start of the file names in a folder; not used with one file.
    - `mode`: see [`flowdiffrax.images.image_folder`][].

    **Raises:** `FileNotFoundError` if there is no file; `ImportError` without pyarrow or
    Pillow; `ValueError` if a file is damaged or has another layout, if a label is missing
    or out of range, or if a picture is invalid, as in `image_folder`.
    """
    path = pathlib.Path(path)
    is_folder = path.is_dir()
    files = sorted(path.glob(f"{split}*.parquet")) if is_folder else [path]
    if not files:
        raise FileNotFoundError(f"There is no {split}*.parquet in {path}.")
    opened = [_open_parquet(file) for file in files]
    labels: list[np.ndarray] = []
    pictures = (
        picture
        for file, parquet in zip(files, opened, strict=True)
        for picture in _parquet_rows(file, parquet, labels)
    )
    number = sum(parquet.metadata.num_rows for parquet in opened)
    images = _decode(pictures, number, mode, "parquet_images")
    names = _class_names(opened[0].schema_arrow)
    name = f"{path.name} {split}" if is_folder else path.stem
    return Images(images, np.concatenate(labels) if labels else None, names, name=name)


def is_picture_folder(path: pathlib.Path) -> bool:
    """Whether there are pictures in the folder, or in each folder in it."""
    try:
        return path.is_dir() and len(_pictures_in(path)) > 0
    except (FileNotFoundError, ValueError):
        return False


def parquet_header(path: pathlib.Path, split: str = "train") -> Header:
    """What Parquet files say, and the header of the first picture of each.

    **Raises:** as `parquet_images`.
    """
    files = sorted(path.glob(f"{split}*.parquet"))
    opened = [_open_parquet(file) for file in files]
    number = sum(parquet.metadata.num_rows for parquet in opened)
    rows = (
        picture
        for file, parquet in zip(files, opened, strict=True)
        for picture in itertools.islice(_parquet_rows(file, parquet, [], 1), 1)
    )
    size = _common_size(rows)
    has_labels = any(name in opened[0].schema_arrow.names for name in _LABEL_COLUMNS)
    return Header((number, *size, 3), np.dtype(np.uint8), has_labels)


def _pictures_in(
    path: pathlib.Path,
) -> tuple[list[pathlib.Path], list[list[pathlib.Path]]]:
    """The folders of classes, if there are any, and the pictures of each."""
    visible = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    classes = [p for p in visible if p.is_dir()]
    parts = [_picture_files(folder) for folder in classes or [path]]
    empty = [p.name for p, part in zip(classes, parts, strict=False) if not part]
    if empty:
        raise ValueError(f"{path} has classes without pictures: {empty}.")
    if not any(parts):
        raise FileNotFoundError(f"{path} has no pictures ({', '.join(_SUFFIXES)}).")
    return classes, parts


def _picture_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = (p for p in sorted(folder.iterdir()) if not p.name.startswith("."))
    return [p for p in files if p.suffix.lower() in _SUFFIXES and p.is_file()]


def _decode(
    pictures: Iterable[tuple[StrPath, Any]], number: int, mode: str, needed_by: str
) -> np.ndarray:
    """Decodes pictures, which are pairs of a name and a file, into one array."""
    if mode not in _MODES:
        raise ValueError(f"`mode` must be one of {_MODES}; got {mode!r}.")
    pillow = import_extra("PIL.Image", "images", needed_by)
    images = None
    for row, (where, file) in enumerate(pictures):
        with _opened(where, file, pillow) as picture:
            values = np.asarray(picture.convert(mode))
        if images is None:
            images = np.empty((number, *values.shape), np.uint8)
        _check_size(where, values.shape[:2], images.shape[1:3])
        images[row] = values
    if images is None:
        raise ValueError(_NO_ROWS)
    return images[..., None] if images.ndim == 3 else images


def _common_size(pictures: Iterable[tuple[StrPath, Any]]) -> tuple[int, int]:
    """The height and width in the headers of pictures, without decoding them."""
    pillow = import_extra("PIL.Image", "images", "images.command.run")
    first = None
    for where, file in pictures:
        with _opened(where, file, pillow) as picture:
            size = picture.size[::-1]
        first = size if first is None else first
        _check_size(where, size, first)
    if first is None:
        raise ValueError(_NO_ROWS)
    return first


@contextlib.contextmanager
def _opened(where: StrPath, file: Any, pillow: Any) -> Iterator[Any]:
    """A picture, of which Pillow has read the header only."""
    # Pillow reports some broken pictures as syntax errors.
    with reading(where, SyntaxError), pillow.open(file) as picture:
        if picture.mode.startswith(("I", "F")):
            raise ValueError("its values have more than 8 bits")
        yield picture


def _check_size(where: StrPath, size: Sequence[int], first: Sequence[int]) -> None:
    if tuple(size) != tuple(first):
        raise ValueError(
            f"Pictures must be of one size; {where} has {tuple(size)}, and the first has "
            f"{tuple(first)}. Resize them first: the method of resizing is part of a "
            "data set."
        )


def _open_parquet(path: pathlib.Path) -> Any:
    arrow = import_extra("pyarrow", "images", "parquet_images")
    parquet = import_extra("pyarrow.parquet", "images", "parquet_images")
    # Checks the pages, if the file has checksums of them.
    with reading(path, arrow.ArrowException):
        return parquet.ParquetFile(path, page_checksum_verification=True)


def _parquet_rows(
    path: pathlib.Path,
    parquet: Any,
    labels: list[np.ndarray],
    rows_at_once: int = _ROWS_AT_ONCE,
) -> Iterator[tuple[str, io.BytesIO]]:
    """Yields named pictures row by row, and appends their labels to the list."""
    arrow = import_extra("pyarrow", "images", "parquet_images")
    names = parquet.schema_arrow.names
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    if image is None:
        raise ValueError(f"{path} has no column {_IMAGE_COLUMNS}; it has {names}.")
    kind = parquet.schema_arrow.field(image).type
    if not arrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(
            f"Column `{image}` of {path} must hold structs with a field `bytes`; got "
            f"{kind}."
        )
    columns = [image] if label is None else [image, label]
    row = 0
    try:
        for batch in parquet.iter_batches(rows_at_once, columns=columns):
            if label is not None:
                if batch.column(label).null_count:
                    raise ValueError(f"{path} has rows without a label.")
                labels.append(batch.column(label).to_numpy(zero_copy_only=False))
            for body in batch.column(image).field("bytes"):
                yield f"{path}, row {row}", io.BytesIO(body.as_buffer())
                row += 1
    except (arrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def _class_names(schema: Any) -> tuple[str, ...] | None:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        label = next(features[name] for name in _LABEL_COLUMNS if name in features)
        return tuple(map(str, label["names"]))
    except (KeyError, StopIteration, TypeError, ValueError):
        return None  # not written by Hugging Face's library, or not classes
