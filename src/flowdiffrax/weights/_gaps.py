import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import check_between, check_positive
from .._time import at_least_float32
from .._types import Scalar, Time
from ..paths._base import AbstractInterpolant
from ..paths._interpolants import LinearInterpolant
from ._base import AbstractWeight


class InverseGap(AbstractWeight):
    r"""The squared error divided by $|t - s|^p$.

    With $p = 2$, a regression of $X_{s,t}(x)$ becomes one of the average velocity
    $v_{s,t}(x)$. Its size, and therefore the suitable learning rate, does not shrink with
    the jump. A smaller $p$ gives long jumps more weight.

    **Arguments:**

    - `power`: the power $p$.
    - `min_gap`: the gap below which the weight stops growing, positive, in units of
      time. `None` uses $100\,\epsilon \max(|s|, |t|)$ with the relative rounding error
      $\epsilon$, because shorter gaps have less than two correct digits.

    **Raises:** `ValueError` if `min_gap` is not positive.
    """

    power: float = 2.0
    min_gap: float | None = None

    def __check_init__(self):
        check_positive(self.min_gap, "min_gap", or_none=True)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        gap = jnp.abs(t - s)
        if self.min_gap is None:
            precision = jnp.finfo(at_least_float32(squared_error.dtype))
            least = 100 * float(precision.eps) * jnp.maximum(jnp.abs(s), jnp.abs(t))
            # Both times may be zero.
            least = jnp.maximum(least, math.sqrt(precision.tiny))
        else:
            least = self.min_gap
        gap = jnp.maximum(gap, least)
        return squared_error / gap.astype(squared_error.dtype) ** self.power


class InverseNoiseGap(AbstractWeight):
    r"""The squared error divided by the gap in noise levels, $\sigma_s - \sigma_t$.

    This is the weight of consistency training between neighbouring noise levels. The
    noise level at time $t$ is $\sigma_t = \alpha_t / \beta_t$, in units of the base's
    standard deviation; for the linear interpolant it is $(1 - t)/t$. At time 0, where
    sampling starts, it is infinite, and `max_noise` is used instead.

    **Arguments:**

    - `interpolant`: the interpolant of the paths.
    - `max_noise`: the largest noise level, positive; 80 in the papers.

    **Raises:** `ValueError` if `max_noise` is not positive.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189), section 3.3.
    """

    interpolant: AbstractInterpolant = LinearInterpolant()
    max_noise: float = 80.0

    def __check_init__(self):
        check_positive(self.max_noise, "max_noise")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        gap = jnp.abs(self._noise(s) - self._noise(t))
        return squared_error / gap.astype(squared_error.dtype)

    def _noise(self, t: Time) -> Scalar:
        alpha, beta, _ = self.interpolant.coefficients(t)
        # Caps the level at `max_noise`, without a division by zero where beta is 0.
        return alpha / jnp.maximum(beta, alpha / self.max_noise)


class BandWeight(AbstractWeight):
    r"""The squared error if $|t - s| \le \tau$, and zero for longer jumps.

    Examples with longer jumps are wasted; `UniformSquare(max_gap)` does not draw any.

    **Arguments:**

    - `max_gap`: the longest jump $\tau$, for example $1/K$. It may be an array, so that a
      schedule can change it.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """

    max_gap: Float[Array, ""] | float

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        inside = jnp.abs(t - s) <= self.max_gap
        return jnp.where(inside, squared_error, jnp.zeros_like(squared_error))


class DataEndWeight(AbstractWeight):
    r"""The squared error times $\min(1, ((1 - t)/\delta)^2)$.

    Off the support of the data, an exact velocity grows like $1/(1 - t)$. Without this
    weight, the few such states near $t = 1$ dominate a distillation loss. It is for paths
    that end at the data at time 1.

    **Arguments:**

    - `width`: the distance $\delta$ from the data end at which the weight starts to fall,
      in (0, 1].

    **Raises:** `ValueError` for a width outside (0, 1].
    """

    width: float = 0.1

    def __check_init__(self):
        check_between(self.width, 0, 1, "width", "(]")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s
        left = jnp.minimum((1 - t) / self.width, 1)
        return squared_error * left.astype(squared_error.dtype) ** 2
