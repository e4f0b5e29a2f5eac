from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Key, Real

from .._check import check_bools, check_count, check_instance, check_like
from .._time import time_dtype
from .._tree import all_finite, is_concrete
from .._types import Args, Numbers, State, TwoTimeMap
from ..flow_maps._base import out_of_range_message, times_out_of_range
from ..flow_maps._inverse import check_composable
from ..paths._base import AbstractInterpolant


def sample(
    flow_map: TwoTimeMap,
    x0: State,
    ts: int | np.integer | Real[ArrayLike, " times"],
    args: Args = None,
    *,
    unroll: int | bool = 1,
) -> State:
    r"""Jumps along a grid of times, in one scan with one evaluation per jump.

    The result is that of `diffrax.diffeqsolve` with [`flowdiffrax.FlowMapSolver`][] and
    `diffrax.StepTo(ts)`, but it compiles faster. Use the solver for everything else that
    Diffrax offers.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `x0`: one state at time `ts[0]`; use `jax.vmap` for a batch.
    - `ts`: the times of the grid, increasing or decreasing, or the number of equal jumps
      over the map's `time_range`, which is [0, 1] if it declares none.
    - `args`: passed to the map.
    - `unroll`: how many jumps are compiled into one turn of the loop; `True` for all. A
      single jump needs no loop. On CPU, XLA runs convolutions in a loop slowly and on one
      core: unroll them there, at the cost of a longer compilation.

    **Returns:** the state at the last time, like `x0`.

    **Raises:** `ValueError` for a number of jumps less than 1 or a grid of fewer than two
    times; for concrete values, `ValueError` for a grid that is not strictly monotone,
    times outside the map's `time_range`, or a state that is not finite; `ValueError` or
    `TypeError` if the map's output is not like `x0`. Inside `jit`, times outside the
    range raise an error at run time.
    """
    x0, grid, jump = _start(flow_map, x0, ts, args)
    if grid.shape[0] == 2:
        return jump(x0, (grid[0], grid[1]))  # a scan would make a loop
    turn = lambda x, ends: (jump(x, ends), None)
    x1, _ = lax.scan(turn, x0, (grid[:-1], grid[1:]), unroll=unroll)
    return x1


def roll_out(
    flow_map: TwoTimeMap,
    x0: State,
    ts: int | np.integer | Real[ArrayLike, " times"],
    args: Args = None,
    *,
    unroll: int | bool = 1,
    throw: bool = True,
) -> State:
    r"""Jumps along a grid of times as [`flowdiffrax.sample`][], and returns all states.

    A learned map can be unstable: a roll-out is good for some jumps, and then grows
    without bound. This is an error that names the jump.

    **Arguments:**

    - `flow_map`, `x0`, `ts`, `args`, `unroll`: as for [`flowdiffrax.sample`][].
    - `throw`: whether to raise an error if the roll-out blows up. If not, its states are
      infinite or NaN from there on; [`flowdiffrax.metrics.first_bad_jump`][] finds where.

    **Returns:** the states at all times of the grid, every leaf of shape `(times, ...)`.
    The first is `x0`.

    **Raises:** as [`flowdiffrax.sample`][]; and at run time, an error that names the
    first jump whose end is not finite.
    """
    check_bools(throw=throw)
    x0, grid, jump = _start(flow_map, x0, ts, args)

    def turn(x, ends):
        x = jump(x, ends)
        return x, (x, all_finite(x))

    _, (xs, is_finite) = lax.scan(turn, x0, (grid[:-1], grid[1:]), unroll=unroll)
    if throw:
        total = grid.shape[0] - 1
        messages = [
            f"The roll-out blew up: jump {number} of {total} returned a state that is "
            "not finite. Train through roll-outs, with `objectives.RollOutMatching`, "
            "make longer jumps, of which there are fewer, or pass `throw=False`."
            for number in range(1, total + 1)
        ]
        first = jnp.argmin(is_finite)
        xs = eqx.branched_error_if(xs, ~jnp.all(is_finite), first, messages)
    return jtu.tree_map(lambda x, rest: jnp.concatenate([x[None], rest]), x0, xs)


def _start(flow_map, x0, ts, args):
    """Checks the start and the grid; returns them, and a function that jumps."""
    check_composable(flow_map)
    x0 = jtu.tree_map(jnp.asarray, x0)
    check_finite_state(x0)
    grid = make_grid(flow_map, ts)
    if is_concrete(grid):
        # The grid is checked as NumPy, which is concrete even inside `jit`.
        check_grid(flow_map, np.asarray(grid))
    else:
        outside = times_out_of_range(flow_map, jnp.min(grid), jnp.max(grid))
        if outside is not None:
            x0 = eqx.error_if(x0, outside, out_of_range_message(flow_map))
    grid = jnp.asarray(grid, time_dtype(x0))

    def jump(x, ends):
        s, t = ends
        return check_like(flow_map(s, t, x, args), x, "`flow_map`")

    return x0, grid, jump


