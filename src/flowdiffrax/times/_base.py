import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._check import check_count

Times = Float[Array, " batch"]


class AbstractTimes(eqx.Module):
    """A distribution of pairs of times, one pair for each example of a batch.

    Each pair is a function of two uniform numbers, so that
    [`flowdiffrax.times.Stratified`][] can spread these more evenly than random draws.
    """

    def __call__(
        self, key: Key[Array, ""], batch_size: int, dtype=None
    ) -> tuple[Times, Times]:
        """Draws a batch of pairs.

        **Arguments:**

        - `key`: a random key.
        - `batch_size`: the number of pairs, at least 1.
        - `dtype`: the dtype of the times; `None` for JAX's default.

        **Returns:** the start times `s` and the end times `t`, each of shape
        `(batch_size,)`.
        """
        check_batch_size(batch_size)
        first_key, second_key = jr.split(key)
        dtype = jnp.result_type(float) if dtype is None else dtype
        first = jr.uniform(first_key, (batch_size,), dtype)
        second = jr.uniform(second_key, (batch_size,), dtype)
        return self.from_uniform(first, second)

    @abc.abstractmethod
    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        """Maps two batches of uniform numbers in [0, 1) to pairs of times."""

    def num_diagonal(self, batch_size: int) -> int:
        """The number of leading pairs of a batch that are sure to have `s == t`.

        For these rows, objectives compute a cheaper form of the loss.
        """
        del batch_size
        return 0


def check_batch_size(batch_size: int) -> None:
    """**Raises:** `ValueError` if `batch_size` is below 1."""
    check_count(batch_size, 1, "batch_size")
