"""Each identity as a residual, with the size of the terms that cancel in it."""

from collections.abc import Callable, Sequence
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
    [`flowdiffrax.FlowMapSolver`][]. Without `vectorise`, the jumps of a batch are taken
    one after the other, for maps that `jax.vmap` refuses. With `shares_args`, all of them
    have the same `args`.
    """

    jvp: Derivative = jax.jvp
    solver: Any = None
    num_steps: int = 3
    vectorise: bool = True
    shares_args: bool = False


class Jump(NamedTuple):
    """The jump at which identities are evaluated, from `s` to `t` by way of `u`.

    `X_st` is its end, which most identities need, and `solution` Diffrax's solve of it.
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
    solution: diffrax.Solution | None = None

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
    if jump.s.ndim == 0:
        return _evaluate_one(names, jump)
    # A batch of solves takes longer to compile than to run one after the other.
    in_turn = [name for name in names if name in SOLVED or not jump.settings.vectorise]
    at_once = [name for name in names if name not in in_turn]
    rows = {"s": jump.s, "u": jump.u, "t": jump.t, "x": jump.x}
    shared = {}
    if not jump.settings.shares_args:
        rows["args"], shared["args"] = eqx.partition(jump.args, eqx.is_array)

    def row(rows, names):
        if shared:
            rows = rows | {"args": eqx.combine(rows["args"], shared["args"])}
        return _evaluate_one(names, jump._replace(**rows))

    found = jax.vmap(lambda rows: row(rows, at_once))(rows) if at_once else {}
    if in_turn:
        found |= jax.lax.map(lambda rows: row(rows, in_turn), rows)
    return {name: found[name] for name in names}


def _evaluate_one(names: Sequence[str], jump: Jump) -> dict[str, tuple[State, Array]]:
    end = jump.between(jump.s, jump.t, jump.x)
    here = jump._replace(X_st=check_like(end, jump.x, "`flow_map`"))
    asked = SOLVED.intersection(names)
    if "dense_output" in asked or (asked and _is_diffrax(jump.settings.solver)):
        # One solve serves both.
        saveat = diffrax.SaveAt(t1=True, dense="dense_output" in asked)
        here = here._replace(solution=_solve(here, saveat))
    return {name: IDENTITIES[name].residual(here) for name in names}


evaluate_compiled = eqx.filter_jit(evaluate)


def _starts_as_identity(jump):
    x = jump.x
    return subtract(jump.between(jump.s, jump.s, x), x), largest(x)


def _semigroup(jump):
    flow_map, _, s, u, t, x, args, _, X_st, *_ = jump
    return semigroup_residual(flow_map, s, u, t, x, args), largest(x, X_st)


def _inverse(jump):
    flow_map, _, s, _, t, x, args, _, X_st, *_ = jump
    return inverse_residual(flow_map, s, t, x, args), largest(x, X_st)


def _tangent(jump):
    flow_map, field, _, _, t, x, args, *_ = jump
    residual = tangent_residual(flow_map, field, t, x, args)
    return residual, largest(x, field(t, x, args))


def _lagrangian(jump):
    flow_map, field, s, _, t, x, args, settings, X_st, *_ = jump
    residual = lagrangian_residual(flow_map, field, s, t, x, args, jvp=settings.jvp)
    return residual, largest(x, X_st, field(t, X_st, args))


def _eulerian(jump):
    flow_map, field, s, _, t, x, args, settings, X_st, *_ = jump
    residual = eulerian_residual(flow_map, field, s, t, x, args, jvp=settings.jvp)
    # The term that cancels is the start velocity, carried to the end.
    return residual, largest(x, X_st, field(s, x, args), field(t, X_st, args))


def _average_velocity(jump):
    flow_map, _, s, _, t, x, args, _, X_st, *_ = jump
    v_st = flow_map.average_velocity(s, t, x, args)
    return subtract(add_scaled(x, t - s, v_st), X_st), largest(x, X_st)


