"""One assertion for each identity, at given points, for anyone's map."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import ArrayLike, Real

from .._derivative import Derivative
from .._time import time_dtype
from .._tree import num_rows, subtract
from .._types import Args, Numbers, State, VectorField
from ..flow_maps._base import AbstractFlowMap
from ._adapt import adapt, is_opaque
from ._failure import Failure, IdentityError, Tolerance, literal, tolerances
from ._identity import IDENTITIES, Jump, Settings, evaluate, evaluate_compiled, largest

if TYPE_CHECKING:
    Times: TypeAlias = Any
else:
    # One time, or those of a batch.
    Times: TypeAlias = Real[ArrayLike, "..."]


def assert_starts_as_identity(
    flow_map: Callable,
    s: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    r"""Asserts $X_{s,s}(x) = x$.

    All assertions share these arguments.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable `(s, t, x)` or
      `(s, t, x, args)` that returns the state at `t`, in JAX or not. One that is not
      written in JAX is called on the host, and differentiated by central differences.
    - `vector_field`: the velocity $b$, any callable `(t, x)` or `(t, x, args)`; `None`
      for the map's own, of which the map is then asked to be the flow.
    - `s`, `t`, `u`: start, end and stop-over, in any order; scalars, or of shape
      `(batch,)`.
    - `x`: one state at time `s`, or a batch of them: every leaf with a leading axis.
    - `args`: passed on to map and field where it is not `None`; of a batch, with its
      axis.
    - `rtol`, `atol`: the largest entry of the residual may be `atol` plus `rtol` times
      the largest entry of what cancels in it: states and velocities. The default `rtol`
      is $\epsilon^{2/3}$ with $\epsilon$ the rounding unit of the least precise leaf:
      4e-11 in float64 and 2e-5 in float32. The default
      `atol` is the same number, for states of order one. Derivatives by central
      differences have a hundredfold. For a map that is learned, give the defect that
      you accept as `atol`.
    - `jvp`: how derivatives are taken: `jax.jvp`, or a
      [`flowdiffrax.objectives.FiniteDifference`][] for layers without forward mode.

    **Raises:** [`flowdiffrax.testing.IdentityError`][], which says which identity does
    not hold, where, and by how much; `ValueError` or `TypeError` for a map whose output
    is not like `x`.
    """
    __tracebackhide__ = True
    _assert("starts_as_identity", flow_map, None, s, s, s, x, args, rtol, atol)


def assert_semigroup(
    flow_map: Callable,
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    r"""Asserts that two jumps are one, $X_{u,t}(X_{s,u}(x)) = X_{s,t}(x)$.

    Needs no vector field, and cannot see a map that follows another ODE consistently.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    _assert("semigroup", flow_map, None, s, u, t, x, args, rtol, atol)


