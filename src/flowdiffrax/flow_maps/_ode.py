import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._check import check_at_least, check_callable, check_count
from .._time import at_least_float32
from .._tree import add_scaled
from .._types import Args, Scalar, State, VectorField
from ._base import AbstractChordFlowMap, as_time_range


class ODEFlowMap(AbstractChordFlowMap):
    r"""The exact flow map of a vector field, integrated by Diffrax.

    Use it as an oracle in tests, as a teacher map, or in place of any learned map. It is
    differentiable in `s`, `t`, `x`, `args` and the vector field's parameters, in forward
    and reverse mode, also nested.

    With `num_steps`, it is a few equal steps of the solver instead, for example as the
    base of a [`flowdiffrax.flow_maps.StepperFlowMap`][].

    !!! info "Numerics"

        Diffrax integrates the average velocity $u(\tau) = v_{s,s+\tau h}(x)\,\tau$, by
        $\dot u = b_{s+\tau h}(x + h u)$ with $h = t - s$, for $\tau$ from 0 to 1. A
        direct solve from $s$ to $t$ would take no step at $s = t$, and its derivative in
        $t$ would be zero there instead of $b_t$. In addition, a batch of mixed jumps, in
        both directions, becomes a batch of solves over [0, 1].

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `solver`: the Diffrax solver; `None` for `diffrax.Dopri8()`.
    - `rtol`, `atol`: tolerances; `None` for 1e-8 in float64 and 1e-6 in float32.
    - `num_steps`: the number of equal steps of each jump, without error control; `None`
      for steps adapted to the tolerances.
    - `max_steps`: the maximum number of steps of a solve; more raise an error.
    - `adjoint`: how the solve is differentiated. The default, `diffrax.DirectAdjoint()`,
      supports every nesting; `diffrax.RecursiveCheckpointAdjoint()` is faster if you need
      reverse mode only.
    - `time_range`: the interval `(low, high)` that both times must lie in; `None` for no
      check.
    """

    vector_field: VectorField
    solver: diffrax.AbstractSolver | None = None
    rtol: float | None = None
    atol: float | None = None
    num_steps: int | None = eqx.field(static=True, default=None)
    max_steps: int = eqx.field(static=True, default=256)
    adjoint: diffrax.AbstractAdjoint = diffrax.DirectAdjoint()
    time_range: tuple[float, float] | None = eqx.field(
        static=True, converter=as_time_range, default=None
    )

    def __check_init__(self):
        check_callable(self.vector_field, "vector_field", "vector_field(t, x, args)")
        check_count(self.num_steps, 1, "num_steps", or_none=True)
        check_count(self.max_steps, 1, "max_steps", or_none=True)
        check_at_least(self.rtol, 0, "rtol", or_none=True)
        check_at_least(self.atol, 0, "atol", or_none=True)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Evaluates the vector field."""
        return self.vector_field(t, x, args)

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity, integrated by Diffrax."""
        # In float32 at least: with bfloat16 times, Diffrax would skip steps.
        like = lambda a, b: a.astype(jnp.result_type(b))
        widen = lambda x: jnp.asarray(x, at_least_float32(jnp.result_type(x)))
        start = jtu.tree_map(widen, x)
        default_tol = 1e-8 if jnp.finfo(s.dtype).bits > 32 else 1e-6
        # Begin with a tenth; Diffrax's own guess would need a vector field call.
        dt0, max_steps = jnp.full_like(s, 0.1), self.max_steps
        controller: diffrax.AbstractStepSizeController = diffrax.PIDController(
            rtol=default_tol if self.rtol is None else self.rtol,
            atol=default_tol if self.atol is None else self.atol,
        )
        if self.num_steps is not None:
            # With a constant step size, rounding could add a tiny step.
            ends = jnp.linspace(0.0, 1.0, self.num_steps + 1, dtype=s.dtype)
            dt0, max_steps, controller = None, self.num_steps, diffrax.StepTo(ends)

        def rate(tau, u, inputs):
            s, h, x, args = inputs
            b_u = self.vector_field(s + tau * h, add_scaled(x, h, u), args)
            return jtu.tree_map(like, b_u, u)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rate),
            diffrax.Dopri8() if self.solver is None else self.solver,
            t0=jnp.zeros_like(s),
            t1=jnp.ones_like(s),
            dt0=dt0,
            y0=jtu.tree_map(jnp.zeros_like, start),
            # In `args`, so that every adjoint differentiates with respect to them.
            args=(s, t - s, start, args),
            stepsize_controller=controller,
            adjoint=self.adjoint,
            max_steps=max_steps,
        )
        return jtu.tree_map(lambda u, x: like(u[0], x), solution.ys, x)
