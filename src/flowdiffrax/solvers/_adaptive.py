from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._tree import all_finite
from .._types import Args, State, Time, TwoTimeMap
from ..estimates._base import AbstractErrorEstimate, check_estimate
from ..estimates._defects import SemigroupDefect
from ._base import AbstractFlowMapSolver, Step, Terms, true_field
from ._jump import JumpInterpolation


class AdaptiveFlowMapSolver(AbstractFlowMapSolver, diffrax.AbstractAdaptiveSolver):
    r"""A flow map with an error estimate, so that `PIDController` chooses the jumps.

    Each step is one jump, as in [`flowdiffrax.FlowMapSolver`][]. The estimate costs extra
    evaluations; the default takes two of the map. To start with one jump over the whole
    interval, pass `dt0=2 * (t1 - t0)`, which Diffrax cuts at `t1`; rounding may let a
    step of `t1 - t0` end just before it. Diffrax's own guess, `dt0=None`, starts at 0.01.

    !!! warning "A tolerance below the map's own error"

        The error of a learned map does not vanish with the step, so a tolerance below it
        leads to ever smaller steps. Bound them with
        `diffrax.PIDController(..., dtmin=abs(t1 - t0) / most_steps)`: steps of that
        length are accepted whatever their error. If you also pass `force_dtmin=False`,
        the solve ends there instead, with Diffrax's result for this case. The errors of
        steps add up: the tolerance holds for each step, as far as the estimate detects
        its error.

    `PIDController` rejects a state that is NaN from the start until `max_steps`.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `estimate`: any [`flowdiffrax.estimates.AbstractErrorEstimate`][]. The default,
      [`flowdiffrax.estimates.SemigroupDefect`][], needs no teacher; the others use the
      term's vector field as the teacher.
    - `check_finite`: whether a non-finite state ends the solve, with the result
      `diffrax.RESULTS.nonlinear_divergence`.
    - `dense_degree`: degree of the stored series, at least 1.

    **Raises:** `TypeError` if `estimate` is not an
    [`flowdiffrax.estimates.AbstractErrorEstimate`][]; otherwise as
    [`flowdiffrax.FlowMapSolver`][].
    """

    flow_map: TwoTimeMap
    estimate: AbstractErrorEstimate = SemigroupDefect()
    check_finite: bool = eqx.field(static=True, default=True)
    dense_degree: int = eqx.field(static=True, default=16)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., JumpInterpolation]] = JumpInterpolation

    def __check_init__(self):
        check_estimate(self.estimate)

    def error_order(self, terms: Terms) -> int:
        """The power of the step at which the estimate vanishes."""
        del terms
        return self.estimate.order

    def step(
        self,
        terms: Terms,
        t0: Time,
        t1: Time,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> Step:
        """Takes one jump and estimates its error. See `diffrax.AbstractSolver.step`."""
        del solver_state, made_jump
        s, t, y0, direction = self._start(terms, t0, t1, y0)
        teacher = true_field(terms, direction)
        y1, error = self.estimate(self.flow_map, teacher, s, t, y0, args)
        # If the initial state is infinite, no step size helps: accept the step, so that
        # its result ends the solve. This cannot help a NaN state, which `PIDController`
        # rejects whatever the error, until `max_steps`.
        hopeless = ~all_finite(y0)
        error = jtu.tree_map(lambda e: jnp.where(hopeless, 0, jnp.abs(e)), error)
        dense_info = self._dense_info(t0, t1, y0, direction, args)
        return y1, error, dense_info, None, self._result(y1)
