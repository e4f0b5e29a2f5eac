"""A jump that the map predicts and the vector field corrects."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array

from .._time import times_like
from .._tree import all_finite, scale, subtract
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..estimates._clock import grade_of
from ..estimates._collocation import (
    Nodes,
    at_nodes,
    at_states,
    largest,
    picard_defects,
    probe_share,
    quadrature_gap,
    tail,
    total_size,
)
from ..estimates._krylov import Krylov
from ..estimates._newton import linearise, newton_step
from ..estimates._quadrature import between, last
from ._branches import run_if_any, where

# A prediction whose defect is a larger share of its displacement is not corrected.
_HOPELESS = 0.3
# A map that moves otherwise than the vector field by this share is not asked for more.
_WRONG, _PART = 0.5, 0.01
# A prediction whose quadrature is this many times outside of the tolerance is not either.
_UNRESOLVED = 4
# How much the last coefficients count, which show a start that is off as well.
_UNEVEN = 0.3
# What a Newton step is expected to leave of an error that it has not checked.
_LEFT = 0.1


def is_hopeless(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    norm: Callable[[State, State], Array],
) -> Array:
    """Whether the map moves otherwise than the vector field along a short part of a jump.

    This costs two evaluations of each, and spares most of those of a useless map.
    """
    s, t = times_like(x, s, t)
    start = (1 - _PART) * probe_share(s, t)
    us = between(s, t, jnp.stack([start, start + _PART]))
    states = jax.vmap(lambda u: flow_map(s, u, x, args))(us)
    rates = jax.vmap(lambda u, y: teacher(u, y, args))(us, states)
    moves = jtu.tree_map(lambda ys: ys[1] - ys[0], states)
    slopes = jtu.tree_map(lambda leaf: jnp.mean(leaf, axis=0), rates)
    expected = scale(us[1] - us[0], slopes)
    end = last(states)
    # What is far below the tolerance may be rounding.
    least = jnp.maximum(_WRONG * norm(total_size(moves, expected), end), 0.05)
    return ~(norm(subtract(moves, expected), end) < least)


def error_ratio(
    error: State, y0: State, y1: State, rtol: Any, atol: Any, norm: Callable
) -> Array:
    """Returns the norm of an error as Diffrax's step size controllers compute it."""

    def scaled(error, y0, y1):
        size = jnp.maximum(jnp.abs(y0), jnp.abs(y1))
        return error / (atol + rtol * size).astype(error.dtype)

    return jnp.asarray(norm(jtu.tree_map(scaled, error, y0, y1)))


class Prediction(NamedTuple):
    """The map's jump.

    **Attributes:**

    - `nodes`: the jump at its nodes.
    - `ratio`: the norm of its largest Picard defect and of the quadrature's error.
    - `error`: these, added up.
    - `is_promising`: whether it is nearly right, so that a shorter one may be taken.
    - `is_close`: whether it may be corrected as it is.
    """

    nodes: Nodes
    ratio: Array
    error: State
    is_promising: Array
    is_close: Array


def predict(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
    norm: Callable[[State, State], Array],
    implicit: bool,
) -> Prediction:
    """Evaluates the map and the vector field along the jump.

    For stiff systems, nodes are dense at the start if the solution slows down from there.
    """
    grade = None
    if implicit:
        share = probe_share(*times_like(x, s, t))
        grade = grade_of(flow_map, teacher, s, t, x, args, share)
    nodes = at_nodes(flow_map, teacher, s, t, x, args, num_nodes, grade)
    end = last(nodes.states)
    gap = quadrature_gap(nodes)
    error = total_size(largest(picard_defects(nodes)), gap)
    moves = jtu.tree_map(lambda ys, y: ys - jnp.expand_dims(y, 0), nodes.states, x)
    ratio = norm(error, end)
    is_promising = ratio < _HOPELESS * norm(largest(moves), end)
    is_close = is_promising & (norm(gap, end) < _UNRESOLVED)
    return Prediction(nodes, ratio, error, is_promising, is_close)


def correct(
    nodes: Nodes,
    teacher: VectorField,
    args: Args,
    norm: Callable[[State, State], Array],
    wanted: Array,
    implicit: bool,
    linear_solver: Krylov | None,
) -> tuple[State, State]:
    """Returns the states at the nodes after one or two Newton steps, and their error.

    The first one is trusted if `norm(error, end)`, with a part of the error that it
    corrects, is well below 1, unless the fallback is implicit. Otherwise the equations
    are evaluated at the corrected states, so that the estimated error is what the first
    step has left. In stiff systems, states that decay fast may be right at the nodes and
    far off between them. The error includes how wrong the polynomial is at the probe, and
    its last coefficients: a solution that oscillates fast may look right at a probe.
    """
    linear = linearise(nodes, teacher, args, linear_solver)

    # What a step changes of the nodes.
    changing = lambda nodes: (nodes.states, nodes.rates, nodes.probe_rate)

    def step(carry):
        changed, *_, is_first, _ = carry
        states, rates, probe_rate = changed
        at = nodes._replace(states=states, rates=rates, probe_rate=probe_rate)
        errors, gap, between = newton_step(at, linear)
        states = subtract(states, errors)
        part = jnp.where(is_first & (not implicit), _LEFT, 1.0)
        error = total_size(scale(part, last(errors)), gap)
        if implicit:
            uneven = scale(jnp.full_like(part, _UNEVEN), tail(at, states))
            error = total_size(error, total_size(between, uneven))
        is_trusted = (norm(error, last(states)) < 0.5) & (not implicit)
        is_done = ~wanted | ~is_first | is_trusted
        move = lambda: changing(at_states(at, states, teacher, args))
        moved = where(is_done, changed, run_if_any(~is_done, move))
        return moved, states, error, is_first & False, is_done

    no = wanted & False
    start = changing(nodes), nodes.states, last(nodes.states), ~no, no
    _, states, error, _, _ = lax.while_loop(lambda carry: ~carry[-1], step, start)
    return states, error


def is_fine(ratio: Array, states: State) -> Array:
    """Whether a jump may be taken. A NaN compares as false."""
    return (ratio < 1) & all_finite(states)
