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

from .._check import check_between, check_count, check_instance
from .._tree import all_finite, freeze, nan_where, scale, subtract
from .._types import Args, State, Time, TwoTimeMap
from ..estimates._clock import Clock
from ..estimates._krylov import Krylov, check_linear_solver
from ..estimates._newton import implicit_states
from ..estimates._quadrature import last
from ..flow_maps._base import times_out_of_range
from ..flow_maps._inverse import check_composable
from ._base import AbstractFlowMapSolver, true_field, true_times
from ._branches import run_if_any, where, with_derivative
from ._jump import Jump
from ._predict import correct, error_ratio, is_fine, is_hopeless, predict

Terms = PyTree[diffrax.AbstractTerm]


# States of up to so many entries are corrected by Newton steps.
_SMALL = 32
# A map that was refused is not tried for so many steps, and then for four times as many.
_FIRST_WAIT = 4
# An implicit step may be so many times as long as the last one. Much longer ones, where a
# jump was refused, can converge to a wrong solution that their own estimate approves.
_LONGER = 10
# How fast an attempt that is too long is shortened: as fast as Diffrax allows by default.
_SHORTENED = 0.2
# Diffrax's placeholder for a tolerance that the step size controller provides.
_FROM_CONTROLLER = diffrax.with_stepsize_controller_tols(optx.Newton)().rtol


