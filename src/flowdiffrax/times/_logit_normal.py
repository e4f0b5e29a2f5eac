import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from .._check import check_bools, check_finite_number, check_positive
from ._base import AbstractTimes, Times


class LogitNormal(AbstractTimes):
    r"""Sorted pairs of independent logit-normal times.

    **Arguments:**

    - `mean`, `std`: the mean and standard deviation of the logit. Papers with the data at
      time 0 give the mean with the opposite sign.
    - `sort`: whether to sort each pair. If not, the two times are independent.

    **Raises:** `ValueError` if `std` is not positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447), section 4.3.
    """

    mean: float = 0.4
    std: float = 1.0
    sort: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_finite_number(self.mean, "mean")
        check_positive(self.std, "std")
        check_bools(sort=self.sort)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        logit = lambda u: self.mean + self.std * _quantile(u)
        first, second = jax.nn.sigmoid(logit(first)), jax.nn.sigmoid(logit(second))
        if not self.sort:
            return first, second
        return jnp.minimum(first, second), jnp.maximum(first, second)


class LogitNormalPair(AbstractTimes):
    r"""Pairs of independent logit-normal times, each with its own distribution.

    If the end time is before the start time, it becomes the start time. Such a pair is on
    the diagonal, and is counted as off it.

    **Arguments:**

    - `mean`, `std`: the mean and standard deviation of the start time's logit. Papers
      with the data at time 0 give the means with the opposite sign.
    - `end_mean`, `end_std`: those of the end time's logit. The defaults of both are those
      of the second setting for CIFAR-10 in the authors' code.

    **Raises:** `ValueError` if a standard deviation is not positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447), in the code for
        CIFAR-10.
    """

    mean: float = 0.6
    std: float = 1.6
    end_mean: float = 4.0
    end_std: float = 1.6

    def __check_init__(self):
        check_finite_number(self.mean, "mean")
        check_positive(self.std, "std")
        check_finite_number(self.end_mean, "end_mean")
        check_positive(self.end_std, "end_std")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s = jax.nn.sigmoid(self.mean + self.std * _quantile(first))
        t = jax.nn.sigmoid(self.end_mean + self.end_std * _quantile(second))
        return s, jnp.maximum(s, t)


class LogitNormalGap(AbstractTimes):
    r"""Pairs with a logit-normal gap $t - s$, placed at random in [0, 1].

    Given the gap, the end time is uniform on the remaining interval $[t - s, 1]$, or
    logit-normal and truncated to it.

    **Arguments:**

    - `mean`, `std`: the mean and standard deviation of the gap's logit.
    - `end_mean`, `end_std`: those of the end time's logit; `None` for a uniform end time.

    **Raises:** `ValueError` if a standard deviation is not positive, or if only one of
    `end_mean` and `end_std` is given.

    ??? cite "Reference"

        Align Your Flow, [arXiv:2506.14603](https://arxiv.org/abs/2506.14603), uniform;
        Terminal Velocity Matching, [arXiv:2511.19797](https://arxiv.org/abs/2511.19797),
        truncated.
    """

    mean: float = -0.6
    std: float = 1.6
    end_mean: float | None = None
    end_std: float | None = None

    def __check_init__(self):
        check_finite_number(self.mean, "mean")
        check_positive(self.std, "std")
        check_finite_number(self.end_mean, "end_mean", or_none=True)
        check_positive(self.end_std, "end_std", or_none=True)
        if (self.end_mean is None) != (self.end_std is None):
            raise ValueError("`end_mean` and `end_std` must be given together.")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        gap = jax.nn.sigmoid(self.mean + self.std * _quantile(first))
        if self.end_mean is None or self.end_std is None:
            t = gap + second * (1 - gap)
        else:
            # The quantile of a normal variable above the gap's logit. Computed from the
            # upper tail, which keeps its digits if the gap is long.
            lowest = (jax.scipy.special.logit(gap) - self.end_mean) / self.end_std
            upper = (1 - second) * ndtr(-lowest)
            t = jax.nn.sigmoid(self.end_mean - self.end_std * _quantile(upper))
        # Rounding may put the start slightly below 0.
        return jnp.maximum(t - gap, 0), t


def _quantile(u: Times) -> Times:
    """The normal quantile, kept finite at 0, which uniform draws include."""
    return ndtri(jnp.maximum(u, jnp.finfo(u.dtype).tiny))
