"""Trajectories as they were observed: ragged, irregular in time, and in part."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from .._check import check_count
from ..data._batches import Batch
from ..paths._trajectory import TrajectoryPath
from ._pool import Pool
from ._problem import Rows


@dataclasses.dataclass(frozen=True)
class Observed:
    """Trajectories of different lengths, filled up with NaN to one length.

    **Attributes:**

    - `ts`: the times, of shape `(trajectories, times)`.
    - `ys`: the states, of shape `(trajectories, times, size)`. NaN is not observed.
    - `starts`: the states to start from, which may be smoothed, of the same shape.
    - `args`: the parameters, of shape `(trajectories, args_size)`, or `None`.
    - `num_dropped`: how many trajectories were dropped.
    """

    ts: Float[np.ndarray, "trajectories times"]
    ys: Float[np.ndarray, "trajectories times size"]
    starts: Float[np.ndarray, "trajectories times size"]
    args: Rows | None
    num_dropped: int

    @property
    def lengths(self) -> Int[np.ndarray, " trajectories"]:
        """The number of times of each trajectory."""
        return np.isfinite(self.ts).sum(1)

    @property
    def is_start(self) -> np.ndarray:
        """Where a state is observed in full, and a later one at least in part."""
        before_last = np.arange(self.ts.shape[1]) < self.lengths[:, None] - 1
        return np.isfinite(self.ys).all(2) & before_last

    def take(self, rows: Any) -> "Observed":
        """Some of the trajectories."""
        args = None if self.args is None else self.args[rows]
        some = self.ts[rows], self.ys[rows], self.starts[rows]
        return Observed(*some, args, self.num_dropped)

    def convert(
        self,
        convert: Callable[[Any, Any], tuple[Any, Any]],
        convert_args: Callable[[Any], Any],
    ) -> "Observed":
        """With the times, the states and the parameters in other units."""
        ts, ys = convert(self.ts, self.ys)
        _, starts = convert(self.ts, self.starts)
        ts, ys, starts = np.asarray(ts), np.asarray(ys), np.asarray(starts)
        args = None if self.args is None else np.asarray(convert_args(self.args))
        return Observed(ts, ys, starts, args, self.num_dropped)

    def batches(self, batch_size: int, first_share: float) -> "PairBatches":
        """What a map learns from."""
        return PairBatches.of(self, batch_size, first_share)

    def from_first_start(self) -> Pool:
        """The trajectories from their first state that is observed in full."""
        first = self.is_start.argmax(1)[:, None]
        columns = first + np.arange(self.ts.shape[1])
        beyond = columns >= self.ts.shape[1]
        index = np.arange(len(self.ts))[:, None], np.where(beyond, 0, columns)
        ts = np.where(beyond, np.nan, self.ts[index])
        ys = np.where(beyond[..., None], np.nan, self.ys[index])
        ys[:, 0] = self.starts[index][:, 0]
        return Pool(ts, ys, self.args)

    def as_pool(
        self, ts: Float[np.ndarray, " times"], is_positive: Bool[np.ndarray, " size"]
    ) -> Pool:
        """A pool of the observed values of each entry, in any order, for their units."""
        shape = len(self.ys), len(ts)
        columns = []
        for values in np.moveaxis(self.ys, 2, 0):
            seen = values[np.isfinite(values)]
            index = np.linspace(0, len(seen) - 1, np.prod(shape)).astype(int)
            columns.append(seen[index].reshape(shape))
        ys = np.stack(columns, axis=2)
        return Pool(ts, np.where(is_positive, np.maximum(ys, 0), ys), self.args)


def observe(ts: Any, ys: Any, args: Any, mask: Any) -> tuple[Observed, Any]:
    """Checks observations, drops what cannot be used, and fills up short trajectories.

    Also returns one `args` of the user's.

    **Raises:** `ValueError` for shapes that do not match, times that do not rise,
    infinite states, or too few trajectories.
    """
    rows = [_real(row, "ys") for row in _listed(ys, 3, "ys")]
    sizes = {row.shape[1] for row in rows if row.ndim == 2}
    if any(row.ndim != 2 for row in rows) or len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "`ys` must have shape (trajectories, times, size), or be a list of arrays of "
            f"shape (times, size): states are vectors. Got {_shapes(ys)}. For states of "
            "one number, add an axis: `ys[..., None]`."
        )
    shared = np.ndim(next(iter(ts), 0.0)) == 0
    times = [ts] * len(rows) if shared else _listed(ts, 2, "ts")
    times = [_real(row, "ts") for row in times]
    _check_like(times, [row[:, 0] for row in rows], "ts", "one time for each state")
    if mask is not None:
        masks = [np.asarray(row) for row in _listed(mask, 3, "mask")]
        _check_like(masks, rows, "mask", "the shape of `ys`")
        if any(row.dtype != bool for row in masks):
            raise ValueError("`mask` must be boolean, and true where `ys` is observed.")
        rows = [np.where(*pair, np.nan) for pair in zip(masks, rows, strict=True)]
    conditions = None if args is None else _real(args, "args")
    if conditions is not None and (
        conditions.ndim not in (1, 2) or len(conditions) != len(rows)
    ):
        raise ValueError(
            f"`args` must have one row for each of the {len(rows)} trajectories, a "
            f"number or a vector; got shape {conditions.shape}."
        )
    pairs = zip(times, rows, strict=True)
    kept = [usable(*pair, index) for index, pair in enumerate(pairs)]
    one_args = None if conditions is None else np.asarray(conditions[0])
    if conditions is not None:
        conditions = conditions.reshape(len(rows), -1)
    return _filled(kept, conditions), one_args


def _listed(values: Any, ndim: int, name: str) -> Sequence[Any]:
    """The rows of an array, or a list as it is."""
    if isinstance(values, list | tuple):
        return values
    array = np.asarray(values)
    if array.ndim != ndim and array.dtype != object:
        raise ValueError(
            f"`{name}` must have {ndim} axes, or be a list of arrays, one for each "
            f"trajectory; got shape {array.shape}."
            + " For states of one number, add an axis: `ys[..., None]`."
            * (name == "ys")
        )
    return list(array)


def _real(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"`{name}` must be real numbers; got dtype {array.dtype}.")
    return array.astype(np.float64)


def _shapes(values: Any) -> str:
    return str(sorted({np.shape(row) for row in values}))


def _check_like(rows: Sequence, like: Sequence, name: str, what: str) -> None:
    if len(rows) != len(like):
        raise ValueError(
            f"`{name}` has {len(rows)} trajectories, and `ys` has {len(like)}."
        )
    for index, (row, other) in enumerate(zip(rows, like, strict=True)):
        if row.shape != other.shape:
            raise ValueError(
                f"`{name}` must have {what}; in trajectory {index}, got shape "
                f"{row.shape} instead of {other.shape}."
            )


def usable(ts: np.ndarray, ys: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The times at which anything is observed, and their states."""
    if np.isinf(ys).any():
        raise ValueError(
            f"`ys` must be finite, or NaN where nothing was observed; trajectory {index} "
            "has infinite entries."
        )
    seen = np.isfinite(ys).any(1)
    ts, ys = ts[seen], ys[seen]
    if not np.isfinite(ts).all():
        raise ValueError(
            f"`ts` must be finite where states are observed; trajectory {index} has "
            f"{int((~np.isfinite(ts)).sum())} times that are not."
        )
    wrong = np.flatnonzero(np.diff(ts) <= 0)
    if wrong.size > 0:
        first = wrong[0]
        raise ValueError(
            f"`ts` must rise within each trajectory; in trajectory {index}, "
            f"{ts[first + 1]:g} follows {ts[first]:g}. Sort each trajectory by time, and "
            "average what was observed at one time."
        )
    return ts, ys


