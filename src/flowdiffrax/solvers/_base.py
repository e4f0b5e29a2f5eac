from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._check import check_bools, check_count
from .._tree import all_finite
from .._types import AbstractVar, Args, State, Time, TwoTimeMap, VectorField
from ..flow_maps._base import out_of_range_message, times_out_of_range
from ..flow_maps._inverse import check_composable
from ._jump import Jump

Terms = PyTree[diffrax.AbstractTerm]


Step = tuple[State, State | None, dict[str, Any], None, diffrax.RESULTS]


class AbstractFlowMapSolver(diffrax.AbstractSolver):
    """Base class of the two solvers: true times, checks, dense output, the teacher.

    Three facts about Diffrax determine the code below.

    1. If `t1 < t0`, Diffrax negates all times, so that they always increase, and negates
       the vector field. A learned map needs the true times. The control of an ODE term
       over one unit of Diffrax's time is the sign that restores them.
    2. `interpolation_cls` is stored in the solution as static data, so it must not hold
       the map's arrays. `Jump` holds them instead.
    3. `term_structure` makes Diffrax refuse SDEs and other terms before any of this.
    """

    flow_map: AbstractVar[TwoTimeMap]
    check_finite: AbstractVar[bool]
    dense_degree: AbstractVar[int]

    def __check_init__(self):
        check_composable(self.flow_map)
        check_count(self.dense_degree, 1, "dense_degree")
        check_bools(check_finite=self.check_finite)

    def order(self, terms: Terms) -> int:
        """One, since a map's local error is mostly the step times its velocity's error.

        This matters for `diffrax.HalfSolver`, whose error estimate then has order two,
        like the semigroup defect.
        """
        del terms
        return 1

    def init(self, terms: Terms, t0: Time, t1: Time, y0: State, args: Args) -> None:
        """Returns no state: nothing is carried from step to step."""
        del terms, t0, t1, y0, args

    def func(self, terms: Terms, t0: Time, y0: State, args: Args) -> State:
        """Evaluates the teacher, for events and initial step sizes."""
        return terms.vf(t0, y0, args)

    def _start(
        self, terms: Terms, t0: Time, t1: Time, y0: State
    ) -> tuple[Array, Array, State, Array]:
        """Returns the true times, the checked state, and the direction of time."""
        s, t, direction = true_times(terms, t0, t1)
        outside = times_out_of_range(self.flow_map, s, t)
        if outside is not None:
            y0 = eqx.error_if(y0, outside, out_of_range_message(self.flow_map))
        return s, t, y0, direction

    def _dense_info(self, t0, t1, y0, direction, args) -> dict[str, Any]:
        flow = lambda t: self.flow_map(direction * t0, direction * t, y0, args)
        return {"jump": Jump.start(flow, t0, t1, y0, self.dense_degree)}

    def _result(self, y1: State) -> diffrax.RESULTS:
        if not self.check_finite:
            return diffrax.RESULTS.successful
        return diffrax.RESULTS.where(
            all_finite(y1),
            diffrax.RESULTS.successful,
            diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore
        )


def true_times(terms: Terms, t0: Time, t1: Time) -> tuple[Array, Array, Array]:
    """Converts Diffrax's times to the true times, and returns the direction of time."""
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    direction = jnp.sign(terms.contr(jnp.zeros_like(t0), jnp.ones_like(t0)))
    return direction * t0, direction * t1, direction


def true_field(terms: Terms, direction: Array) -> VectorField:
    """Returns the term's vector field as a function of the true time."""

    def field(t: Time, y: State, args: Args) -> State:
        t = jnp.asarray(t)
        return terms.vf(direction.astype(t.dtype) * t, y, args)

    return field
