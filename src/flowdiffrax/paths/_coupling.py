import abc

import equinox as eqx
from jaxtyping import Array, Key

from .._types import Args, State


class AbstractCoupling(eqx.Module):
    """How base draws are paired with data points: re-orders a batch of base draws.

    The data stay where they are, so that their conditions stay with them.
    """

    @abc.abstractmethod
    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        """Returns `x0` re-ordered along its leading axis.

        **Arguments:**

        - `key`: for couplings that draw.
        - `x0`, `x1`: a batch of base draws and one of data points, every leaf with the
          same leading axis.
        - `args`: the conditions of the data points, with that axis too, or `None`.
        """


class IndependentCoupling(AbstractCoupling):
    """Base and data drawn independently: the batch as it comes."""

    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        del key, x1, args
        return x0
