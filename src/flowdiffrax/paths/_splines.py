import abc
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._time import as_times, times_like
from .._tree import is_concrete, subtract
from .._types import Scalar, State, Time


class AbstractSpline(eqx.Module):
    r"""A curve through one state at each of several times, $I_t = \sum_k w_k(t)\, x_k$.

    Here $x_k$ is the state at time $t_k$, for $k = 0, \ldots, K$. The weight $w_k$ is 1
    at $t_k$ and 0 at the other times $t_j$. Calling a spline with the states returns the
    curve, a `diffrax.AbstractPath`: `path.evaluate(t)` is $I_t$ and `path.derivative(t)`
    is $\dot I_t$.

    If each $x_k$ is a member of the population that was observed at $t_k$, then $I_{t_k}$
    has the distribution of that population, however the members are coupled. So the flow
    of the velocity $b_t(x) = E[\dot I_t \mid I_t = x]$ passes through all populations,
    and objectives that learn from data learn its flow map.
    [`flowdiffrax.data.SplineBatches`][] draws the states.

    **Arguments:**

    - `ts`: the times $t_0 < \cdots < t_K$, at least two, in any unit. They are known
      numbers, and are kept as a tuple.

    **Raises:** `ValueError` if there are fewer than two times, or if they are not finite
    or do not rise; `TypeError` for traced times.

    ??? cite "Reference"

        Interpolants between several distributions:
        [arXiv:2310.03695](https://arxiv.org/abs/2310.03695).
    """

    ts: tuple[float, ...] = eqx.field(static=True, converter=lambda ts: _as_knots(ts))

    def __check_init__(self):
        ts = np.asarray(self.ts)
        rises = bool(np.isfinite(ts).all() and np.all(np.diff(ts) > 0))
        if ts.size < 2 or not rises:
            raise ValueError(
                "`ts` must be at least two finite times that rise; got "
                f"{list(self.ts)}. Sort the snapshots by their times."
            )

    @abc.abstractmethod
    def weights_within(
        self, index: Int[Array, ""], fraction: Scalar
    ) -> Float[Array, " knots"]:
        r"""The weights inside one of the intervals between neighbouring times.

        **Arguments:**

        - `index`: the number $k$ of the interval $[t_k, t_{k+1}]$.
        - `fraction`: the position in it, $(t - t_k) / (t_{k+1} - t_k)$.
        """

    def __call__(self, xs: State) -> "SplinePath":
        """The curve through states.

        **Arguments:**

        - `xs`: the states, an array or a PyTree of arrays, every leaf with one row for
          each time.

        **Raises:** `ValueError` if a leaf has another number of rows.
        """
        return SplinePath(self, xs)

    def weights(self, t: Time, left: bool = True) -> Float[Array, " knots"]:
        """The weights of the states at time `t`. Outside the times, they are NaN."""
        index, fraction, _, is_inside = self._place(t, left)
        return jnp.where(is_inside, self.weights_within(index, fraction), jnp.nan)

    def rates(self, t: Time, left: bool = True) -> Float[Array, " knots"]:
        """The derivatives of the weights at time `t`.

        **Arguments:**

        - `t`: the time.
        - `left`: which of the two derivatives to take at one of the times `ts`, where
          they may differ: that of the interval before it, or of the one after it. At the
          first and the last time there is only one.
        """
        index, fraction, width, is_inside = self._place(t, left)
        inside = lambda fraction: self.weights_within(index, fraction)
        _, rates = jax.jvp(inside, (fraction,), (jnp.ones_like(fraction),))
        return jnp.where(is_inside, rates / width, jnp.nan)

    def _place(
        self, t: Time, left: bool
    ) -> tuple[Int[Array, ""], Scalar, Scalar, Bool[Array, ""]]:
        """The interval of a time, the position in it, its width, and if there is one."""
        (t,) = as_times(t)
        ts = jnp.asarray(self.ts, t.dtype)
        side = "left" if left else "right"
        index = jnp.searchsorted(ts, t, side=side) - 1
        index = jnp.clip(index, 0, ts.size - 2)
        width = ts[index + 1] - ts[index]
        # Rounding may put times that a distribution maps to the interval past its ends.
        slack = 4 * jnp.finfo(t.dtype).eps * jnp.max(jnp.abs(ts))
        is_inside = (t >= ts[0] - slack) & (t <= ts[-1] + slack)
        return index, (t - ts[index]) / width, width, is_inside


