import io
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import ArrayLike, UInt8

from .._io import import_extra
from ._device import to_uint8

# Pixels between and around images.
_GAP = 2


def image_grid(
    axes: Any,
    images: ArrayLike,
    *,
    row_labels: Sequence[str] | None = None,
    num_columns: int | None = None,
):
    """Draws images in rows and columns, in grey or colour.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `images`: an array of shape `(rows, columns, height, width, channels)`, or without
      the axis of rows, with one or three channels. Values are 8-bit, or numbers in
      [-1, 1]; numbers outside are clipped, and NaN is drawn black.
    - `row_labels`: one text per row, written to its left.
    - `num_columns`: the number of images in a row, if `images` has no axis of rows;
      `None` for a square grid. The last row may be shorter.

    **Raises:** `ValueError` if `images` is empty or has another shape, or if the numbers
    of labels and rows differ; `TypeError` for integers other than uint8.
    """
    tiles = tile_images(images, num_columns)
    num_rows, _, height = tiles.shape[:3]
    labels = [""] * num_rows if row_labels is None else list(row_labels)
    if len(labels) != num_rows:
        raise ValueError(
            f"There must be one label per row; got {len(labels)} labels and {num_rows} "
            "rows."
        )
    axes.imshow(join_tiles(tiles), interpolation="nearest")
    centres = _GAP + (height - 1) / 2 + (height + _GAP) * np.arange(num_rows)
    axes.set(xticks=[], aspect="equal")
    axes.set_yticks(centres, labels)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def tile_images(images: ArrayLike, num_columns: int | None = None):
    """Returns the images as 8-bit RGB, with an axis of rows and one of columns."""
    x = np.asarray(images)
    if x.ndim not in (4, 5) or x.shape[-1] not in (1, 3) or x.size == 0:
        raise ValueError(
            "`images` must have shape (images, height, width, channels) or (rows, "
            "columns, height, width, channels), with 1 or 3 channels, and not be empty; "
            f"got {x.shape}. For grey images without channels, use `images[..., None]`."
        )
    if x.dtype != np.uint8:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"`images` must be uint8, or numbers in [-1, 1]; got {x.dtype}."
            )
        x = np.asarray(to_uint8(np.nan_to_num(x.astype(np.float32), nan=-1.0)))
    if x.ndim == 4:
        number = len(x)
        columns = int(np.ceil(np.sqrt(number))) if num_columns is None else num_columns
        if columns < 1:
            raise ValueError(f"`num_columns` must be at least 1; got {num_columns}.")
        missing = np.full((-number % columns, *x.shape[1:]), 255, np.uint8)
        x = rearrange(np.concatenate([x, missing]), "(r c) h w k -> r c h w k", c=columns)
    elif num_columns is not None:
        raise ValueError(
            f"`num_columns` needs images without an axis of rows; got shape {x.shape}."
        )
    return np.broadcast_to(x, (*x.shape[:-1], 3))


def join_tiles(tiles: UInt8[np.ndarray, "rows columns height width 3"]) -> np.ndarray:
    """Returns one picture of all images, on a white background."""
    gap = ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0), (0, 0))
    tiles = np.pad(tiles, gap, constant_values=255)
    picture = rearrange(tiles, "r c h w k -> (r h) (c w) k")
    return np.pad(picture, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255)


def picture(rows: Sequence[ArrayLike], labels: Sequence[str]) -> bytes:
    """Returns a PNG that magnifies each image by a whole number."""
    # Avoid `pyplot`, which keeps figures and may open windows.
    figures = import_extra("matplotlib.figure", "plot", "SampleGrids")
    images = tile_images(np.stack(rows))
    height, width = join_tiles(images).shape[:2]
    # Rows of about 64 pixels leave room for their labels, with nine pixels a letter.
    zoom = max(1, round(64 / images.shape[2]))
    margin, dpi = 12 + 9 * max(map(len, labels)), 100
    size = (margin + zoom * width) / dpi, zoom * height / dpi
    figure = figures.Figure(figsize=size, dpi=dpi)
    left = margin / dpi / size[0]
    image_grid(figure.add_axes((left, 0, 1 - left, 1)), images, row_labels=labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
