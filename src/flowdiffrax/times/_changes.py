import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Key

from ._base import AbstractTimes, Times, check_batch_size


class OnInterval(AbstractTimes):
    r"""Another law, moved from [0, 1] to an interval of a physical ODE.

    **Arguments:**

    - `times`: a law on [0, 1].
    - `t0`, `t1`: where 0 and 1 are moved to.
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
    """Another law in both directions of time: each pair is swapped with chance one half.

    For maps that are to go back as well as forth. In [`flowdiffrax.times.Stratified`][]
    one half of the pairs is swapped, to within one.

    **Arguments:**

    - `times`: the law to draw from. Its pairs on the diagonal stay there.
    """

    times: AbstractTimes

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        # As in `UniformSquare`: each half of the unit interval draws the whole law.
        forward = first < 0.5
        first = jnp.where(forward, 2 * first, 2 * first - 1)
        s, t = self.times.from_uniform(first, second)
        return jnp.where(forward, s, t), jnp.where(forward, t, s)

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


class StartAt(AbstractTimes):
    r"""Another law with its start times replaced by one: jumps from a single time.

    Bounds on a sampler's error need the Lagrangian residual at $s = 0$ only.

    **Arguments:**

    - `times`: the law of the end times.
    - `s`: the start of every jump.
    """

    times: AbstractTimes
    s: ArrayLike = 0.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        _, t = self.times.from_uniform(first, second)
        return jnp.full_like(t, self.s), t


class EndAt(AbstractTimes):
    r"""Another law with its end times replaced by one: jumps to a single time.

    With $t = 1$, the pairs of a consistency model.

    **Arguments:**

    - `times`: the law of the start times.
    - `t`: the end of every jump.
    """

    times: AbstractTimes
    t: ArrayLike = 1.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s, _ = self.times.from_uniform(first, second)
        return s, jnp.full_like(s, self.t)


class Stratified(AbstractTimes):
    """Another law, drawn with less variance: a Latin hypercube over the batch.

    Each of the two uniform numbers falls exactly once in each of `batch_size` equal
    cells, in independent random orders. The law of each single pair stays the same.

    **Arguments:**

    - `times`: the law to draw from.
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
    # Rounding may lift the last cell's draw to 1.
    below_one = 1 - jnp.finfo(dtype).epsneg
    return jnp.minimum((cell + offset) / batch_size, below_one)
