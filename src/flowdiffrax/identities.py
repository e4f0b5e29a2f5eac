"""The identities that a flow map satisfies, each defined once.

Losses, metrics, error estimates and tests call these functions. Each returns a residual
like `x` that vanishes for all times and states if the map is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._check import check_flow_map, check_like
from ._derivative import Derivative
from ._time import times_like
from ._tree import add_scaled, scale, subtract
from ._types import Args, State, Time, TwoTimeMap, VectorField
from .flow_maps._base import AbstractFlowMap

__all__ = [
    "eulerian_residual",
    "inverse_residual",
    "lagrangian_residual",
    "semigroup_residual",
    "tangent_residual",
    "two_piece_target",
]


def end_derivative(
    flow_map: TwoTimeMap,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative = jax.jvp,
) -> tuple[State, State]:
    r"""Returns $X_{s,t}(x)$ and $\partial_t X_{s,t}(x)$, from one forward-mode pass.

    If `flow_map` is an `average_velocity`, returns $v_{s,t}$ and $\partial_t v_{s,t}$.
    """
    s, t = times_like(x, s, t)
    end = lambda t: flow_map(s, t, x, args)
    return jvp(end, (t,), (jnp.ones_like(t),))


def transport_derivative(
    flow_map: TwoTimeMap,
    s: Time,
    t: Time,
    x: State,
    w: State,
    args: Args = None,
    *,
    jvp: Derivative = jax.jvp,
) -> tuple[State, State]:
    r"""Returns $X_{s,t}(x)$ and $\partial_s X_{s,t}(x) + \nabla X_{s,t}(x)\,w$.

    This takes one forward-mode pass along the joint direction $(1, w)$ in $(s, x)$. If
    `flow_map` is an `average_velocity`, returns the same for $v_{s,t}$.
    """
    s, t = times_like(x, s, t)
    start = lambda s, x: flow_map(s, t, x, args)
    return jvp(start, (s, x), (jnp.ones_like(s), w))


def lagrangian_residual(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative = jax.jvp,
) -> State:
    r"""The gap between the map's end-time derivative and the teacher.

    Computes $\partial_t X_{s,t}(x) - b_t(X_{s,t}(x))$. Together with
    $X_{s,s}(x) = x$, this vanishes everywhere if and only if $X$ is the flow map of $b$.

    !!! info "Numerics"

        It takes one forward-mode pass and one teacher call, and forms no spatial
        Jacobian. It is safe at `s == t`, where it compares $v_{t,t}$ with $b_t$.

    **Arguments:**

    - `flow_map`, `teacher`: the map $X$ and the velocity $b$ that it should follow.
    - `s`, `t`: start and end times, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to both, for example a class label.
    - `jvp`: how the derivative is taken: `jax.jvp` or a
      [`flowdiffrax.objectives.FiniteDifference`][].

    **Returns:** a state like `x`.

    ??? cite "Reference"

        Lagrangian map distillation, equation (3.1):
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    return end_and_residual(flow_map, teacher, s, t, x, args, jvp=jvp)[1]


def end_and_residual(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative = jax.jvp,
) -> tuple[State, State]:
    r"""Returns $X_{s,t}(x)$ and its Lagrangian residual, from one forward-mode pass."""
    check_flow_map(flow_map)
    s, t = times_like(x, s, t)
    X_st, dX_dt = end_derivative(flow_map, s, t, x, args, jvp=jvp)
    X_st = check_like(X_st, x, "`flow_map`")
    b_t = check_like(teacher(t, X_st, args), X_st, "`teacher`")
    return X_st, subtract(dX_dt, b_t)