class LinearSpline(AbstractSpline):
    r"""Straight lines between neighbouring states.

    Each line covers its interval with constant speed, so the velocity jumps at the times
    `ts`. With two times, 0 and 1, this is [`flowdiffrax.LinearInterpolant`][].

    **Arguments**, **Raises:** as for [`flowdiffrax.paths.AbstractSpline`][].
    """

    def weights_within(self, index, fraction):
        each = jnp.eye(len(self.ts), dtype=fraction.dtype)
        return (1 - fraction) * each[index] + fraction * each[index + 1]


class CubicSpline(AbstractSpline):
    r"""The natural cubic spline: cubic between neighbouring states, and smooth.

    First and second derivatives are continuous, and the second vanishes at both ends. Of
    all curves through the states, it has the least mean square acceleration. With two
    times, it is a straight line.

    A weight is negative in some places, so a curve can overshoot where it turns sharply,
    most of all if the intervals are of very different lengths. Where it must not, use
    [`flowdiffrax.paths.LinearSpline`][].

    **Arguments**, **Raises:** as for [`flowdiffrax.paths.AbstractSpline`][].

    ??? cite "Reference"

        Through states that optimal transport couples:
        [arXiv:2010.12101](https://arxiv.org/abs/2010.12101); in flow matching, Rohbeck et
        al., *Modeling complex system dynamics with flow matching across time and
        conditions*, ICLR 2025.
    """

    def weights_within(self, index, fraction):
        u, each = fraction, jnp.eye(len(self.ts), dtype=fraction.dtype)
        slopes, widths = (jnp.asarray(a, u.dtype) for a in _natural_slopes(self.ts))
        # The cubic with given values and slopes at both ends, by Hermite.
        start, end = (1 + 2 * u) * (1 - u) ** 2, u**2 * (3 - 2 * u)
        of_values = start * each[index] + end * each[index + 1]
        of_slopes = u * (1 - u) ** 2 * slopes[index] - u**2 * (1 - u) * slopes[index + 1]
        return of_values + widths[index] * of_slopes


class SplinePath(diffrax.AbstractPath):
    """One curve of a [`flowdiffrax.paths.AbstractSpline`][].

    It is NaN before the first and after the last time.
    """

    spline: AbstractSpline
    xs: State

    def __check_init__(self):
        num_times = len(self.spline.ts)
        rows = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(self.xs)}
        if rows != {(num_times,)}:
            raise ValueError(
                f"A curve through {num_times} times needs one state for each: arrays "
                f"with a leading axis of {num_times}; got leading axes {sorted(rows)}. "
                "For a batch, use `jax.vmap`."
            )

    @property
    def t0(self):  # pyright: ignore
        return self.spline.ts[0]

    @property
    def t1(self):  # pyright: ignore
        return self.spline.ts[-1]

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        r"""$I_{t_0}$, or the increment $I_{t_1} - I_{t_0}$ if `t1` is given."""
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        (t,) = times_like(self.xs, t0)
        return self._combine(self.spline.weights(t, left))

    def derivative(self, t: Time, left: bool = True) -> State:
        r"""$\dot I_t$; at one of the spline's times, the derivative on that side."""
        (t,) = times_like(self.xs, t)
        return self._combine(self.spline.rates(t, left))

    def _combine(self, weights: Float[Array, " knots"]) -> State:
        def sum_of(leaf):
            factors = weights.astype(jnp.finfo(leaf.dtype).dtype).astype(leaf.dtype)
            return jnp.sum(factors.reshape((-1,) + (1,) * (leaf.ndim - 1)) * leaf, axis=0)

        return jtu.tree_map(sum_of, self.xs)


def _as_knots(ts: Any) -> tuple[float, ...]:
    if not is_concrete(ts):
        raise TypeError("The times of a spline are known numbers, not traced arrays.")
    try:
        array = np.asarray(ts, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`ts` must be a row of times; got {ts!r}.") from error
    if array.ndim != 1:
        raise ValueError(f"`ts` must be a row of times; got shape {array.shape}.")
    return tuple(array.tolist())


def _natural_slopes(
    ts: tuple[float, ...],
) -> tuple[Float[np.ndarray, "knots knots"], Float[np.ndarray, " intervals"]]:
    """Slopes of the natural cubic spline as a matrix times the states, and the widths.

    Row `k` equates the second derivatives of the two cubics that meet at time `k`; the
    first and the last row set it to zero.
    """
    widths = np.diff(ts)
    size = len(ts)
    left, right = np.zeros((2, size, size))
    for k, width in enumerate(widths):
        left[k : k + 2, k : k + 2] += np.array([[2, 1], [1, 2]]) / width
        right[k : k + 2, k : k + 2] += np.array([[-3, 3], [-3, 3]]) / width**2
    return np.linalg.solve(left, right), widths
