import abc

import equinox as eqx
from jaxtyping import Array, Key

from .._types import Args, State


class AbstractCoupling(eqx.Module):
    """Pairs base draws with data points by re-ordering a batch of base draws.

    The data keep their order, so they stay aligned with their conditions.
    """

    @abc.abstractmethod
    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        """Returns `x0` re-ordered along its leading axis.

        **Arguments:**

        - `key`: a random key, for couplings that draw random numbers.
        - `x0`, `x1`: a batch of base draws and a batch of data points, every leaf with
          the same leading axis.
        - `args`: the conditions of the data points, with the same leading axis, or
          `None`.
        """


class IndependentCoupling(AbstractCoupling):
    """Independent base and data: returns the base draws in their order."""

    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        del key, x1, args
        return x0
