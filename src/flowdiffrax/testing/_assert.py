"""The assertions. `assert_starts_as_identity` documents what they have in common."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from .._derivative import Derivative
from .._time import time_dtype
from .._tree import subtract
from .._types import Args, Numbers, State
from ._assess import Times, assess, broadcast, check_names, prepare
from ._failure import IdentityError, Tolerance, literal
from ._identity import largest

# Pytest leaves this module out of the tracebacks that it shows.
__tracebackhide__ = True

Map: TypeAlias = Callable
Field: TypeAlias = Callable | None


class How(TypedDict, total=False):
    """The keyword arguments of nearly all assertions."""

    rtol: float | None
    atol: float | None
    jvp: Derivative | None


def assert_starts_as_identity(
    flow_map: Map, s: Times, x: State, args: Args = None, **how: Unpack[How]
) -> None:
    r"""Asserts $X_{s,s}(x) = x$.

    All assertions share these arguments.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable `(s, t, x)` or
      `(s, t, x, args)` that returns the state at `t`, in JAX or not. A callable that is
      not written in JAX is called on the host, and differentiated by central differences.
    - `vector_field`: the velocity $b$, any callable `(t, x)` or `(t, x, args)`. `None`
      uses the map's own velocity, and so asserts that the map is the flow of it.
    - `s`, `t`, `u`: start, end and intermediate time, in any order; scalars, or arrays of
      shape `(batch,)`.
    - `x`: one state at time `s`, or a batch of states, with a leading axis on every leaf.
    - `args`: passed to the map and the field if it is not `None`; for a batch, with the
      batch axis.
    - `rtol`, `atol`: the largest entry of the residual may be at most `atol` plus `rtol`
      times the largest entry of the states and velocities that cancel in it. The default
      `rtol` is $\epsilon^{2/3}$, where $\epsilon$ is the rounding unit of the least
      precise leaf: 4e-11 in float64 and 2e-5 in float32. The default `atol` is the same
      number, which suits states of order one. With central differences, the defaults are
      a hundred times larger. For a learned map, set `atol` to the defect that you accept.
    - `jvp`: how to take derivatives: `jax.jvp`, or a
      [`flowdiffrax.objectives.FiniteDifference`][] for layers without forward mode.

    **Raises:** [`flowdiffrax.testing.IdentityError`][], which names the identity that
    does not hold, where, and by how much; `ValueError` or `TypeError` if the map's output
    is not like `x`.
    """
    _assert(["starts_as_identity"], flow_map, None, (s, s, s), x, args, **how)


def assert_semigroup(
    flow_map: Map,
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args = None,
    **how: Unpack[How],
) -> None:
    r"""Asserts that two jumps equal one, $X_{u,t}(X_{s,u}(x)) = X_{s,t}(x)$.

    It needs no vector field, and does not detect a map that consistently follows another
    ODE.
    """
    _assert(["semigroup"], flow_map, None, (s, u, t), x, args, **how)


def assert_inverse(
    flow_map: Map, s: Times, t: Times, x: State, args: Args = None, **how: Unpack[How]
) -> None:
    r"""Asserts that a round trip ends where it began, $X_{t,s}(X_{s,t}(x)) = x$."""
    _assert(["inverse"], flow_map, None, (s, s, t), x, args, **how)


def assert_tangent(
    flow_map: Map,
    vector_field: Field,
    t: Times,
    x: State,
    args: Args = None,
    **how: Unpack[How],
) -> None:
    r"""Asserts that the map's own velocity is the field, $v_{t,t}(x) = b_t(x)$.

    If `vector_field` is `None`, it tests nothing.
    """
    _assert(["tangent"], flow_map, vector_field, (t, t, t), x, args, **how)


def assert_lagrangian(
    flow_map: Map,
    vector_field: Field,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    **how: Unpack[How],
) -> None:
    r"""Asserts that the end point moves with the field, $\partial_t X_{s,t}(x) =
    b_t(X_{s,t}(x))$."""
    _assert(["lagrangian"], flow_map, vector_field, (s, s, t), x, args, **how)


def assert_eulerian(
    flow_map: Map,
    vector_field: Field,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    **how: Unpack[How],
) -> None:
    r"""Asserts that all points of a trajectory have one end, $\partial_s X_{s,t}(x) +
    \nabla X_{s,t}(x)\,b_s(x) = 0$."""
    _assert(["eulerian"], flow_map, vector_field, (s, s, t), x, args, **how)


def assert_average_velocity(
    flow_map: Map, s: Times, t: Times, x: State, args: Args = None, **how: Unpack[How]
) -> None:
    r"""Asserts that the average velocity matches the map, $X_{s,t}(x) = x + (t - s)
    v_{s,t}(x)$.

    Use it for classes that define `average_velocity` themselves.
    """
    _assert(["average_velocity"], flow_map, None, (s, s, t), x, args, **how)


def assert_both_directions(
    flow_map: Map, s: Times, t: Times, x: State, args: Args = None, **how: Unpack[How]
) -> None:
    r"""Asserts that a jump and the jump back have the same slope, $v_{s,t}(x) =
    v_{t,s}(X_{s,t}(x))$.

    This is the inverse identity divided by $t - s$, so that short jumps count as much as
    long ones: a wrong direction is an error of order one, however short the jump.
    """
    _assert(["both_directions"], flow_map, None, (s, s, t), x, args, **how)


def assert_positive_jacobian(
    flow_map: Map,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts $\det \nabla X_{s,t}(x) > 0$: a flow never folds or reflects space.

    It takes one derivative per entry of the state. The state must be real.
    """
    _assert(["positive_jacobian"], flow_map, None, (s, s, t), x, args, jvp=jvp)


