from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from .._check import (
    check_at_least,
    check_bools,
    check_callable,
    check_count,
    check_like,
)
from .._time import times_like
from .._tree import freeze, nan_where, subtract
from .._types import Args, Scalar, State
from ..times._base import AbstractTimes
from ..times._uniform import UniformTriangle
from ..weights._base import AbstractWeight
from ..weights._gaps import InverseGap
from ._base import AbstractObjective
from ._trajectory import as_trajectory


class RollOutMatching(AbstractObjective):
    r"""Regression of several jumps, each from where the last one arrived.

    A roll-out visits the times $t_0, t_1, \dots, t_K$ of an exact trajectory. It starts
    at $\hat x_0 = x_{t_0}$ and goes on from its own states,
    $\hat x_k = X_{t_{k-1},t_k}(\hat x_{k-1})$. The loss is

    $$\frac1K \sum_{k=1}^K w(t_0, t_k)\, |\hat x_k - x_{t_k}|^2.$$

    The map therefore sees the states that it makes itself. One jump is
    [`flowdiffrax.TrajectoryMatching`][].

    The times are saved times of the trajectory, so that nothing is interpolated. The
    first and the last are the nearest to the pair that `times` draws, in either order.
    Those between are drawn at random, all different. If fewer lie between, the last jumps
    have length zero. For $K$ consecutive saved times, use
    `times.Neighbours(ts, distance=K)`.

    **Arguments:**

    - `num_jumps`: the number $K$ of jumps, at least 1.
    - `times`: the distribution of the first and the last time.
    - `weight`: maps the squared error to the loss. It receives the first time of the
      roll-out and the time reached, and by default divides by the square of their
      difference.
    - `positions`: whether `times` draws positions along each trajectory's own saved
      times, as in [`flowdiffrax.TrajectoryMatching`][].
    - `push_forward`: whether gradients stop between jumps. Each jump then learns to
      correct the state that it is given, but not to be easy to go on from. The gradient
      is a semigradient, with the memory of one jump. The paper trains the last jump of a
      roll-out of random length; the mean over all jumps is its expectation.
    - `noise`: the standard deviation of normal noise that is added to the first state,
      at least 0, in units of the state. The targets have none, so the map learns to
      return to the trajectory. Use it with `weights.NoWeight()`: the default also divides
      the noise by the square of a short time.
    - `remat`: whether the reverse pass recomputes each jump instead of storing it. This
      saves memory at the cost of one more evaluation per jump.
    - `difference`: a function `(x, y)` of the map's state and the trajectory's, whose
      squared norm is the error, as in [`flowdiffrax.TrajectoryMatching`][].
    - `quantities`: a function `(x, args)` of a state, such as its mass, its energy or its
      spectrum ([`flowdiffrax.metrics.energy_spectrum`][]), or `None`. It returns a
      number, an array or a PyTree of them. The squared difference of its values at
      $\hat x_k$ and $x_{t_k}$ is added to the squared error, as a penalty.
    - `quantity_weight`: the factor of this penalty, at least 0.
    - `unroll`: how many jumps are compiled into one turn of the loop, as in
      [`flowdiffrax.sample`][]; `True` for all, which is faster for networks with
      convolutions on CPU.

    The teacher is not used. Paths come from [`flowdiffrax.solve_trajectories`][].

    **Raises:** `TypeError` if `num_jumps` is not an integer, or a function not callable;
    `ValueError` if `num_jumps` is below 1, or `noise` or `quantity_weight` is negative.
    When called, `TypeError` if the path is not a trajectory, and `ValueError` if it has
    fewer than `num_jumps + 1` saved times.

    ??? cite "Reference"

        Push-forward training: [arXiv:2202.03376](https://arxiv.org/abs/2202.03376),
        section 3.1. Noise on inputs: [arXiv:2010.03409](https://arxiv.org/abs/2010.03409).
    """

    num_jumps: int = eqx.field(static=True, default=2)
    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = InverseGap()
    positions: bool = eqx.field(static=True, default=False)
    push_forward: bool = eqx.field(static=True, default=False)
    noise: float = 0.0
    remat: bool = eqx.field(static=True, default=False)
    difference: Callable[[State, State], State] = subtract
    quantities: Callable[[State, Args], PyTree] | None = None
    quantity_weight: float = 1.0
    unroll: int | bool = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count(self.num_jumps, 1, "num_jumps")
        check_at_least(self.noise, 0, "noise")
        check_at_least(self.quantity_weight, 0, "quantity_weight")
        names = "positions", "push_forward", "remat"
        check_bools(**{name: getattr(self, name) for name in names})
        check_callable(self.difference, "difference", "difference(x, y)")
        if self.quantities is not None:
            check_callable(self.quantities, "quantities", "quantities(x, args)")

    def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None) -> Scalar:
        del teacher
        path = as_trajectory(path, self)
        if path.ts.size <= self.num_jumps:
            raise ValueError(
                f"{self.num_jumps} jumps visit {self.num_jumps + 1} saved times, but the "
                f"trajectories have {path.ts.size}. Save more, or lower `num_jumps`."
            )
        noise_key, times_key = jr.split(key)  # pyright: ignore
        s, t = times_like(path.ys, s, t)
        find = path.index_of_position if self.positions else path.index_of_time
        visited = self._visited(path.ts.size, find(s), find(t), times_key)
        saved_ts = path.ts.astype(s.dtype)
        ts, states = jtu.tree_map(lambda leaf: leaf[visited], (saved_ts, path.ys))
        x = self._perturbed(jtu.tree_map(lambda leaf: leaf[0], states), noise_key)
        if not self.positions:
            # As in `TrajectoryPath.evaluate`.
            low, high = jnp.minimum(s, t), jnp.maximum(s, t)
            x = nan_where((low < saved_ts[0]) | (high > saved_ts[-1]), x)

        def jump(x, inputs):
            t_last, t_now, truth = inputs
            x = freeze(x) if self.push_forward else x
            x = check_like(flow_map(t_last, t_now, x, args), x, "`flow_map`")
            error = self.difference(x, truth), self._penalty(x, truth, args)
            return x, self._weighted(ts[0], t_now, error)

        jump = jax.checkpoint(jump) if self.remat else jump
        targets = jtu.tree_map(lambda leaf: leaf[1:], states)
        _, losses = lax.scan(jump, x, (ts[:-1], ts[1:], targets), unroll=self.unroll)
        return jnp.mean(losses)

    def _visited(
        self,
        num_times: int,
        first: Int[Array, ""],
        last: Int[Array, ""],
        key: Key[Array, ""],
    ) -> Int[Array, " visited"]:
        """The numbers of the saved times that the roll-out visits."""
        # Steps from the first time, in either direction.
        steps = jnp.arange(num_times)
        num_steps = jnp.abs(last - first)
        is_between = (steps > 0) & (steps < num_steps)
        # A random order, in which those that are not between come last.
        order = jnp.argsort(jnp.where(is_between, jr.uniform(key, (num_times,)), 1))
        chosen = order[: self.num_jumps - 1]
        chosen = jnp.sort(jnp.where(is_between[chosen], chosen, num_steps))
        steps = jnp.concatenate([steps[:1], chosen, num_steps[None]])
        return first + jnp.sign(last - first) * steps

    def _perturbed(self, x: State, key: Key[Array, ""]) -> State:
        if isinstance(self.noise, float | int) and self.noise == 0:
            return x
        leaves, structure = jtu.tree_flatten(x)
        keys = jr.split(key, len(leaves))
        moved = [
            leaf + self.noise * jr.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jtu.tree_unflatten(structure, moved)

    def _penalty(self, x: State, truth: State, args: Args) -> Any:
        if self.quantities is None:
            return ()
        error = subtract(self.quantities(x, args), self.quantities(truth, args))
        return jtu.tree_map(lambda leaf: self.quantity_weight**0.5 * leaf, error)