def assert_inverse(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    r"""Asserts that a round trip ends where it began, $X_{t,s}(X_{s,t}(x)) = x$.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    _assert("inverse", flow_map, None, s, s, t, x, args, rtol, atol)


def assert_tangent(
    flow_map: Callable,
    vector_field: Callable | None,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts that the map's own velocity is the field, $v_{t,t}(x) = b_t(x)$.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][]. With
    `None` for the field it says nothing.
    """
    __tracebackhide__ = True
    settings = (rtol, atol, jvp)
    _assert("tangent", flow_map, vector_field, t, t, t, x, args, *settings)


def assert_lagrangian(
    flow_map: Callable,
    vector_field: Callable | None,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts that the end point moves with the field, $\partial_t X_{s,t}(x) =
    b_t(X_{s,t}(x))$.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    settings = (rtol, atol, jvp)
    _assert("lagrangian", flow_map, vector_field, s, s, t, x, args, *settings)


def assert_eulerian(
    flow_map: Callable,
    vector_field: Callable | None,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts that all starts on a trajectory lead to one end, $\partial_s X_{s,t}(x) +
    \nabla X_{s,t}(x)\,b_s(x) = 0$.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    settings = (rtol, atol, jvp)
    _assert("eulerian", flow_map, vector_field, s, s, t, x, args, *settings)


def assert_average_velocity(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    r"""Asserts that the map's average velocity is its own, $X_{s,t}(x) = x + (t - s)
    v_{s,t}(x)$.

    For classes that define `average_velocity` themselves.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    _assert("average_velocity", flow_map, None, s, s, t, x, args, rtol, atol)


def assert_both_directions(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts that the way back has the slope of the way there, $v_{s,t}(x) =
    v_{t,s}(X_{s,t}(x))$.

    It is the inverse identity over $t - s$, so that short jumps weigh as much as long
    ones: a wrong direction is an error of order one however short the jump.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][].
    """
    __tracebackhide__ = True
    _assert("both_directions", flow_map, None, s, s, t, x, args, rtol, atol, jvp)


def assert_positive_jacobian(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative | None = None,
) -> None:
    r"""Asserts $\det \nabla X_{s,t}(x) > 0$: a flow never folds space, nor mirrors it.

    One derivative for each entry of the state, real ones only.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][]. There is
    no tolerance.
    """
    __tracebackhide__ = True
    _assert("positive_jacobian", flow_map, None, s, s, t, x, args, None, None, jvp)


def assert_solver_equals_map(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    solver: Any = None,
    num_steps: int = 3,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Asserts that a solve in equal steps is the same jumps in turn, in any direction.

    **Arguments:** as for [`flowdiffrax.testing.assert_starts_as_identity`][], and

    - `solver`: a Diffrax solver that steps by the map, `None` for
      [`flowdiffrax.FlowMapSolver`][]; or a function `(flow_map, x, ts, args) -> x_t`
      such as [`flowdiffrax.sample`][], `ts` being a grid of `num_steps + 1` times.
    - `num_steps`: how many steps.
    """
    __tracebackhide__ = True
    name, settings = "solver_equals_map", (None, solver, num_steps)
    _assert(name, flow_map, None, s, s, t, x, args, rtol, atol, *settings)


def assert_dense_output(
    flow_map: Callable,
    s: Times,
    t: Times,
    x: State,
    args: Args = None,
    *,
    solver: Any = None,
    num_steps: int = 3,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Asserts that dense output between the steps is the map's own jump to there.

    The solver interpolates by a polynomial: the default tolerance is the root of the
    rounding unit, 1.5e-8 in float64 and 3.5e-4 in float32, and steps must be short
    enough for its degree.

    **Arguments:** as for [`flowdiffrax.testing.assert_solver_equals_map`][], with Diffrax
    solvers only.
    """
    __tracebackhide__ = True
    name, settings = "dense_output", (None, solver, num_steps)
    _assert(name, flow_map, None, s, s, t, x, args, rtol, atol, *settings)


def assert_identities(
    flow_map: Callable,
    vector_field: Callable | None,
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

    - `identities`: names of identities, those of the assertions without `assert_`.
      `tangent` is taken at the end time `t`, with `x`.
    - `rtol`, `atol`: one tolerance for all, or some by the names of the identities.

    **Raises:** `ValueError` for an unknown name; else as there.
    """
    __tracebackhide__ = True
    check_names(identities)
    s, u, t = _broadcast(s, u, t)
    prepared = prepare(flow_map, vector_field, x, s, args, jvp)
    failures, _ = assess(prepared, tuple(identities), s, u, t, x, args, rtol, atol)
    if failures:
        raise IdentityError(*failures)


def assert_path_derivative(
    path: Any, t: Numbers, *, rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    r"""Asserts that the derivative of a path is that of its values.

    **Arguments:**

    - `path`: whatever has `evaluate(t)` and `derivative(t)`, a `diffrax.AbstractPath`
      such as an interpolant between two points.
    - `t`: a time, or several.
    - `rtol`, `atol`: tolerances, relative to the largest entry of the derivative.

    **Raises:** `AssertionError`.
    """
    __tracebackhide__ = True
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
                f"{literal(found)} in the place of {literal(truth)}.\n"
                "  often it is: the rate of one coefficient missing or with the wrong "
                "sign"
            )


def _assert(
    name, flow_map, field, s, u, t, x, args, rtol, atol, jvp=None, solver=None, steps=3
):
    __tracebackhide__ = True
    s, u, t = _broadcast(s, u, t)
    prepared = prepare(flow_map, field, x, s, args, jvp, solver, steps)
    failures, _ = assess(prepared, (name,), s, u, t, x, args, rtol, atol)
    if failures:
        raise IdentityError(*failures)


def _broadcast(*times: Times) -> tuple:
    """**Raises:** `ValueError` for times of other shapes than `()` and `(batch,)`."""
    shapes = {jnp.shape(time) for time in times} - {()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(
            f"Times must be scalars or of one shape (batch,); got shapes {shapes}."
        )
    return tuple(np.broadcast_arrays(*map(np.asarray, times)))


def check_names(names: Sequence[str]) -> None:
    """**Raises:** `ValueError` unless all are names of identities."""
    unknown = sorted({*names} - {*IDENTITIES})
    if unknown or not names:
        raise ValueError(
            f"`identities` must be names among {', '.join(IDENTITIES)}; got {names}."
        )


class Prepared(NamedTuple):
    """What does not change from point to point."""

    compute: Callable
    flow_map: AbstractFlowMap
    vector_field: VectorField
    settings: Settings
    has_field: bool


def prepare(
    flow_map: Callable,
    vector_field: Callable | None,
    x: State,
    s: Times = 0.0,
    args: Args = None,
    jvp: Derivative | None = None,
    solver: Any = None,
    num_steps: int = 3,
    *,
    once: bool = True,
) -> Prepared:
    """Makes ready what a map, a field and settings are evaluated by.

    **Arguments:** as for the assertions, with a state at which all may be tried, and

    - `once`: whether it is used for one point only, for which it is not worth while to
      compile what cannot be kept.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    x = jtu.tree_map(jnp.asarray, x)
    if jnp.ndim(s) == 1:
        num_rows((x, _arrays(args)), "States and conditions of a batch")
        s, x, args = _row((jnp.asarray(s), x, args), 0)
    opaque = is_opaque(flow_map)
    has_field = vector_field is not None
    flow_map, vector_field, jvp = adapt(flow_map, vector_field, s, x, args, jvp)
    compute = evaluate if once and opaque else evaluate_compiled
    settings = Settings(jvp, solver, num_steps)
    return Prepared(compute, flow_map, vector_field, settings, has_field)


def assess(
    prepared: Prepared,
    names: tuple[str, ...],
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args,
    rtol: Tolerance,
    atol: Tolerance,
) -> tuple[list[Failure], dict[str, float]]:
    """What does not hold at a point or a batch, and each identity's largest defect."""
    compute, flow_map, vector_field, settings, has_field = prepared
    x = jtu.tree_map(jnp.asarray, x)
    s, u, t = (jnp.asarray(time, time_dtype(x)) for time in (s, u, t))
    if s.ndim == 1:
        num_rows((s, x, _arrays(args)), "Times, states and conditions of a batch")
    jump = Jump(flow_map, vector_field, s, u, t, x, args, settings)
    times = {"s": np.asarray(s), "u": np.asarray(u), "t": np.asarray(t)}
    failures, defects = [], {}
    for name, (residual, size) in compute(names, jump).items():
        relative, absolute = tolerances(name, x, settings.jvp, rtol, atol)
        allowed = absolute + relative * np.atleast_1d(np.asarray(size, float))
        if name == "positive_jacobian":
            allowed = np.zeros_like(allowed)
        entries, labels = _entries(residual, s.ndim == 1)
        worst = np.max(entries, axis=1, initial=0)
        defects[name] = float(np.max(worst))
        # What is not finite is off by more than anything.
        excess = np.where(np.isfinite(worst), worst - allowed, np.inf)
        if np.max(excess) <= 0:
            continue
        row = int(np.argmax(excess))
        at = row if s.ndim == 1 else ()
        defect = worst[row]
        if name == "positive_jacobian":
            defect = -defect
        failures.append(
            Failure(
                identity=name,
                times={key: times[key][at] for key in IDENTITIES[name].times},
                x=_row(x, at),
                args=_row(args, at),
                defect=float(defect),
                tolerance=float(allowed[row]),
                entry=labels(int(np.argmax(np.nan_to_num(entries[row], nan=np.inf)))),
                row=row if s.ndim == 1 else None,
                has_field=has_field,
            )
        )
    return failures, defects


def _arrays(args: Args) -> Args:
    return eqx.filter(args, eqx.is_array)


def _row(tree: Any, at: int | tuple) -> Any:
    return jtu.tree_map(lambda leaf: leaf[at] if eqx.is_array(leaf) else leaf, tree)


def _entries(residual: State, batched: bool) -> tuple[np.ndarray, Callable]:
    """Magnitudes of shape (rows, entries), and the name of each entry."""
    paths, leaves = [], []
    for path, leaf in jtu.tree_flatten_with_path(residual)[0]:
        leaf = leaf if batched else leaf[None]
        paths.append((jtu.keystr(path), leaf.shape[1:]))
        magnitude = np.asarray(jnp.abs(leaf).astype(float))
        leaves.append(magnitude.reshape(leaf.shape[0], -1))

    def label(index: int) -> str:
        for path, shape in paths:
            size = int(np.prod(shape))
            if index < size:
                at = ", ".join(map(str, np.unravel_index(index, shape)))
                return f"{path}[{at}]" if at else path
            index -= size
        return ""

    return np.concatenate(leaves, axis=1), label


def jacobian_is_cheap(x: State) -> bool:
    """Whether a state is real, and small enough for its whole Jacobian."""
    leaves = jtu.tree_leaves(x)
    is_real = all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)
    return is_real and sum(int(np.size(leaf)) for leaf in leaves) <= 64
