import abc
import math

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._custom_types import Scalar, Time
from .._interpolant import AbstractInterpolant, LinearInterpolant
from .._misc import at_least_float32, is_concrete


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


class InverseGap(AbstractWeight):
    r"""The squared error over $|t - s|^p$.

    With $p = 2$ a regression of $X_{s,t}(x)$ is one of the average velocity
    $v_{s,t}(x)$, whose size, and so the learning rate that suits it, does not shrink
    with the jump. A smaller $p$ gives long jumps more weight.

    **Arguments:**

    - `power`: the power $p$.
    - `min_gap`: the gap below which the weight stops growing, positive, in units of
      time. `None` for $100\,\epsilon \max(|s|, |t|)$ with $\epsilon$ the relative
      rounding error: shorter gaps are known to less than two digits.

    **Raises:** `ValueError` if `min_gap` is not positive.
    """

    power: float = 2.0
    min_gap: float | None = None

    def __check_init__(self):
        if self.min_gap is not None:
            _check_positive("min_gap", self.min_gap)

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
    r"""The squared error over the difference of noise levels, $\sigma_s - \sigma_t$.

    The weight of consistency training between neighbouring noise levels. The level of a
    time is $\sigma_t = \alpha_t / \beta_t$, in units of the base's standard deviation:
    $(1 - t)/t$ for the linear interpolant. It is infinite at time 0, where sampling
    starts, and counts as `max_noise` there.

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
        _check_positive("max_noise", self.max_noise)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        gap = jnp.abs(self._noise(s) - self._noise(t))
        return squared_error / gap.astype(squared_error.dtype)

    def _noise(self, t: Time) -> Scalar:
        alpha, beta, _ = self.interpolant.coefficients(t)
        # Where beta is smaller than this, the level is beyond the largest.
        return alpha / jnp.maximum(beta, alpha / self.max_noise)


class BandWeight(AbstractWeight):
    r"""The squared error where $|t - s| \le \tau$, and zero beyond.

    It wastes the examples beyond: `UniformSquare(max_gap)` draws none of them.

    **Arguments:**

    - `max_gap`: the longest jump $\tau$, for example $1/K$. It may be an array, so that a
      schedule may change it.

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
    weight those few states near $t = 1$ dominate a distillation loss. It is for paths
    that end in the data at time 1.

    **Arguments:**

    - `width`: how far before the data end the weight starts to fall, $\delta$ in (0, 1].

    **Raises:** `ValueError` for a width outside (0, 1].
    """

    width: float = 0.1

    def __check_init__(self):
        if is_concrete(self.width) and not 0 < self.width <= 1:
            raise ValueError(f"`width` must be in (0, 1]; got {self.width}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s
        left = jnp.minimum((1 - t) / self.width, 1)
        return squared_error * left.astype(squared_error.dtype) ** 2


class PowerWeight(AbstractWeight):
    r"""The squared error $e$ over $\mathrm{sg}(e + c)^p$, the adaptive weight.

    It takes weight from examples with large errors; $p = 1/2$ resembles a Huber loss, and
    with $p = 1$ every example has a gradient of about the same size. Along data, whose
    rate is scattered around its mean, that moves the minimiser towards the most frequent
    rates: little in high dimensions, where all errors are of one size, and much in few.
    The divisor is held fixed. The loss is close to 1 for every error much above $c$:
    watch the samples, not the loss.

    **Arguments:**

    - `power`: the power $p$, at least 0.
    - `floor`: the $c$, positive, for the squared error summed over all entries.
    - `scale`: for data in other units, how many times as large they are as those that
      `floor` is for: the floor becomes `floor * scale**2`.

    **Raises:** `ValueError` for a negative power, or a floor or scale that is not
    positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447).
    """

    power: float = 1.0
    floor: float = 1e-3
    scale: float = 1.0

    def __check_init__(self):
        _check_positive("floor", self.floor)
        _check_positive("scale", self.scale)
        if is_concrete(self.power) and self.power < 0:
            raise ValueError(f"`power` must be at least 0; got {self.power}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        floor = self.floor * self.scale**2
        return squared_error / lax.stop_gradient(squared_error + floor) ** self.power


class NormalisedTangent(AbstractWeight):
    r"""The squared error $|g|^2$ over $\mathrm{sg}(|g| + c)$.

    For an objective $|v - \mathrm{sg}(v - g)|^2$ its gradient is the one with the tangent
    $g$ replaced by $g / (|g| + c)$.

    **Arguments:**

    - `floor`: the $c$, positive; 0.1 in the paper, for data with a standard deviation of
      0.5.
    - `scale`: for data in other units, how many times as large they are as those that
      `floor` is for: the floor becomes `floor * scale`.

    **Raises:** `ValueError` if one of them is not positive.

    ??? cite "Reference"

        sCM, [arXiv:2410.11081](https://arxiv.org/abs/2410.11081).
    """

    floor: float = 0.1
    scale: float = 1.0

    def __check_init__(self):
        _check_positive("floor", self.floor)
        _check_positive("scale", self.scale)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        size = lax.stop_gradient(jnp.sqrt(squared_error))
        return squared_error / (size + self.floor * self.scale)


class PseudoHuber(AbstractWeight):
    r"""The metric $\sqrt{|e|^2 + c^2} - c$: quadratic for small errors, linear for large.

    Along scattered data it moves the minimiser from the mean towards the median.

    **Arguments:**

    - `c`: where quadratic turns into linear, at least 0, in units of the data. With 0 it
      is the distance $|e|$, which suits data in any units. For a state of $d$ entries,
      the paper has $0.00054 \sqrt d$, for data with a standard deviation of 0.5.

    **Raises:** `ValueError` if it is negative.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189).
    """

    c: float = 0.0

    def __check_init__(self):
        if is_concrete(self.c) and self.c < 0:
            raise ValueError(f"`c` must be at least 0; got {self.c}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        # The derivative of the root is finite at an error of zero, too.
        tiny = jnp.finfo(squared_error.dtype).tiny
        root = jnp.sqrt(jnp.maximum(squared_error + self.c**2, tiny))
        # sqrt(e + c^2) - c without its cancellation.
        return squared_error / (root + self.c)


class AbstractLearnedWeight(AbstractWeight):
    """A weight with weights of its own, which training moves with those of the map.

    [`flowdiffrax.train.TrainState`][] carries them.
    """


class LearnedWeight(AbstractLearnedWeight):
    r"""The learned log-variance, $e^{-w_{s,t}} e + w_{s,t}$ with $w$ a small network.

    For each pair of times the best $w_{s,t}$ is the logarithm of the mean error there,
    so that all pairs come to weigh the same. The loss may be negative. $w$ is linear in
    cosines and sines of both times, and starts at the same value for all pairs.

    **Arguments:**

    - `num_frequencies`: cosines and sines of each time, of 0, 1/2, 1 ... periods in
      [0, 1].
    - `scale`: the typical size of an error, in units of the data, at which $w$ starts:
      $w = 2 \log(\mathrm{scale})$. Far from it, training first has to find the size.

    **Raises:** `ValueError` for a number below 1, or a scale that is not positive.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696);
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    coefficients: Float[Array, "2 2 frequencies"]

    def __init__(self, num_frequencies: int = 8, dtype=None, *, scale: float = 1.0):
        _check_positive("scale", scale)
        if num_frequencies < 1:
            raise ValueError(
                f"`num_frequencies` must be at least 1; got {num_frequencies}."
            )
        dtype = jnp.result_type(float) if dtype is None else dtype
        zeros = jnp.zeros((2, 2, num_frequencies), dtype)
        # The cosine of zero periods is constant.
        self.coefficients = zeros.at[0, 0, 0].set(2 * math.log(scale))

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        log_variance = self.log_variance(s, t).astype(squared_error.dtype)
        return jnp.exp(-log_variance) * squared_error + log_variance

    def log_variance(self, s: Time, t: Time) -> Scalar:
        """The $w$ of a pair of times."""
        dtype = self.coefficients.dtype
        times = jnp.stack([jnp.asarray(s, dtype), jnp.asarray(t, dtype)])
        frequencies = jnp.arange(self.coefficients.shape[-1], dtype=dtype)
        angles = jnp.pi * jnp.outer(times, frequencies)
        waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return jnp.sum(self.coefficients * waves)


def _check_positive(name: str, value: float) -> None:
    if is_concrete(value) and value <= 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")
