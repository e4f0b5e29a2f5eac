import typing
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real

from .._check import check_at_least, check_instance
from .._tree import add_scaled, all_finite, freeze, nan_where, scale, subtract
from .._types import Args, State, Time, TwoTimeMap
from ..estimates._base import AbstractErrorEstimate, check_estimate
from ..estimates._linearised import LinearisedError
from ..estimates._picard import PicardDefect
from ..flow_maps._base import times_out_of_range
from ..flow_maps._inverse import check_composable
from ._base import AbstractFlowMapSolver, true_field, true_times
from ._branches import run_if_any, where, with_derivative
from ._jump import Jump

Terms = PyTree[diffrax.AbstractTerm]


# Diffrax's placeholder for a tolerance that the step size controller provides.
_FROM_CONTROLLER = diffrax.with_stepsize_controller_tols(optx.Newton)().rtol


class HybridState(NamedTuple):
    """The state that a [`flowdiffrax.HybridSolver`][] carries from step to step.

    **Attributes:**

    - `num_learned`, `num_classical`: the numbers of accepted steps of each kind so far.
    - `wait`: for how many more steps the map is not tried.
    - `patience`: for how many steps it will not be tried after its next failure.
    - `shortest`: the minimum length of a jump, the length of the last classical step.
    - `is_fresh`: whether `fallback` belongs to the last step.
    - `fallback`: the state of the classical solver.
    """

    num_learned: Int[Array, ""]
    num_classical: Int[Array, ""]
    wait: Int[Array, ""]
    patience: Int[Array, ""]
    shortest: Real[Array, ""]
    is_fresh: Bool[Array, ""]
    fallback: PyTree


