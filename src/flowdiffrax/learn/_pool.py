import dataclasses
import time
from typing import Any

import numpy as np
from jaxtyping import Float

from ._plan import Plan
from ._probe import Ranges, Solves
from ._problem import Problem, Rows

# Of these, how many there must be at least, and how many are enough to stop early.
_FEWEST, _ENOUGH = 64, 1024


@dataclasses.dataclass(frozen=True)
class Pool:
    """Exact trajectories.

    **Attributes:**

    - `ts`: the times, of shape `(times,)`, or `(trajectories, times)`.
    - `ys`: the states, of shape `(trajectories, times, size)`, in float64.
    - `args`: the parameters, of shape `(trajectories, args_size)`, or `None`.
    - `num_dropped`: how many trajectories were dropped because their solve failed.
    """

    ts: Float[np.ndarray, "*trajectories times"]
    ys: Float[np.ndarray, "trajectories times size"]
    args: Rows | None
    num_dropped: int = 0


def empty_pool(plan: Plan) -> Pool:
    """A pool from which `build` makes a map of the right shapes."""
    ys = np.ones((1, len(plan.ts), plan.size))
    args = np.ones((1, plan.args_size)) if plan.args_size > 0 else None
    return Pool(plan.ts, ys, args)


class PoolMaker:
    """Solves initial states in chunks, until there are enough or time is over."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        solves: Solves,
        rtol: float,
        ranges: Ranges,
        say: Any,
    ):
        self._problem, self._plan, self._say = problem, plan, say
        self._solves, self._rtol, self._ranges = solves, rtol, ranges

    def __call__(
        self,
        key: Any,
        num: int,
        ends: tuple[float, float] = (np.inf, np.inf),
        held_out: bool = False,
    ) -> Pool:
        problem, plan = self._problem, self._plan
        x0, args = problem.draw(key, num, held_out)
        # All solves of a chunk step together until its last one is done, and the matrices
        # of many large stiff ones do not fit into a cache.
        chunk = min(32 if plan.is_stiff and problem.size > 16 else 256, len(x0))
        found, last = [], time.perf_counter()
        for start in range(0, len(x0), chunk):
            # Too small a pool costs more than the time that it saves.
            end = ends[0] if start >= _ENOUGH else ends[1]
            if start > 0 and time.perf_counter() > end:
                break
            rows = slice(start, start + chunk)
            # The last chunk is filled up, so that nothing is compiled anew.
            index = np.arange(len(x0))[rows]
            padded = np.resize(index, chunk)
            some = None if args is None else args[padded]
            ys, _ = self._solves(x0[padded], some, plan.ts, self._rtol, self._ranges)
            found.append(ys[: len(index)])
            if time.perf_counter() - last > 5:
                last = time.perf_counter()
                self._say(f"{sum(map(len, found)):,} trajectories solved")
        ys = np.concatenate(found)
        args = None if args is None else args[: len(ys)]
        good = np.isfinite(ys).all((1, 2))
        dropped = int((~good).sum())
        if good.mean() < 0.8 or good.sum() < min(_FEWEST, len(x0)):
            raise ValueError(
                f"The teacher failed on {dropped} of {len(ys)} initial states, which "
                "leaves too few or too special ones to learn from. Look for a pole or a "
                "blow-up within the interval, shorten it, or pass another `solver`."
            )
        if dropped > 0:
            self._say(f"dropped {dropped} of {len(ys)} trajectories, whose solves failed")
        ys = np.where(plan.is_positive, np.maximum(ys, 0), ys)
        return Pool(plan.ts, ys[good], None if args is None else args[good], dropped)
