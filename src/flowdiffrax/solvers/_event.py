from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .._check import check_count
from .._types import Args, State, Time
from ._base import Terms


class EventSolver(diffrax.AbstractAdaptiveSolver, diffrax.AbstractWrappedSolver):
    """Wraps another solver, and shortens steps that contain more than one event.

    Diffrax looks at the conditions of an event at the ends of steps. In a long step, it
    misses a condition that changes its sign twice, and if two conditions change theirs,
    it locates the first one in the list, which need not be the earlier one. This solver
    looks at the conditions along each step, on its dense output. Where signs change more
    than once, the step size controller refuses the step, until it contains one event.

    ```python
    event = diffrax.Event(conditions, optimistix.Newton(1e-6, 1e-6))
    diffrax.diffeqsolve(
        term, fd.solvers.EventSolver(fd.FlowMapSolver(flow_map), event),
        t0, t1, dt0=2 * (t1 - t0), y0=y0, event=event,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
    )
    ```

    A solver without an error estimate, such as [`flowdiffrax.FlowMapSolver`][], gets one
    of zero, so that its steps are as long as events allow, whatever the tolerances. The
    controller must adapt the steps: with `diffrax.ConstantStepSize` or `diffrax.StepTo`,
    none is refused.

    Conditions are called as `condition(t, y, args, terms=terms, solver=solver)`. As in
    Diffrax, `t` is negative where a solve goes backwards in time. Two changes of one
    condition between neighbouring points go unseen. Events at the same time cannot be
    told apart: steps are shortened until they hardly change time or state, and then the
    first in the list counts.

    **Arguments:**

    - `solver`: any Diffrax solver.
    - `event`: the `diffrax.Event` that is passed to `diffrax.diffeqsolve`.
    - `num_points`: how many evenly spaced times within a step are looked at, at least 1.

    **Raises:** `TypeError` if `solver` or `event` is neither of these; `ValueError` for
    `num_points`.
    """

    solver: diffrax.AbstractSolver  # pyright: ignore
    event: diffrax.Event
    num_points: int = eqx.field(static=True, default=31)

    def __check_init__(self):
        for name, value, kind in (
            ("solver", self.solver, diffrax.AbstractSolver),
            ("event", self.event, diffrax.Event),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` must be a `diffrax.{kind.__name__}`; got {value!r}."
                )
        check_count(self.num_points, 1, "num_points")

    @property
    def term_structure(self):  # pyright: ignore
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):  # pyright: ignore
        return self.solver.term_compatible_contr_kwargs

    @property
    def root_finder(self):
        """That of an implicit solver, to which Diffrax gives its tolerances."""
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    def order(self, terms: Terms) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: Terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms: Terms):
        return self.solver.error_order(terms)

    def func(self, terms: Terms, t0: Time, y0: State, args: Args) -> State:
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms: Terms, t0: Time, t1: Time, y0: State, args: Args) -> Any:
        return self.solver.init(terms, t0, t1, y0, args)

    def step(
        self,
        terms: Terms,
        t0: Time,
        t1: Time,
        y0: State,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[State, State, dict[str, Any], Any, diffrax.RESULTS]:
        """Takes a step of the solver, with an infinite error if it has several events."""
        y1, error, dense_info, solver_state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        along = self.solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
        shares = np.arange(1, self.num_points + 1) / (self.num_points + 1)
        ts = t0 + jnp.asarray(shares, jnp.result_type(t0)) * (t1 - t0)
        inner = jax.vmap(along.evaluate)(ts)
        ts = jnp.concatenate([jnp.stack([t0]), ts, jnp.stack([t1])])
        # What Diffrax compares are the states at the ends.
        join = lambda y0, ys, y1: jnp.concatenate([y0[None], ys, y1[None]])
        ys = jtu.tree_map(join, y0, inner, y1)
        given = {"terms": terms, "solver": self.solver}
        look = lambda t, y: _signs(self.event, t, y, args, given)
        several = lax.stop_gradient(_several(jax.vmap(look)(ts, ys), ts, y0, y1))
        if error is None:
            error = jtu.tree_map(jnp.zeros_like, y0)
        error = jtu.tree_map(lambda leaf: jnp.where(several, jnp.inf, leaf), error)
        return y1, error, dense_info, solver_state, result


def _signs(
    event: diffrax.Event, t: Time, y: State, args: Args, given: dict[str, Any]
) -> Bool[Array, " conditions"]:
    """Whether each condition is true or positive."""
    values = [
        jnp.asarray(condition(t, y, args, **given))
        for condition in jtu.tree_leaves(event.cond_fn, is_leaf=callable)
    ]
    return jnp.stack([v if v.dtype == jnp.bool_ else v > 0 for v in values])


def _several(
    signs: Bool[Array, "times conditions"], ts: Array, y0: State, y1: State
) -> Bool[Array, ""]:
    """Whether signs change more than once, at times that can be told apart."""
    changes = signs[1:] != signs[:-1]
    apart = jnp.sum(jnp.any(changes, axis=1)) > 1
    eps = jnp.sqrt(jnp.finfo(ts.dtype).eps)
    short = ts[1] - ts[0] <= eps * jnp.maximum(jnp.abs(ts[0]), jnp.abs(ts[-1]))
    return apart | ((jnp.sum(changes) > 1) & ~(short | _is_still(y0, y1)))


def _is_still(y0: PyTree[Array], y1: PyTree[Array]) -> Bool[Array, ""]:
    """Whether the state has hardly changed."""

    def still(y0, y1):
        eps = jnp.sqrt(jnp.finfo(y0.dtype).eps)
        return jnp.max(jnp.abs(y1 - y0)) <= eps * jnp.max(jnp.abs(y0))

    return jnp.all(jnp.stack(jtu.tree_leaves(jtu.tree_map(still, y0, y1))))
