from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ._custom_types import AbstractVar, Args, State, Time, TwoTimeMap, VectorField
from ._estimate import AbstractErrorEstimate, SemigroupDefect, check_estimate
from ._flow_map.base import out_of_range_message, times_out_of_range
from ._flow_map.wrappers import check_composable
from ._misc import all_finite, check_like, subtract

_Terms = PyTree[diffrax.AbstractTerm]
_Step = tuple[State, State | None, dict[str, Any], None, diffrax.RESULTS]


class AbstractFlowMapSolver(diffrax.AbstractSolver):
    """What the two solvers share: true times, checks, dense output, the teacher.

    Three facts about Diffrax decide the code below.

    1. If `t1 < t0`, Diffrax negates all times, so that they always rise, and turns the
       vector field around. A learned map must be given the true times. The control of
       an ODE term over one unit of Diffrax's clock is the true clock's sign.
    2. `interpolation_cls` outlives the solve as static data of the solution, so that it
       must not carry the map's arrays. They ride on `Jump` instead.
    3. `term_structure` makes Diffrax refuse SDEs and other terms before any of this.
    """

    flow_map: AbstractVar[TwoTimeMap]
    check_finite: AbstractVar[bool]
    dense_degree: AbstractVar[int]

    def __check_init__(self):
        check_composable(self.flow_map)
        check_dense_degree(self.dense_degree)

    def order(self, terms: _Terms) -> int:
        """One: a map's local error is mostly the step times the error of its velocity.

        It matters for `diffrax.HalfSolver`, whose error estimate then has order two, as
        the semigroup defect does.
        """
        del terms
        return 1

    def init(self, terms: _Terms, t0: Time, t1: Time, y0: State, args: Args) -> None:
        """Nothing is carried from step to step."""
        del terms, t0, t1, y0, args

    def func(self, terms: _Terms, t0: Time, y0: State, args: Args) -> State:
        """The teacher's vector field, for events and initial step sizes."""
        return terms.vf(t0, y0, args)

    def _start(
        self, terms: _Terms, t0: Time, t1: Time, y0: State
    ) -> tuple[Array, Array, State, Array]:
        """The true times, the checked state, and the sign of the true clock."""
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


def true_times(terms: _Terms, t0: Time, t1: Time) -> tuple[Array, Array, Array]:
    """The true times of a step on Diffrax's clock, and the sign of the true clock."""
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    direction = jnp.sign(terms.contr(jnp.zeros_like(t0), jnp.ones_like(t0)))
    return direction * t0, direction * t1, direction


def true_field(terms: _Terms, direction: Array) -> VectorField:
    """The term's vector field as a function of the true time."""

    def field(t: Time, y: State, args: Args) -> State:
        t = jnp.asarray(t)
        return terms.vf(direction.astype(t.dtype) * t, y, args)

    return field


def check_dense_degree(dense_degree: int) -> None:
    """**Raises:** `ValueError` for a degree below 1."""
    if dense_degree < 1:
        raise ValueError(f"`dense_degree` must be at least 1; got {dense_degree}.")


@jtu.register_pytree_node_class
class Jump:
    """One step as dense output sees it.

    While Diffrax has a step in hand, to save at `ts`, this is the map itself: exact, for
    one evaluation. Storing it, for `SaveAt(dense=True)` or an event, flattens it, and
    then only arrays may remain: the map's parameters, once a step, are out of the
    question, and a closure would leak tracers. What is stored is the start and the
    Chebyshev series in $t$ of $X_{s,t}(y_0) - y_0$, whose error falls geometrically with
    the degree. Nothing is evaluated at its nodes unless somebody stores the step.
    """

    # `Any` and not `State`: JAX also unflattens placeholders that are no arrays.
    def __init__(self, y0: Any, series: Any, flow: Callable | None = None):
        self.y0 = y0
        self.series = series
        self.flow = flow

    @classmethod
    def start(cls, flow: Callable, t0: Time, t1: Time, y0: State, degree: int):
        """The jump in hand. `series` is a function until it is needed."""
        return cls(y0, lambda: _chebyshev_series(flow, t0, t1, y0, degree), flow)

    def evaluate(self, t: Time, t0: Time, t1: Time) -> State:
        if self.flow is not None:
            return self.flow(t)
        # A step of length zero has one point only: any fraction will do.
        h = jnp.where(t1 == t0, 1, t1 - t0)
        z = 2 * (t - t0) / h - 1

        def value(y0, series):
            polynomials = [jnp.ones_like(z), z]
            for _ in range(2, series.shape[0]):
                polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
            basis = jnp.stack(polynomials[: series.shape[0]])
            basis = basis.astype(jnp.finfo(y0.dtype).dtype).astype(y0.dtype)
            return y0 + jnp.tensordot(basis, series, axes=1)

        return jtu.tree_map(value, self.y0, self.series)

    def tree_flatten(self):
        series = self.series if self.flow is None else self.series()
        return (self.y0, series), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux
        return cls(*children)


class _JumpInterpolation(diffrax.AbstractLocalInterpolation):
    t0: Time
    t1: Time
    jump: Jump

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        return self.jump.evaluate(t0, self.t0, self.t1)


