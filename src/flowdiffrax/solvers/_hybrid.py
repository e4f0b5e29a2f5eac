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

from .._tree import all_finite, freeze, nan_where, scale, subtract
from .._types import Args, State, Time, TwoTimeMap
from ..estimates._base import AbstractErrorEstimate, check_estimate
from ..estimates._linearised import LinearisedError
from ..estimates._residual_integral import ResidualIntegral
from ..flow_maps._base import times_out_of_range
from ..flow_maps._inverse import check_composable
from ._base import AbstractFlowMapSolver, true_field, true_times
from ._branches import run_if_any, where, with_derivative
from ._jump import Jump, check_dense_degree

Terms = PyTree[diffrax.AbstractTerm]


# What Diffrax itself puts where a tolerance is to come from the step size controller.
_FROM_CONTROLLER = diffrax.with_stepsize_controller_tols(optx.Newton)().rtol


class HybridState(NamedTuple):
    """What a [`flowdiffrax.HybridSolver`][] carries from step to step.

    **Attributes:**

    - `num_learned`, `num_classical`: accepted steps of either kind so far.
    - `wait`: for how many more steps the map is left alone.
    - `patience`: for how many it will be after its next failure.
    - `shortest`: how long a jump must be, as long as the last classical step.
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
    r"""Takes the learned jump where its estimated error meets the tolerance, and a step
    of a classical solver where it does not.

    Each step is judged by an estimate of its error, as a classical solver judges its own:
    a map that returns NaN costs time and no accuracy, and one that is merely bad is taken
    only where a small share of the tolerance allows it. With a good map, most of the
    interval is one jump. Events that are short against the jump can escape the estimate:
    see the warning below.

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

    The term must be the exact vector field: it is what the map is judged by. Start with
    more than the whole interval, which Diffrax cuts at `t1`: `t1 - t0` may by rounding
    end just before it, and Diffrax's own guess, `dt0=None`, starts at 0.01. With an
    implicit fallback, start with the step that it would start with, from where jumps grow
    tenfold: after a long one that was refused, it would be tried at far too long a step
    itself, at which implicit solvers can take a wrong solution for the right one.

    !!! info "What decides"

        A jump is taken if the norm of its estimate, scaled by `atol + rtol * |y|` as
        the step size controller does, is below `safety`, all its values are finite, its
        times lie in the map's `time_range`, and it is no shorter than the last classical
        step. Tolerances and norm are those of the controller. A map that was refused, or
        whose jump could not have been twice as long, is left alone for the next step,
        then for two, four and so on up to `max_wait`; one that does better is tried again
        at once. Step sizes are Diffrax's, by the estimate of whichever step was made. As
        with any solver, errors are controlled at the ends of steps:
        `diffrax.ClipStepSizeController(controller, step_ts=ts)` makes ends of the times
        that are saved.

        By default, the estimate asks the vector field:
        [`flowdiffrax.estimates.LinearisedError`][] for states of up to 32 entries, and
        for larger ones beside an implicit fallback, since most errors of stiff systems
        die out at once; [`flowdiffrax.estimates.ResidualIntegral`][] for others. A root
        finder that is given to an implicit fallback should solve more exactly than the
        tolerance, as `optimistix.Newton(1e-6, 1e-12)` does.

    !!! warning "Short events within a long jump"

        The estimate looks at the start of a jump and at three more times in it, at 16 %,
        64 % and 100 % of its length. An event between them goes undetected: a pulse or a
        switch in the vector field that the map does not know is jumped over, with an
        error of any size. So does a map's own fault, if it hops to a neighbouring
        trajectory within a short part of the jump.

        If the times of events are known, let steps end there, with
        `diffrax.ClipStepSizeController(controller, jump_ts=times)`. If only their
        duration is, keep jumps no longer than that:
        `diffrax.PIDController(rtol, atol, dtmax=duration)`.

    !!! info "Cost"

        Where the map is tried, its estimate: by default four forward-mode passes through
        it, of which the jump is part, and four calls of the vector field, with their
        Jacobians in a small system. Where it is
        not taken, a step of the classical solver. Under `jax.vmap` all examples step
        together until the last is done, and each turn pays for the map if any example
        tries it, and for the classical solver if any needs it. To keep easy examples
        from waiting for hard ones, sort them into chunks: [`flowdiffrax.vmap_sorted`][].

    Gradients are those of the steps that were made: of the map where a jump was taken,
    and of the classical solver elsewhere, whatever the map returns there.

    Events are found at the ends of steps and located within them, on the map itself
    where the step is a jump. One that comes and goes within a long jump is missed.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `fallback`: a Diffrax solver for `diffrax.ODETerm` with an error estimate, explicit
      or implicit.
    - `estimate`: the error estimate by which a jump is judged; `None` for the one named
      above.
    - `safety`: the share of the tolerance that a jump may use, in (0, 1]; `None` for 0.3,
      since the errors of a classical solver are mostly well below the tolerance, too,
      and for 0.1 with an implicit fallback, which needs to start close to the slow
      solution.
    - `rtol`, `atol`: to be given with controllers without tolerances, such as
      `diffrax.ConstantStepSize`, or in manual steps; from the controller otherwise.
    - `norm`: likewise; the root mean square where both tolerances are given.
    - `max_wait`: the most steps for which a refused map is left alone; 0 to try always.
    - `dense_degree`: as for [`flowdiffrax.FlowMapSolver`][].

    **Raises:** when it is built, `TypeError` for a map that is not callable or a fallback
    that is no solver of ODE terms, `ValueError` for a fallback without error estimate or
    a bad `safety` or `max_wait`; in the solve, `ValueError` without tolerances, by
    Diffrax itself for a fixed step size, in words for implicit solvers. A tolerance that
    neither can meet ends with Diffrax's own result.
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
        if self.safety is None:
            self.safety = 0.1 if _is_implicit(self.fallback) else 0.3

    def __check_init__(self):
        check_composable(self.flow_map)
        check_dense_degree(self.dense_degree)
        _check_fallback(self.fallback)
        if self.estimate is not None:
            check_estimate(self.estimate)
        if not 0 < typing.cast(float, self.safety) <= 1:
            raise ValueError(f"`safety` must be in (0, 1]; got {self.safety}.")
        if self.max_wait < 0:
            raise ValueError(f"`max_wait` must be at least 0; got {self.max_wait}.")

    @property
    def root_finder(self):  # pyright: ignore
        """Diffrax gives the tolerances of its controller to what it finds here."""
        return self

    @property
    def interpolation_cls(self):  # pyright: ignore
        """Builds the dense output of a step."""
        return _Interpolations(self.fallback.interpolation_cls)

    def order(self, terms: Terms) -> int | None:
        """That of the classical solver."""
        return self.fallback.order(terms)

    def error_order(self, terms: Terms) -> Any:
        """That of the classical solver, to which the map's errors are converted."""
        return self.fallback.error_order(terms)

    def func(self, terms: Terms, t0: Time, y0: State, args: Args) -> State:
        """The vector field, for events and initial step sizes."""
        return self.fallback.func(terms, t0, y0, args)

    def init(
        self, terms: Terms, t0: Time, t1: Time, y0: State, args: Args
    ) -> HybridState:
        """Counts at zero, and the classical solver's own start."""
        if any(value is _FROM_CONTROLLER for value in (self.rtol, self.atol, self.norm)):
            raise ValueError(
                "There is no step size controller to take tolerances from. Give both: "
                "`HybridSolver(flow_map, rtol=1e-3, atol=1e-6)`."
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
        """A jump or a classical step. See `diffrax.AbstractSolver.step`."""
        s, t, direction = true_times(terms, t0, t1)
        teacher = true_field(terms, direction)
        state, fallback = solver_state, self._fallback()
        estimate = self._estimate(y0)
        safety = typing.cast(float, self.safety)

        jump = eqx.filter_closure_convert(
            lambda: estimate(self.flow_map, teacher, s, t, y0, args)
        )

        def classical():
            # After a jump, what the classical solver remembers is out of date.
            start = fallback.init(terms, t0, t1, y0, args)
            memory = where(state.is_fresh, state.fallback, start)
            restart = made_jump | ~state.is_fresh
            return fallback.step(terms, t0, t1, y0, args, memory, restart)

        length = jnp.abs(t - s)
        # Jumps that are shorter than classical steps would add up to larger errors.
        tried = (state.wait == 0) & (length >= state.shortest)
        outside = times_out_of_range(self.flow_map, s, t)
        if outside is not None:
            tried = tried & ~outside
        frozen = freeze(jump)
        jump_y1, jump_error = run_if_any(tried, lambda: frozen())
        jump_error = scale(jnp.asarray(1 / safety), jump_error)
        ratio = self._ratio(jump_error, y0, jump_y1)
        # A ratio that is NaN is no success.
        taken = tried & (ratio < 1) & all_finite(jump_y1)
        y1, error, info, memory, result = run_if_any(~taken, classical)
        # The controller has one order for all errors, the classical solver's. This leaves
        # a ratio of one where it is, and lets step sizes follow the estimate's order.
        error_order = typing.cast(float, fallback.error_order(terms))
        power = max(error_order / estimate.order - 1, 0)
        jump_error = scale(jnp.where(taken, ratio, 0) ** power, jump_error)

        def flow(t):
            to_t = eqx.filter_closure_convert(
                lambda: self.flow_map(s, direction * t, y0, args)
            )
            return with_derivative(freeze(to_t)(), taken, to_t)

        dense_info = {
            "is_jump": taken,
            "jump": Jump.start(flow, t0, t1, y0, self.dense_degree),
            "fallback": info,
        }
        end = eqx.filter_closure_convert(lambda: jump()[0])
        y1 = where(taken, with_derivative(jump_y1, taken, end), y1)
        error = lax.stop_gradient(where(taken, jump_error, error))
        # A step that overflowed is refused for sure: an infinity in both would make the
        # controller's ratio of the two, and then its step size, not a number.
        is_fine = all_finite(y1) & all_finite(error)
        return (
            nan_where(~is_fine, y1),
            jtu.tree_map(lambda leaf: jnp.where(is_fine, leaf, jnp.inf), error),
            dense_info,
            self._remember(state, tried, taken, ratio, length, memory),
            diffrax.RESULTS.where(taken, diffrax.RESULTS.successful, result),
        )

    def _estimate(self, y: State) -> AbstractErrorEstimate:
        if self.estimate is not None:
            return self.estimate
        leaves = jtu.tree_leaves(y)
        is_real = not any(map(jnp.iscomplexobj, leaves))
        is_small = sum(map(jnp.size, leaves)) <= 32
        is_linear = is_real and (is_small or _is_implicit(self.fallback))
        return LinearisedError() if is_linear else ResidualIntegral()

    def _fallback(self) -> diffrax.AbstractSolver:
        """The classical solver, with what Diffrax would have given it."""
        fallback = self.fallback
        if getattr(fallback, "scan_kind", "none of its own") is None:
            # The kind of loop that both modes of differentiation can go through.
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
        """The size of an error as the step size controller sees it; one is enough."""

        def scaled(error, y0, y1):
            size = jnp.maximum(jnp.abs(y0), jnp.abs(y1))
            return error / (self.atol + self.rtol * size).astype(error.dtype)

        return lax.stop_gradient(
            jnp.asarray(self.norm(jtu.tree_map(scaled, error, y0, y1)))
        )

    def _remember(self, state, tried, taken, ratio, length, memory) -> HybridState:
        # Where the map's error asks for short steps, taking one after the other would
        # keep the classical solver from taking long ones.
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


def _is_implicit(solver: object) -> bool:
    """Whether each step solves equations, below any wrapper."""
    while isinstance(solver, diffrax.AbstractWrappedSolver):
        solver = solver.solver
    return isinstance(solver, diffrax.AbstractImplicitSolver)


def _check_fallback(fallback: object) -> None:
    name = type(fallback).__name__
    if not isinstance(fallback, diffrax.AbstractSolver):
        raise TypeError(
            f"`fallback` must be a Diffrax solver such as `diffrax.Tsit5()`; got {name}."
        )
    if isinstance(fallback, AbstractFlowMapSolver | HybridSolver):
        raise TypeError(f"`fallback` must be a classical solver; got `{name}`.")
    structure = fallback.term_structure
    structure = typing.get_origin(structure) or structure
    if not (isinstance(structure, type) and issubclass(diffrax.ODETerm, structure)):
        raise TypeError(
            f"`fallback` must solve a single `diffrax.ODETerm`; got `{name}`, which "
            f"takes terms of the structure {fallback.term_structure}."
        )
    if not isinstance(fallback, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"`fallback` needs an error estimate, which `{name}` has not. Wrap it as "
            f"`diffrax.HalfSolver({name}())`, or use `diffrax.Tsit5()`."
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
