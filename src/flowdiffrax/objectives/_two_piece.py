"""Difference quotients of the equations: jumps in two pieces, one of them short.

Suppose the short piece is a share $a$ of the jump. Then the target of $v_{s,t}$ is off by
$a$ times the residual, so a plain regression has values of order $a^2$ and gradients of
order $a$. The quotients divide the fixed difference by $a$, so that values and gradients
converge to those of the derivative as $a$ falls.
"""

from jaxtyping import ArrayLike

from .._time import times_like
from .._tree import freeze, scale, subtract
from .._types import Args, State, Time, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..identities import two_piece_target


def eulerian_quotient(
    flow_map: AbstractFlowMap,
    s: Time,
    t: Time,
    x: State,
    w: State,
    share: ArrayLike,
    args: Args,
) -> State:
    """The Eulerian residual, up to its sign: a step along `w`, then the map.

    The step covers `share` of the jump. Gradients flow through the leading velocity.
    """
    frozen = freeze(flow_map)
    target = two_piece_target(
        s,
        t,
        x,
        share,
        lambda s, u, x: w,
        lambda u, t, x: frozen.average_velocity(u, t, x, args),
    )
    return _quotient(flow_map.average_velocity(s, t, x, args), target, share)


def lagrangian_quotient(
    flow_map: AbstractFlowMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    share: ArrayLike,
    args: Args,
) -> State:
    """The Lagrangian residual: the map, then a step along the teacher.

    The step covers `share` of the jump. Gradients flow through the leading velocity.
    """
    frozen = freeze(flow_map)
    target = two_piece_target(
        s,
        t,
        x,
        1 - share,
        lambda s, u, x: frozen.average_velocity(s, u, x, args),
        lambda u, t, x: teacher(u, x, args),
    )
    return _quotient(flow_map.average_velocity(s, t, x, args), target, share)


def _quotient(v_st: State, target: State, share: ArrayLike) -> State:
    (share,) = times_like(v_st, share)
    tangent = scale(1 / share, subtract(v_st, target))
    # The value is the tangent, the gradient that of v_st.
    return subtract(v_st, freeze(subtract(v_st, tangent)))