def _chebyshev_series(
    flow: Callable, t0: Time, t1: Time, y0: State, degree: int
) -> State:
    nodes, transform = _chebyshev(degree)
    # The first node is the start itself, where nothing has moved yet.
    times = t0 + jnp.asarray(nodes[1:], jnp.result_type(t0)) * (t1 - t0)

    def coefficients(ends, y0):
        matrix = jnp.asarray(transform[:, 1:], jnp.finfo(y0.dtype).dtype)
        moved = ends - jnp.expand_dims(y0, 0)
        return jnp.tensordot(matrix.astype(moved.dtype), moved, axes=1)

    return jtu.tree_map(coefficients, jax.vmap(flow)(times), y0)


def _chebyshev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1], and the matrix from values there to Chebyshev coefficients."""
    angles = np.pi * np.arange(degree + 1) / degree
    # Ascending nodes: z = -cos(angle), and T_k(z) = cos(k (pi - angle)).
    values = np.cos(np.outer(np.pi - angles, np.arange(degree + 1)))
    return (1 - np.cos(angles)) / 2, np.linalg.inv(values)


class FlowMapSolver(AbstractFlowMapSolver):
    r"""A flow map as a Diffrax solver: each step is one jump, $y_1 = X_{t_0,t_1}(y_0)$.

    Swap it for `diffrax.Tsit5()` in `diffrax.diffeqsolve` and keep all the rest: the
    term with the exact vector field, or `diffrax.ODETerm(flow_map.velocity)` if there is
    none. Each step costs one evaluation of the map and none of the vector field, in
    either direction of time.

    ```python
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), FlowMapSolver(flow_map), t0=0, t1=1, dt0=0.25, y0=x
    )
    ```

    There is no error estimate, so use fixed steps, `diffrax.ConstantStepSize` or
    `diffrax.StepTo`; for `diffrax.PIDController` take
    [`flowdiffrax.AdaptiveFlowMapSolver`][] or `diffrax.HalfSolver(FlowMapSolver(...))`.

    !!! info "Dense output"

        `SaveAt(ts=...)` evaluates the map itself at each time: exact, for one evaluation
        each. `SaveAt(dense=True)` and events store a Chebyshev series of each jump, for
        `dense_degree` evaluations a step, which are made only then.

        Diffrax looks for events at the ends of steps: one that comes and goes within a
        long jump is missed, as with any solver. Take steps that are short enough.

    !!! info "Differentiation"

        `RecursiveCheckpointAdjoint`, `DirectAdjoint` and `ForwardMode` differentiate
        through the map: in `y0`, `args`, times and the map's parameters.
        `ImplicitAdjoint` differentiates the steady state of the *term's* vector field:
        gradients in the map's parameters are zero.
        `BacksolveAdjoint(solver=...)` with a classical solver integrates the term's
        adjoint ODE backwards; it knows nothing of the map's parameters, and refuses
        gradients in them with "Unexpected tangent". Without that solver it is refused,
        with a message that terms are not compatible: the map solves the ODE, not its
        adjoint.

    !!! warning "Times in half precision"

        Diffrax rounds off a step that ends within 100 units in the last place of `t1`:
        in bfloat16 that is a third of [0, 1], and steps are skipped. Pass times in
        float32 or float64.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `check_finite`: whether a non-finite state ends the solve, with the result
      `diffrax.RESULTS.nonlinear_divergence`. Diffrax's own solvers return the NaN as a
      success.
    - `dense_degree`: degree of the stored series, at least 1. The error for a smooth
      jump falls geometrically with it.

    **Raises:** when it is built, `TypeError` for a map that is not callable and
    `ValueError` for a bad degree; in the solve, `ValueError` or `TypeError` for a map
    whose output is not like its input, and an error for times outside the map's
    `time_range`. Diffrax refuses terms other than `diffrax.ODETerm`.
    """

    flow_map: TwoTimeMap
    check_finite: bool = eqx.field(static=True, default=True)
    dense_degree: int = eqx.field(static=True, default=16)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., _JumpInterpolation]] = _JumpInterpolation

    def step(
        self,
        terms: _Terms,
        t0: Time,
        t1: Time,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> _Step:
        """One jump. See `diffrax.AbstractSolver.step` for arguments and returns."""
        del solver_state, made_jump
        s, t, y0, direction = self._start(terms, t0, t1, y0)
        y1 = check_like(self.flow_map(s, t, y0, args), y0, "`flow_map`")
        dense_info = self._dense_info(t0, t1, y0, direction, args)
        return y1, None, dense_info, None, self._result(y1)


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

    - `estimate`: any [`flowdiffrax.AbstractErrorEstimate`][]. A
      [`flowdiffrax.SemigroupDefect`][] needs no teacher; the others trust the term's
      vector field.

    **Raises:** `TypeError` for an estimate that is none.
    """

    flow_map: TwoTimeMap
    estimate: AbstractErrorEstimate = SemigroupDefect()
    check_finite: bool = eqx.field(static=True, default=True)
    dense_degree: int = eqx.field(static=True, default=16)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., _JumpInterpolation]] = _JumpInterpolation

    def __check_init__(self):
        check_estimate(self.estimate)

    def error_order(self, terms: _Terms) -> int:
        """The order in the step at which the estimate vanishes."""
        del terms
        return self.estimate.order

    def step(
        self,
        terms: _Terms,
        t0: Time,
        t1: Time,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> _Step:
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
