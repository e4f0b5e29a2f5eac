"""A check of all identities of a map at many times and states."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jax.tree_util as jtu
import numpy as np

from .._check import check_at_least, check_bools, check_count
from .._derivative import Derivative
from .._types import Args, State
from ._assess import check_names, jacobian_is_cheap
from ._failure import IdentityError, Tolerance, literal
from ._identity import IDENTITIES
from ._points import make_spaces
from ._search import NUM_POINTS, Search
from ._strategies import Strategy, hypothesis_module

# These need a map that goes backwards in time too.
_BACKWARDS = {"inverse", "both_directions"}


class CheckReport(dict[str, float]):
    """The largest defect of each identity, by name, which prints as a table.

    **Attributes:**

    - `num_points`: the number of jumps.
    - `looked_at`: which jumps they are, and which faults they may miss, in words.
    """

    def __init__(self, defects: dict[str, float], num_points: int, looked_at: str):
        super().__init__(defects)
        self.num_points = num_points
        self.looked_at = looked_at

    def __str__(self) -> str:
        lines = [f"{name:<20}{defect:>11.2e}" for name, defect in self.items()]
        return "\n".join([f"{'identity':<20}{'worst':>11}", *lines, "", self.looked_at])

    __repr__ = __str__


def check(
    flow_map: Callable,
    vector_field: Callable | None = None,
    *,
    state: State | Strategy,
    bounds: tuple[Any, Any] = (-2.0, 2.0),
    identities: Sequence[str] | None = None,
    t0: float | None = None,
    t1: float | None = None,
    ordered: bool = False,
    args: Args = None,
    rtol: Tolerance = None,
    atol: Tolerance = None,
    jvp: Derivative | None = None,
    max_examples: int | None = None,
    seed: int | None = None,
) -> CheckReport:
    """Searches for times and states at which an identity does not hold.

    It evaluates all identities at 4,096 jumps, in one compiled function. The jumps are
    spread evenly over the times and states, with some that start or end at the ends of
    the interval, at simple numbers, or where they are nearly or exactly of length zero.
    A failure is then reduced to the simplest numbers that still fail clearly, and
    reported together with the worst. It does not need pytest:

    ```python
    check(lambda s, t, x: my_network(x, s, t), state=jnp.zeros(2))
    ```

    **Arguments:**

    - `flow_map`, `vector_field`, `args`, `jvp`: as for
      [`flowdiffrax.testing.assert_starts_as_identity`][]. Without a field, the map is
      compared with its own velocity.
    - `state`: an example state, whose dtypes are those of the check; or a Hypothesis
      strategy of states. A strategy draws as many states as the Hypothesis profile says,
      100 by default, which are used at all times.
    - `bounds`: the lowest and the highest entries of states that are like an example,
      numbers or PyTrees like the state; for a complex state, of its real and imaginary
      parts.
    - `identities`: names of identities: the names of the assertions without `assert_`.
      `None` for all that apply: `tangent` needs a field, and `positive_jacobian` a real
      state of at most 64 entries.
    - `t0`, `t1`: the interval of times; `None` for the map's `time_range`, or [0, 1] if
      it declares none.
    - `ordered`: whether times only rise, for maps that go in one direction. By default,
      this omits `inverse` and `both_directions`.
    - `rtol`, `atol`: as for [`flowdiffrax.testing.assert_identities`][].
    - `max_examples`: the number of jumps. `None` for 4,096, or as many as a minute
      allows; and for 256 if JAX cannot trace or vectorise the map or the field, such as
      functions of NumPy and PyTorch, which are called once for each jump.
    - `seed`: the seed of the jumps; `None` for a random one, or a fixed one if the
      Hypothesis profile is derandomised. A failure reports its seed.

    **Returns:** a [`flowdiffrax.testing.CheckReport`][], the largest defect of each
    identity.

    **Raises:** [`flowdiffrax.testing.IdentityError`][], with one failure for each
    identity that is broken; `ImportError` for a strategy without Hypothesis; `ValueError`
    for unknown names, bounds that are not in order, or a state without entries.
    """
    names = tuple(IDENTITIES) if identities is None else tuple(identities)
    check_names(names)
    check_bools(ordered=ordered)
    if identities is None:
        left_out = {"tangent"} if vector_field is None else set()
        left_out |= _BACKWARDS if ordered else set()
        names = tuple(name for name in names if name not in left_out)
    check_count(max_examples, 1, "max_examples", or_none=True)
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        for number in jtu.tree_leaves(tolerance):
            check_at_least(number, 0, name)
    if len(bounds) != 2:
        raise ValueError(f"`bounds` are the lowest and the highest; got {bounds}.")
    low, high = getattr(flow_map, "time_range", None) or (0.0, 1.0)
    low, high = low if t0 is None else t0, high if t1 is None else t1
    if not (np.isfinite([low, high]).all() and low != high):
        raise ValueError(
            f"The interval of times must be finite and not empty; got {low} to {high}."
        )
    if seed is None:
        seed = 0 if _is_derandomised() else secrets.randbits(32)
    rng = np.random.default_rng(seed)
    spaces = make_spaces(state, bounds, (low, high, ordered), seed)
    num_given = sum(space.num_given for space in spaces)
    searches = []
    for space in spaces:
        # Without being asked, take no derivative per entry of a large state.
        cheap = identities is not None or jacobian_is_cheap(space.like)
        asked = tuple(name for name in names if cheap or name != "positive_jacobian")
        how = {"args": args, "rtol": rtol, "atol": atol}
        search = Search(flow_map, vector_field, space, asked, jvp, how)
        search.run(rng, max_examples, space.num_given / num_given if num_given else 1.0)
        searches.append(search)
    report = _report(searches, bounds)
    failures = []
    for name in report:
        asked = [search for search in searches if name in search.names]
        worst = max(asked, key=lambda search: search.excess(name))  # noqa: B023
        if worst.excess(name) > 0:
            failing = sum(search.num_failing[name] for search in asked)
            share = failing / sum(search.num_points for search in asked)
            failure = worst.failure(name, state, seed)
            failures.append(failure._replace(share=share))
    if failures:
        raise IdentityError(
            *failures,
            note=f"{len(failures)} of {len(report)} identities do not hold. To repeat "
            f"the search: `check(..., seed={seed})`.\n\n{report.looked_at}",
        )
    return report


def _is_derandomised() -> bool:
    """Whether the profile of Hypothesis asks for the same examples each time."""
    try:
        return hypothesis_module().settings().derandomize
    except ImportError:
        return False


def _report(searches: list[Search], bounds: tuple) -> CheckReport:
    names = [name for name in IDENTITIES if any(name in one.names for one in searches)]
    defects = {
        # NumPy's maximum of something with NaN is NaN.
        name: float(np.max([one.defects[name] for one in searches if name in one.names]))
        for name in names
    }
    spaces = [one.space for one in searches]
    num = sum(one.num_points for one in searches)
    if spaces[0].given is None:
        low, high = map(literal, bounds)
        states, num_states = f"states with entries in [{low}, {high}]", 7 * num // 8
    else:
        num_states = sum(space.num_given for space in spaces)
        states = f"{num_states:,} states of the strategy"
    dtypes = {str(x.dtype) for space in spaces for x in jtu.tree_leaves(space.like)}
    direction = "rising times" if spaces[0].ordered else "times in either order"
    fewer = ""
    if any(one.in_turn for one in searches):
        fewer = (
            f" These are fewer than {NUM_POINTS:,} jumps because JAX cannot trace or "
            "vectorise the map or the field, which are called jump by jump."
        )
    if any(one.is_cut_short for one in searches):
        fewer += " The search stopped after a minute; `max_examples` asks for more."
    # Of eight points, four have uniform times, and seven uniform states.
    looked_at = (
        f"Looked at {num:,} jumps, with {direction} in [{spaces[0].t0}, {spaces[0].t1}] "
        f"and {states}, in {', '.join(sorted(dtypes))}.{fewer}\n"
        f"A fault on {_visible(num // 2)} % of the pairs of times, or on "
        f"{_visible(num_states)} % of the states, is found with a probability of 95 %. "
        "A rarer one may be missed."
    )
    return CheckReport(defects, num, looked_at)


def _visible(num: int) -> str:
    """The percentage of a space that `num` points meet with a probability of 95 %."""
    return f"{100 * (1 - 0.05 ** (1 / max(num, 1))):.2g}"
