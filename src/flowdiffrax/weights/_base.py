import abc

import equinox as eqx

from .._types import Scalar, Time


class AbstractWeight(eqx.Module):
    """Maps the squared norm of an objective's residual to the loss.

    A weight receives the squared error and returns the loss, rather than a factor, so
    that it can depend on the error itself.
    """

    @abc.abstractmethod
    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        """The loss of one example."""


class NoWeight(AbstractWeight):
    """Returns the squared error unchanged."""

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        return squared_error


class WeightChain(AbstractWeight):
    """Several weights, each applied to the result of the previous one.

    **Arguments:**

    - `weights`: the weights, the first one applied first.
    """

    weights: tuple[AbstractWeight, ...] = eqx.field(converter=tuple)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        loss = squared_error
        for weight in self.weights:
            loss = weight(s, t, loss)
        return loss
