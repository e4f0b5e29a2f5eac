import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import check_count, check_positive
from .._types import Scalar, Time
from ._base import AbstractWeight


class AbstractLearnedWeight(AbstractWeight):
    """A weight with parameters that are trained together with those of the map.

    [`flowdiffrax.train.TrainState`][] holds these parameters.
    """


class LearnedWeight(AbstractLearnedWeight):
    r"""A learned log-variance: the loss is $e^{-w_{s,t}} e + w_{s,t}$ with a learned $w$.

    For each pair of times, the best $w_{s,t}$ is the logarithm of the mean squared error
    $e$ there. At this value all pairs have the same weight. The loss may be negative. The
    function $w$ is linear in cosines and sines of both times, and starts at the same
    value for all pairs.

    **Arguments:**

    - `num_frequencies`: the number of cosines and of sines of each time. They have 0,
      1/2, 1, ... periods in [0, 1].
    - `scale`: the typical size of an error, in units of the data. It sets the initial
      $w = 2 \log(\mathrm{scale})$. If it is far off, training first has to find the size.

    **Raises:** `ValueError` if `num_frequencies` is below 1, or if `scale` is not
    positive.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696);
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    coefficients: Float[Array, "2 2 frequencies"]

    def __init__(self, num_frequencies: int = 8, dtype=None, *, scale: float = 1.0):
        check_positive(scale, "scale")
        check_count(num_frequencies, 1, "num_frequencies")
        dtype = jnp.result_type(float) if dtype is None else dtype
        zeros = jnp.zeros((2, 2, num_frequencies), dtype)
        # The cosine with zero periods is the constant function.
        self.coefficients = zeros.at[0, 0, 0].set(2 * math.log(scale))

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        log_variance = self.log_variance(s, t).astype(squared_error.dtype)
        return jnp.exp(-log_variance) * squared_error + log_variance

    def log_variance(self, s: Time, t: Time) -> Scalar:
        """The value of $w$ at a pair of times."""
        dtype = self.coefficients.dtype
        times = jnp.stack([jnp.asarray(s, dtype), jnp.asarray(t, dtype)])
        frequencies = jnp.arange(self.coefficients.shape[-1], dtype=dtype)
        angles = jnp.pi * jnp.outer(times, frequencies)
        waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return jnp.sum(self.coefficients * waves)
