from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Key

from .._check import check_bools, check_instance
from .._tree import num_rows
from .._types import Args, State
from ..paths._splines import AbstractSpline
from ..times._base import check_batch_size
from ._batches import Batch, _as_jax, _draw_rows, check_finite


class SplineBatches(eqx.Module):
    r"""Batches of splines through chains of states, drawn with replacement from a pool.

    Unlike trajectories of [`flowdiffrax.data.TrajectoryBatches`][], splines have
    velocities, so every objective that learns from data works: flow matching, MeanFlow,
    self-distillation. The map learns the flow of the *mean* velocity at each state and
    time, $b_t(x) = E[\dot I_t \mid I_t = x]$. Where curves cross, it does not follow any
    of them, but it still carries the population at one time of the spline to that at
    every other.

    Times of the objective must cover those of the spline. For a spline from day 0 to
    day 9, put them into `times.OnInterval(times, 0.0, 9.0)`, or normalise:

    ```python
    chains = paths.couple_snapshots(snapshots, key=key)
    units = Normalisation.of(days, chains)
    ts, zs = units.trajectories(days, chains)
    batches = data.SplineBatches(paths.CubicSpline(ts), zs, 256)
    state = train.fit(FlowMap(net), LagrangianSelfDistillation(), batches, ...)
    flow_map = units.flow_map(state.ema_map)  # takes days
    ```

    **Arguments:**

    - `spline`: the curve, with its times.
    - `xs`: the chains, every leaf of shape `(pool, times, ...)`, one state for each time
      of the spline. [`flowdiffrax.paths.couple_snapshots`][] makes them from populations;
      states that were tracked, such as particles with a number, already are chains.
    - `batch_size`: the number of curves per batch, at least 1.
    - `args`: conditions, one row for each chain, or `None`.
    - `draw`: whether to draw rows at random. If `False`, a batch consists of all rows in
      order, as when they are one batch of [`flowdiffrax.data.stream`][], and their values
      are not checked.

    **Raises:** `ValueError` for a batch size below 1, shapes that do not match, or rows
    that are not finite (see [`flowdiffrax.data.finite_rows`][]); `TypeError` for integer
    states, a memory map, or a `spline` that is not a spline. When called with
    `draw=False`, `ValueError` if the number of rows is not `batch_size`.
    """

    spline: AbstractSpline
    xs: State = eqx.field(converter=_as_jax)
    batch_size: int = eqx.field(static=True)
    args: Args = eqx.field(converter=_as_jax, default=None)
    draw: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_batch_size(self.batch_size)
        check_bools(draw=self.draw)
        what = "an instance such as `CubicSpline(ts)`, and `spline` comes first"
        check_instance(self.spline, AbstractSpline, "spline", what)
        num_rows((self.xs, self.args), "Chains and conditions")
        num_times = len(self.spline.ts)
        for leaf in jtu.tree_leaves(self.xs):
            if leaf.shape[1:2] != (num_times,):
                raise ValueError(
                    f"The spline has {num_times} times, so `xs` must have shape (pool, "
                    f"{num_times}, ...); got {leaf.shape}. `paths.couple_snapshots` "
                    "makes such chains from snapshots."
                )
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise TypeError(
                    "States of a spline are floating-point or complex; got "
                    f"{leaf.dtype}. Convert them with `.astype(float)`."
                )
        if self.draw:
            check_finite((self.xs, self.args), "Chains and conditions")

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every leaf with the batch axis."""
        rows: Any = self.xs, self.args
        xs, args = _draw_rows(key, rows, self.batch_size, self.draw)
        return eqx.filter_vmap(self.spline)(xs), args
