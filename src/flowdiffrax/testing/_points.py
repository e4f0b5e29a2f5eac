"""Where a search looks: times and states that are spread over all jumps."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float

from .._types import State
from ._strategies import Strategy, hypothesis_module

# Eight kinds of points take turns. One has simple times and states, three have times that
# uniform pairs rarely have, and the times of the other four are uniform.
_NUM_KINDS = 8
_SIMPLE, _FROM_START, _BY_GAP, _NEARLY_EQUAL = range(4)


class Points(NamedTuple):
    """Times and states of jumps, one a row. A state is a row of real numbers."""

    times: Float[np.ndarray, "points 3"]
    states: Float[np.ndarray, "points size"]

    def rows(self, rows: Any) -> "Points":
        return Points(self.times[rows], self.states[rows])

    @property
    def num(self) -> int:
        return len(self.times)


class Space(NamedTuple):
    """The times and states of a search.

    - `t0`, `t1`, `ordered`: the interval of times, and whether they only rise.
    - `like`: a state, for structure, shapes and dtypes.
    - `low`, `high`: the range of each number of a state, in the order of `flatten`.
    - `given`: the states of a strategy, one a row, to choose from instead.
    """

    t0: float
    t1: float
    ordered: bool
    like: State
    low: np.ndarray
    high: np.ndarray
    given: np.ndarray | None = None

    @property
    def num_given(self) -> int:
        return 0 if self.given is None else len(self.given)

    @property
    def smallest(self) -> np.ndarray:
        """The numbers of the state that is closest to zero."""
        return np.clip(0.0, self.low, self.high)

    def draw(self, rng: np.random.Generator, num: int, chunk: int) -> Iterator[Points]:
        """Yields points in chunks.

        Times are stratified over all points, and states within each chunk. The order is
        random, so that the first chunks alone are spread over the whole space too.
        """
        kinds = np.arange(num) % _NUM_KINDS
        times = self.t0 + (self.t1 - self.t0) * _unit_times(rng, kinds, self.ordered)
        times = np.clip(times, self.t0, self.t1)
        order = rng.permutation(num)
        for start in range(0, num, chunk):
            rows = order[start : start + chunk]
            yield Points(times[rows], self._states(rng, kinds[rows] == _SIMPLE))

    def _states(self, rng: np.random.Generator, simple: np.ndarray) -> np.ndarray:
        num = len(simple)
        if self.given is not None:
            # Each state equally often, as far as possible.
            rounds = -(-num // len(self.given))
            order = [rng.permutation(len(self.given)) for _ in range(rounds)]
            return self.given[np.concatenate(order)[:num]]
        states = self.low + (self.high - self.low) * _strata(rng, num, self.low.size)
        which = rng.integers(0, 3, states.shape)
        which[np.argmax(simple)] = 0
        corners = np.choose(which, [self.smallest, self.low, self.high])
        return np.where(simple[:, None], corners, states)

    def unflatten(self, states: np.ndarray) -> State:
        """A batch of states from rows of numbers."""
        leaves, structure = jtu.tree_flatten(self.like)
        sizes = [math.prod(leaf.shape) * (1 + _is_complex(leaf)) for leaf in leaves]
        parts = np.split(states, np.cumsum(sizes)[:-1], axis=1)

        def leaf_like(part: np.ndarray, leaf: Any) -> np.ndarray:
            part = np.ascontiguousarray(part)
            part = part.view(complex) if _is_complex(leaf) else part
            return part.reshape(len(states), *leaf.shape).astype(leaf.dtype)

        return structure.unflatten(map(leaf_like, parts, leaves))


def make_spaces(
    state: State | Strategy, bounds: tuple, times: tuple[float, float, bool], seed: int
) -> list[Space]:
    """The space of states like an example, or one for each shape that a strategy draws.

    **Arguments:**

    - `state`, `bounds`, `seed`: as for [`flowdiffrax.testing.check`][].
    - `times`: the interval of times, and whether they only rise.

    **Raises:** `ValueError` for bounds that are not in order, or a state without entries.
    """
    if is_strategy(state):
        drawn: list[State] = []
        draw_states(state, lambda x: drawn.append(jtu.tree_map(jnp.asarray, x)), seed)
        alike: dict[str, list[State]] = {}
        for x in drawn:
            alike.setdefault(str(jax.eval_shape(lambda x: x, x)), []).append(x)
        return [
            Space(*times, xs[0], *_no_bounds(xs[0]), np.stack([*map(flatten, xs)]))
            for xs in alike.values()
        ]
    shapes = jax.eval_shape(lambda x: jtu.tree_map(jnp.asarray, x), state)
    like = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    low, high = (_bound_numbers(bound, like) for bound in bounds)
    if low.size == 0:
        raise ValueError("`state` has no entries: give one as the map takes it.")
    if not np.all(low <= high):
        raise ValueError(f"`bounds` are the lowest and the highest; got {bounds}.")
    return [Space(*times, like, low, high)]


def _no_bounds(like: State) -> tuple[np.ndarray, np.ndarray]:
    size = flatten(like).size
    return np.full(size, -np.inf), np.full(size, np.inf)


def _bound_numbers(bound: Any, like: State) -> np.ndarray:
    """A bound for each number of a state."""
    if isinstance(bound, int | float):
        return np.full(flatten(like).shape, float(bound))

    def spread(leaf: Any, bound: Any) -> np.ndarray:
        bound = np.broadcast_to(np.asarray(bound), leaf.shape)
        both = _is_complex(leaf) and not np.iscomplexobj(bound)
        return bound * (1 + 1j) if both else bound

    return flatten(jtu.tree_map(spread, like, bound))


def flatten(x: State) -> np.ndarray:
    """The real numbers of a state: of a complex one, its real and imaginary parts."""
    parts = [np.zeros(0)]
    for leaf in map(np.asarray, jtu.tree_leaves(x)):
        wide = leaf.astype(complex if _is_complex(leaf) else float)
        parts.append(wide.reshape(-1).view(float))
    return np.concatenate(parts)


def _is_complex(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def is_strategy(state: Any) -> bool:
    """Whether it is a strategy of Hypothesis, which is then imported already."""
    strategies = sys.modules.get("hypothesis.strategies")
    return strategies is not None and isinstance(state, strategies.SearchStrategy)


def draw_states(strategy: Strategy, use: Callable[[State], None], seed: int) -> None:
    """Passes the states of a strategy to a function, the same ones for the same seed.

    If the function raises, Hypothesis looks for the simplest state for which it does.
    """
    hypothesis = hypothesis_module()
    settings = hypothesis.settings(
        deadline=None,
        database=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def test(x: State) -> None:
        use(x)

    hypothesis.seed(seed)(settings(hypothesis.given(strategy)(test)))()


def _strata(rng: np.random.Generator, num: int, *shape: int) -> np.ndarray:
    """Random shares, along the first axis one in each of `num` equal parts of [0, 1]."""
    parts = np.arange(num).reshape(num, *[1] * len(shape))
    parts = rng.permuted(np.broadcast_to(parts, (num, *shape)), axis=0)
    return (parts + rng.random((num, *shape))) / max(num, 1)


def _unit_times(rng: np.random.Generator, kinds: np.ndarray, ordered: bool) -> np.ndarray:
    """Times (s, u, t) in [0, 1], one triple a row."""
    num = kinds.size
    first, last = _strata(rng, num), _strata(rng, num)

    def fill(kind: int, make: Callable) -> None:
        rows = np.flatnonzero(kinds == kind)
        first[rows], last[rows] = make(_strata(rng, len(rows)), rng.random(len(rows)))

    def with_gap(gap: np.ndarray, share: np.ndarray) -> tuple:
        return share * (1 - gap), share * (1 - gap) + gap

    # Uniform pairs rarely both start and end late, or are as far apart as can be.
    fill(_FROM_START, lambda start, share: (start, start + share * (1 - start)))
    fill(_BY_GAP, with_gap)
    fill(_NEARLY_EQUAL, lambda share, start: with_gap(10 ** (-6 + 5 * share), start))
    low, high = np.minimum(first, last), np.maximum(first, last)
    mirrored = rng.random(num) < 0.5
    low, high = np.where(mirrored, [1 - high, 1 - low], [low, high])
    times = np.stack([low, low + _strata(rng, num) * (high - low), high], axis=1)
    # Any of the eighths, and often the same one.
    eighths = np.sort(rng.integers(0, 9, (num, 3)), axis=1) / 8
    eighths[:, 1] = np.choose(rng.integers(0, 3, num), eighths.T)
    at_rest = rng.random(num) < 0.25
    eighths = np.where(at_rest[:, None], eighths[:, :1], eighths)
    is_simple = kinds == _SIMPLE
    times = np.where(is_simple[:, None], eighths, times)
    if ordered:
        return times
    anywhere = (rng.random(num) < 0.5) & ~is_simple
    times[:, 1] = np.where(anywhere, _strata(rng, num), times[:, 1])
    return np.where(rng.random((num, 1)) < 0.5, times[:, ::-1], times)