def fill_up(kept: list[tuple], args: Rows | None, num_times: int) -> Observed:
    """Trajectories of one length, of which the shorter ones end with NaN."""
    size = kept[0][1].shape[1]
    ts = np.full((len(kept), num_times), np.nan)
    ys = np.full((len(kept), num_times, size), np.nan)
    for index, (own_ts, own_ys) in enumerate(kept):
        ts[index, : len(own_ts)], ys[index, : len(own_ys)] = own_ts, own_ys
    return Observed(ts, ys, ys, args, 0)


def _filled(kept: list[tuple], args: Rows | None) -> Observed:
    """Drops trajectories from which nothing can be learned, and fills up the others."""
    whole = fill_up(kept, args, max(len(ts) for ts, _ in kept))
    good = whole.lengths >= 2
    if args is not None:
        good &= np.isfinite(args).all(1)
    if not good.any():
        raise ValueError(
            f"None of {len(kept)} trajectories has two times at which anything is "
            "observed, and finite `args`: there is nothing to learn from."
        )
    starts = whole.is_start.any(1)
    if not (good & starts).any():
        never = np.flatnonzero(~np.isfinite(whole.ys).any((0, 1)))
        what = (
            f"entries {never[:5].tolist()} are never observed"
            if never.size > 0
            else "some entry is always missing"
        )
        raise ValueError(
            "No trajectory has two times of which the earlier is observed in full: "
            f"{what}. Learn on the entries that are observed together, `ys[..., some]`; "
            "if these do not determine their future, append their values at earlier "
            "times to the state (delay coordinates)."
        )
    found = whole.take(good & starts)
    if len(found.ts) < 10:
        raise ValueError(
            f"{len(found.ts)} of {len(kept)} trajectories can be used, which is too few: "
            "at least 10 are needed, of which a fifth is held out. Cut long trajectories "
            "into pieces."
        )
    return dataclasses.replace(found, num_dropped=len(kept) - len(found.ts))


