import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ._misc import check_shares, is_concrete, split_by_shares

Times = Float[Array, " batch"]


class AbstractTimes(eqx.Module):
    """A law of pairs of times, one pair for each example of a batch.

    A law is a function of two uniform numbers a pair, which
    [`flowdiffrax.Stratified`][] may choose more evenly than chance.
    """

    def __call__(
        self, key: Key[Array, ""], batch_size: int, dtype=None
    ) -> tuple[Times, Times]:
        """Draws the pairs.

        **Arguments:**

        - `key`: a random key.
        - `batch_size`: how many pairs, at least 1.
        - `dtype`: the dtype of the times; `None` for JAX's default.

        **Returns:** the start times `s` and the end times `t`, each of shape
        `(batch_size,)`.
        """
        check_batch_size(batch_size)
        first_key, second_key = jr.split(key)
        dtype = jnp.result_type(float) if dtype is None else dtype
        first = jr.uniform(first_key, (batch_size,), dtype)
        second = jr.uniform(second_key, (batch_size,), dtype)
        return self.from_uniform(first, second)

    @abc.abstractmethod
    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        """The pairs that two batches of uniform numbers in [0, 1) stand for."""

    def num_diagonal(self, batch_size: int) -> int:
        """How many of the first pairs of a batch are sure to have `s == t`.

        Losses take a cheaper form there, and compute nothing else for these rows.
        """
        del batch_size
        return 0


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

    - `max_gap`: as for [`flowdiffrax.UniformTriangle`][].
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


class DiagonalMixture(AbstractTimes):
    r"""A fixed share of each batch on the diagonal $s = t$, the rest by another law.

    The share is a count, not a chance: the first `round(fraction * batch_size)` pairs,
    but neither none nor all of them, lie on the diagonal, so that a loss may treat the
    two parts differently without computing both for every example.

    **Arguments:**

    - `times`: the law off the diagonal, on [0, 1]. For another interval, put the mixture
      into [`flowdiffrax.OnInterval`][], not the other way round.
    - `fraction`: the share on the diagonal, in [0, 1].
    - `diagonal`: the law on the diagonal, uniform by default whatever the law off it.

    **Raises:** `ValueError` for a fraction outside [0, 1], and in use for a batch of one
    pair, which has no room for both parts.
    """

    times: AbstractTimes
    fraction: float = eqx.field(static=True, default=0.75)
    diagonal: Diagonal = Diagonal()

    def __check_init__(self):
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"`fraction` must be in [0, 1]; got {self.fraction}.")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        cut = self.num_diagonal(first.shape[0])
        s_on, t_on = self.diagonal.from_uniform(first[:cut], second[:cut])
        if cut == first.shape[0]:
            return s_on, t_on
        s_off, t_off = self.times.from_uniform(first[cut:], second[cut:])
        return jnp.concatenate([s_on, s_off]), jnp.concatenate([t_on, t_off])

    def num_diagonal(self, batch_size: int) -> int:
        if batch_size == 1 and 0 < self.fraction < 1:
            raise ValueError(
                f"A batch of 1 has no room for a share of {self.fraction} on the "
                "diagonal and the rest off it: use a batch of at least 2, or accumulate "
                "several."
            )
        # Neither part may vanish in a small batch, if it is asked for.
        least, most = int(self.fraction > 0), batch_size - int(self.fraction < 1)
        return min(max(round(self.fraction * batch_size), least), most)


class LogitNormal(AbstractTimes):
    r"""Sorted pairs of independent logit-normal times.

    **Arguments:**

    - `mean`, `std`: of the logit on our clock. Papers that have the data at time 0
      quote the mean with the opposite sign.
    - `sort`: whether to sort; if not, the two times are independent.

    **Raises:** `ValueError` for a `std` that is not positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447), section 4.3.
    """

    mean: float = 0.4
    std: float = 1.0
    sort: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if is_concrete(self.std) and self.std <= 0:
            raise ValueError(f"`std` must be positive; got {self.std}.")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        logit = lambda u: self.mean + self.std * _quantile(u)
        first, second = jax.nn.sigmoid(logit(first)), jax.nn.sigmoid(logit(second))
        if not self.sort:
            return first, second
        return jnp.minimum(first, second), jnp.maximum(first, second)


