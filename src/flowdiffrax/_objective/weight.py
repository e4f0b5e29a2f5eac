import abc

import equinox as eqx
import jax.numpy as jnp

from .._custom_types import Scalar, Time


class AbstractWeight(eqx.Module):
    """What an objective makes of the squared norm of its residual.

    Weights receive the squared error and return the loss, so that they may depend on the
    error itself. Any callable with this signature serves as well.
    """

    @abc.abstractmethod
    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        """The loss of one example."""


class NoWeight(AbstractWeight):
    """The squared error as it is."""

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        return squared_error


class InverseGap(AbstractWeight):
    r"""The squared error over $|t - s|^p$.

    With $p = 2$ a regression of $X_{s,t}(x)$ is one of the average velocity
    $v_{s,t}(x)$, whose size, and so the learning rate that suits it, does not shrink
    with the jump. A smaller $p$ cares more for long jumps.

    **Arguments:**

    - `power`: the power $p$.
    - `min_gap`: the gap below which the weight stops growing, positive.

    **Raises:** `ValueError` if `min_gap` is not positive.
    """

    power: float = 2.0
    min_gap: float = 1e-3

    def __check_init__(self):
        if self.min_gap <= 0:
            raise ValueError(f"`min_gap` must be positive; got {self.min_gap}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        gap = jnp.maximum(jnp.abs(t - s), self.min_gap)
        return squared_error / gap.astype(squared_error.dtype) ** self.power


class DataEndWeight(AbstractWeight):
    r"""The squared error times $\min(1, ((1 - t)/\delta)^2)$.

    Off the support of the data, an exact velocity grows like $1/(1 - t)$. Without this
    weight those few states near $t = 1$ dominate a distillation loss.

    **Arguments:**

    - `width`: how far before the data end the weight starts to fall, $\delta$ in (0, 1].

    **Raises:** `ValueError` for a width outside (0, 1].
    """

    width: float = 0.1

    def __check_init__(self):
        if not 0 < self.width <= 1:
            raise ValueError(f"`width` must be in (0, 1]; got {self.width}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s
        left = jnp.minimum((1 - t) / self.width, 1)
        return squared_error * left.astype(squared_error.dtype) ** 2
