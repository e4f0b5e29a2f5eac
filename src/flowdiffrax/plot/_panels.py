"""Panels of figures. Each function draws into the axes that are passed to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from ..metrics import Calibration
from ..metrics._calibration import as_shares


def density(
    axes: Any,
    samples: ArrayLike,
    *,
    low: float,
    high: float,
    bins: int = 100,
    peak: float | None = None,
):
    """Draws a two-dimensional histogram of samples. Dense regions are bright.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `samples`: the samples, of shape `(samples, 2)`.
    - `low`, `high`: the box drawn is `[low, high]` in both coordinates.
    - `bins`: the number of bins per side.
    - `peak`: the density with the brightest colour; `None` for the density of the fullest
      bin. Use the same `peak` in panels that you want to compare.

    **Raises:** `ValueError` for another shape.
    """
    samples = _in_the_plane(samples, "samples", "(samples, 2)")
    # Normalise by all samples, including those outside the box.
    share = bins**2 / (len(samples) * (high - low) ** 2)
    axes.hist2d(
        samples[:, 0],
        samples[:, 1],
        bins=bins,
        range=[[low, high], [low, high]],
        weights=np.full(len(samples), share),
        cmap="magma",
        vmin=0.0,
        vmax=peak,
    )
    axes.set(xticks=[], yticks=[], aspect="equal")


def trajectories(axes: Any, paths: ArrayLike, **style: Any):
    """Draws two-dimensional trajectories as lines, with a dot at each start.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `paths`: the trajectories, of shape `(paths, times, 2)`.
    - `style`: keyword arguments for the lines.

    **Raises:** `ValueError` for another shape.
    """
    paths = _in_the_plane(paths, "paths", "(paths, times, 2)")
    axes.plot(paths[..., 0].T, paths[..., 1].T, **style)
    axes.plot(paths[:, 0, 0], paths[:, 0, 1], ".", color="0.6", markersize=3)
    axes.set(xticks=[], yticks=[], aspect="equal")


def work_precision(
    axes: Any,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    floor: float | None = None,
):
    """Plots error against work on logarithmic axes, with one line per method.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `curves`: for each method, its points `(work, error)`.
    - `xlabel`, `ylabel`: the axis labels of work and error.
    - `floor`: the error of a perfect method, drawn as a dashed line; `None` for no line.
    """
    for name, points in curves.items():
        work, error = zip(*sorted(points), strict=True)
        axes.plot(work, error, "o-", label=name, markersize=4)
    if floor is not None:
        axes.axhline(floor, color="0.6", linestyle="--", label="perfect sampler")
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    # If work spans only a decade or two, the minor tick labels would overlap.
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def calibration(axes: Any, result: Calibration, names: Sequence[str] | None = None):
    """Draws how far ranks and coverage are from those of an exact posterior.

    Each line is the share of ranks below a level, minus the level: zero if they are
    uniform. Above zero on the left and below zero on the right, the posterior is too
    narrow; the other way round, too wide. Above zero throughout, it lies too high. An
    exact posterior leaves the grey band with a probability of 1 % for each line.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `result`: a [`flowdiffrax.metrics.Calibration`][].
    - `names`: the names of the parameters; `None` for their numbers.
    """
    u = as_shares(result.ranks, result.num_samples)
    names = [f"parameter {k}" for k in range(u.shape[1])] if names is None else names
    num, levels = len(u), np.linspace(0, 1, 201)
    # The 99 % quantile of Kolmogorov's distribution.
    band = 1.628 / np.sqrt(num)
    axes.axhspan(-band, band, color="0.9", label="99 % of exact posteriors")
    rows = [*zip(names, u.T, strict=True), ("coverage (TARP)", result.shares)]
    for index, (name, row) in enumerate(rows):
        share = np.searchsorted(np.sort(row), levels) / num
        is_last = index == len(rows) - 1
        style = {"color": "black", "linestyle": "--"} if is_last else {}
        axes.plot(levels, share - levels, label=name, **style)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="level", ylabel="share below level, minus level", xlim=(0, 1))
    axes.legend(fontsize="small")


def _in_the_plane(points: ArrayLike, name: str, shape: str) -> np.ndarray:
    """**Raises:** `ValueError` for another shape, of which a part would be drawn."""
    points = np.asarray(points)
    if points.ndim != shape.count(",") + 1 or points.shape[-1] != 2:
        raise ValueError(
            f"`{name}` must have shape {shape}; got {points.shape}. Of states with more "
            "entries, choose two."
        )
    return points
