import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Real

from ._custom_types import Args, State, Time, VectorField
from ._misc import is_concrete, num_rows, real_dtype, subtract, time_dtype, times_like


class StatePath(diffrax.AbstractPath):
    """A single state at all times, for objectives that only ask where to be right.

    Distillation needs no data, only states that matter: the initial states of a physical
    ODE, or draws of the base.

    **Arguments:**

    - `x`: the state, an array or a PyTree of arrays.
    """

    x: State
    t0 = -jnp.inf
    t1 = jnp.inf

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        """The state, or the increment to `t1`, zero, if that is given."""
        del t0, left
        return self.x if t1 is None else subtract(self.x, self.x)

    def derivative(self, t: Time, left: bool = True) -> State:
        """There is none: **raises** `TypeError`."""
        raise TypeError(
            "A `StatePath` is one state, and no data: this objective learns from data. "
            "Use `data.InterpolantBatches`, or an objective that learns from a teacher."
        )


class TrajectoryPath(diffrax.AbstractPath):
    """A solution of an ODE, known at certain times: exact there, linear between.

    Outside its times it is NaN.

    **Arguments:**

    - `ts`: rising times, of shape `(times,)`, at least two.
    - `ys`: the states at those times, every leaf with leading axis `times`.
    """

    ts: Float[Array, "*batch times"]
    ys: State

    @property
    def t0(self):  # pyright: ignore
        return self.ts[0]

    @property
    def t1(self):  # pyright: ignore
        return self.ts[-1]

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        """The state at `t0`, or the increment to `t1` if that is given."""
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        (t,) = times_like(self.ys, t0)
        ts = self.ts.astype(t.dtype)
        index = jnp.clip(jnp.searchsorted(ts, t, side="right") - 1, 0, ts.size - 2)
        fraction = (t - ts[index]) / (ts[index + 1] - ts[index])
        # Extrapolation would train a map on states that no trajectory has.
        fraction = jnp.where((t < ts[0]) | (t > ts[-1]), jnp.nan, fraction)

        def between(ys):
            weight = fraction.astype(jnp.finfo(ys.dtype).dtype)
            return (1 - weight) * ys[index] + weight * ys[index + 1]

        return jtu.tree_map(between, self.ys)


def solve_trajectories(
    vector_field: VectorField,
    x0: State,
    ts: Real[Array, " times"] | np.ndarray,
    args: Args = None,
    *,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    chunk_size: int = 4096,
) -> State:
    """Integrates a batch of initial states with Diffrax and saves them at given times.

    Each example has its own adaptive steps. Gradients are not kept.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt` for one example.
    - `x0`: a batch of states at `ts[0]`, every leaf with the same leading axis.
    - `ts`: the times to save at, strictly rising or strictly falling, at least two.
    - `args`: passed on to the vector field, the same for all examples.
    - `solver`: the Diffrax solver; `None` for `diffrax.Tsit5()`.
    - `rtol`, `atol`: tolerances; `None` for 1e-8 in float64 and 1e-5 in float32.
    - `max_steps`: the most steps a solve may take before it is an error.
    - `chunk_size`: how many examples are integrated at a time, which bounds the memory.

    **Returns:** the states, every leaf of shape `(batch, times, ...)`.

    **Raises:** `ValueError` for times that are too few or, if known, not monotone, for
    a `chunk_size` below 1, and for an `x0` that is no batch.
    """
    num_rows(x0, "`x0` is a batch of states: its leaves")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
    if jnp.ndim(ts) != 1 or jnp.shape(ts)[0] < 2:
        raise ValueError(
            f"`ts` must be one-dimensional with at least two times; got {jnp.shape(ts)}."
        )
    if is_concrete(ts):
        steps = np.diff(np.asarray(ts))
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError(f"`ts` must strictly rise or strictly fall; got {ts}.")
    return _solve_trajectories(
        vector_field, x0, ts, args, solver, rtol, atol, max_steps, chunk_size
    )


# The checks stay outside `jit`, in which no time is known.
@eqx.filter_jit
def _solve_trajectories(
    vector_field, x0, ts, args, solver, rtol, atol, max_steps, chunk_size
):
    ts = jnp.asarray(ts, time_dtype(x0))
    default_tol = 1e-8 if jnp.finfo(real_dtype(x0)).bits > 32 else 1e-5
    controller = diffrax.PIDController(
        rtol=default_tol if rtol is None else rtol,
        atol=default_tol if atol is None else atol,
    )

    def solve(x0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Tsit5() if solver is None else solver,
            t0=ts[0],
            t1=ts[-1],
            dt0=0.01 * (ts[-1] - ts[0]),
            y0=x0,
            args=args,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=controller,
            max_steps=max_steps,
        )
        return solution.ys

    return lax.stop_gradient(lax.map(solve, x0, batch_size=chunk_size))