def _both_directions(jump):
    flow_map, _, s, _, t, x, args, _, X_st, *_ = jump
    there = flow_map.average_velocity(s, t, x, args)
    back = flow_map.average_velocity(t, s, X_st, args)
    # If a map computes only end points, its slope has the error rounding / gap. Fifty
    # rounding errors are enough for all maps in `tests`; ten were not, in float32.
    eps = rounding_unit(x)
    gap = jnp.abs(t - s).astype(float)
    blur = 50 * eps ** (1 / 3) / jnp.where(gap == 0, 1, gap)
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
    _, _, ends = _steps(jump)
    end = jtu.tree_map(lambda leaf: leaf[-1], ends)
    return subtract(_solved_end(jump), end), largest(jump.x, end)


def _solved_end(jump):
    flow_map, _, _, _, _, x, args, settings, *_ = jump
    if jump.solution is not None:
        return _cast_like(jtu.tree_map(lambda leaf: leaf[0], jump.solution.ys), x)
    return _cast_like(settings.solver(flow_map, x, _steps(jump)[0], args), x)


def _dense_output(jump):
    x = jump.x
    ts, starts, ends = _steps(jump)
    # Within each step, and at its ends.
    shares = jnp.asarray([0.0, 0.15, 0.4, 0.8, 1.0], ts.dtype)
    repeat = lambda leaf: jnp.repeat(leaf, shares.size, axis=0)
    first, last, starts = jtu.tree_map(repeat, (ts[:-1], ts[1:], starts))
    shares = jnp.tile(shares, len(ts) - 1)
    inside = _clip(jump, (1 - shares) * first + shares * last)
    truth = jax.vmap(jump.between)(first, inside, starts)
    found = _cast_like(jax.vmap(jump.solution.evaluate)(inside), x)
    gap = jtu.tree_map(lambda a, b: jnp.max(jnp.abs(a - b), axis=0), found, truth)
    return gap, largest(x, ends, truth)


def _clip(jump: Jump, times: Array) -> Array:
    # A solution is not defined beyond its ends, even by rounding.
    return jnp.clip(times, jnp.minimum(jump.s, jump.t), jnp.maximum(jump.s, jump.t))


def _steps(jump: Jump) -> tuple[Array, State, State]:
    """The times of equal steps, and the states that jumps reach at their ends."""
    num_steps = jump.settings.num_steps
    fractions = jnp.arange(num_steps + 1, dtype=jump.s.dtype) / num_steps
    ts = _clip(jump, (1 - fractions) * jump.s + fractions * jump.t)

    def step(x, times):
        s, t = times
        end = jump.between(s, t, x)
        return end, (x, end)

    starts, ends = jax.lax.scan(step, jump.x, (ts[:-1], ts[1:]))[1]
    return ts, starts, ends


def _cast_like(y: State, x: State) -> State:
    # Diffrax carries states of half precision in the precision of the times.
    return jtu.tree_map(lambda a, b: a.astype(b.dtype), y, x)


# Solving and dense output are asked of the same solve.
SOLVED = {"solver_equals_map", "dense_output"}


def _is_diffrax(solver: Any) -> bool:
    return solver is None or isinstance(solver, diffrax.AbstractSolver)


def _solve(jump: Jump, saveat: diffrax.SaveAt) -> diffrax.Solution:
    s, t, num_steps = jump.s, jump.t, jump.settings.num_steps
    solver = jump.settings.solver
    return diffrax.diffeqsolve(
        diffrax.ODETerm(jump.vector_field),  # pyright: ignore
        FlowMapSolver(jump.flow_map) if solver is None else solver,
        s,
        t,
        (t - s) / num_steps,
        jump.x,
        jump.args,
        saveat=saveat,
        max_steps=2 * num_steps + 2,
        # A solve that fails ends in a state that is not finite, and so in a failure.
        throw=False,
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