def assert_solver_equals_map(
    flow_map: Map,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    solver: Any = None,
    num_steps: int = 3,
    **how: Unpack[How],
) -> None:
    """Asserts that a solve in equal steps equals the map's jumps over the same steps.

    It holds in both directions of time.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][], and

    - `solver`: a Diffrax solver that steps with the map; `None` for
      [`flowdiffrax.FlowMapSolver`][]; or a function `(flow_map, x, ts, args) -> x_t`
      such as [`flowdiffrax.sample`][], where `ts` is a grid of `num_steps + 1` times.
    - `num_steps`: the number of steps.
    """
    solve = {"solver": solver, "num_steps": num_steps}
    _assert(["solver_equals_map"], flow_map, None, (s, s, t), x, args, **solve, **how)


def assert_dense_output(
    flow_map: Map,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    solver: Any = None,
    num_steps: int = 3,
    **how: Unpack[How],
) -> None:
    """Asserts that dense output between the steps equals the map's jump to that time.

    The solver interpolates with a polynomial. The default tolerance is therefore the
    square root of the rounding unit, 1.5e-8 in float64 and 3.5e-4 in float32, and steps
    must be short enough for the polynomial's degree.

    **Arguments:** as for [`flowdiffrax.testing.assert_solver_equals_map`][], with Diffrax
    solvers only.
    """
    solve = {"solver": solver, "num_steps": num_steps}
    _assert(["dense_output"], flow_map, None, (s, s, t), x, args, **solve, **how)


def assert_identities(
    flow_map: Map,
    vector_field: Field,
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    identities: Sequence[str],
    rtol: Tolerance = None,
    atol: Tolerance = None,
    jvp: Derivative | None = None,
) -> None:
    """Asserts several identities at once, compiled as one function.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][], and

    - `identities`: names of identities: the names of the assertions without `assert_`.
      `tangent` is evaluated at the end time `t` and at `x`.
    - `rtol`, `atol`: one tolerance for all identities, or a mapping from their names.

    **Raises:** `ValueError` for an unknown name, and the errors of
    [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    check_names(identities)
    how = {"rtol": rtol, "atol": atol, "jvp": jvp}
    _assert(identities, flow_map, vector_field, (s, u, t), x, args, **how)


def assert_path_derivative(
    path: Any, t: Numbers, *, rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    r"""Asserts that `path.derivative` is the derivative of `path.evaluate`.

    **Arguments:**

    - `path`: any object with `evaluate(t)` and `derivative(t)`, such as a
      `diffrax.AbstractPath` or an interpolant between two points.
    - `t`: one time, or several.
    - `rtol`, `atol`: tolerances, relative to the largest entry of the derivative.

    **Raises:** `AssertionError` if it is not.
    """
    for time in np.ravel(np.asarray(t)):
        like = jax.eval_shape(path.evaluate, jnp.asarray(time, float))
        now = jnp.asarray(time, time_dtype(like))
        _, truth = jax.jvp(path.evaluate, (now,), (jnp.ones_like(now),))
        found = path.derivative(now)
        allowed = atol + rtol * float(largest(truth))
        defect = float(largest(subtract(found, truth)))
        if not defect <= allowed:
            raise AssertionError(
                f"`path.derivative` is not the derivative of `path.evaluate`: off by "
                f"{defect:.3g} at t = {now}, where {allowed:.2g} is allowed: "
                f"{literal(found)} instead of {literal(truth)}.\n"
                "  often it is: a rate that is missing or has the wrong sign"
            )


def _assert(names, flow_map, field, times, x, args, *, rtol=None, atol=None, **how):
    s, u, t = broadcast(*times)
    prepared = prepare(flow_map, field, x, s, args, **how)
    failures = assess(prepared, tuple(names), s, u, t, x, args, rtol, atol)
    if failures:
        raise IdentityError(*failures)
