import abc

import equinox as eqx

from .._tree import is_concrete
from .._types import Scalar, Time


class AbstractWeight(eqx.Module):
    """What an objective makes of the squared norm of its residual.

    Weights receive the squared error and return the loss, so that they may depend on the
    error itself.
    """

    @abc.abstractmethod
    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        """The loss of one example."""


class NoWeight(AbstractWeight):
    """The squared error as it is."""

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        return squared_error


class WeightChain(AbstractWeight):
    """Several weights, each applied to what the one before it returns.

    **Arguments:**

    - `weights`: the weights, the first one applied first.
    """

    weights: tuple[AbstractWeight, ...] = eqx.field(converter=tuple)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        loss = squared_error
        for weight in self.weights:
            loss = weight(s, t, loss)
        return loss


def check_positive(name: str, value: float) -> None:
    if is_concrete(value) and value <= 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")
