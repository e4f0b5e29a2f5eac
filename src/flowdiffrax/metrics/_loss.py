from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .._check import check_count
from .._types import Args
from ..flow_maps._base import AbstractFlowMap
from ..objectives._base import AbstractObjective
from ..objectives._batch import (
    ExampleLosses,
    as_mixture,
    example_losses,
    objective_sizes,
    segments_of,
)
from ..objectives._mixture import Mixture


class BinnedLoss(NamedTuple):
    """The result of [`flowdiffrax.metrics.loss_by_times`][].

    **Attributes:**

    - `means`: the mean loss of each bin, NaN for an empty bin. The first axis is the
      start time `s`, the second the end time `t`.
    - `counts`: the number of examples in each bin.
    - `edges`: the edges of the bins, the same for both times.
    """

    means: Float[np.ndarray, "bins bins"]
    counts: Int[np.ndarray, "bins bins"]
    edges: Float[np.ndarray, " edges"]


def loss_by_times(
    objective: AbstractObjective | Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
    paths: diffrax.AbstractPath,
    args: Args = None,
    *,
    key: Key[Array, ""],
    num_bins: int = 8,
    time_range: tuple[float, float] | None = None,
) -> BinnedLoss:
    """The mean loss of an objective by start and end time.

    It shows which jumps are hard to learn. The times are those that
    [`flowdiffrax.objectives.batch_loss`][] draws with the same key, and its loss is the
    mean of the bins, weighted by their counts. For a mixture, each example is weighted as
    in the mixture's loss. To measure a single objective of it, pass that one alone.

    **Arguments:**

    - `objective`, `flow_map`, `teacher`, `paths`, `args`, `key`: as for
      [`flowdiffrax.objectives.batch_loss`][].
    - `num_bins`: the number of bins per axis, at least 1.
    - `time_range`: the interval to divide into bins, for both times; `None` for the map's
      `time_range`, or [0, 1] if it has none.

    **Returns:** the means, counts and edges of the bins.

    **Raises:** `ValueError` if there are no bins or times lie outside the interval;
    otherwise as [`flowdiffrax.objectives.batch_loss`][].
    """
    check_count(num_bins, 1, "num_bins")
    losses = _losses(objective, flow_map, teacher, paths, args, key)
    return bin_losses(losses, flow_map, num_bins, time_range)


def weighted_losses(
    objective: AbstractObjective | Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
    paths: diffrax.AbstractPath,
    args: Args,
    key: Key[Array, ""],
) -> ExampleLosses:
    """The losses of all examples, weighted so that their mean is `batch_loss`."""
    mixture = as_mixture(objective)
    examples = example_losses(mixture, flow_map, teacher, paths, args, key=key)
    batch_size = sum(len(rows.loss) for rows in examples)
    segments = segments_of(mixture, batch_size)
    sizes = objective_sizes(segments)
    all_rows = []
    for segment, rows in zip(segments, examples, strict=True):
        weight = jnp.asarray(mixture.weights[segment.objective], rows.loss.dtype)
        factor = weight * (batch_size / sizes[segment.objective])
        all_rows.append(rows._replace(loss=factor * rows.loss))
    return ExampleLosses(*map(jnp.concatenate, zip(*all_rows, strict=True)))


_losses = eqx.filter_jit(weighted_losses)


def bin_losses(
    losses: ExampleLosses,
    flow_map: AbstractFlowMap,
    num_bins: int,
    time_range: tuple[float, float] | None,
) -> BinnedLoss:
    """Bins losses by their times. Arguments and errors are as for `loss_by_times`."""
    low, high = time_range or flow_map.time_range or (0.0, 1.0)
    s, t, loss = (np.asarray(leaf, float) for leaf in losses)
    first, last = min(s.min(), t.min()), max(s.max(), t.max())
    # Allow for the rounding of the interval's ends in float32.
    slack = 1e-6 * max(high - low, abs(low), abs(high))
    if first < low - slack or last > high + slack:
        raise ValueError(
            f"Drawn times, from {first:.4g} to {last:.4g}, are outside of "
            f"`time_range=({low}, {high})`."
        )
    s, t = np.clip(s, low, high), np.clip(t, low, high)
    edges = np.linspace(low, high, num_bins + 1)
    counts = np.histogram2d(s, t, (edges, edges))[0]
    sums = np.histogram2d(s, t, (edges, edges), weights=loss)[0]
    means = np.full_like(sums, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return BinnedLoss(means, counts.astype(int), edges)