class HybridState(NamedTuple):
    """The state that a [`flowdiffrax.HybridSolver`][] carries from step to step.

    **Attributes:**

    - `num_learned`, `num_classical`: the numbers of accepted steps of each kind so far.
    - `wait`: for how many more steps the map is not tried.
    - `patience`: for how many steps it will not be tried after its next failure.
    - `shortest`: the length of the last classical step; before it, 0. With an implicit
      fallback, a length that is safe for it: before the first step, a guess from the
      vector field, and after a jump at least a hundredth of that.
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
    r"""Takes the learned jump, corrected by the vector field, where its estimated error
    meets the tolerance, and a step of a classical solver elsewhere.

    The map predicts the states at some nodes along the step, all at once. The vector
    field at these states says by how much they miss the ODE. If that is too much, one or
    two Newton steps correct all of them. What is taken is what meets the tolerance, as
    with any solver: a poor map costs time but no accuracy, even one that returns NaN.
    With a good map, a few jumps replace all steps of the classical solver.

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
    starts at 0.01. With an implicit fallback, the step that the fallback would start with
    is often the better choice; jumps grow tenfold from there.

    !!! info "What decides"

        The estimated error of a jump has two parts. The first is how much the states at
        the nodes miss the integral form of the ODE: at first their Picard defects, and
        after a Newton step the errors that these cause. The second is how much the
        polynomial through the nodes misses the vector field at the start, and at one more
        time that differs from jump to jump. A jump is taken if the norm of their sum,
        scaled by `atol + rtol * |y|` as in the step size controller, is below `safety`,
        all its values are finite, its times lie in the map's `time_range`, and it is at
        least `num_nodes / 3` times as long as the last classical step; with an implicit
        fallback, as long as that. Tolerances and norm are those of the controller.

        If neither a jump nor a classical step of its length meets the tolerance, a
        shorter jump is tried, as long as the map is nearly right. If a jump is refused,
        or could not have been much longer, the map is not tried for the next four steps,
        then for 16 and 64, up to `max_wait`; and then with a step that is long enough. If
        a jump does better, the map is tried again at once. As with any solver, errors are
        controlled at the ends of steps; to make steps end at the saved times, use
        `diffrax.ClipStepSizeController(controller, step_ts=ts)`.

        Newton steps need the Jacobians of the vector field, and are made for states of up
        to 32 real entries, and for larger ones with an implicit fallback, or with a
        `linear_solver` that takes products of them instead. With an implicit
        fallback, every jump is corrected and checked, since most errors of stiff systems
        decay at once, and its nodes are dense at the start if the vector field is slower
        later along the jump. Implicit solvers can converge to a wrong solution if a step
        is far too long: where a jump is refused, shorter ones are tried, down to ten
        times the last classical step or a tenth of the last jump. If you pass a root
        finder to an implicit fallback, it should be more accurate than the tolerance,
        such as `optimistix.Newton(1e-6, 1e-12)`.

    !!! warning "Short events within a long jump"

        Events between the nodes go undetected. If the vector field has a pulse or a
        switch that the map does not know, the solver jumps over it, with an error of any
        size. A map that moves to a neighbouring trajectory and back within a short part
        of the jump is not detected either.

        The polynomial through the nodes resolves no jump of the vector field in time,
        even if the map knows it: then a correction can make a right state worse.

        If the times of events are known, let steps end there, with
        `diffrax.ClipStepSizeController(controller, jump_ts=times)`. If only their
        duration is known, limit jumps to that length:
        `diffrax.PIDController(rtol, atol, dtmax=duration)`.

    !!! info "Cost"

        A look at a short part of the jump takes two evaluations of the map and of the
        vector field. A prediction takes one at each node, one more of the map, and two
        more of the vector field. A correction adds the Jacobian of the vector field at
        each node, and its check another evaluation. The calls do not wait for each other:
        a step is as deep as two to four calls. Under `jax.vmap`, all examples step
        together until the last one is done. Each turn pays for the map if any example
        tries it, and for the classical solver if any example needs it. For a batch, use
        [`flowdiffrax.solve_batch`][].

    Gradients are those of the steps that were taken: of the map for a jump that was taken
    as predicted; of the equations that a corrected jump solves, by the implicit function
    theorem; and of the classical solver otherwise, whatever the map returns there.

    Events are detected at the ends of steps and located within them, on the polynomial
    through the nodes if the step is a jump. Use `optimistix.Bisection` as the root finder
    of the event: Newton's method may leave a long jump. To detect events that begin and
    end within one, wrap the solver in a [`flowdiffrax.solvers.EventSolver`][].

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `fallback`: a Diffrax solver for `diffrax.ODETerm` with an error estimate, explicit
      or implicit.
    - `num_nodes`: the number of nodes of a jump, at least 2; `None` for 24 in states of
      up to 8 entries, 12 up to 32, and 8 beyond.
    - `safety`: the share of the tolerance that a jump may use, in (0, 1]. The errors of a
      classical solver are also mostly well below the tolerance.
    - `rtol`, `atol`: the tolerances. Give them for controllers without tolerances, such
      as `diffrax.ConstantStepSize`, and for manual steps; otherwise they come from the
      controller.
    - `norm`: the norm of scaled errors. By default it is the root mean square if both
      tolerances are given, and otherwise comes from the controller.
    - `max_wait`: the most steps for which a refused map is not tried, at least 1.
    - `linear_solver`: a [`flowdiffrax.estimates.Krylov`][], for corrections of states of
      many entries, such as fields on grids; `None` for Jacobians as matrices.

    **Raises:** when constructed, `TypeError` for a map that is not callable or for a
    fallback or `linear_solver` of another kind, and `ValueError` for a fallback that is
    not a classical solver of ODEs with an error estimate, or an invalid `num_nodes`,
    `safety` or `max_wait`. In the solve, `ValueError` without tolerances or for a state
    without entries, `TypeError` for times in half precision; for a fixed step size
    Diffrax raises it itself, with a message about implicit solvers. If neither the map
    nor the fallback can meet the tolerance, the solve ends with Diffrax's own result.

    ??? cite "Reference"

        Hairer, Wanner: Solving Ordinary Differential Equations II, sections IV.5
        and IV.8, for Radau collocation and its simplified Newton iterations.
    """

    flow_map: TwoTimeMap
    fallback: diffrax.AbstractSolver = diffrax.Tsit5()
    num_nodes: int | None = eqx.field(static=True, default=None)
    safety: float = 0.3
    rtol: Any = _FROM_CONTROLLER
    atol: Any = _FROM_CONTROLLER
    norm: Any = _FROM_CONTROLLER
    max_wait: int = eqx.field(static=True, default=64)
    linear_solver: Krylov | None = None

    term_structure: ClassVar = diffrax.ODETerm
    root_find_max_steps: ClassVar[int] = 10

    def __post_init__(self):
        given = self.rtol is not _FROM_CONTROLLER and self.atol is not _FROM_CONTROLLER
        if given and self.norm is _FROM_CONTROLLER:
            self.norm = optx.rms_norm

    def __check_init__(self):
        check_composable(self.flow_map)
        check_count(self.max_wait, 1, "max_wait")
        check_fallback(self.fallback)
        check_linear_solver(self.linear_solver)
        check_count(self.num_nodes, 2, "num_nodes", or_none=True)
        check_between(self.safety, 0, 1, "safety", "(]")

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
        leaves = jtu.tree_leaves(y0)
        if not any(map(jnp.size, leaves)):
            raise ValueError("The state has no entries, so that it has no error either.")
        times = jnp.result_type(t0)
        if jnp.finfo(times).bits < 32:
            raise TypeError(
                f"Times must be float32 or float64; got {times}. Pass "
                "`t0`, `t1` and `dt0` as Python floats."
            )
        # Like the state, so that a loop under `jax.shard_map` can carry them.
        like = leaves[0]
        full = lambda value, dtype: jnp.full_like(like, value, dtype, shape=())
        shortest = full(0, times)
        if is_implicit(self.fallback):
            shortest = jnp.minimum(jnp.abs(t1 - t0), self._guess(terms, t0, y0, args))
        return HybridState(
            num_learned=full(0, jnp.int32),
            num_classical=full(0, jnp.int32),
            wait=full(0, jnp.int32),
            patience=full(min(_FIRST_WAIT, self.max_wait), jnp.int32),
            shortest=shortest.astype(times),
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
        implicit = is_implicit(self.fallback)
        corrects = can_correct(y0, implicit, self.linear_solver)
        num_nodes = default_nodes(y0) if self.num_nodes is None else self.num_nodes
        norm = lambda error, y: self._ratio(error, y0, y) / self.safety

        prediction = eqx.filter_closure_convert(
            lambda: predict(
                self.flow_map, teacher, s, t, y0, args, num_nodes, norm, implicit
            )
        )
        predicted = eqx.filter_closure_convert(lambda: prediction().nodes.states)
        field = eqx.filter_closure_convert(teacher, t, y0, args)

        def classical():
            # After a jump, the state of the classical solver is out of date.
            start = fallback.init(terms, t0, t1, y0, args)
            memory = where(state.is_fresh, state.fallback, start)
            restart = made_jump | ~state.is_fresh
            return fallback.step(terms, t0, t1, y0, args, memory, restart)

        length = jnp.abs(t - s)
        # Many jumps not much longer than classical steps would cost more, and add up to
        # larger errors.
        worth = 1 if implicit else num_nodes / 3
        is_first = state.num_learned + state.num_classical == 0
        tried = (state.wait == 0) & (is_first | (length >= worth * state.shortest))
        outside = times_out_of_range(self.flow_map, s, t)
        if outside is not None:
            tried = tried & ~outside
        asked = tried
        if not implicit:
            first = eqx.filter_closure_convert(
                lambda: is_hopeless(self.flow_map, teacher, s, t, y0, args, norm)
            )
            asked = tried & ~run_if_any(tried, lambda: freeze(first)())
        made = run_if_any(asked, lambda: freeze(prediction)())
        nodes, ratio, error = made[:3]
        states = nodes.states
        # The defects of a stiff system say little about its errors.
        as_predicted = asked & is_fine(ratio, states) & (not implicit)
        taken = as_predicted
        if corrects:
            wanted = asked & ~as_predicted & (made.is_close | implicit)
            fixed_field, fixed_args = freeze((field, args))
            corrected = run_if_any(
                wanted,
                lambda: correct(
                    nodes,
                    fixed_field,
                    fixed_args,
                    norm,
                    wanted,
                    implicit,
                    self.linear_solver,
                ),
            )
            states, error = where(wanted, corrected, (states, error))
            ratio = norm(error, last(states))
            taken = as_predicted | (wanted & is_fine(ratio, states))
        states, grade = freeze((states, nodes.clock.grade))
        y1, error_1, info, memory, result = run_if_any(~taken, classical)
        # The controller uses the classical solver's order for all errors. This conversion
        # keeps a ratio of one, and lets step sizes follow the order of jumps.
        order = typing.cast(float, fallback.error_order(terms))
        # A clock adapts the nodes of stiff systems, so that the length matters less.
        rate_of_errors = 1 if implicit else num_nodes / 2
        aim = jnp.where(ratio > 0, ratio, 1) ** (order / rate_of_errors)
        # A shorter jump may succeed where a classical step of this length cannot.
        is_near = asked & ~taken & made.is_promising & (ratio >= 1)
        ratio_1 = self._ratio(error_1, y0, y1)
        is_near &= ratio_1 > 1
        y1 = where(taken, last(states), y1)
        seen = self._ratio(error, y0, y1)
        error = scale(jnp.where(seen > 0, aim / seen, 0), error)
        # Before the map is tried again, a long step is called for.
        wish = (0.8 / worth) ** order / jnp.where(ratio_1 > 0, ratio_1, 1)
        is_last = (state.wait == 1) & (ratio_1 < 1)
        error_1 = scale(jnp.where(is_last, jnp.minimum(1, wish), 1), error_1)
        error = where(taken | is_near, error, error_1)
        if implicit:
            # Controllers of step sizes refuse such a step, and others accept it.
            too_long = ~taken & (length > _LONGER * state.shortest)
            times = (0.9 / _SHORTENED) ** order

            def refused(y0, y1):
                size = jnp.maximum(jnp.abs(y0), jnp.abs(y1))
                return (times * (self.atol + self.rtol * size)).astype(y0.dtype)

            error = where(too_long, jtu.tree_map(refused, y0, y1), error)

        along = with_derivative(states, as_predicted, predicted)
        if corrects:
            solved = eqx.filter_closure_convert(
                lambda: implicit_states(
                    states, teacher, Clock(s, t, grade), y0, args, self.linear_solver
                )
            )
            is_solved = taken & ~as_predicted
            along = where(is_solved, with_derivative(states, is_solved, solved), along)
        dense_info = {
            "is_jump": taken,
            "jump": Jump.through(y0, along, grade),
            "fallback": info,
        }
        y1 = where(taken, last(along), y1)
        error = lax.stop_gradient(error)
        # Make sure that a step that overflowed is refused: if state and error were both
        # infinite, their ratio in the controller, and then its step size, would be NaN.
        is_finite = all_finite(y1) & all_finite(error)
        return (
            nan_where(~is_finite, y1),
            jtu.tree_map(lambda leaf: jnp.where(is_finite, leaf, jnp.inf), error),
            dense_info,
            self._remember(state, tried, taken, ratio, length, memory),
            diffrax.RESULTS.where(taken, diffrax.RESULTS.successful, result),
        )

    def _guess(self, terms: Terms, t0: Time, y0: State, args: Args) -> Array:
        """Returns a first step: Hairer, Nørsett and Wanner (1993), Section II.4, (a)."""
        size = self._ratio(y0, y0, y0)
        rate = self._ratio(self.func(terms, t0, y0, args), y0, y0)
        is_known = (size > 1e-5) & (rate > 1e-5)
        return jnp.where(is_known, 0.01 * size / jnp.where(is_known, rate, 1), 1e-6)

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
        ratio = error_ratio(error, y0, y1, self.rtol, self.atol, self.norm)
        return lax.stop_gradient(ratio)

    def _remember(self, state, tried, taken, ratio, length, memory) -> HybridState:
        # If the map's error requires short steps, many in succession would keep the
        # classical solver from taking long ones.
        helps = taken & (ratio < 0.5)
        failed = tried & ~helps
        patience = jnp.where(failed, 4 * state.patience, state.patience)
        waits = (state.wait == 0) & ~helps
        after_jump = state.shortest
        if is_implicit(self.fallback):
            after_jump = jnp.maximum(after_jump, length / _LONGER**2)
        return HybridState(
            num_learned=jnp.where(taken, state.num_learned + 1, state.num_learned),
            num_classical=jnp.where(taken, state.num_classical, state.num_classical + 1),
            wait=jnp.where(waits, state.patience, jnp.maximum(state.wait - 1, 0)),
            patience=jnp.minimum(jnp.where(helps, _FIRST_WAIT, patience), self.max_wait),
            shortest=jnp.where(taken, after_jump, length),
            is_fresh=~taken,
            fallback=memory,
        )


def can_correct(y: State, implicit: bool, linear_solver: Krylov | None) -> bool:
    """Whether jumps of such states are corrected, which takes real derivatives.

    Without a linear solver, it also takes Jacobians of their size.
    """
    is_real = not any(map(jnp.iscomplexobj, jtu.tree_leaves(y)))
    return is_real and (_size(y) <= _SMALL or implicit or linear_solver is not None)


def default_nodes(y: State) -> int:
    """Returns the number of nodes for states like this one."""
    size = _size(y)
    return 24 if size <= 8 else 12 if size <= _SMALL else 8


def _size(y: State) -> int:
    return sum(map(jnp.size, jtu.tree_leaves(y)))


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
