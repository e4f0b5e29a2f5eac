from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx

from .._check import check_like
from .._types import Args, State, Time, TwoTimeMap
from ._base import AbstractFlowMapSolver, Step, Terms
from ._jump import JumpInterpolation


class FlowMapSolver(AbstractFlowMapSolver):
    r"""A flow map as a Diffrax solver: each step is one jump, $y_1 = X_{t_0,t_1}(y_0)$.

    Use it in place of `diffrax.Tsit5()` in `diffrax.diffeqsolve`, and change nothing
    else. The term holds the exact vector field; if you have none, use
    `diffrax.ODETerm(flow_map.velocity)`. Each step costs one evaluation of the map and
    none of the vector field, in either direction of time.

    ```python
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), FlowMapSolver(flow_map), t0=0, t1=1, dt0=0.25, y0=x
    )
    ```

    There is no error estimate, so use fixed steps: `diffrax.ConstantStepSize` or
    `diffrax.StepTo`. For `diffrax.PIDController`, use
    [`flowdiffrax.AdaptiveFlowMapSolver`][] or `diffrax.HalfSolver(FlowMapSolver(...))`.

    !!! info "Dense output"

        `SaveAt(ts=...)` evaluates the map itself at each time, which is exact and costs
        one evaluation for each. `SaveAt(dense=True)` and events store a Chebyshev series
        of each jump, which costs `dense_degree` evaluations per step. These evaluations
        are made only if the series is stored.

        Diffrax looks for events at the ends of steps. As with any solver, an event that
        begins and ends within a long jump is missed; take short enough steps, or wrap the
        solver in a [`flowdiffrax.solvers.EventSolver`][].

    !!! info "Differentiation"

        `RecursiveCheckpointAdjoint`, `DirectAdjoint` and `ForwardMode` differentiate
        through the map: in `y0`, `args`, times and the map's parameters.
        `ImplicitAdjoint` differentiates the steady state of the *term's* vector field:
        gradients in the map's parameters are zero.
        `BacksolveAdjoint(solver=...)` with a classical solver integrates the term's
        adjoint ODE backwards. It does not involve the map's parameters, and gradients in
        them raise an error, "Unexpected tangent". Without a classical solver, Diffrax
        raises an error about incompatible terms: the map solves the ODE, not its adjoint.

    !!! warning "Times in half precision"

        Diffrax treats a step that ends within 100 units in the last place of `t1` as
        ending there. In bfloat16 that is a third of [0, 1], and steps are skipped. Pass
        times in float32 or float64.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `check_finite`: whether a non-finite state ends the solve, with the result
      `diffrax.RESULTS.nonlinear_divergence`. Diffrax's own solvers return NaN and report
      success.
    - `dense_degree`: degree of the stored series, at least 1. For a smooth jump, the
      error decreases geometrically with the degree.

    **Raises:** when constructed, `TypeError` for a map that is not callable and
    `ValueError` for a `dense_degree` less than 1. In the solve, `ValueError` or
    `TypeError` if the map's output is not like its input, and an error for times outside
    the map's `time_range`. Diffrax refuses terms other than `diffrax.ODETerm`.
    """

    flow_map: TwoTimeMap
    check_finite: bool = eqx.field(static=True, default=True)
    dense_degree: int = eqx.field(static=True, default=16)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., JumpInterpolation]] = JumpInterpolation

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
        """Takes one jump. See `diffrax.AbstractSolver.step`."""
        del solver_state, made_jump
        s, t, y0, direction = self._start(terms, t0, t1, y0)
        y1 = check_like(self.flow_map(s, t, y0, args), y0, "`flow_map`")
        dense_info = self._dense_info(t0, t1, y0, direction, args)
        return y1, None, dense_info, None, self._result(y1)
