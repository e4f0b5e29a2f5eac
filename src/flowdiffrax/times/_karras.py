import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from .._check import check_between, check_count, check_positive
from ._base import AbstractTimes, Times


def karras_times(
    num_times: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    base_std: float = 1.0,
    power: float = 7.0,
) -> Float[Array, " num_times"]:
    r"""The noise levels of consistency models, as times of the linear interpolant.

    A noise level $\sigma$ becomes the time $t = \sigma_0 / (\sigma_0 + \sigma)$, where
    $\sigma_0$ is the standard deviation of the base. The levels are evenly spaced in
    $\sigma^{1/7}$. The last time is set to 1.

    **Arguments:**

    - `num_times`: the number of times, at least 2. For a number that is traced, use
      [`flowdiffrax.times.KarrasNeighbours`][].
    - `sigma_min`, `sigma_max`: the lowest and the highest noise level, positive, in units
      of the data. The defaults are for data with a standard deviation of about 0.5.
    - `base_std`: the standard deviation of the base, in the same units.
    - `power`: the 7 above.

    **Returns:** increasing times of shape `(num_times,)`.

    **Raises:** `ValueError` if `num_times` is below 2, or unless
    $0 < \sigma_{\min} < \sigma_{\max}$.

    ??? cite "Reference"

        [arXiv:2206.00364](https://arxiv.org/abs/2206.00364), equation (5).
    """
    _check_karras(num_times, sigma_min, sigma_max)
    share = np.linspace(0, 1, num_times)
    ts = _karras_time(share, sigma_min, sigma_max, base_std, power)
    ts[-1] = 1.0
    return jnp.asarray(ts, float)


class KarrasNeighbours(AbstractTimes):
    r"""Neighbouring times of the grid of consistency models, all pairs equally likely.

    The grid is [`flowdiffrax.times.karras_times`][], except that the first time is 0
    instead of the time of `sigma_max`: sampling starts there, from the base alone. The
    number of times may be traced, so the grid can grow during training:

    ```python
    grid = doubling_schedule(num_steps)
    Scheduled(lambda step: ConsistencyTraining(KarrasNeighbours(grid(step))))
    ```

    **Arguments:**

    - `num_times`: the number of times, at least 2. It may be traced.
    - `sigma_min`, `sigma_max`, `base_std`, `power`: see
      [`flowdiffrax.times.karras_times`][].

    **Raises:** `ValueError` if `num_times` is known and below 2, or unless
    $0 < \sigma_{\min} < \sigma_{\max}$.

    ??? cite "Reference"

        [arXiv:2303.01469](https://arxiv.org/abs/2303.01469), section 5.
    """

    num_times: ArrayLike
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    base_std: float = 1.0
    power: float = 7.0

    def __check_init__(self):
        _check_karras(self.num_times, self.sigma_min, self.sigma_max)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        del second
        num_pairs = jnp.asarray(self.num_times, first.dtype) - 1
        i = jnp.minimum(jnp.floor(first * num_pairs), num_pairs - 1)
        return self._time(i, num_pairs), self._time(i + 1, num_pairs)

    def _time(self, i: Times, num_pairs: Array) -> Times:
        settings = (self.sigma_min, self.sigma_max, self.base_std, self.power)
        t = _karras_time(i / num_pairs, *settings)
        return jnp.where(i == 0, 0, jnp.where(i == num_pairs, 1, t))


def doubling_schedule(
    num_steps: int, first: int = 10, last: int = 1280
) -> Callable[[Int[Array, ""]], Int[Array, ""]]:
    r"""A schedule for a grid whose number of intervals doubles during training.

    The number of times at step $k$ of $K$ is
    $N(k) = \min(s_0 2^{\lfloor k / K' \rfloor}, s_1) + 1$, with
    $K' = \lfloor K / (\log_2 \lfloor s_1 / s_0 \rfloor + 1) \rfloor$.

    **Arguments:**

    - `num_steps`: the number $K$ of training steps.
    - `first`, `last`: the first and the last number of intervals, $s_0$ and $s_1$, with
      $1 \le s_0 \le s_1$.

    **Returns:** a function of the step number.

    **Raises:** `ValueError` unless $K \ge 1$ and $1 \le s_0 \le s_1$.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189), section 3.4.
    """
    check_count(num_steps, 1, "num_steps")
    check_count(last, 1, "last")
    check_between(first, 1, last, "first")
    num_stages = math.log2(last // first) + 1
    steps_a_stage = max(math.floor(num_steps / num_stages), 1)

    def schedule(step):
        # Beyond the last stage, the power could overflow.
        stage = jnp.minimum(step // steps_a_stage, math.ceil(num_stages))
        return jnp.minimum(first * 2**stage, last) + 1

    return schedule


def _karras_time(share, sigma_min, sigma_max, base_std, power):
    """The time of a noise level; `share` is 0 for the most noise and 1 for the least."""
    most, least = sigma_max ** (1 / power), sigma_min ** (1 / power)
    return base_std / (base_std + (most + share * (least - most)) ** power)


def _check_karras(num_times: ArrayLike, sigma_min: float, sigma_max: float) -> None:
    check_count(num_times, 2, "num_times")
    check_positive(sigma_max, "sigma_max")
    check_between(sigma_min, 0, sigma_max, "sigma_min", "()")
