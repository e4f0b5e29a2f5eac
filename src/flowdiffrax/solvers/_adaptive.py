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

    The step is the single jump of [`flowdiffrax.FlowMapSolver`][]; the estimate costs
    extra evaluations, two of the map for the default. Start with one jump: pass
    `dt0=2 * (t1 - t0)`, which Diffrax cuts at `t1`, where `t1 - t0` may by rounding end
    just before it. Diffrax's own guess, `dt0=None`, starts at 0.01.

    !!! warning "A tolerance below the map's own error"

        The error of a learned map does not vanish with the step, so that a tolerance
        below it asks for ever smaller steps. Bound them,
        `diffrax.PIDController(..., dtmin=abs(t1 - t0) / most_steps)`: steps of that
        length are then accepted whatever their error. With `force_dtmin=False` beside it,
        the solve ends there instead, with Diffrax's result for it. Errors of steps add
        up: what is kept is the tolerance of each, as far as the estimate sees it.

    A state that is NaN from the start is rejected by `PIDController` until `max_steps`.

    **Arguments:** as for [`flowdiffrax.FlowMapSolver`][], and

    - `estimate`: any [`flowdiffrax.estimates.AbstractErrorEstimate`][]. A
      [`flowdiffrax.estimates.SemigroupDefect`][] needs no teacher; the others trust the
      term's vector field.

    **Raises:** `TypeError` for an estimate that is none.
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
        """The order in the step at which the estimate vanishes."""
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
        """One jump and its estimate. See `diffrax.AbstractSolver.step`."""
        del solver_state, made_jump
        s, t, y0, direction = self._start(terms, t0, t1, y0)
        teacher = true_field(terms, direction)
        y1, error = self.estimate(self.flow_map, teacher, s, t, y0, args)
        # No step size can mend an infinite start: accept it, so that the result ends
        # the solve. A NaN start is beyond help, since `PIDController` rejects it
        # whatever the error, until `max_steps`.
        hopeless = ~all_finite(y0)
        error = jtu.tree_map(lambda e: jnp.where(hopeless, 0, jnp.abs(e)), error)
        dense_info = self._dense_info(t0, t1, y0, direction, args)
        return y1, error, dense_info, None, self._result(y1)
