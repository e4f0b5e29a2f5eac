"""Observed trajectories that are read from a file, some rows at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from .._check import check_count
from ..data import StreamBatches
from ..data._batches import Batch
from ._observed import Observed, PairBatches, fill_up, observe, usable

# Of a file, so many trajectories show the units, and some of them are held out.
_NUM_SHOWN = 4096
_BYTES_SHOWN = 2**28
# So many pairs of states are drawn from each trajectory that is read, and so many are
# read at least: some may have nothing to learn from.
_PAIRS_EACH, _FEWEST_ROWS = 8, 32


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Trajectories of one length that do not fit into memory.

    **Attributes:**

    - `read`: a function that takes row numbers and returns these trajectories.
    - `size`: how many there are.
    """

    read: Callable[[np.ndarray], Observed]
    size: int

    def convert(
        self,
        convert: Callable[[Any, Any], tuple[Any, Any]],
        convert_args: Callable[[Any], Any],
    ) -> "Streamed":
        """With the times, the states and the parameters in other units."""
        return self.then(lambda found: found.convert(convert, convert_args))

    def then(self, change: Callable[[Observed], Observed]) -> "Streamed":
        """With a change to what is read."""
        read = self.read
        return Streamed(lambda rows: change(read(rows)), self.size)

    def take(self, rows: np.ndarray) -> "Streamed":
        """Some of the trajectories."""
        read = self.read
        return Streamed(lambda some: read(np.sort(rows[some])), len(rows))

    def batches(self, batch_size: int, first_share: float) -> StreamBatches:
        """What a map learns from: each step reads a few trajectories."""
        num_rows = max(-(-batch_size // _PAIRS_EACH), _FEWEST_ROWS)
        make = functools.partial(
            _RowBatches, batch_size=batch_size, first_share=first_share
        )
        as_arrays = lambda rows: _as_arrays(self.read(rows))
        return StreamBatches(
            as_arrays, num_rows, lambda arrays: make(**arrays), size=self.size
        )


@dataclasses.dataclass(frozen=True)
class File:
    """A memory map of trajectories, or a function that reads some of them.

    **Attributes:**

    - `ts`: the times, of shape `(times,)` or `(trajectories, times)`.
    - `ys`: the states, or a function that takes row numbers and returns states.
    - `args`: the parameters, one row for each trajectory, or `None`.
    - `size`: the number of trajectories.
    - `shape`, `num_bytes`: the shape and the size of one of them.
    """

    ts: np.ndarray
    ys: Any
    args: np.ndarray | None
    size: int
    shape: tuple[int, ...]
    num_bytes: int

    @classmethod
    def open(cls, ts: Any, ys: Any, args: Any, size: int | None) -> "File":
        """**Raises:** `ValueError` for shapes that do not match."""
        if callable(ys):
            if size is None:
                raise ValueError(
                    "If `ys` is a function, give `size`, its number of rows."
                )
            check_count(size, 1, "size")
        else:
            size = len(ys)
        # Of a memory map, this reads nothing.
        ts, args = np.asarray(ts), None if args is None else np.asarray(args)
        first = np.asarray(ys(np.arange(1)) if callable(ys) else ys[:1])
        if first.ndim != 3 or len(first) != 1:
            raise ValueError(
                "`ys` must hold states of shape (trajectories, times, size), or return "
                "them for an array of row numbers. States are vectors; for one row, got "
                f"shape {first.shape}."
            )
        for values, name in ((args, "args"), (ts if ts.ndim == 2 else None, "ts")):
            if values is not None and len(values) != size:
                raise ValueError(
                    f"`{name}` must have one row for each of the {size} trajectories; "
                    f"got {len(values)}."
                )
        return cls(ts, ys, args, int(size), first.shape[1:], first.nbytes)

    @property
    def is_small(self) -> bool:
        """Whether all trajectories fit into memory easily."""
        return self.size * self.num_bytes <= _BYTES_SHOWN

    def rows(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        """Times, states and parameters of some trajectories."""
        ts = self.ts[rows] if self.ts.ndim == 2 else self.ts
        ys = np.asarray(self.ys(rows) if callable(self.ys) else self.ys[rows])
        if ys.shape != (len(rows), *self.shape):
            raise ValueError(
                f"For {len(rows)} rows, `ys` must return shape "
                f"{(len(rows), *self.shape)}; got {ys.shape}."
            )
        return ts, ys, None if self.args is None else self.args[rows]

    def split(self, rng: np.random.Generator) -> tuple["Data", Any]:
        """What to learn from and what is held out; and one `args`."""
        num = int(np.clip(_BYTES_SHOWN // self.num_bytes, 128, _NUM_SHOWN))
        order = rng.permutation(self.size)
        held_out, rest = np.sort(order[: num // 5]), np.sort(order[num // 5 :])
        shown, one_args = observe(*self.rows(np.sort(rng.choice(rest, num))), None)
        fresh, _ = observe(*self.rows(held_out), None)
        return Data(shown, fresh, Streamed(self.read, len(rest)).take(rest)), one_args

    def read(self, rows: np.ndarray) -> Observed:
        """Some trajectories, none of which is dropped."""
        ts, ys, args = self.rows(rows)
        ts = np.broadcast_to(np.asarray(ts, np.float64), ys.shape[:2])
        found = zip(ts, np.asarray(ys, np.float64), rows.tolist(), strict=True)
        if args is not None:
            args = args.reshape(len(rows), -1).astype(np.float64)
        return fill_up([usable(*row) for row in found], args, self.shape[0])


@dataclasses.dataclass(frozen=True)
class Data:
    """What a map learns from, and what is held out.

    **Attributes:**

    - `shown`: all trajectories, or if they are streamed, some of them.
    - `fresh`: those that are held out; `None` if they are still among `shown`.
    - `streamed`: all that is learned from, if it does not fit into memory.
    """

    shown: Observed
    fresh: Observed | None = None
    streamed: Streamed | None = None

    @property
    def size(self) -> int:
        """How many trajectories there are to learn from, or to split."""
        return len(self.shown.ts) if self.streamed is None else self.streamed.size

    def change(self, change: Callable[[Observed], Observed]) -> "Data":
        """With a change to all trajectories."""
        return Data(
            change(self.shown),
            None if self.fresh is None else change(self.fresh),
            None if self.streamed is None else self.streamed.then(change),
        )

    def split(self, key: Key[Array, ""]) -> "Data":
        """Holds out a fifth, unless that is done already."""
        if self.fresh is not None:
            return self
        order = np.asarray(jr.permutation(key, len(self.shown.ts)))
        held_out, rest = np.split(order, [len(order) // 5])
        return Data(self.shown.take(rest), self.shown.take(held_out))


def is_file(ys: Any) -> bool:
    """Whether states are to be read row by row."""
    return isinstance(ys, np.memmap) or callable(ys)


def _as_arrays(found: Observed) -> dict[str, np.ndarray]:
    """Finite arrays of fixed shapes, and what of them was observed."""
    is_start = found.is_start
    if found.args is not None:
        is_start = is_start & np.isfinite(found.args).all(1, keepdims=True)
    if not is_start.any():
        raise ValueError(
            f"None of {len(is_start)} trajectories that were read has two times of "
            "which the earlier is observed in full: there is nothing to learn from."
        )
    single = lambda values: np.nan_to_num(values, nan=0.0).astype(np.float32)
    arrays = {"ts": single(found.ts), "starts": single(found.starts)}
    arrays |= {"targets": single(found.ys), "is_seen": np.isfinite(found.ys)}
    arrays |= {"is_start": is_start, "lengths": found.lengths}
    return arrays | ({} if found.args is None else {"args": single(found.args)})


class _RowBatches(eqx.Module):
    """`PairBatches` of a few trajectories, in arrays whose shapes are always the same."""

    ts: Float[Array, "rows times"]
    starts: Float[Array, "rows times size"]
    targets: Float[Array, "rows times size"]
    is_seen: Bool[Array, "rows times size"]
    is_start: Bool[Array, "rows times"]
    lengths: Any
    args: Float[Array, "rows args_size"] | None = None
    batch_size: int = eqx.field(static=True, kw_only=True)
    first_share: float = eqx.field(static=True, kw_only=True)

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch, as `PairBatches`."""
        num_times = self.ts.shape[1]
        flat = lambda values: values.reshape(-1, *values.shape[2:])
        # Where a start is not one, what follows is not used.
        (row,) = jnp.nonzero(flat(self.is_start), size=self.ts.size, fill_value=0)
        trajectory = row // num_times
        counts = self.is_start.sum(1)
        stop = jnp.cumsum(counts)
        pairs = PairBatches(
            ts=flat(self.ts),
            starts=flat(self.starts),
            targets=flat(jnp.where(self.is_seen, self.targets, jnp.nan)),
            row=row,
            last=trajectory * num_times + self.lengths[trajectory] - 1,
            first=(stop - counts)[trajectory],
            stop=stop[trajectory],
            args=None if self.args is None else self.args[trajectory],
            num_starts=counts.sum(),
            batch_size=self.batch_size,
            first_share=self.first_share,
        )
        return pairs(key)