class LogitNormalGap(AbstractTimes):
    r"""Pairs with a logit-normal gap $t - s$, placed where there is room for it.

    Given the gap, the end time is uniform on what is left, $[t - s, 1]$, or logit-normal
    and cut off there.

    **Arguments:**

    - `mean`, `std`: of the gap's logit.
    - `end_mean`, `end_std`: of the end time's logit on our clock; `None` for uniform.

    **Raises:** `ValueError` for standard deviations that are not positive, or for one of
    `end_mean` and `end_std` alone.

    ??? cite "Reference"

        Align Your Flow, [arXiv:2506.14603](https://arxiv.org/abs/2506.14603), uniform;
        Terminal Velocity Matching, [arXiv:2511.19797](https://arxiv.org/abs/2511.19797),
        cut off.
    """

    mean: float = -0.6
    std: float = 1.6
    end_mean: float | None = None
    end_std: float | None = None

    def __check_init__(self):
        stds = [self.std] if self.end_std is None else [self.std, self.end_std]
        is_bad = is_concrete(stds) and not all(std > 0 for std in stds)
        if is_bad or (self.end_mean is None) != (self.end_std is None):
            raise ValueError(
                "`std` and `end_std` must be positive, and `end_mean` and `end_std` "
                f"given together; got {self.std}, {self.end_mean}, {self.end_std}."
            )

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        gap = jax.nn.sigmoid(self.mean + self.std * _quantile(first))
        if self.end_mean is None or self.end_std is None:
            t = gap + second * (1 - gap)
        else:
            # The quantile of a normal number above the gap's logit, from its upper tail.
            lowest = (jax.scipy.special.logit(gap) - self.end_mean) / self.end_std
            upper = (1 - second) * ndtr(-lowest)
            t = jax.nn.sigmoid(self.end_mean - self.end_std * _quantile(upper))
        # Rounding may put the start a trifle below 0.
        return jnp.maximum(t - gap, 0), t