class HybridSolver(diffrax.AbstractImplicitSolver, diffrax.AbstractAdaptiveSolver):
    r"""Takes the learned jump if its estimated error meets the tolerance, and a step of a
    classical solver otherwise.

    The solver estimates the error of each step, as a classical solver does. A jump whose
    error is below the tolerance is taken, and its error is subtracted, as far as the
    estimate knows it. A map that returns NaN costs time but no accuracy. With a good map,
    most of the interval is one jump. The estimate can miss events that are short compared
    to the jump: see the warning below.

    ```python
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        HybridSolver(flow_map),
        t0, t1, dt0=2 * (t1 - t0), y0=y0,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
    )
    sol.solver_state.num_learned, sol.solver_state.num_classical
    ```

    The term must hold the exact vector field, since it decides whether a jump is taken.
    Start with a step longer than the whole interval, which Diffrax cuts at `t1`: rounding
    may let a step of `t1 - t0` end just before it, and Diffrax's own guess, `dt0=None`,
    starts at 0.01. With an implicit fallback, start with the step that the fallback would
    start with; jumps grow tenfold from there. If a long first jump were refused, the
    fallback would try a step that is far too long, and implicit solvers can then converge
    to a wrong solution.

    !!! info "What decides"

        A jump is taken if the norm of its estimate, scaled by `atol + rtol * |y|` as in
        the step size controller, is below `safety`, all its values are finite, its times
        lie in the map's `time_range`, and it is no shorter than the last classical step.
        Tolerances and norm are those of the controller. If a jump is refused, or could
        not have been twice as long, the map is not tried for the next step, then for two,
        four and so on, up to `max_wait`. If a jump does better, the map is tried again at
        once. Diffrax chooses the step sizes, by the estimate of whichever step was taken.
        As with any solver, errors are controlled at the ends of steps; to make steps end
        at the saved times, use
        `diffrax.ClipStepSizeController(controller, step_ts=ts)`.

        The default estimates evaluate the vector field. They are
        [`flowdiffrax.estimates.LinearisedError`][] for states of up to 32 entries, and
        for larger states with an implicit fallback, since most errors of stiff systems
        decay at once; and [`flowdiffrax.estimates.PicardDefect`][] for all others. It has
        12 nodes for states of up to 8 entries, and else 6, or 8 for the latter. If
        you pass a root finder to an implicit fallback, it should be more accurate than
        the tolerance, such as `optimistix.Newton(1e-6, 1e-12)`.

    !!! warning "Short events within a long jump"

        The estimate evaluates the jump at its start, at the nodes, and at one more time
        that differs from jump to jump. Events between these times go undetected. If the
        vector field has a pulse or a switch that the map does not know, the solver jumps
        over it, with an error of any size. A map that moves to a neighbouring trajectory
        and back within a short part of the jump is not detected either.

        If the times of events are known, let steps end there, with
        `diffrax.ClipStepSizeController(controller, jump_ts=times)`. If only their
        duration is known, limit jumps to that length:
        `diffrax.PIDController(rtol, atol, dtmax=duration)`.

    !!! info "Cost"

        If the map is tried, a step costs its estimate: an evaluation of the map and of
        the vector field at each node, for a small system with the field's Jacobian, and
        one or two more. If the jump is not taken, a step
        also costs a step of the classical solver. Under `jax.vmap`, all examples step
        together until the last one is done. Each turn pays for the map if any example
        tries it, and for the classical solver if any example needs it. To keep easy
        examples from waiting for hard ones, sort them into chunks:
        [`flowdiffrax.vmap_sorted`][].

    Gradients are those of the steps that were taken: of the map for a jump, and of the
    classical solver otherwise, whatever the map returns there.

    Events are detected at the ends of steps and located within them, on the map itself
    if the step is a jump. An event that begins and ends within a long jump is missed.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `fallback`: a Diffrax solver for `diffrax.ODETerm` with an error estimate, explicit
      or implicit.
    - `estimate`: the error estimate for jumps; `None` for the default described above.
    - `safety`: the share of the tolerance that a jump may use, in (0, 1]. `None` is 1 if
      the estimated error is subtracted, and else 0.3, since the errors of a classical
      solver are also mostly well below the tolerance. With an implicit fallback, which
      needs to start close to the slow solution, it is 0.3 and 0.1.
    - `rtol`, `atol`: the tolerances. Give them for controllers without tolerances, such
      as `diffrax.ConstantStepSize`, and for manual steps; otherwise they come from the
      controller.
    - `norm`: the norm of scaled errors. By default it is the root mean square if both
      tolerances are given, and otherwise comes from the controller.
    - `max_wait`: the most steps for which a refused map is not tried; 0 to try always.
    - `dense_degree`: degree of the stored series of a jump, at least 1.

    **Raises:** when constructed, `TypeError` for a map that is not callable or a fallback
    that is not a solver, and `ValueError` for a fallback that is not a classical solver
    of ODEs with an error estimate, or an invalid `safety`, `max_wait` or `dense_degree`.
    In the solve, `ValueError` without tolerances; for a fixed step size Diffrax raises it
    itself, with a message about implicit solvers. If neither the map nor the fallback can
    meet the tolerance, the solve ends with Diffrax's own result.
    """

    flow_map: TwoTimeMap
    fallback: diffrax.AbstractSolver = diffrax.Tsit5()
    estimate: AbstractErrorEstimate | None = None
    safety: float | None = None
    rtol: Any = _FROM_CONTROLLER
    atol: Any = _FROM_CONTROLLER
    norm: Any = _FROM_CONTROLLER
    max_wait: int = eqx.field(static=True, default=8)
    dense_degree: int = eqx.field(static=True, default=16)

    term_structure: ClassVar = diffrax.ODETerm
    root_find_max_steps: ClassVar[int] = 10

    def __post_init__(self):
        given = self.rtol is not _FROM_CONTROLLER and self.atol is not _FROM_CONTROLLER
        if given and self.norm is _FROM_CONTROLLER:
            self.norm = optx.rms_norm

    def __check_init__(self):
        check_composable(self.flow_map)
        check_at_least(self.dense_degree, 1, "dense_degree")
        check_at_least(self.max_wait, 0, "max_wait")
        check_fallback(self.fallback)
        if self.estimate is not None:
            check_estimate(self.estimate)
        if self.safety is not None and not 0 < self.safety <= 1:
            raise ValueError(f"`safety` must be in (0, 1]; got {self.safety}.")

    @property
    def root_finder(self):  # pyright: ignore
        """Returns the solver, so that Diffrax gives it the controller's tolerances."""
        return self

    @property
    def interpolation_cls(self):  # pyright: ignore
        """Builds the dense output of a step."""
        return _Interpolations(self.fallback.interpolation_cls)

    def order(self, terms: Terms) -> int | None:
        """Returns the order of the classical solver."""
        return self.fallback.order(terms)

    def error_order(self, terms: Terms) -> Any:
        """Returns the fallback's error order, to which jump errors are converted."""
        return self.fallback.error_order(terms)

    def func(self, terms: Terms, t0: Time, y0: State, args: Args) -> State:
        """Evaluates the vector field, for events and initial step sizes."""
        return self.fallback.func(terms, t0, y0, args)

    def init(
        self, terms: Terms, t0: Time, t1: Time, y0: State, args: Args
    ) -> HybridState:
        """Starts the counts at zero, and initialises the classical solver."""
        if any(value is _FROM_CONTROLLER for value in (self.rtol, self.atol, self.norm)):
            raise ValueError(
                "Without a step size controller, give `HybridSolver` `rtol` and `atol`."
            )
        # Like the state, so that a loop under `jax.shard_map` can carry them.
        like = jtu.tree_leaves(y0)[0]
        full = lambda value, dtype: jnp.full_like(like, value, dtype, shape=())
        return HybridState(
            num_learned=full(0, jnp.int32),
            num_classical=full(0, jnp.int32),
            wait=full(0, jnp.int32),
            patience=full(min(1, self.max_wait), jnp.int32),
            shortest=full(0, jnp.result_type(t0)),
            is_fresh=full(True, jnp.bool_),
            fallback=self._fallback().init(terms, t0, t1, y0, args),
        )

    def step(
        self,
        terms: Terms,
        t0: Time,
        t1: Time,
        y0: State,
        args: Args,
        solver_state: HybridState,
        made_jump: Any,
    ) -> tuple[State, State, dict[str, Any], HybridState, diffrax.RESULTS]:
        """Takes a jump or a classical step. See `diffrax.AbstractSolver.step`."""
        s, t, direction = true_times(terms, t0, t1)
        teacher = true_field(terms, direction)
        state, fallback = solver_state, self._fallback()
        estimate = self.estimate
        if estimate is None:
            estimate = default_estimate(y0, is_implicit(self.fallback))
        safety = self.safety
        if safety is None:
            safety = default_safety(estimate, is_implicit(self.fallback))

        jump = eqx.filter_closure_convert(
            lambda: estimate.correct(self.flow_map, teacher, s, t, y0, args)
        )

        def classical():
            # After a jump, the state of the classical solver is out of date.
            start = fallback.init(terms, t0, t1, y0, args)
            memory = where(state.is_fresh, state.fallback, start)
            restart = made_jump | ~state.is_fresh
            return fallback.step(terms, t0, t1, y0, args, memory, restart)

        length = jnp.abs(t - s)
        # Many jumps shorter than classical steps would add up to larger errors.
        tried = (state.wait == 0) & (length >= state.shortest)
        outside = times_out_of_range(self.flow_map, s, t)
        if outside is not None:
            tried = tried & ~outside
        frozen = freeze(jump)
        jump_end, jump_y1, jump_error = run_if_any(tried, lambda: frozen())
        jump_error = scale(jnp.asarray(1 / safety), jump_error)
        ratio = self._ratio(jump_error, y0, jump_y1)
        # A NaN ratio compares as false, and the jump is refused.
        taken = tried & (ratio < 1) & all_finite(jump_y1)
        y1, error, info, memory, result = run_if_any(~taken, classical)
        # The controller uses the classical solver's order for all errors. This conversion
        # keeps a ratio of one, and lets step sizes follow the estimate's order.
        error_order = typing.cast(float, fallback.error_order(terms))
        power = max(error_order / estimate.order - 1, 0)
        jump_error = scale(jnp.where(taken, ratio, 0) ** power, jump_error)
        correction = subtract(jump_y1, jump_end)

        def flow(t):
            to_t = eqx.filter_closure_convert(
                lambda: self.flow_map(s, direction * t, y0, args)
            )
            share = lax.stop_gradient((t - t0) / jnp.where(t1 == t0, 1, t1 - t0))
            value = add_scaled(freeze(to_t)(), share, correction)
            return with_derivative(value, taken, to_t)

        dense_info = {
            "is_jump": taken,
            "jump": Jump.start(flow, t0, t1, y0, self.dense_degree),
            "fallback": info,
        }
        end = eqx.filter_closure_convert(lambda: jump()[0])
        y1 = where(taken, with_derivative(jump_y1, taken, end), y1)
        error = lax.stop_gradient(where(taken, jump_error, error))
        # Make sure that a step that overflowed is refused: if state and error were both
        # infinite, their ratio in the controller, and then its step size, would be NaN.
        is_fine = all_finite(y1) & all_finite(error)
        return (
            nan_where(~is_fine, y1),
            jtu.tree_map(lambda leaf: jnp.where(is_fine, leaf, jnp.inf), error),
            dense_info,
            self._remember(state, tried, taken, ratio, length, memory),
            diffrax.RESULTS.where(taken, diffrax.RESULTS.successful, result),
        )

    def _fallback(self) -> diffrax.AbstractSolver:
        """Returns the classical solver, with the settings that Diffrax would give it."""
        fallback = self.fallback
        if getattr(fallback, "scan_kind", "none of its own") is None:
            # This kind of loop supports both modes of differentiation.
            fallback = eqx.tree_at(
                lambda solver: solver.scan_kind,
                fallback,
                "bounded",
                is_leaf=lambda leaf: leaf is None,
            )
        if isinstance(fallback, diffrax.AbstractImplicitSolver):
            mine = {"rtol": self.rtol, "atol": self.atol, "norm": self.norm}
            finder = fallback.root_finder
            missing = [k for k in mine if getattr(finder, k, None) is _FROM_CONTROLLER]
            fallback = eqx.tree_at(
                lambda solver: [getattr(solver.root_finder, k) for k in missing],
                fallback,
                [mine[k] for k in missing],
            )
        return fallback

    def _ratio(self, error: State, y0: State, y1: State) -> Array:
        """Returns the norm of an error as the step size controller computes it."""

        def scaled(error, y0, y1):
            size = jnp.maximum(jnp.abs(y0), jnp.abs(y1))
            return error / (self.atol + self.rtol * size).astype(error.dtype)

        return lax.stop_gradient(
            jnp.asarray(self.norm(jtu.tree_map(scaled, error, y0, y1)))
        )

    def _remember(self, state, tried, taken, ratio, length, memory) -> HybridState:
        # If the map's error requires short steps, many in succession would keep the
        # classical solver from taking long ones.
        helps = taken & (ratio < 0.5)
        failed = tried & ~helps
        patience = jnp.where(failed, 2 * state.patience, state.patience)
        return HybridState(
            num_learned=jnp.where(taken, state.num_learned + 1, state.num_learned),
            num_classical=jnp.where(taken, state.num_classical, state.num_classical + 1),
            wait=jnp.where(failed, state.patience, jnp.maximum(state.wait - 1, 0)),
            patience=jnp.minimum(jnp.where(helps, 1, patience), self.max_wait),
            shortest=jnp.where(taken, state.shortest, length),
            is_fresh=~taken,
            fallback=memory,
        )


