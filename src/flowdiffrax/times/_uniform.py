import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .._check import check_between, check_bools
from ._base import AbstractTimes, Times


class UniformTriangle(AbstractTimes):
    r"""Uniform on $\{0 \le s \le t \le 1\}$, or on its band with $t - s \le \tau$.

    **Arguments:**

    - `max_gap`: the longest jump $\tau$, in (0, 1]. It may be an array, so that a
      schedule can change it without recompilation.

    **Raises:** `ValueError` if `max_gap` is known and outside (0, 1].
    """

    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        check_between(self.max_gap, 0, 1, "max_gap", "(]")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        gap = _uniform_gap(first, self.max_gap)
        s = second * (1 - gap)
        return s, s + gap


class UniformSquare(AbstractTimes):
    r"""Uniform on $[0, 1]^2$, or on its band with $|t - s| \le \tau$.

    The pairs go in both directions of time.

    **Arguments:**

    - `max_gap`: as for [`flowdiffrax.times.UniformTriangle`][].
    """

    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        check_between(self.max_gap, 0, 1, "max_gap", "(]")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        # The first half of the unit interval draws forward jumps, the second half
        # backward jumps.
        forward = first < 0.5
        gap = _uniform_gap(jnp.where(forward, 2 * first, 2 * first - 1), self.max_gap)
        low = second * (1 - gap)
        high = low + gap
        return jnp.where(forward, low, high), jnp.where(forward, high, low)


class Diagonal(AbstractTimes):
    r"""Equal times $s = t$, uniform in [0, 1] or drawn from another distribution.

    **Arguments:**

    - `times`: a distribution of pairs whose end times are used, or `None` for uniform
      times.
    - `start`: whether to use the start times of `times` instead.
    """

    times: AbstractTimes | None = None
    start: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_bools(start=self.start)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        if self.times is None:
            return second, second
        s, t = self.times.from_uniform(first, second)
        return (s, s) if self.start else (t, t)

    def num_diagonal(self, batch_size: int) -> int:
        return batch_size


class LogUniformGap(AbstractTimes):
    r"""Pairs with a log-uniform gap $t - s$, placed at random in [0, 1].

    All orders of magnitude of the gap are equally likely, from the short steps of an
    adaptive solver to one jump across the whole interval. Given the gap, $s$ is uniform
    on the remaining interval $[0, 1 - (t - s)]$. For both directions of time, put it into
    [`flowdiffrax.times.EitherDirection`][].

    **Arguments:**

    - `min_gap`, `max_gap`: the shortest and the longest gap, with
      $0 < \text{min} \le \text{max} \le 1$. They may be arrays, as in
      [`flowdiffrax.times.UniformTriangle`][].

    **Raises:** `ValueError` if the gaps are known and violate this.
    """

    min_gap: ArrayLike
    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        # For times outside [0, 1], there is `OnInterval`.
        check_between(self.max_gap, 0, 1, "max_gap", "(]")
        check_between(self.min_gap, 0, self.max_gap, "min_gap", "(]")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        low, high = (
            jnp.asarray(gap, first.dtype) for gap in (self.min_gap, self.max_gap)
        )
        # Rounding may put the longest gap slightly above `max_gap`.
        gap = jnp.minimum(low * jnp.exp(first * jnp.log(high / low)), high)
        s = second * (1 - gap)
        return s, s + gap


def _uniform_gap(u: Times, max_gap: ArrayLike) -> Times:
    # The density of the gap g of a uniform pair is proportional to 1 - g on [0, tau].
    tau = jnp.asarray(max_gap, u.dtype)
    gap = 1 - jnp.sqrt(1 - u * tau * (2 - tau))
    return jnp.clip(gap, 0, tau)