class LogUniformGap(AbstractTimes):
    r"""Pairs with a log-uniform gap $t - s$, placed where there is room for it.

    All orders of magnitude of the step are equally likely, from the short steps of an
    adaptive solver to one jump across the whole interval. Given the gap, $s$ is uniform
    on what is left, $[0, 1 - (t - s)]$. For both directions of time, put it into
    [`flowdiffrax.EitherDirection`][].

    **Arguments:**

    - `min_gap`, `max_gap`: the shortest and the longest gap,
      $0 < \text{min} \le \text{max} \le 1$. They may be arrays, as in
      [`flowdiffrax.UniformTriangle`][].

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


class Dyadic(AbstractTimes):
    r"""Dyadic jumps: length $2^{-j}$ from a multiple of it, $j$ uniform in $0 .. J$.

    **Arguments:**

    - `max_level`: the finest level $J$, at least 0; $2^J$ jumps cover [0, 1].

    **Raises:** `ValueError` for a negative level.

    ??? cite "Reference"

        Shortcut models, [arXiv:2410.12557](https://arxiv.org/abs/2410.12557), section 3.
    """

    max_level: int = eqx.field(static=True, default=7)

    def __check_init__(self):
        if self.max_level < 0:
            raise ValueError(f"`max_level` must be at least 0; got {self.max_level}.")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        level = jnp.floor(first * (self.max_level + 1))
        # A power by `exp2` is rounded, and its multiples would miss one another and 1.
        num_jumps = jnp.ldexp(jnp.ones_like(level), level.astype(int))
        index = jnp.floor(second * num_jumps)
        return index / num_jumps, (index + 1) / num_jumps


class GridTimes(AbstractTimes):
    r"""Pairs from a given grid, $s = t_i$ and $t = t_j$ with $i < j$, all equally likely.

    For data that are known at certain times only, such as saved trajectories.

    **Arguments:**

    - `ts`: the grid, at least two rising times.
    - `both_directions`: whether to draw $i > j$ as well.

    **Raises:** `ValueError` for fewer than two times, or if known, for times that do not
    rise.
    """

    ts: Float[Array, " grid"] = eqx.field(converter=jnp.asarray)
    both_directions: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        _check_grid(self.ts)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        size = self.ts.shape[0]
        # Two different indices: the second skips over the first.
        i = jnp.minimum((first * size).astype(int), size - 1)
        j = jnp.minimum((second * (size - 1)).astype(int), size - 2)
        j = jnp.where(j >= i, j + 1, j)
        if not self.both_directions:
            i, j = jnp.minimum(i, j), jnp.maximum(i, j)
        ts = self.ts.astype(first.dtype)
        return ts[i], ts[j]


class Neighbours(AbstractTimes):
    r"""Neighbouring times of a grid, $s = t_i$ and $t = t_{i+1}$, all equally likely.

    The pairs that discrete consistency models are trained on.

    **Arguments:**

    - `ts`: the grid, at least two rising times.

    **Raises:** as [`flowdiffrax.GridTimes`][].
    """

    ts: Float[Array, " grid"] = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        _check_grid(self.ts)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        del second
        num_pairs = self.ts.shape[0] - 1
        i = jnp.minimum((first * num_pairs).astype(int), num_pairs - 1)
        ts = self.ts.astype(first.dtype)
        return ts[i], ts[i + 1]


class OnInterval(AbstractTimes):
    r"""Another law, moved from [0, 1] to an interval of a physical ODE.

    **Arguments:**

    - `times`: a law on [0, 1].
    - `t0`, `t1`: where 0 and 1 are moved to.
    """

    times: AbstractTimes
    t0: ArrayLike
    t1: ArrayLike

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s, t = self.times.from_uniform(first, second)
        low, high = (jnp.asarray(end, s.dtype) for end in (self.t0, self.t1))
        return low + (high - low) * s, low + (high - low) * t

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


class EitherDirection(AbstractTimes):
    """Another law in both directions of time: each pair is swapped with chance one half.

    For maps that are to go back as well as forth. In [`flowdiffrax.Stratified`][] one
    half of the pairs is swapped, to within one.

    **Arguments:**

    - `times`: the law to draw from. Its pairs on the diagonal stay there.
    """

    times: AbstractTimes

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        # As in `UniformSquare`: each half of the unit interval draws the whole law.
        forward = first < 0.5
        first = jnp.where(forward, 2 * first, 2 * first - 1)
        s, t = self.times.from_uniform(first, second)
        return jnp.where(forward, s, t), jnp.where(forward, t, s)

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


class MixedTimes(AbstractTimes):
    r"""Several laws, each for its own share of the batch.

    The shares are counts, as in [`flowdiffrax.DiagonalMixture`][], and their rows come
    one after another.

    **Arguments:**

    - `laws`: the laws.
    - `shares`: their shares of the batch, positive; they are divided by their sum.

    **Raises:** `ValueError` for shares that are not positive or not one a law, and in use
    for a batch that is too small for them.
    """

    laws: tuple[AbstractTimes, ...]
    shares: tuple[float, ...] = eqx.field(static=True)

    def __check_init__(self):
        check_shares(self.shares, len(self.laws), "laws")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        slices = split_by_shares(first.shape[0], self.shares)
        pairs = [
            law.from_uniform(first[rows], second[rows])
            for law, rows in zip(self.laws, slices, strict=True)
        ]
        s, t = zip(*pairs, strict=True)
        return jnp.concatenate(s), jnp.concatenate(t)

    def num_diagonal(self, batch_size: int) -> int:
        total = 0
        for law, rows in zip(
            self.laws, split_by_shares(batch_size, self.shares), strict=True
        ):
            size = rows.stop - rows.start
            total += law.num_diagonal(size)
            if law.num_diagonal(size) < size:
                break
        return total


class StartAt(AbstractTimes):
    r"""Another law with its start times replaced by one: jumps from a single time.

    Bounds on a sampler's error need the Lagrangian residual at $s = 0$ only.

    **Arguments:**

    - `times`: the law of the end times.
    - `s`: the start of every jump.
    """

    times: AbstractTimes
    s: ArrayLike = 0.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        _, t = self.times.from_uniform(first, second)
        return jnp.full_like(t, self.s), t


class EndAt(AbstractTimes):
    r"""Another law with its end times replaced by one: jumps to a single time.

    With $t = 1$, the pairs of a consistency model.

    **Arguments:**

    - `times`: the law of the start times.
    - `t`: the end of every jump.
    """

    times: AbstractTimes
    t: ArrayLike = 1.0

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        s, _ = self.times.from_uniform(first, second)
        return s, jnp.full_like(s, self.t)


class Stratified(AbstractTimes):
    """Another law, drawn with less variance: a Latin hypercube over the batch.

    Each of the two uniform numbers falls exactly once in each of `batch_size` equal
    cells, in independent random orders. The law of each single pair stays the same.

    **Arguments:**

    - `times`: the law to draw from.
    """

    times: AbstractTimes

    def __call__(
        self, key: Key[Array, ""], batch_size: int, dtype=None
    ) -> tuple[Times, Times]:
        check_batch_size(batch_size)
        dtype = jnp.result_type(float) if dtype is None else dtype
        return self.from_uniform(
            *(_latin(axis_key, batch_size, dtype) for axis_key in jr.split(key))
        )

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        return self.times.from_uniform(first, second)

    def num_diagonal(self, batch_size: int) -> int:
        return self.times.num_diagonal(batch_size)


def _quantile(u: Times) -> Times:
    """The normal quantile; finite, though uniform draws include 0."""
    return ndtri(jnp.maximum(u, jnp.finfo(u.dtype).tiny))


def _latin(key: Key[Array, ""], batch_size: int, dtype) -> Times:
    order_key, offset_key = jr.split(key)
    cell = jr.permutation(order_key, batch_size).astype(dtype)
    offset = jr.uniform(offset_key, (batch_size,), dtype)
    # Rounding may lift the last cell's draw to 1.
    below_one = 1 - jnp.finfo(dtype).epsneg
    return jnp.minimum((cell + offset) / batch_size, below_one)


def _uniform_gap(u: Times, max_gap: ArrayLike) -> Times:
    # The density of the gap g of a uniform pair is proportional to 1 - g on [0, tau].
    tau = jnp.asarray(max_gap, u.dtype)
    gap = 1 - jnp.sqrt(1 - u * tau * (2 - tau))
    return jnp.clip(gap, 0, tau)


def _check_grid(ts: Array) -> None:
    if jnp.ndim(ts) != 1 or jnp.shape(ts)[0] < 2:
        raise ValueError(
            "`ts` must be one-dimensional with at least two times; got shape "
            f"{jnp.shape(ts)}."
        )
    if is_concrete(ts) and not np.all(np.diff(np.asarray(ts)) > 0):
        raise ValueError(f"`ts` must rise; got {ts}.")


def karras_times(
    num_times: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    base_std: float = 1.0,
    power: float = 7.0,
) -> Float[Array, " num_times"]:
    r"""The grid of noise levels of consistency models, on the linear interpolant's clock.

    A noise level $\sigma$ there is time $t = \sigma_0 / (\sigma_0 + \sigma)$ here, with
    $\sigma_0$ the base's standard deviation. Levels are even in $\sigma^{1/7}$; the last
    time is set to 1.

    **Arguments:**

    - `num_times`: how many times, at least 2.
    - `sigma_min`, `sigma_max`: least and most noise, positive, in units of the data. The
      defaults are for data with a standard deviation of about 0.5.
    - `base_std`: standard deviation of the base, in the same units.
    - `power`: the 7 above.

    **Returns:** rising times of shape `(num_times,)`.

    **Raises:** `ValueError` for fewer than two times, a traced number of them, or unless
    $0 < \sigma_{\min} < \sigma_{\max}$.

    ??? cite "Reference"

        [arXiv:2206.00364](https://arxiv.org/abs/2206.00364), equation (5).
    """
    if not is_concrete(num_times):
        raise ValueError(
            "`num_times` is the length of an array, and cannot be traced. For a grid "
            "that grows in training, use `KarrasNeighbours(num_times)`."
        )
    _check_karras(num_times, sigma_min, sigma_max)
    share = np.linspace(0, 1, num_times)
    ts = _karras_time(share, sigma_min, sigma_max, base_std, power)
    ts[-1] = 1.0
    return jnp.asarray(ts, float)


class KarrasNeighbours(AbstractTimes):
    r"""Neighbouring times of the grid of consistency models, all pairs equally likely.

    The pairs of [`flowdiffrax.karras_times`][], but that the first time is 0 instead of
    that of `sigma_max`: there sampling starts, from the base without any data. The number
    of times may be traced, so that the grid may grow in training:

    ```python
    grid = doubling_schedule(num_steps)
    Scheduled(lambda step: ConsistencyTraining(KarrasNeighbours(grid(step))))
    ```

    **Arguments:**

    - `num_times`: how many times, at least 2.
    - `sigma_min`, `sigma_max`, `base_std`, `power`: see [`flowdiffrax.karras_times`][].

    **Raises:** `ValueError` as [`flowdiffrax.karras_times`][] does, as far as values are
    known.

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
    r"""The number of times of a grid that doubles its intervals along training.

    $N(k) = \min(s_0 2^{\lfloor k / K' \rfloor}, s_1) + 1$, with
    $K' = \lfloor K / (\log_2 \lfloor s_1 / s_0 \rfloor + 1) \rfloor$, of $K$ steps.

    **Arguments:**

    - `num_steps`: the number of steps $K$ of the training.
    - `first`, `last`: the numbers of intervals $s_0$ and $s_1$ in the beginning and in
      the end, with $1 \le s_0 \le s_1$.

    **Returns:** a function of the step's number.

    **Raises:** `ValueError` for other numbers.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189), section 3.4.
    """
    if num_steps < 1 or not 1 <= first <= last:
        raise ValueError(
            "Expected at least one step and 1 <= first <= last; got "
            f"{num_steps}, {first} and {last}."
        )
    num_stages = math.log2(last // first) + 1
    steps_a_stage = max(math.floor(num_steps / num_stages), 1)

    def schedule(step):
        # Beyond the last stage, a power could overflow.
        stage = jnp.minimum(step // steps_a_stage, math.ceil(num_stages))
        return jnp.minimum(first * 2**stage, last) + 1

    return schedule


def _karras_time(share, sigma_min, sigma_max, base_std, power):
    """The time of a noise level, from its share of the way from most to least noise."""
    most, least = sigma_max ** (1 / power), sigma_min ** (1 / power)
    return base_std / (base_std + (most + share * (least - most)) ** power)


def _check_karras(num_times: ArrayLike, sigma_min: float, sigma_max: float) -> None:
    is_few = is_concrete(num_times) and bool(np.asarray(num_times) < 2)
    if is_few or not 0 < sigma_min < sigma_max:
        raise ValueError(
            "Expected at least two times and 0 < sigma_min < sigma_max; got "
            f"{num_times}, {sigma_min} and {sigma_max}."
        )


def _check_max_gap(max_gap: ArrayLike) -> None:
    if isinstance(max_gap, float | int) and not 0 < max_gap <= 1:
        raise ValueError(f"`max_gap` must be in (0, 1]; got {max_gap}.")


def check_batch_size(batch_size: int) -> None:
    """**Raises:** `ValueError` if `batch_size` is below 1."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