def eulerian_residual(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    jvp: Derivative = jax.jvp,
) -> State:
    r"""How fast the end moves as the start moves along the teacher's trajectory.

    Computes $\partial_s X_{s,t}(x) + \nabla X_{s,t}(x)\,b_s(x)$, the total derivative
    of $X_{s,t}(x_s)$ in $s$. It vanishes for the flow map, since jumps from all points of
    a trajectory arrive at the same state.

    !!! info "Numerics"

        It takes one teacher call and one forward-mode pass, in the joint direction
        $(1, b_s)$.

    **Arguments:**

    - `flow_map`, `teacher`: the map $X$ and the velocity $b$ that it should follow.
    - `s`, `t`: start and end times, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to both.
    - `jvp`: how the derivative is taken: `jax.jvp` or a
      [`flowdiffrax.objectives.FiniteDifference`][].

    **Returns:** a state like `x`.

    ??? cite "Reference"

        Eulerian map distillation: [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    check_flow_map(flow_map)
    s, t = times_like(x, s, t)
    b_s = check_like(teacher(s, x, args), x, "`teacher`")
    _, residual = transport_derivative(flow_map, s, t, x, b_s, args, jvp=jvp)
    return residual


def semigroup_residual(
    flow_map: TwoTimeMap, s: Time, u: Time, t: Time, x: State, args: Args = None
) -> State:
    r"""The gap between two jumps and one, $X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)$.

    It needs no teacher. It therefore does not detect a map that follows the wrong ODE
    consistently; combine it with [`flowdiffrax.tangent_residual`][].

    **Arguments:**

    - `flow_map`: the map $X$.
    - `s`, `u`, `t`: start, intermediate and end time, in any order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to the map.

    **Returns:** a state like `x`.

    ??? cite "Reference"

        Progressive self-distillation:
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """
    check_flow_map(flow_map)
    s, u, t = times_like(x, s, u, t)
    X_su = flow_map(s, u, x, args)
    return subtract(flow_map(u, t, X_su, args), flow_map(s, t, x, args))


def tangent_residual(
    flow_map: AbstractFlowMap,
    teacher: VectorField,
    t: Time,
    x: State,
    args: Args = None,
) -> State:
    r"""The gap between the map's velocity and the teacher, $v_{t,t}(x) - b_t(x)$.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the velocity $b$ that it should follow.
    - `t`: the time.
    - `x`: one state at time `t`; use `jax.vmap` for a batch.
    - `args`: passed to both.

    **Returns:** a state like `x`.
    """
    check_flow_map(flow_map)
    (t,) = times_like(x, t)
    b_t = check_like(teacher(t, x, args), x, "`teacher`")
    return subtract(flow_map.velocity(t, x, args), b_t)


def inverse_residual(
    flow_map: TwoTimeMap, s: Time, t: Time, x: State, args: Args = None
) -> State:
    r"""The gap between the end and start of a round trip, $X_{t,s}(X_{s,t}(x)) - x$.

    **Arguments:**

    - `flow_map`: the map $X$.
    - `s`, `t`: start and end times, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to the map.

    **Returns:** a state like `x`.
    """
    check_flow_map(flow_map)
    s, t = times_like(x, s, t)
    return subtract(flow_map(t, s, flow_map(s, t, x, args), args), x)


def two_piece_target(
    s: Time,
    t: Time,
    x: State,
    share: Time,
    first: Callable[[Time, Time, State], State],
    second: Callable[[Time, Time, State], State],
) -> State:
    r"""Computes the average velocity of a jump from those of its two pieces.

    It uses the semigroup identity for average velocities. If $a$ is the first piece's
    share of the jump and $u = s + a (t - s)$,

    $$v_{s,t}(x) = a\,v_{s,u}(x) + (1 - a)\,v_{u,t}(X_{s,u}(x)).$$

    Every objective without derivatives regresses on the right-hand side. If the first
    piece is short and uses an instantaneous velocity, this is a difference quotient of
    the Eulerian equation; if the last piece is, it is one of the Lagrangian equation.

    **Arguments:**

    - `s`, `t`: start and end of the jump.
    - `x`: one state at time `s`.
    - `share`: $a$ in [0, 1].
    - `first`, `second`: average velocities of the pieces, `(start, end, x) -> v`.

    **Returns:** a state like `x`.

    ??? cite "Reference"

        Progressive self-distillation, in velocities:
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), section 3.
    """
    s, t, share = times_like(x, s, t, share)
    u = s + share * (t - s)
    v_su = check_like(first(s, u, x), x, "The first piece")
    v_ut = check_like(second(u, t, add_scaled(x, u - s, v_su)), x, "The second piece")
    return add_scaled(scale(share, v_su), 1 - share, v_ut)
