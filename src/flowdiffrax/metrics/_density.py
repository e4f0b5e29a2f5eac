from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import ArrayLike

from .._check import check_count


class HistogramKL(NamedTuple):
    r"""The result of [`flowdiffrax.metrics.histogram_kl`][].

    **Attributes:**

    - `kl`: the divergence $\mathrm{KL}(\rho \| \hat\rho)$ in nats.
    - `empty_bins`: the number of bins without samples in which the density is positive.
    - `outside`: the fraction of samples outside the box.
    """

    kl: float
    empty_bins: int
    outside: float


def histogram_kl(
    samples: ArrayLike,
    density: Callable[[np.ndarray], np.ndarray],
    *,
    bins: int,
    low: float = -1.0,
    high: float = 1.0,
) -> HistogramKL:
    r"""The KL divergence of a histogram of 2D samples from a known density.

    It is $\sum_{ij} \rho(x_{ij}) \log(\rho(x_{ij}) / \hat\rho_{ij})\,dx\,dy$ over the
    bins of a square, where $x_{ij}$ are the centres of the bins and $\hat\rho$ is the
    histogram of the samples inside the square. To keep the sum finite, an empty bin
    counts as half a sample. Empty bins are reported.

    The estimate is not zero for perfect samples. On the 4x4 checkerboard, 64,000 perfect
    samples score 0.066 with 50 bins, which do not align with the squares, and 0.009 with
    48, which do.

    **Arguments:**

    - `samples`: the samples, of shape `(samples, 2)`.
    - `density`: a function that returns the density at points of shape `(..., 2)`.
    - `bins`: the number of bins per side, at least 1.
    - `low`, `high`: the box is `[low, high]` in both coordinates.

    **Raises:** `ValueError` if samples have another shape or are not finite, there are no
    bins, or no sample lies in the box.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), appendix G.1.
    """
    samples = np.asarray(samples)
    if samples.ndim != 2 or samples.shape[1] != 2 or not np.isfinite(samples).all():
        raise ValueError(
            f"`samples` must be finite and (samples, 2); got shape {samples.shape}."
        )
    check_count(bins, 1, "bins")
    edges = np.linspace(low, high, bins + 1)
    counts, _, _ = np.histogram2d(samples[:, 0], samples[:, 1], bins=(edges, edges))
    inside = counts.sum()
    if inside == 0:
        raise ValueError(f"No sample lies in [{low}, {high}]^2.")
    centres = (edges[1:] + edges[:-1]) / 2
    area = ((high - low) / bins) ** 2
    rho = density(np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1))
    filled = rho > 0
    estimate = np.maximum(counts, 0.5) / (inside * area)
    kl = np.sum(rho[filled] * np.log(rho[filled] / estimate[filled])) * area
    return HistogramKL(
        kl=float(kl),
        empty_bins=int(np.sum(filled & (counts == 0))),
        outside=float(1 - inside / len(samples)),
    )


def rms_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The root mean square Euclidean distance between paired points.

    **Arguments:**

    - `x`, `y`: two batches of points, paired by their leading axis.

    **Raises:** `ValueError` if their shapes differ.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape:
        raise ValueError(f"Paired points need equal shapes; got {x.shape}, {y.shape}.")
    squares = rearrange((x - y) ** 2, "points ... -> points (...)")
    return float(np.sqrt(squares.sum(axis=1).mean()))
