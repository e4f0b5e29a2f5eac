"""Distances between sets of points that do not assume Gaussians."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._check import check_count

# The number of rows per block in matrix products.
_ROWS = 2048


class KernelDistance(NamedTuple):
    """The result of [`flowdiffrax.metrics.kernel_distance`][].

    **Attributes:**

    - `mean`: the mean over the subsets, an unbiased estimate.
    - `std`: the standard deviation over subsets of the given size. The standard error of
      the mean is smaller.
    """

    mean: float
    std: float


def kernel_distance(
    x: Float[np.ndarray | Array, "n features"],
    y: Float[np.ndarray | Array, "m features"],
    *,
    num_subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    r"""The kernel distance (KID) of two sets of feature vectors.

    This is the squared maximum mean discrepancy with the kernel $(x \cdot y / d + 1)^3$.
    The estimate omits the diagonals, so it is unbiased: for two sets from the same
    distribution its expectation is zero, and it is often negative.

    **Arguments:**

    - `x`, `y`: the two sets of vectors.
    - `num_subsets`: the number of pairs of random subsets, at least 1.
    - `subset_size`: the number of vectors in each subset, at least 2; `None` for 1000, or
      half of the smaller set if that is less.
    - `seed`: the seed for drawing subsets.

    **Raises:** `ValueError` if the shapes do not match, a set is too small, or vectors
    are not finite.

    ??? cite "Reference"

        [arXiv:1801.01401](https://arxiv.org/abs/1801.01401).
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Vectors must be of the same length; got {x.shape}, {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("Vectors of features must be finite.")
    smaller = min(len(x), len(y))
    size = min(1000, max(2, smaller // 2)) if subset_size is None else subset_size
    check_count(size, 2, "subset_size")
    check_count(num_subsets, 1, "num_subsets")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        a = x[rng.choice(len(x), size, replace=False)].astype(np.float64)
        b = y[rng.choice(len(y), size, replace=False)].astype(np.float64)
        within = _sum_off_diagonal(a) + _sum_off_diagonal(b)
        values.append(within / (size * (size - 1)) - 2 * _kernel(a, b).mean())
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _sum_off_diagonal(a: np.ndarray) -> float:
    kernel = _kernel(a, a)
    return kernel.sum() - np.trace(kernel)


def sliced_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    *,
    num_projections: int = 256,
    seed: int = 0,
) -> float:
    r"""The sliced 2-Wasserstein distance between two sets of points.

    It is $(\mathbb{E}_\theta W_2^2(\theta \cdot x, \theta \cdot y))^{1/2}$ over
    directions $\theta$ of length 1. Along one direction $W_2$ has a closed form: the root
    mean square difference of the two quantile functions. A shift by $c$ in $d$ dimensions
    gives about $|c| / \sqrt{d}$.

    Use it for states of few dimensions. For the pixels of images, it detects colours and
    coarse shapes, but little else.

    **Arguments:**

    - `x`, `y`: the points, of shapes `(n, ...)` and `(m, ...)`.
    - `num_projections`: the number of directions, at least 1.
    - `seed`: the seed for drawing directions.

    **Raises:** `ValueError` if the shapes of the points differ, a set is empty, or points
    are not finite.
    """
    x, y = (np.asarray(points) for points in (x, y))
    if x.ndim < 1 or x.shape[1:] != y.shape[1:] or x.size == 0 or y.size == 0:
        raise ValueError(f"Points must be of the same shape; got {x.shape}, {y.shape}.")
    check_count(num_projections, 1, "num_projections")
    x, y = (points.reshape(len(points), -1) for points in (x, y))
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((x.shape[1], num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    first, second = (_sorted_along(points, directions) for points in (x, y))
    # Both quantile functions are step functions, with at most n + m steps in all.
    n, m = len(first), len(second)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(ends, prepend=0)
    difference = first[(ends - 1) // m] - second[(ends - 1) // n]
    return float(np.sqrt(np.mean(widths @ difference**2) / (n * m)))


def _sorted_along(points: np.ndarray, directions: np.ndarray) -> np.ndarray:
    blocks = range(0, len(points), _ROWS)
    parts = [points[n : n + _ROWS].astype(np.float64) @ directions for n in blocks]
    projections = np.concatenate(parts)
    if not np.isfinite(projections).all():
        raise ValueError("Points must be finite.")
    return np.sort(projections, axis=0)
