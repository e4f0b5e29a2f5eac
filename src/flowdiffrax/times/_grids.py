import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._check import check_bools, check_count
from .._tree import is_concrete
from ._base import AbstractTimes, Times


class Dyadic(AbstractTimes):
    r"""Jumps of length $2^{-j}$ from a multiple of it, with $j$ uniform in $0 .. J$.

    **Arguments:**

    - `max_level`: the finest level $J$, at least 0; $2^J$ jumps cover [0, 1].

    **Raises:** `ValueError` for a negative level.

    ??? cite "Reference"

        Shortcut models, [arXiv:2410.12557](https://arxiv.org/abs/2410.12557), section 3.
    """

    max_level: int = eqx.field(static=True, default=7)

    def __check_init__(self):
        check_count(self.max_level, 0, "max_level")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        level = jnp.floor(first * (self.max_level + 1))
        # `exp2` rounds: multiples of its results would not meet each other, nor 1.
        num_jumps = jnp.ldexp(jnp.ones_like(level), level.astype(int))
        index = jnp.floor(second * num_jumps)
        return index / num_jumps, (index + 1) / num_jumps


class GridTimes(AbstractTimes):
    r"""Pairs from a given grid, $s = t_i$ and $t = t_j$ with $i < j$, all equally likely.

    Use it for data that are known at certain times only, such as saved trajectories.

    **Arguments:**

    - `ts`: the grid, at least two increasing times.
    - `both_directions`: whether to draw $i > j$ as well.

    **Raises:** `ValueError` if there are fewer than two times, or if the times are known
    and do not increase.
    """

    ts: Float[Array, " grid"] = eqx.field(converter=jnp.asarray)
    both_directions: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        _check_grid(self.ts)
        check_bools(both_directions=self.both_directions)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        size = self.ts.shape[0]
        # The second index skips the first, so that they differ.
        i = jnp.minimum((first * size).astype(int), size - 1)
        j = jnp.minimum((second * (size - 1)).astype(int), size - 2)
        j = jnp.where(j >= i, j + 1, j)
        if not self.both_directions:
            i, j = jnp.minimum(i, j), jnp.maximum(i, j)
        ts = self.ts.astype(first.dtype)
        return ts[i], ts[j]


class Neighbours(AbstractTimes):
    r"""Neighbouring times of a grid, $s = t_i$ and $t = t_{i+1}$, all equally likely.

    Discrete consistency models are trained on these pairs. At a larger distance, they
    are the ends of roll-outs over consecutive times.

    **Arguments:**

    - `ts`: the grid, at least two increasing times.
    - `distance`: the number $n$ of steps of the grid between $s$ and $t = t_{i+n}$, at
      least 1.

    **Raises:** as [`flowdiffrax.times.GridTimes`][], and `ValueError` if `distance` is
    below 1 or the grid has too few times for it.
    """

    ts: Float[Array, " grid"] = eqx.field(converter=jnp.asarray)
    distance: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _check_grid(self.ts)
        check_count(self.distance, 1, "distance")
        if self.ts.shape[0] <= self.distance:
            raise ValueError(
                f"A grid of {self.ts.shape[0]} times has no two that are "
                f"{self.distance} steps apart."
            )

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        del second
        num_pairs = self.ts.shape[0] - self.distance
        i = jnp.minimum((first * num_pairs).astype(int), num_pairs - 1)
        ts = self.ts.astype(first.dtype)
        return ts[i], ts[i + self.distance]


def _check_grid(ts: Array) -> None:
    is_grid = jnp.ndim(ts) == 1 and jnp.size(ts) >= 2
    if not is_grid or (is_concrete(ts) and not np.all(np.diff(np.asarray(ts)) > 0)):
        raise ValueError(f"`ts` must be at least two times that rise; got {ts}.")
