"""Panels of figures. Each function draws into the axes that it is given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike


def density(
    axes: Any,
    samples: ArrayLike,
    *,
    low: float,
    high: float,
    bins: int = 100,
    peak: float | None = None,
):
    """A two-dimensional histogram of samples, bright where they are dense.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `samples`: of shape `(samples, 2)`.
    - `low`, `high`: the box drawn is `[low, high]` in both coordinates.
    - `bins`: bins a side.
    - `peak`: the density that has the brightest colour; `None` for that of the fullest
      bin. Panels that are to be compared need the same `peak`.
    """
    samples = np.asarray(samples)
    # Every sample counts, those outside of the box too.
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
    """Two-dimensional trajectories as lines, from a dot at the start.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `paths`: of shape `(paths, times, 2)`.
    - `style`: passed on to the lines.
    """
    paths = np.asarray(paths)
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
    """Error against work, both logarithmic, one line a method.

    **Arguments:**

    - `axes`: Matplotlib axes.
    - `curves`: for each method its points `(work, error)`.
    - `xlabel`, `ylabel`: what work and error are.
    - `floor`: the error of a perfect method, drawn as a dashed line, if there is one.
    """
    for name, points in curves.items():
        work, error = zip(*sorted(points), strict=True)
        axes.plot(work, error, "o-", label=name, markersize=4)
    if floor is not None:
        axes.axhline(floor, color="0.6", linestyle="--", label="perfect sampler")
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    # Where work spans a decade or two, the numbers between its powers would overlap.
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
