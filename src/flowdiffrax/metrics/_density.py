from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import ArrayLike


class HistogramKL(NamedTuple):
    r"""What [`flowdiffrax.metrics.histogram_kl`][] measures.

    **Attributes:**

    - `kl`: the divergence $\mathrm{KL}(\rho \| \hat\rho)$ in nats.
    - `empty_bins`: bins where the density is positive and no sample fell.
    - `outside`: the share of samples outside the box.
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
    r"""The divergence of a histogram of two-dimensional samples from a known density.

    $\sum_{ij} \rho(x_{ij}) \log(\rho(x_{ij}) / \hat\rho_{ij})\,dx\,dy$ over the bins of a
    square, with $x_{ij}$ the bins' centres and $\hat\rho$ the histogram of the samples
    inside. It is finite: an empty bin counts as half a sample, and is reported.

    The estimate is not zero for perfect samples. On the 4x4 checkerboard with 64,000
    samples they score 0.066 with 50 bins, which do not align with the squares, and 0.009
    with 48, which do.

    **Arguments:**

    - `samples`: of shape `(samples, 2)`.
    - `density`: the density at points of shape `(..., 2)`.
    - `bins`: bins a side, at least 1.
    - `low`, `high`: the box is `[low, high]` in both coordinates.

    **Raises:** `ValueError` for samples of another shape or that are not finite, for no
    bins or an empty box, or if no sample falls inside it.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), appendix G.1.
    """
    samples = np.asarray(samples)
    if samples.ndim != 2 or samples.shape[1] != 2 or not np.isfinite(samples).all():
        raise ValueError(
            "`samples` must be finite and of shape (samples, 2); got shape "
            f"{samples.shape} with {np.sum(~np.isfinite(samples))} entries not finite."
        )
    if bins < 1 or low >= high:
        raise ValueError(
            f"Expected at least one bin and low < high; got {bins}, {low}, {high}."
        )
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
    """The root of the mean squared Euclidean distance between paired points.

    **Arguments:**

    - `x`, `y`: two batches of points, paired by their leading axis.

    **Raises:** `ValueError` if their shapes differ.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape:
        raise ValueError(f"Paired points need equal shapes; got {x.shape}, {y.shape}.")
    squares = rearrange((x - y) ** 2, "points ... -> points (...)")
    return float(np.sqrt(squares.sum(axis=1).mean()))