def default_estimate(y: State, implicit: bool) -> AbstractErrorEstimate:
    """Returns the estimate for a state and the kind of fallback."""
    leaves = jtu.tree_leaves(y)
    is_real = not any(map(jnp.iscomplexobj, leaves))
    size = sum(map(jnp.size, leaves))
    if not (is_real and (size <= 32 or implicit)):
        return PicardDefect()
    # Its linear system has as many unknowns as entries at all nodes.
    return LinearisedError(12 if size <= 8 else 6)


def default_safety(estimate: AbstractErrorEstimate, implicit: bool) -> float:
    """Returns the share of the tolerance that a jump may use."""
    if not getattr(estimate, "has_direction", False):
        return 0.1 if implicit else 0.3
    # The estimated error is subtracted, so that much less is left.
    return 0.3 if implicit else 1.0


def is_implicit(solver: object) -> bool:
    """Whether the solver inside any wrappers is implicit."""
    while isinstance(solver, diffrax.AbstractWrappedSolver):
        solver = solver.solver
    return isinstance(solver, diffrax.AbstractImplicitSolver)


def check_fallback(fallback: Any) -> None:
    what = "a Diffrax solver such as `diffrax.Tsit5()`"
    check_instance(fallback, diffrax.AbstractSolver, "fallback", what)
    structure = typing.get_origin(fallback.term_structure) or fallback.term_structure
    takes_odes = isinstance(structure, type) and issubclass(diffrax.ODETerm, structure)
    is_adaptive = isinstance(fallback, diffrax.AbstractAdaptiveSolver)
    is_learned = isinstance(fallback, AbstractFlowMapSolver | HybridSolver)
    if is_learned or not (takes_odes and is_adaptive):
        name = type(fallback).__name__
        raise ValueError(
            "`fallback` must be a classical solver of a `diffrax.ODETerm` with an error "
            f"estimate; got {name}. Wrap it as `diffrax.HalfSolver({name}())`, or use "
            "`diffrax.Tsit5()`."
        )


class _Interpolations(NamedTuple):
    """Builds the interpolation of a step. Diffrax compares it between solutions."""

    fallback_cls: Callable[..., diffrax.AbstractLocalInterpolation]

    def __call__(self, *, t0, t1, is_jump, jump, fallback):
        classical = self.fallback_cls(t0=t0, t1=t1, **fallback)
        return _HybridInterpolation(t0, t1, is_jump, jump, classical)


class _HybridInterpolation(diffrax.AbstractLocalInterpolation):
    t0: Time
    t1: Time
    is_jump: Bool[ArrayLike, ""]
    jump: Jump
    classical: diffrax.AbstractLocalInterpolation

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        if t1 is not None:
            return subtract(self.evaluate(t1, left=left), self.evaluate(t0, left=left))
        value = lambda: self.jump.evaluate(t0, self.t0, self.t1)
        classical = self.classical.evaluate(t0, left=left)
        return where(self.is_jump, run_if_any(self.is_jump, value), classical)