class PairBatches(eqx.Module):
    """Batches of pairs of states, of which the later may be NaN in part.

    A pair is an earlier state that is observed in full, and any later one of the same
    trajectory. About all such pairs of a trajectory are equally likely, but for a share
    of the batch that starts at the first state.

    **Arguments:**

    - `ts`: the times of all observations, of shape `(observations,)`.
    - `starts`: the states to start from, of shape `(observations, size)`.
    - `targets`: the states to arrive at, likewise.
    - `row`, `last`: for each possible start, the number of its observation, and of the
      last one of its trajectory.
    - `first`, `stop`: for each of them, the range of starts of the same trajectory.
    - `args`: for each of them, the parameters, or `None`.
    - `num_starts`: how many of these starts there are; what follows is not used.
    - `batch_size`: the number of pairs per batch, at least 1.
    - `first_share`: the share that starts at the first state.
    """

    ts: Float[Array, " observations"]
    starts: Float[Array, "observations size"]
    targets: Float[Array, "observations size"]
    row: Int[Array, " starts"]
    last: Int[Array, " starts"]
    first: Int[Array, " starts"]
    stop: Int[Array, " starts"]
    args: Float[Array, "starts args_size"] | None
    num_starts: Int[Array, ""]
    batch_size: int = eqx.field(static=True)
    first_share: float = eqx.field(static=True)

    def __check_init__(self):
        check_count(self.batch_size, 1, "batch_size")

    @classmethod
    def of(cls, observed: Observed, batch_size: int, first_share: float) -> "PairBatches":
        """Finds all possible starts."""
        seen = np.isfinite(observed.ts)
        number = np.cumsum(seen).reshape(seen.shape) - 1
        trajectory, time = np.nonzero(observed.is_start)
        own_last = number[trajectory, observed.lengths[trajectory] - 1]
        first, stop = (
            np.searchsorted(trajectory, trajectory, side) for side in ("left", "right")
        )
        args = observed.args
        return cls(
            jnp.asarray(observed.ts[seen]),
            jnp.asarray(observed.starts[seen]),
            jnp.asarray(observed.ys[seen]),
            jnp.asarray(number[trajectory, time]),
            jnp.asarray(own_last),
            jnp.asarray(first),
            jnp.asarray(stop),
            None if args is None else jnp.asarray(args[trajectory]),
            jnp.asarray(len(trajectory)),
            batch_size,
            first_share,
        )

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths, each of two times, and its conditions."""
        start_key, other_key, target_key = jr.split(key, 3)
        shape = (self.batch_size,)
        start = jr.randint(start_key, shape, 0, self.num_starts)
        first = self.first[start]
        # Early states have more later ones.
        other = jr.randint(other_key, shape, first, self.stop[start])
        start = jnp.minimum(start, other)
        at_first = jnp.arange(self.batch_size) < round(self.first_share * self.batch_size)
        start = jnp.where(at_first, first, start)
        row = self.row[start]
        later = jr.randint(target_key, shape, row + 1, self.last[start] + 1)
        ts = jnp.stack([self.ts[row], self.ts[later]], axis=1)
        ys = jnp.stack([self.starts[row], self.targets[later]], axis=1)
        return TrajectoryPath(ts, ys), None if self.args is None else self.args[start]
