import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Key

from ._base import AbstractTimes, Times, check_batch_size


class OnInterval(AbstractTimes):
    r"""A distribution mapped from [0, 1] to the time interval of a physical ODE.

    **Arguments:**

    - `times`: a distribution on [0, 1].
    - `t0`, `t1`: the times that 0 and 1 are mapped to.
    """

    times: AbstractTimes
    t0: ArrayLike
    t1: ArrayLike

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s, t = self.times.from_uniform(first, second)
        low, high = (jnp.asarray(end, s.dtype) for end in (self.t0, self.t1))
        return low + (high - low) * s, low + (high - low) * t

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


class EitherDirection(AbstractTimes):
    """Swaps each pair of a distribution with probability one half.

    Use it for maps that go both forward and backward in time. Inside
    [`flowdiffrax.times.Stratified`][], half of the pairs are swapped, to within one.

    **Arguments:**

    - `times`: the distribution to draw from. Pairs on the diagonal stay there.
    """

    times: AbstractTimes

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        # As in `UniformSquare`: each half of the unit interval draws from `times`.
        forward = first < 0.5
        first = jnp.where(forward, 2 * first, 2 * first - 1)
        s, t = self.times.from_uniform(first, second)
        return jnp.where(forward, s, t), jnp.where(forward, t, s)

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


class StartAt(AbstractTimes):
    r"""Replaces every start time of a distribution by one time.

    Bounds on a sampler's error only need the Lagrangian residual at $s = 0$.

    **Arguments:**

    - `times`: the distribution of the end times.
    - `s`: the start of every jump.
    """

    times: AbstractTimes
    s: ArrayLike = 0.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        _, t = self.times.from_uniform(first, second)
        return jnp.full_like(t, self.s), t


class EndAt(AbstractTimes):
    r"""Replaces every end time of a distribution by one time.

    With $t = 1$, these are the pairs of a consistency model.

    **Arguments:**

    - `times`: the distribution of the start times.
    - `t`: the end of every jump.
    """

    times: AbstractTimes
    t: ArrayLike = 1.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s, _ = self.times.from_uniform(first, second)
        return s, jnp.full_like(s, self.t)


class Stratified(AbstractTimes):
    """Draws from a distribution with less variance, by a Latin hypercube over the batch.

    Each of the two uniform numbers falls exactly once into each of `batch_size` equal
    cells, in independent random orders. The distribution of a single pair is unchanged.

    **Arguments:**

    - `times`: the distribution to draw from.
    """

    times: AbstractTimes

    def __call__(
        self, key: Key[Array, ""], batch_size: int, dtype=None
    ) -> tuple[Times, Times]:
        check_batch_size(batch_size)
        dtype = jnp.result_type(float) if dtype is None else dtype
        return self.from_uniform(
            *(_latin(axis_key, batch_size, dtype) for axis_key in jr.split(key))
        )

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        return self.times.from_uniform(first, second)

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


def _latin(key: Key[Array, ""], batch_size: int, dtype) -> Times:
    order_key, offset_key = jr.split(key)
    cell = jr.permutation(order_key, batch_size).astype(dtype)
    offset = jr.uniform(offset_key, (batch_size,), dtype)
    # Rounding may raise a draw in the last cell to 1.
    below_one = 1 - jnp.finfo(dtype).epsneg
    return jnp.minimum((cell + offset) / batch_size, below_one)
