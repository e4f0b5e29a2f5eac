"""A check of all identities of a map at random times and states."""

import secrets
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import jax.tree_util as jtu

from .._derivative import Derivative
from .._types import Args, State
from ._assess import Prepared, assess, check_names, jacobian_is_cheap, prepare
from ._failure import Failure, IdentityError, Tolerance, literal
from ._identity import IDENTITIES
from ._strategies import Strategy, hypothesis_module, states_like, time_triples

# These need a map that goes backwards in time too.
_BACKWARDS = {"inverse", "both_directions"}


def check(
    flow_map: Callable,
    vector_field: Callable | None = None,
    *,
    state: State | Strategy,
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
) -> dict[str, float]:
    """Searches for times and states at which an identity does not hold.

    Hypothesis draws them, and shrinks a failure to the simplest numbers that still fail.
    It does not need pytest:

    ```python
    check(lambda s, t, x: my_network(x, s, t), state=jnp.zeros(2))
    ```

    **Arguments:**

    - `flow_map`, `vector_field`, `args`, `jvp`: as for
      [`flowdiffrax.testing.assert_starts_as_identity`][]. Without a field, the map is
      compared with its own velocity.
    - `state`: an example state, from which similar states with entries up to 2 are
      drawn; or a strategy.
    - `identities`: names of identities: the names of the assertions without `assert_`.
      `None` for all that apply: `tangent` needs a field, and `positive_jacobian` a real
      state of at most 64 entries.
    - `t0`, `t1`: the interval of times; `None` for the map's `time_range`, or [0, 1] if
      it declares none.
    - `ordered`: whether times only rise, for maps that go in one direction. By default,
      this omits `inverse` and `both_directions`.
    - `rtol`, `atol`: as for [`flowdiffrax.testing.assert_identities`][].
    - `max_examples`: the number of jumps; `None` for the number of the Hypothesis
      profile, which is 100 by default.
    - `seed`: the seed of the examples; `None` for a random one, or a fixed one if the
      Hypothesis profile is derandomised. A failure reports its seed.

    **Returns:** the largest defect found for each identity.

    **Raises:** [`flowdiffrax.testing.IdentityError`][], with one failure for each
    identity that is broken; `ImportError` without Hypothesis; `ValueError` for unknown
    names, or a state without entries.
    """
    hypothesis = hypothesis_module()
    st = hypothesis_module(".strategies")
    is_strategy = isinstance(state, st.SearchStrategy)
    if not is_strategy and sum(map(jnp.size, jtu.tree_leaves(state))) == 0:
        raise ValueError("`state` has no entries: give one as the map takes it.")
    draws = state if is_strategy else states_like(state)
    low, high = getattr(flow_map, "time_range", None) or (0.0, 1.0)
    low, high = low if t0 is None else t0, high if t1 is None else t1
    points = time_triples(low, high, ordered=True if ordered else None)
    all_names = tuple(IDENTITIES) if identities is None else tuple(identities)
    check_names(all_names)
    if identities is None:
        left_out = {"tangent"} if vector_field is None else set()
        left_out |= _BACKWARDS if ordered else set()
        all_names = tuple(name for name in all_names if name not in left_out)
    if seed is None:
        seed = 0 if hypothesis.settings().derandomize else secrets.randbits(32)
    settings = hypothesis.settings(
        max_examples=max_examples or hypothesis.settings().max_examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    leave_out_jacobian = identities is None

    prepared: Prepared | None = None
    defects: dict[str, float] = {}

    def failures_at(times: tuple[float, float, float], x: State) -> list[Failure]:
        nonlocal prepared
        s, u, t = times
        if prepared is None:
            prepared = prepare(flow_map, vector_field, x, s, args, jvp, once=False)
        asked = all_names
        if leave_out_jacobian and not jacobian_is_cheap(x):
            asked = tuple(name for name in asked if name != "positive_jacobian")
        failures, found = assess(prepared, asked, s, u, t, x, args, rtol, atol)
        for name, defect in found.items():
            defects[name] = max(defect, defects.get(name, 0.0))
        return failures

    def search(test: Callable) -> None:
        test = hypothesis.given(points, draws)(test)
        hypothesis.seed(seed)(settings(test))()

    # First find the broken identities. Then shrink each separately, from the same
    # examples.
    simplest = _find_broken(search, failures_at)
    for name in simplest:

        def fail(times, x):
            for failure in failures_at(times, x):
                if failure.identity == name:  # noqa: B023
                    raise IdentityError(failure)

        try:
            search(fail)
        except IdentityError as error:
            (simplest[name],) = error.failures
        except hypothesis.errors.Flaky:
            # The map is not a function of its inputs, so its failures cannot be shrunk:
            # report the first one.
            continue
    if simplest:
        note = (
            f"{len(simplest)} of {len(defects)} identities do not hold. To repeat the "
            f"search: `check(..., seed={seed})`."
        )
        in_order = [
            simplest[name]._replace(largest=defects[name])
            for name in all_names
            if name in simplest
        ]
        raise IdentityError(*in_order, note=note)
    return defects


def _find_broken(search: Callable, failures_at: Callable) -> dict[str, Failure]:
    """For each identity that is broken, the first failure found."""
    first: dict[str, Failure] = {}
    crash: Exception | None = None

    def collect(times, x):
        nonlocal crash
        if crash is not None:
            return
        try:
            for failure in failures_at(times, x):
                first.setdefault(failure.identity, failure)
        except Exception as error:
            # A map that cannot be called fails everywhere. Stop here, because Hypothesis
            # would take long to search for the simplest point at which it fails.
            error.add_note(f"At (s, u, t) = {times} and x = {literal(x)}.")
            crash = error

    search(collect)
    if crash is not None:
        raise crash
    return first
