from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float64, Int, UInt8

from ..sets._images import Images
from ._features import as_images

# The number of rows at a time, which bounds the memory.
_ROWS = 2048


class NearestNeighbours(NamedTuple):
    """The result of [`flowdiffrax.images.nearest_neighbours`][].

    **Attributes:**

    - `distances`: the distance from each sample to the nearest training image: the
      Euclidean norm of their difference in 8-bit values.
    - `indices`: the index of that training image.
    - `held_out_distances`: the distance from each held-out image to the nearest training
      image.
    - `share`: the share of samples that are nearer to the training images than the
      `quantile` of the held-out distances. It is about `quantile` for samples that are as
      new as the held-out images, and far more for a model that repeats its training
      images.
    - `copies`: the number of samples that equal a training image in every value.
    """

    distances: Float64[np.ndarray, " samples"]
    indices: Int[np.ndarray, " samples"]
    held_out_distances: Float64[np.ndarray, " held_out"]
    share: float
    copies: int


def nearest_neighbours(
    samples: Images | UInt8[np.ndarray | Array, "n height width channels"],
    train: Images | UInt8[np.ndarray | Array, "m height width channels"],
    held_out: (
        Images | UInt8[np.ndarray | Array, "k height width channels"] | NearestNeighbours
    ),
    *,
    quantile: float = 0.01,
) -> NearestNeighbours:
    """Measures whether a model repeats its training images.

    A model that repeats them has the best Fréchet distance of all. This function compares
    its samples with images of the same kind that it has not seen.

    !!! info "Numerics"

        Multiplies blocks of matrices in float64, which gives exact distances for 8-bit
        values. 10,000 samples and 50,000 images of 32x32x3 take about a minute on two CPU
        cores. Memory is needed for one block at a time.

    **Arguments:**

    - `samples`: 8-bit images, from [`flowdiffrax.images.to_uint8`][].
    - `train`: the images that the model was trained on. If they were flipped in training,
      include the flipped images.
    - `held_out`: images of the same kind that it was not trained on; or the result of an
      earlier call with the same `train`, whose distances of held-out images are used
      again. This saves time if there are several sets of samples.
    - `quantile`: the quantile of the held-out distances, strictly between 0 and 1.

    **Raises:** `TypeError` or `ValueError` if the arguments are not 8-bit images of one
    shape; `ValueError` if `quantile` is out of range.
    """
    is_known = isinstance(held_out, NearestNeighbours)
    given = (samples, train) if is_known else (samples, train, held_out)
    sets = [as_images(images) for images in given]
    shapes = {rows.shape[1:] for rows in sets}
    if len(shapes) > 1:
        raise ValueError(f"Images must have one shape; got {sorted(shapes)}.")
    if not 0 < quantile < 1:
        raise ValueError(f"`quantile` must lie between 0 and 1; got {quantile}.")
    flat = [rows.reshape(len(rows), -1) for rows in sets]
    squares, indices = _nearest(flat[0], flat[1])
    if is_known:
        held_out_distances = held_out.held_out_distances
    else:
        held_out_distances = np.sqrt(_nearest(flat[2], flat[1])[0])
    limit = np.quantile(held_out_distances, quantile)
    distances = np.sqrt(squares)
    return NearestNeighbours(
        distances=distances,
        indices=indices,
        held_out_distances=held_out_distances,
        share=float(np.mean(distances < limit)),
        copies=int(np.sum(squares == 0)),
    )


def _nearest(
    points: UInt8[np.ndarray, "n values"], others: UInt8[np.ndarray, "m values"]
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns each point's squared distance to the nearest other, and its index."""
    smallest, indices = np.full(len(points), np.inf), np.zeros(len(points), int)
    for start in range(0, len(points), _ROWS):
        rows = slice(start, start + _ROWS)
        a = points[rows].astype(np.float64)
        for first in range(0, len(others), _ROWS):
            b = others[first : first + _ROWS].astype(np.float64)
            squares = (b**2).sum(axis=1) - 2 * (a @ b.T)
            nearest = squares.argmin(axis=1)
            found = squares[np.arange(len(a)), nearest] + (a**2).sum(axis=1)
            better = found < smallest[rows]
            smallest[rows][better] = found[better]
            indices[rows][better] = first + nearest[better]
    return smallest, indices
