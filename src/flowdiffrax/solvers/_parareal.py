from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from .._check import check_callable, check_count, check_like, check_positive
from .._time import time_dtype
from .._tree import subtract
from .._types import Args, State, TwoTimeMap, VectorField
from ..flow_maps._inverse import check_composable
from ._predict import error_ratio
from ._sample import roll_out


class PararealSolution(NamedTuple):
    """What [`flowdiffrax.solvers.parareal`][] returns.

    **Attributes:**

    - `ts`: the times.
    - `ys`: the states, every leaf with the axis of times in front.
    - `changes`: by how many tolerances each sweep changed the states at most; NaN for
      sweeps that were not needed.
    - `num_sweeps`: the number of sweeps.
    - `is_successful`: whether the last sweep changed the states by less than the
      tolerance, and its classical solves succeeded.
    """

    ts: Real[Array, " times"]
    ys: State
    changes: Float[Array, " sweeps"]
    num_sweeps: Int[Array, ""]
    is_successful: Bool[Array, ""]


def parareal(
    flow_map: TwoTimeMap,
    vector_field: VectorField,
    ts: Real[ArrayLike, " times"],
    x0: State,
    args: Args = None,
    *,
    rtol: float,
    atol: float,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    max_sweeps: int | None = None,
    max_steps: int = 4096,
) -> PararealSolution:
    r"""Solves one long trajectory in windows side by side, with a map as the predictor.

    Jumps of the map give the first states at the ends of the windows. A sweep solves all
    windows at once by the classical solver, from these states, and carries what it finds
    wrong with each jump to all later windows:
    $x_{n+1}^{k+1} = X(x_n^{k+1}) + F(x_n^k) - X(x_n^k)$, where $X$ is the map and $F$ the
    classical solver. Sweeps end when they change no state by more than the tolerance.
    The first $k$ windows are those of the classical solver after $k$ sweeps, whatever the
    map; a good one needs two or three sweeps for any number of windows.

    It takes more evaluations of the vector field than one classical solve, as often as
    there are sweeps, but these do not wait for each other. This pays where many
    evaluations cost hardly more than one: an expensive vector field on an accelerator, or
    one that would read the weights of a large network for each evaluation.

    Call it inside `jax.jit`: otherwise it is compiled at every call. For gradients, use a
    classical solver or a [`flowdiffrax.HybridSolver`][].

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `ts`: at least two times, rising or falling: the ends of the windows, from that of
      `x0`.
    - `x0`: one state.
    - `args`: passed to both.
    - `rtol`, `atol`: the tolerances of the classical solver and of the sweeps, positive.
    - `solver`: a Diffrax solver for `diffrax.ODETerm` with an error estimate.
    - `max_sweeps`: the largest number of sweeps, at least 1; `None` for the number of
      windows, after which the result is that of the classical solver.
    - `max_steps`: the largest number of classical steps in a window.

    **Returns:** a [`flowdiffrax.solvers.PararealSolution`][].

    **Raises:** `ValueError` for fewer than two times, times that are known and do not
    rise or fall, a vector field of another shape, or settings out of their ranges;
    otherwise as [`flowdiffrax.sample`][].

    ??? cite "Reference"

        Lions, Maday and Turinici, *A "parareal" in time discretization of PDE's*, 2001.
        The update is equation (2.13) of Gander and Vandewalle, *Analysis of the parareal
        time-parallel time-integration method*, 2007.
    """
    check_composable(flow_map)
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_count(max_steps, 1, "max_steps")
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"`ts` must be at least two times; got shape {ts.shape}.")
    num_windows = len(ts) - 1
    max_sweeps = num_windows if max_sweeps is None else max_sweeps
    check_count(max_sweeps, 1, "max_sweeps")
    x0 = jtu.tree_map(jnp.asarray, x0)
    ts = ts.astype(time_dtype(x0))
    slope = jax.eval_shape(lambda x: vector_field(ts[0], x, args), x0)
    check_like(slope, x0, "`vector_field`")
    starts, ends = ts[:-1], ts[1:]
    controller = diffrax.PIDController(rtol=rtol, atol=atol)

    def classical(s, t, x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            s,
            t,
            None,
            x,
            args,
            stepsize_controller=controller,
            max_steps=max_steps,
            throw=False,
        )
        is_good = solution.result == diffrax.RESULTS.successful
        return jtu.tree_map(lambda leaf: leaf[0], solution.ys), is_good

    def jump(s, t, x):
        # Any other prediction is better than one that is not finite.
        value = flow_map(s, t, x, args)
        return jtu.tree_map(lambda y, x: jnp.where(jnp.isfinite(y), y, x), value, x)

    before = lambda ys: jtu.tree_map(lambda leaf: leaf[:-1], ys)

    def sweep(carry):
        ys, changes, k, _ = carry
        solved, is_good = jax.vmap(classical)(starts, ends, before(ys))
        wrong = subtract(solved, jax.vmap(jump)(starts, ends, before(ys)))

        def window(x, given):
            s, t, wrong = given
            new = jtu.tree_map(jnp.add, jump(s, t, x), wrong)
            return new, new

        _, rest = lax.scan(window, x0, (starts, ends, wrong))
        new = jtu.tree_map(lambda x, ys: jnp.concatenate([x[None], ys]), x0, rest)
        norm = optx.rms_norm
        ratio = lambda y, old: error_ratio(subtract(y, old), y, old, rtol, atol, norm)
        change = jnp.max(jax.vmap(ratio)(new, ys)).astype(changes.dtype)
        return new, changes.at[k].set(change), k + 1, is_good.all()

    def goes_on(carry):
        _, changes, k, is_good = carry
        return (k == 0) | ((k < max_sweeps) & ~((changes[k - 1] < 1) & is_good))

    ys = roll_out(lambda s, t, x, args: jump(s, t, x), x0, ts, args, throw=False)
    changes = jnp.full(max_sweeps, jnp.nan, ts.dtype)
    ys, changes, k, is_good = lax.while_loop(
        goes_on, sweep, (ys, changes, jnp.asarray(0, jnp.int32), jnp.asarray(True))
    )
    is_done = (changes[k - 1] < 1) | (k >= num_windows)
    return PararealSolution(ts, ys, changes, k, is_done & is_good)
