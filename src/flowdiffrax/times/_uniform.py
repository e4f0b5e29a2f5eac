import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike

from ._base import AbstractTimes, Times


class UniformTriangle(AbstractTimes):
    r"""Uniform on $\{0 \le s \le t \le 1\}$, or on the band of it with $t - s \le \tau$.

    **Arguments:**

    - `max_gap`: the longest jump $\tau$ in (0, 1]. It may be an array, so that a
      schedule may anneal it without a new compilation.
    """

    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        _check_max_gap(self.max_gap)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        gap = _uniform_gap(first, self.max_gap)
        s = second * (1 - gap)
        return s, s + gap


class UniformSquare(AbstractTimes):
    r"""Uniform on $[0, 1]^2$, both directions of time, or on $|t - s| \le \tau$.

    **Arguments:**

    - `max_gap`: as for [`flowdiffrax.times.UniformTriangle`][].
    """

    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        _check_max_gap(self.max_gap)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        # The first half of the unit interval draws the triangle below, the second half
        # the one above.
        forward = first < 0.5
        gap = _uniform_gap(jnp.where(forward, 2 * first, 2 * first - 1), self.max_gap)
        low = second * (1 - gap)
        high = low + gap
        return jnp.where(forward, low, high), jnp.where(forward, high, low)


class Diagonal(AbstractTimes):
    r"""Equal times $s = t$, uniform in [0, 1] or as another law has its end times.

    **Arguments:**

    - `times`: the law one of whose times is used; `None` for uniform.
    - `start`: whether to use its start time rather than its end time.
    """

    times: AbstractTimes | None = None
    start: bool = eqx.field(static=True, default=False)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        if self.times is None:
            return second, second
        s, t = self.times.from_uniform(first, second)
        return (s, s) if self.start else (t, t)

    def num_diagonal(self, batch_size: int) -> int:
        return batch_size


class LogUniformGap(AbstractTimes):
    r"""Pairs with a log-uniform gap $t - s$, placed where there is room for it.

    All orders of magnitude of the step are equally likely, from the short steps of an
    adaptive solver to one jump across the whole interval. Given the gap, $s$ is uniform
    on what is left, $[0, 1 - (t - s)]$. For both directions of time, put it into
    [`flowdiffrax.times.EitherDirection`][].

    **Arguments:**

    - `min_gap`, `max_gap`: the shortest and the longest gap,
      $0 < \text{min} \le \text{max} \le 1$. They may be arrays, as in
      [`flowdiffrax.times.UniformTriangle`][].

    **Raises:** `ValueError` for other gaps, if known.
    """

    min_gap: ArrayLike
    max_gap: ArrayLike = 1.0

    def __check_init__(self):
        gaps = (self.min_gap, self.max_gap)
        known = all(isinstance(gap, float | int) for gap in gaps)
        if known and not 0 < self.min_gap <= self.max_gap <= 1:  # pyright: ignore
            raise ValueError(
                "The gaps must have 0 < min_gap <= max_gap <= 1; got "
                f"{self.min_gap} and {self.max_gap}. For another interval than [0, 1], "
                "use `OnInterval`."
            )

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        low, high = (
            jnp.asarray(gap, first.dtype) for gap in (self.min_gap, self.max_gap)
        )
        # Rounding may put the longest gap a trifle above `max_gap`.
        gap = jnp.minimum(low * jnp.exp(first * jnp.log(high / low)), high)
        s = second * (1 - gap)
        return s, s + gap


def _uniform_gap(u: Times, max_gap: ArrayLike) -> Times:
    # The density of the gap g of a uniform pair is proportional to 1 - g on [0, tau].
    tau = jnp.asarray(max_gap, u.dtype)
    gap = 1 - jnp.sqrt(1 - u * tau * (2 - tau))
    return jnp.clip(gap, 0, tau)


def _check_max_gap(max_gap: ArrayLike) -> None:
    if isinstance(max_gap, float | int) and not 0 < max_gap <= 1:
        raise ValueError(f"`max_gap` must be in (0, 1]; got {max_gap}.")