def sample_with_restarts(
    flow_map: TwoTimeMap,
    interpolant: AbstractInterpolant,
    x0: State,
    times: Real[ArrayLike, " restarts"],
    args: Args = None,
    *,
    base: Callable[[Key[Array, ""], State], State],
    key: Key[Array, ""],
    unroll: int | bool = 1,
) -> State:
    r"""Jumps to the data, and repeatedly returns to earlier times with fresh noise.

    The first jump goes from 0 to 1. Then, for each time $t$, the interpolant combines the
    last sample and a new draw of the base into a state at $t$, and the map jumps from $t$
    to 1. If the jumps have the right distribution, so do the samples, for any times.
    Unlike jumps along the flow, restarts forget the errors of earlier jumps. With
    restarts, maps from consistency training, which learn only jumps to the data, can take
    several steps.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `interpolant`: the interpolant that the map was trained with.
    - `x0`: one draw of the base; use `jax.vmap` for a batch, with a key for each.
    - `times`: the times to restart from, in [0, 1), usually increasing.
    - `args`: passed to the map.
    - `base`: a function of a key and a sample that returns a draw of the base, such as
      [`flowdiffrax.data.GaussianBase`][].
    - `key`: a random key.
    - `unroll`: how many restarts are compiled into one turn of the loop; `True` for all.

    **Returns:** the sample at time 1, like `x0`.

    **Raises:** `ValueError` if `times` is not one-dimensional, or for concrete times
    outside [0, 1); otherwise as [`flowdiffrax.sample`][].

    ??? cite "Reference"

        Consistency models, [arXiv:2303.01469](https://arxiv.org/abs/2303.01469),
        algorithm 1.
    """
    times = jnp.asarray(times, time_dtype(x0))
    with jax.ensure_compile_time_eval():
        inside = not is_concrete(times) or bool(jnp.all((times >= 0) & (times < 1)))
    if times.ndim != 1 or not inside:
        raise ValueError(f"`times` must be an array of times in [0, 1); got {times}.")
    to_data = lambda s, x: sample(flow_map, x, jnp.stack([s, jnp.ones_like(s)]), args)

    def restart(x1, inputs):
        t, index = inputs
        base_key, latent_key = jr.split(jr.fold_in(key, index))
        z = None
        if interpolant.has_latent:
            z = optax.tree.random_like(latent_key, x1)
        return to_data(t, interpolant(base(base_key, x1), x1, z).evaluate(t)), None

    x1 = to_data(jnp.zeros((), times.dtype), x0)
    turns = times, jnp.arange(times.shape[0])
    x1, _ = lax.scan(restart, x1, turns, unroll=unroll)
    return x1


def check_finite_state(x0: State) -> None:
    """**Raises:** `ValueError` for a concrete state that is not finite."""
    if not is_concrete(x0):
        return
    # A constant within `jit` is concrete, but results computed from it are not.
    with jax.ensure_compile_time_eval():
        finite = bool(all_finite(x0))
    if not finite:
        raise ValueError("`x0` is not finite, but a flow map takes finite states.")


def make_grid(flow_map: TwoTimeMap, ts) -> Real[ArrayLike, " times"]:
    check_instance(ts, Numbers, "ts", "a number of jumps, or a grid of times")
    is_number = jnp.ndim(ts) == 0 and is_concrete(ts)
    if is_number and jnp.issubdtype(jnp.result_type(ts), jnp.integer):
        check_count(ts, 1, "ts")
        low, high = getattr(flow_map, "time_range", None) or (0.0, 1.0)
        return np.linspace(low, high, int(ts) + 1)
    shape = jnp.shape(ts)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            "`ts` must be a number of jumps, an integer, or a one-dimensional grid of at "
            f"least two times; got {f'shape {shape}' if shape else ts}."
        )
    return ts if isinstance(ts, np.ndarray) else jnp.asarray(ts)


def check_grid(flow_map: TwoTimeMap, ts: np.ndarray) -> None:
    steps = np.diff(ts)
    if not (np.all(steps > 0) or np.all(steps < 0)):
        raise ValueError(f"`ts` must strictly rise or strictly fall; got {ts}.")
    with jax.ensure_compile_time_eval():
        outside = times_out_of_range(flow_map, ts.min(), ts.max())
        if outside is not None and bool(outside):
            raise ValueError(f"{out_of_range_message(flow_map)} Got `ts` = {ts}.")
