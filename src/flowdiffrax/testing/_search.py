"""The search of one space of states for points at which identities do not hold."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.tree_util as jtu
import numpy as np

from .._derivative import Derivative
from .._types import State
from ._assess import Measured, measure, prepare
from ._failure import Failure, IdentityError, literal
from ._identity import IDENTITIES, SOLVED
from ._points import Points, Space, draw_states, is_strategy
from ._simplify import simplify
from ._strategies import Strategy, hypothesis_module

# The number of jumps, and the number for maps that take one jump at a time.
NUM_POINTS, NUM_POINTS_IN_TURN = 4096, 256
# How many are evaluated at once, and the largest number of numbers in their states.
_CHUNK, _CHUNK_IN_TURN, _CHUNK_NUMBERS = 256, 32, 2**16
# After so many seconds, no further chunk is evaluated, unless the number is given.
_PATIENCE = 60.0
# A single point with a state of more numbers is not evaluated as a whole chunk.
_LARGE = 64


class Search:
    """A search for failures.

    **Attributes:**

    - `defects`: for each identity, the largest defect.
    - `num_points`, `num_failing`: the number of points, and for each identity the number
      at which it does not hold.
    - `in_turn`: whether the map takes one jump at a time.
    - `is_cut_short`: whether the search ended early because it took too long.
    """

    def __init__(
        self,
        flow_map: Callable,
        vector_field: Callable | None,
        space: Space,
        names: tuple[str, ...],
        jvp: Derivative | None,
        how: dict[str, Any],
    ):
        self.space, self.names, self._how = space, names, how
        try:
            self._prepared = prepare(
                flow_map,
                vector_field,
                space.like,
                space.t0,
                how["args"],
                jvp,
                once=False,
                shares_args=True,
            )
        except Exception as error:
            _locate(error, (space.t0,) * 3, space.like)
            raise
        self.in_turn = self._prepared.in_turn
        self.defects = dict.fromkeys(names, 0.0)
        self.num_failing = dict.fromkeys(names, 0)
        self.num_points = 0
        self.is_cut_short = False
        self._worst: dict[str, tuple[float, float, Failure, Points]] = {}
        self._chunk = 1

    def run(self, rng: np.random.Generator, num: int | None, share: float) -> None:
        """Evaluates the identities at `num` points, or at the usual number of them.

        Of these, this space gets its share.
        """
        usual = NUM_POINTS_IN_TURN if self.in_turn else NUM_POINTS
        most = max(1, round(share * (usual if num is None else num)))
        chunk = _CHUNK_IN_TURN if self.in_turn else _CHUNK
        chunk = min(chunk, most, _CHUNK_NUMBERS // max(1, self.space.low.size))
        self._chunk = max(1, chunk)
        start = time.monotonic()
        for points in self.space.draw(rng, most, self._chunk):
            self._keep(points)
            self.is_cut_short = num is None and time.monotonic() - start > _PATIENCE
            if self.is_cut_short:
                break

    def excess(self, name: str) -> float:
        """By how much the largest defect of an identity is too large; 0 if it holds."""
        return self._worst[name][0] if name in self._worst else 0.0

    def failure(self, name: str, state: State | Strategy, seed: int) -> Failure:
        """The simplest clear failure of an identity that is broken, with the worst.

        The ratio of its defect and the allowed one is at least a tenth of the worst, and
        at least its square root, so that it is not a matter of rounding.
        """
        _, ratio, worst, point = self._worst[name]
        clear = ratio if np.isinf(ratio) else max(ratio / 10, ratio**0.5)

        def fails(points: Points) -> Iterator[bool]:
            chunk = 1 if self.in_turn else self._chunk
            for start in range(0, points.num, chunk):
                some = points.rows(slice(start, start + chunk))
                yield from self._measure_only(name, some).ratio[: some.num] >= clear

        point = simplify(self.space, point, IDENTITIES[name].times, fails)
        found = self._measure_only(name, point)
        # A map that is not a function of its inputs may no longer fail.
        simplest = found.failure(0) if found.excess[0] > 0 else worst
        if is_strategy(state):
            simplest = self._with_simple_state(name, simplest, point, clear, state, seed)
        return simplest._replace(row=None, worst=worst)

    def _with_simple_state(self, name, failure, point, clear, strategy, seed) -> Failure:
        def fail(x: State) -> None:
            nonlocal failure
            found = self._measure_one(name, point, x)
            if found.ratio[0] >= clear:
                failure = found.failure(0)
                raise IdentityError(failure)

        try:
            # The states are drawn as before, so that one of them fails.
            draw_states(strategy, fail, seed)
        except (IdentityError, hypothesis_module().errors.Flaky):
            pass
        return failure

    def _measure_only(self, name: str, points: Points) -> Measured:
        """Evaluates at most a chunk of points for one identity."""
        if self.in_turn or (points.num == 1 and self.space.low.size > _LARGE):
            x = jtu.tree_map(lambda leaf: leaf[0], self.space.unflatten(points.states))
            return self._measure_one(name, points, x)
        # Others are compiled already, but solves take long.
        others = tuple(other for other in self.names if other not in SOLVED)
        return self._measure(points, (name,) if name in SOLVED else others)[name]

    def _measure_one(self, name: str, point: Points, x: State) -> Measured:
        s, u, t = point.times[0]
        return measure(self._prepared, (name,), s, u, t, x, **self._how)[name]

    def _keep(self, points: Points) -> None:
        self.num_points += points.num
        for name, found in self._measure(points, self.names).items():
            excess, row = found.excess[: points.num], min(found.worst, points.num - 1)
            # NumPy's maximum of something with NaN is NaN.
            largest = np.max(found.defect, initial=self.defects[name])
            self.defects[name] = float(largest)
            self.num_failing[name] += int(np.sum(excess > 0))
            if excess[row] > self.excess(name):
                failure = found.failure(row)._replace(row=None)
                ratio = float(found.ratio[row])
                self._worst[name] = float(excess[row]), ratio, failure, points.rows([row])

    def _measure(self, points: Points, names: tuple) -> dict[str, Measured]:
        """Evaluates at most a chunk of points."""
        # Fill it up with the last one, so that nothing is compiled again.
        rows = np.minimum(np.arange(self._chunk), points.num - 1)
        try:
            return self._measure_chunk(points.rows(rows), names)
        except Exception as error:
            row, error = self._first_error(points, names, error)
            x = self.space.unflatten(points.states[row : row + 1])
            _locate(error, points.times[row], jtu.tree_map(lambda leaf: leaf[0], x))
            raise error from None

    def _first_error(self, points, names, error) -> tuple[int, Exception]:
        """The first point at which the map raises, and its error."""
        for row in range(points.num):
            try:
                self._measure_chunk(points.rows(np.full(self._chunk, row)), names)
            except Exception as alone:
                return row, alone
        return 0, error

    def _measure_chunk(self, points: Points, names: tuple) -> dict[str, Measured]:
        x = self.space.unflatten(points.states)
        s, u, t = points.times.T
        return measure(self._prepared, names, s, u, t, x, **self._how)


def _locate(error: Exception, times: Any, x: State) -> None:
    at = tuple(map(float, times))
    error.add_note(f"At (s, u, t) = {at} and x = {literal(x)}.")
