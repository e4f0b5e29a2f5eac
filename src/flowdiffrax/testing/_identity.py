"""Each identity as a residual, with the size of the terms that cancel in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._check import check_like
from .._derivative import Derivative
from .._time import time_dtype
from .._tree import add_scaled, ravel, subtract
from .._types import Args, State, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..identities import (
    eulerian_residual,
    inverse_residual,
    lagrangian_residual,
    semigroup_residual,
    tangent_residual,
)
from ..solvers._fixed import FlowMapSolver


class Settings(NamedTuple):
    """How identities are evaluated.

    `solver` is a Diffrax solver or a function `(flow_map, x, ts, args) -> x`; `None` is
    [`flowdiffrax.FlowMapSolver`][].
    """

    jvp: Derivative = jax.jvp
    solver: Any = None
    num_steps: int = 3


class Jump(NamedTuple):
    """The jump at which identities are evaluated, from `s` to `t` by way of `u`.

    `X_st` is its end, which most identities need.
    """

    flow_map: AbstractFlowMap
    vector_field: VectorField
    s: Array
    u: Array
    t: Array
    x: State
    args: Args
    settings: Settings
    X_st: State = None

    def between(self, s: Array, t: Array, x: State) -> State:
        return self.flow_map(s, t, x, self.args)


class Identity(NamedTuple):
    """One identity.

    - `formula`: the formula that is printed.
    - `times`: the names of its times, in the order of the assertion's arguments.
    - `residual`: maps a jump to the residual and the largest entry of the terms that
      cancel in it.
    - `causes`: the usual causes of a failure.
    - `needs_field`: whether its assertion takes a vector field.
    - `differentiates`: whether it differentiates the map.
    - `accuracy`: the power of the rounding unit that is the default tolerance.
    """

    formula: str
    times: str
    residual: Callable[[Jump], tuple[State, Array]]
    causes: str
    needs_field: bool = False
    differentiates: bool = False
    accuracy: float = 2 / 3


def largest(*states: State) -> Array:
    """The largest entry of some states, by magnitude."""
    sizes = [
        jnp.max(jnp.abs(leaf), initial=0).astype(float)
        for leaf in jtu.tree_leaves(states)
    ]
    return jnp.max(jnp.stack(sizes))


def rounding_unit(x: State) -> float:
    """The rounding unit of the least precise leaf."""
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max(float(jnp.finfo(dtype).eps) for dtype in floats)


def evaluate(names: tuple[str, ...], jump: Jump) -> dict[str, tuple[State, Array]]:
    """Residuals and sizes at one jump, or at a batch of them."""

    def one(s, u, t, x, args):
        end = check_like(jump.flow_map(s, t, x, args), x, "`flow_map`")
        here = jump._replace(s=s, u=u, t=t, x=x, args=args, X_st=end)
        return {name: IDENTITIES[name].residual(here) for name in names}

    inputs = (jump.s, jump.u, jump.t, jump.x, jump.args)
    if jump.s.ndim == 0:
        return one(*inputs)
    axes = eqx.if_array(0)
    return eqx.filter_vmap(one, in_axes=(0, 0, 0, axes, axes))(*inputs)


evaluate_compiled = eqx.filter_jit(evaluate)


def _starts_as_identity(jump):
    x = jump.x
    return subtract(jump.between(jump.s, jump.s, x), x), largest(x)


def _semigroup(jump):
    flow_map, _, s, u, t, x, args, _, X_st = jump
    return semigroup_residual(flow_map, s, u, t, x, args), largest(x, X_st)


def _inverse(jump):
    flow_map, _, s, _, t, x, args, _, X_st = jump
    return inverse_residual(flow_map, s, t, x, args), largest(x, X_st)


def _tangent(jump):
    flow_map, field, _, _, t, x, args, _, _ = jump
    residual = tangent_residual(flow_map, field, t, x, args)
    return residual, largest(x, field(t, x, args))


def _lagrangian(jump):
    flow_map, field, s, _, t, x, args, settings, X_st = jump
    residual = lagrangian_residual(flow_map, field, s, t, x, args, jvp=settings.jvp)
    return residual, largest(x, X_st, field(t, X_st, args))


def _eulerian(jump):
    flow_map, field, s, _, t, x, args, settings, X_st = jump
    residual = eulerian_residual(flow_map, field, s, t, x, args, jvp=settings.jvp)
    # The term that cancels is the start velocity, carried to the end.
    return residual, largest(x, X_st, field(s, x, args), field(t, X_st, args))


def _average_velocity(jump):
    flow_map, _, s, _, t, x, args, _, X_st = jump
    v_st = flow_map.average_velocity(s, t, x, args)
    return subtract(add_scaled(x, t - s, v_st), X_st), largest(x, X_st)


def _both_directions(jump):
    flow_map, _, s, _, t, x, args, _, X_st = jump
    there = flow_map.average_velocity(s, t, x, args)
    back = flow_map.average_velocity(t, s, X_st, args)
    # If a map computes only end points, its slope has the error rounding / gap.
    eps = rounding_unit(x)
    gap = jnp.abs(t - s).astype(float)
    blur = 10 * eps ** (1 / 3) / jnp.where(gap == 0, 1, gap)
    return subtract(there, back), largest(x, X_st, there) * (1 + blur)


def _positive_jacobian(jump):
    s, t, x, jvp = jump.s, jump.t, jump.x, jump.settings.jvp
    vector, unravel = ravel(x, "`assert_positive_jacobian`")
    end = lambda vector: ravel(jump.between(s, t, unravel(vector)), "The map")[0]
    column = lambda direction: jvp(end, (vector,), (direction,))[1]
    columns = jax.vmap(column)(jnp.eye(vector.size, dtype=vector.dtype))
    # LAPACK has no bfloat16.
    sign, log_abs = jnp.linalg.slogdet(columns.astype(time_dtype(x)))
    # Never round to zero, which would mean no defect.
    size = jnp.maximum(jnp.exp(log_abs), jnp.finfo(log_abs.dtype).tiny)
    defect = jnp.where(sign > 0, 0, jnp.where(sign < 0, -size, jnp.nan))
    return defect, jnp.zeros_like(defect)


def _solver_equals_map(jump):
    flow_map, _, s, _, t, x, args, settings, _ = jump
    num_steps = settings.num_steps
    fractions = jnp.arange(num_steps + 1, dtype=s.dtype) / num_steps
    ts = (1 - fractions) * s + fractions * t
    solver = _solver(jump)
    if isinstance(solver, diffrax.AbstractSolver):
        solution = _solve(jump, solver, diffrax.SaveAt(t1=True))
        found = jtu.tree_map(lambda leaf: leaf[0], solution.ys)
    else:
        found = solver(flow_map, x, ts, args)
    found = _cast_like(found, x)
    end = x
    for k in range(num_steps):
        end = jump.between(ts[k], ts[k + 1], end)
    return subtract(found, end), largest(x, end)


def _dense_output(jump):
    s, t, x = jump.s, jump.t, jump.x
    num_steps = jump.settings.num_steps
    solution = _solve(jump, _solver(jump), diffrax.SaveAt(dense=True))
    # Within each step, and at its ends.
    shares = jnp.asarray([0.0, 0.15, 0.4, 0.8, 1.0], s.dtype)
    worst, sizes, start = None, [largest(x)], x
    # The solution is not defined beyond its ends, even by rounding.
    inside = lambda time: jnp.clip(time, jnp.minimum(s, t), jnp.maximum(s, t))
    shares_of_steps = [k / num_steps for k in range(num_steps + 1)]
    ts = [inside((1 - share) * s + share * t) for share in shares_of_steps]
    for first, last in zip(ts[:-1], ts[1:], strict=True):
        ends = inside((1 - shares) * first + shares * last)
        truth = jax.vmap(lambda u: jump.between(first, u, start))(ends)  # noqa: B023
        found = _cast_like(jax.vmap(solution.evaluate)(ends), x)
        gap = jtu.tree_map(lambda a, b: jnp.max(jnp.abs(a - b), axis=0), found, truth)
        worst = gap if worst is None else jtu.tree_map(jnp.maximum, worst, gap)
        sizes.append(largest(truth))
        start = jump.between(first, last, start)
    return worst, jnp.max(jnp.stack(sizes))


def _cast_like(y: State, x: State) -> State:
    # Diffrax carries states of half precision in the precision of the times.
    return jtu.tree_map(lambda a, b: a.astype(b.dtype), y, x)


def _solver(jump):
    given = jump.settings.solver
    return FlowMapSolver(jump.flow_map) if given is None else given


def _solve(jump: Jump, solver: Any, saveat: diffrax.SaveAt) -> diffrax.Solution:
    s, t, num_steps = jump.s, jump.t, jump.settings.num_steps
    return diffrax.diffeqsolve(
        diffrax.ODETerm(jump.vector_field),  # pyright: ignore
        solver,
        s,
        t,
        (t - s) / num_steps,
        jump.x,
        jump.args,
        saveat=saveat,
        max_steps=2 * num_steps + 2,
    )


IDENTITIES = {
    "starts_as_identity": Identity(
        "X_{s,s}(x) = x",
        "s",
        _starts_as_identity,
        "the factor (t - s) is missing, or the callable returns a velocity, not a state",
    ),
    "semigroup": Identity(
        "X_{u,t}(X_{s,u}(x)) = X_{s,t}(x)",
        "sut",
        _semigroup,
        "times that are swapped, rounded or off by one, a map that saw too few jumps in "
        "training, or numbers cast to fewer digits inside",
    ),
    "inverse": Identity(
        "X_{t,s}(X_{s,t}(x)) = x",
        "st",
        _inverse,
        "a map that was trained in one direction of time only, |t - s| instead of t - s, "
        "or a state that is clipped",
    ),
    "tangent": Identity(
        "v_{t,t}(x) = b_t(x)",
        "t",
        _tangent,
        "a velocity with the wrong sign or clock, times swapped, or training without the "
        "diagonal",
        needs_field=True,
        differentiates=True,
    ),
    "lagrangian": Identity(
        "d/dt X_{s,t}(x) = b_t(X_{s,t}(x))",
        "st",
        _lagrangian,
        "the field evaluated at the start of the jump, an end time whose derivative is "
        "stopped or rounded away, or a factor that is missing in a custom derivative",
        needs_field=True,
        differentiates=True,
    ),
    "eulerian": Identity(
        "d/ds X_{s,t}(x) + grad X_{s,t}(x) b_s(x) = 0",
        "st",
        _eulerian,
        "a state or a start time whose derivative is stopped, the field at the wrong "
        "time, or the wrong sign",
        needs_field=True,
        differentiates=True,
    ),
    "average_velocity": Identity(
        "X_{s,t}(x) = x + (t - s) v_{s,t}(x)",
        "st",
        _average_velocity,
        "`average_velocity` was written separately from `jump`, and differs from it",
    ),
    "both_directions": Identity(
        "v_{s,t}(x) = v_{t,s}(X_{s,t}(x))",
        "st",
        _both_directions,
        "|t - s| instead of t - s, an embedding of the jump that loses its sign, or "
        "training in one direction of time only",
        differentiates=True,
    ),
    "positive_jacobian": Identity(
        "det grad X_{s,t}(x) > 0",
        "st",
        _positive_jacobian,
        "a map that folds or reflects space, or that ignores or clips the state: "
        "trajectories of an ODE never cross",
        differentiates=True,
    ),
    "solver_equals_map": Identity(
        "a solve in equal steps = the same jumps in turn",
        "st",
        _solver_equals_map,
        "a grid that is off by one, or Diffrax's time instead of the true one: Diffrax "
        "negates times when it solves backwards",
    ),
    "dense_output": Identity(
        "sol.evaluate(u) = X_{t_k,u}(x_k)",
        "st",
        _dense_output,
        "an interpolation that does not follow the map, or steps that are too long for "
        "its degree",
        accuracy=1 / 2,
    ),
}
