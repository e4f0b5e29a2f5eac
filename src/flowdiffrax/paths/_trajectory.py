from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Real

from .._check import check_at_least, check_bools, check_callable, check_count, check_like
from .._time import real_dtype, time_dtype, times_like
from .._tree import is_concrete, nan_where, num_rows, rows_not_finite, subtract
from .._types import Args, State, Time, TwoTimeMap, VectorField


class StatePath(diffrax.AbstractPath):
    """A path that is one state at all times, for objectives that need states only.

    Distillation needs no data, only the states where the map should be accurate: the
    initial states of a physical ODE, or draws of the base.

    **Arguments:**

    - `x`: the state, an array or a PyTree of arrays.
    """

    x: State
    t0 = -jnp.inf
    t1 = jnp.inf

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        """The state, or the increment to `t1`, which is zero, if `t1` is given."""
        del t0, left
        return self.x if t1 is None else subtract(self.x, self.x)

    def derivative(self, t: Time, left: bool = True) -> State:
        """A single state has no derivative: **raises** `TypeError`."""
        raise TypeError(
            "This objective learns from data, but a `StatePath` is a single state. Use "
            "`data.InterpolantBatches`, or an objective that learns from a teacher."
        )


class TrajectoryPath(diffrax.AbstractPath):
    """A solution of an ODE saved at certain times, linearly interpolated between them.

    It is NaN before the first and after the last time.

    **Arguments:**

    - `ts`: increasing times, of shape `(times,)`, at least two.
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

    def saved_time(self, position: Time) -> Float[Array, ""]:
        """The saved time nearest to a position, where 0 is the first and 1 the last."""
        (position,) = times_like(self.ys, position)
        return self.ts[self.index_of_position(position)].astype(position.dtype)

    def saved_state(self, position: Time) -> State:
        """The state at `saved_time`, without interpolation: others may be NaN."""
        index = self.index_of_position(position)
        return jtu.tree_map(lambda leaf: leaf[index], self.ys)

    def index_of_time(self, t: Time) -> Int[Array, ""]:
        """The number of the saved time nearest to a time."""
        (t,) = times_like(self.ys, t)
        return jnp.argmin(jnp.abs(self.ts.astype(t.dtype) - t))

    def index_of_position(self, position: Time) -> Int[Array, ""]:
        """The number of the saved time nearest to a position, as in `saved_time`."""
        (position,) = times_like(self.ys, position)
        index = jnp.round(position * (self.ts.size - 1)).astype(int)
        return jnp.clip(index, 0, self.ts.size - 1)

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        """The state at `t0`, or the increment to `t1` if `t1` is given."""
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        (t,) = times_like(self.ys, t0)
        ts = self.ts.astype(t.dtype)
        index = jnp.clip(jnp.searchsorted(ts, t, side="right") - 1, 0, ts.size - 2)
        fraction = (t - ts[index]) / (ts[index + 1] - ts[index])
        # Extrapolation would train a map on states that are on no trajectory.
        fraction = jnp.where((t < ts[0]) | (t > ts[-1]), jnp.nan, fraction)

        def between(ys):
            weight = fraction.astype(jnp.finfo(ys.dtype).dtype)
            return (1 - weight) * ys[index] + weight * ys[index + 1]

        return jtu.tree_map(between, self.ys)


def check_one_length(rows: Any) -> None:
    """**Raises:** `ValueError` for rows of different lengths.

    This replaces NumPy's error about an inhomogeneous shape.
    """
    is_object = isinstance(rows, np.ndarray) and rows.dtype.kind == "O"
    if not (is_object or isinstance(rows, list | tuple)):
        return
    lengths = sorted({np.shape(row)[:1] for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            "All trajectories must be saved at the same number of times; got leading "
            f"axes {lengths}. The times may differ, in `ts` of shape (pool, times)."
        )


def solve_trajectories(
    vector_field: VectorField,
    x0: State,
    ts: Real[Array, "*batch times"] | np.ndarray,
    args: Args = None,
    *,
    args_per_example: bool = False,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    chunk_size: int = 4096,
    throw: bool = True,
) -> State:
    """Integrates a batch of initial states with Diffrax and saves them at given times.

    Each example takes its own adaptive steps, and can have its own times and parameters.
    Gradients are stopped.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt` for one example.
    - `x0`: a batch of states at the first time, every leaf with the same leading axis.
    - `ts`: the times to save at, at least two, strictly increasing or strictly
      decreasing. Shape `(times,)` for all examples, or `(batch, times)` with one row for
      each example. Each solve starts at its first time.
    - `args`: passed to the vector field.
    - `args_per_example`: whether `args` has one row for each example: arrays with the
      leading axis of `x0`. If not, all examples share `args`.
    - `solver`: the Diffrax solver, or `None` for `diffrax.Tsit5()`. For stiff problems,
      use an implicit solver such as `diffrax.Kvaerno5()`.
    - `rtol`, `atol`: the tolerances. `None` uses 1e-8 in float64 and 1e-5 in float32. For
      an implicit solver in float32 it uses 1e-3, because at tighter tolerances rounding
      errors can make it reject every step.
    - `max_steps`: the largest number of steps in a solve; a solve that needs more fails.
    - `chunk_size`: the number of examples to integrate at a time, which bounds the
      memory.
    - `throw`: whether to raise an error if a solve fails. If not, all states of that
      solve are NaN; [`flowdiffrax.data.finite_rows`][] drops and counts such rows.

    **Returns:** the states, every leaf of shape `(batch, times, ...)`.

    **Raises:** `ValueError` if there are fewer than two times or they are known and not
    monotone; if `chunk_size` or `max_steps` is below 1, or a tolerance negative; if `x0`
    is not a batch; if `ts` or `args` do not have one row for each example; if rows are
    known and not finite; or if `vector_field` returns another shape. `TypeError` if
    `vector_field` does not take the arguments `(t, x, args)`, or for settings of another
    type.
    """
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    check_count(max_steps, 1, "max_steps")
    check_bools(throw=throw)
    check_at_least(rtol, 0, "rtol", or_none=True)
    check_at_least(atol, 0, "atol", or_none=True)
    rows, shared = _rows_of_batch(x0, ts, args, args_per_example, chunk_size)
    return _solve_trajectories(
        vector_field, rows, shared, solver, rtol, atol, max_steps, chunk_size, throw
    )


def step_trajectories(
    step: TwoTimeMap,
    x0: State,
    ts: Real[Array, "*batch times"] | np.ndarray,
    args: Args = None,
    *,
    args_per_example: bool = False,
    num_substeps: int = 1,
    chunk_size: int = 4096,
) -> State:
    """Integrates a batch of initial states with any stepper, with steps of fixed length.

    Use it instead of [`flowdiffrax.solve_trajectories`][] where an integrator for the
    equation at hand is faster than a solver of Diffrax: an exponential or an
    implicit-explicit step, or a stepper of another library. Gradients are stopped.

    **Arguments:**

    - `step`: a callable `step(s, t, x, args)` that takes one state from time `s` to time
      `t`. A stepper with a built-in step `dt` ignores the times; then `ts` must have
      steps of `num_substeps * dt`.
    - `x0`, `ts`, `args`, `args_per_example`, `chunk_size`: as for
      [`flowdiffrax.solve_trajectories`][].
    - `num_substeps`: the number of steps between two saved times, at least 1.

    **Returns:** the states, every leaf of shape `(batch, times, ...)`. They are infinite
    or NaN where the stepper is unstable; [`flowdiffrax.data.finite_rows`][] drops and
    counts such rows.

    **Raises:** as [`flowdiffrax.solve_trajectories`][]; `ValueError` if `num_substeps` is
    below 1, or if `step` does not return a state.
    """
    check_callable(step, "step", "step(s, t, x, args)")
    check_count(num_substeps, 1, "num_substeps")
    rows, shared = _rows_of_batch(x0, ts, args, args_per_example, chunk_size)
    return _step_trajectories(step, rows, shared, num_substeps, chunk_size)


def _rows_of_batch(
    x0: State,
    ts: Real[Array, "*batch times"] | np.ndarray,
    args: Args,
    args_per_example: bool,
    chunk_size: int,
) -> tuple[tuple, tuple]:
    """Checks a batch; returns what it has for each example, and what is shared."""
    batch_size = num_rows(x0, "`x0` is a batch of states: its leaves")
    check_one_length(ts)
    check_count(chunk_size, 1, "chunk_size")
    check_bools(args_per_example=args_per_example)
    if jnp.ndim(ts) not in (1, 2) or jnp.shape(ts)[-1] < 2:
        raise ValueError(
            "`ts` must have at least two times, in shape (times,) or (batch, times); "
            f"got shape {jnp.shape(ts)}."
        )
    if is_concrete(ts):
        steps = np.diff(np.asarray(ts))
        if not np.all(np.all(steps > 0, axis=-1) | np.all(steps < 0, axis=-1)):
            raise ValueError(f"`ts` must strictly rise or strictly fall; got {ts}.")
    if jnp.ndim(ts) == 2:
        _check_rows("ts", ts, batch_size)
    if args_per_example:
        _check_rows("args", args, batch_size)
    rows = x0, ts if jnp.ndim(ts) == 2 else None, args if args_per_example else None
    bad = np.flatnonzero(rows_not_finite(rows))
    if bad.size > 0:
        raise ValueError(
            f"`x0` and `args` must be finite; {bad.size} of {batch_size} examples are "
            f"not, the first of them example {bad[0]}."
        )
    shared = None if jnp.ndim(ts) == 2 else ts, None if args_per_example else args
    return rows, shared


def _check_rows(name: str, tree: PyTree, batch_size: int) -> None:
    rows = [jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(tree)]
    if any(size != (batch_size,) for size in rows):
        raise ValueError(
            f"`{name}` must have one row for each example, {batch_size}; got {rows}."
        )


# The checks stay outside `jit`, where the times would be traced.
@eqx.filter_jit
def _solve_trajectories(
    vector_field, rows, shared, solver, rtol, atol, max_steps, chunk_size, throw
):
    dtype = time_dtype(rows[0])
    is_implicit = isinstance(solver, diffrax.AbstractImplicitSolver)
    if jnp.finfo(real_dtype(rows[0])).bits > 32:
        default_tol = 1e-8
    else:
        # An implicit step solves its equation to a hundredth of the tolerance. If this is
        # below the rounding error, every step is rejected.
        default_tol = 1e-3 if is_implicit else 1e-5
    controller = diffrax.PIDController(
        rtol=default_tol if rtol is None else rtol,
        atol=default_tol if atol is None else atol,
    )

    def solve(row):
        x0, ts, args = row
        ts = jnp.asarray(shared[0] if ts is None else ts, dtype)
        args = shared[1] if args is None else args
        # Diffrax would broadcast, without a word.
        slope = jax.eval_shape(lambda t, x: vector_field(t, x, args), ts[0], x0)
        check_like(slope, x0, "`vector_field`", any_dtype=True)
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
            throw=throw,
        )
        if throw:
            return solution.ys
        failed = solution.result != diffrax.RESULTS.successful
        return nan_where(failed, solution.ys)

    return lax.stop_gradient(lax.map(solve, rows, batch_size=chunk_size))


@eqx.filter_jit
def _step_trajectories(step, rows, shared, num_substeps, chunk_size):
    dtype = time_dtype(rows[0])

    def run(row):
        x0, ts, args = row
        ts = jnp.asarray(shared[0] if ts is None else ts, dtype)
        args = shared[1] if args is None else args

        def interval(x, ends):
            s, t = ends
            # This form ends exactly at the saved time.
            at = lambda k: s + (t - s) * (k / num_substeps)

            def substep(x, k):
                return check_like(step(at(k), at(k + 1), x, args), x, "`step`"), None

            x, _ = lax.scan(substep, x, jnp.arange(num_substeps, dtype=dtype))
            return x, x

        _, xs = lax.scan(interval, x0, (ts[:-1], ts[1:]))
        return jtu.tree_map(lambda x, xs: jnp.concatenate([x[None], xs]), x0, xs)

    return lax.stop_gradient(lax.map(run, rows, batch_size=chunk_size))
