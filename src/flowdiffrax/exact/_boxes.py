import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf, erfc
from jaxtyping import Array, Float

from .._check import check_positive
from .._time import times_like
from .._types import Args, Numbers, State, Time
from ..data import checkerboard_boxes
from ..paths._base import AbstractInterpolant
from ..paths._interpolants import LinearInterpolant


class UniformBoxesVelocity(eqx.Module):
    r"""The exact velocity from a Gaussian base to a distribution uniform on boxes.

    Given $I_t = x$ and the box, each coordinate of the base is a normal variable
    truncated to an interval, and each coordinate of the data is an affine function of
    it. The boxes are weighted by the mass of their intervals.

    !!! info "Numerics"

        The velocity is exact to rounding for all $t$ in [0, 1] and all $x$ within a few
        box widths. Outside the support it points to the nearest box, and grows like
        $1/(1 - t)$ as $t$ tends to 1.

    **Arguments:**

    - `lower`, `upper`: the corners of the boxes, of shape `(boxes, d)`.
    - `weights`: the probabilities of the boxes, positive. They are divided by their sum.
      `None` gives a uniform density.
    - `interpolant`: any interpolant without a latent.
    - `base_std`: the standard deviation of the base, positive.

    **Raises:** `ValueError` if the shapes do not match, a box is empty, a weight or
    `base_std` is not positive, or the interpolant has a latent.
    """

    intervals: Float[Array, "2 d unique"]
    index: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    log_weights: Float[Array, " boxes"]
    interpolant: AbstractInterpolant
    base_std: Array

    def __init__(
        self,
        lower: Numbers,
        upper: Numbers,
        weights: Numbers | None = None,
        interpolant: AbstractInterpolant = LinearInterpolant(),
        base_std: Numbers = 1.0,
    ):
        check_positive(base_std, "base_std")
        lower, upper = np.asarray(lower, float), np.asarray(upper, float)
        if lower.ndim != 2 or lower.shape != upper.shape or not np.all(lower < upper):
            raise ValueError("`lower` and `upper` must be (boxes, d) with lower < upper.")
        volume = np.prod(upper - lower, axis=-1)
        mass = volume if weights is None else np.asarray(weights, float)
        if mass.shape != volume.shape or not mass.min() > 0:
            raise ValueError(f"Expected {len(volume)} positive weights; got {weights}.")
        if interpolant.has_latent:
            raise ValueError("`interpolant` must not have a latent.")
        # Boxes on a grid share intervals: a 4x4 board has four instead of eight.
        pairs = np.stack([lower, upper], axis=-1)
        unique, index = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
        self.intervals = jnp.asarray(unique.T)
        rows: Any = index.reshape(lower.shape).tolist()
        self.index = tuple(map(tuple, rows))
        self.log_weights = jnp.asarray(np.log(mass / mass.sum()))
        self.interpolant = interpolant
        self.base_std = jnp.asarray(base_std, float)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        del args
        noise, denoised = self.predict(t, x)
        (t,) = times_like(x, t)
        d_alpha, d_beta, _ = self.interpolant.rates(t)
        return d_alpha.astype(x.dtype) * noise + d_beta.astype(x.dtype) * denoised

    def predict(self, t: Time, x: State) -> tuple[State, State]:
        r"""The pair $E[x_0 | I_t = x]$ and $E[x_1 | I_t = x]$."""
        (t,) = times_like(x, t)
        cast = lambda value: value.astype(x.dtype)
        alpha, beta, _ = map(cast, self.interpolant.coefficients(t))
        low, high = cast(self.intervals)[:, None]
        # The scale is zero at the data end; the floor keeps squares of ratios finite.
        scale = jnp.maximum(alpha * cast(self.base_std), 1e-15)
        x_column = x[:, None]
        log_mass, mean, position = _truncated_normal(
            (x_column - beta * high) / scale,
            (x_column - beta * low) / scale,
            beta * (high - low) / scale,
        )
        dims, index = np.arange(x.shape[0]), np.asarray(self.index)
        pick = lambda value: value[dims, index]
        # The density in a box is its weight over its volume. `log_mass` is already
        # divided by the widths, whose product is the volume.
        log_posterior = cast(self.log_weights) + jnp.sum(pick(log_mass), axis=-1)
        posterior = jax.nn.softmax(log_posterior)
        noise = cast(self.base_std) * (posterior @ pick(mean))
        denoised = posterior @ pick(high - (high - low) * position)
        return noise, denoised


def checkerboard_velocity(
    interpolant: AbstractInterpolant = LinearInterpolant(),
    base_std: Numbers = 1.0,
    squares: int = 4,
) -> UniformBoxesVelocity:
    """The exact velocity from a Gaussian base to the checkerboard on [-1, 1]^2.

    **Arguments:**

    - `interpolant`, `base_std`: as for [`flowdiffrax.exact.UniformBoxesVelocity`][].
    - `squares`: as for [`flowdiffrax.data.checkerboard_boxes`][].
    """
    lower, upper = checkerboard_boxes(squares)
    return UniformBoxesVelocity(lower, upper, interpolant=interpolant, base_std=base_std)


# Gauss-Legendre quadrature on [0, 1]. Six nodes are exact to rounding if the density
# falls by less than a factor of e over less than half a standard deviation.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def _truncated_normal(a: Array, b: Array, width: Array) -> tuple[Array, Array, Array]:
    r"""A standard normal truncated to $[a, b]$, of known width $b - a$.

    Returns the logarithm of its mean density over the interval, its mean, and the mean's
    position in the interval, from 0 at `a` to 1 at `b`. To keep full precision, it uses
    quadrature for short intervals, Mills ratios for intervals in the tail, and error
    functions for the rest.
    """
    # Reflect so that the midpoint is not negative.
    flip = a + b < 0
    a, b = jnp.where(flip, -b, a), jnp.where(flip, -a, b)
    # The logarithm of the ratio of the densities at the two ends.
    fall = width * (a + b) / 2
    short = (width < 0.5) & (fall < 1)
    tail = a >= 0

    def choose(mask, value, safe):
        return jnp.where(mask, value, safe)

    # Short intervals: relative to the density at `a`.
    narrow, start = choose(short, width, 0.1), choose(short, a, 0.1)
    nodes, weights = jnp.asarray(_NODES, a.dtype), jnp.asarray(_WEIGHTS, a.dtype)
    steps = narrow[..., None] * jnp.broadcast_to(nodes, (*narrow.shape, nodes.size))
    density = jnp.exp(-steps * (start[..., None] + steps / 2))
    mass = density @ weights
    moment = density @ (weights * nodes)
    short_log, short_position = jnp.log(mass) - start**2 / 2, moment / mass
    short_mean = start + narrow * short_position

    # In the tail: everything relative to the density at `a`.
    in_tail = ~short & tail
    left, right = choose(in_tail, a, 1.0), choose(in_tail, b, 3.0)
    rest = jnp.exp(-choose(in_tail, fall, 4.0))
    ratio = _mills_ratio(left) - _mills_ratio(right) * rest
    wide = choose(short, 1.0, width)
    tail_log = jnp.log(ratio) - left**2 / 2 - jnp.log(wide)
    tail_mean = (1 - rest) / ratio

    # Around the middle, at least half a standard deviation wide.
    in_middle = ~short & ~tail
    left, right = choose(in_middle, a, -1.0), choose(in_middle, b, 1.0)
    root = math.sqrt(0.5)
    mass = math.sqrt(math.pi / 2) * (erf(root * right) - erf(root * left))
    middle_log = jnp.log(mass) - jnp.log(wide)
    middle_mean = (jnp.exp(-(left**2) / 2) - jnp.exp(-(right**2) / 2)) / mass

    log_density = jnp.where(short, short_log, jnp.where(tail, tail_log, middle_log))
    mean = jnp.where(short, short_mean, jnp.where(tail, tail_mean, middle_mean))
    position = jnp.where(short, short_position, (mean - a) / wide)
    return (
        log_density,
        jnp.where(flip, -mean, mean),
        jnp.where(flip, 1 - position, position),
    )


def _mills_ratio(x: Array) -> Array:
    """The upper tail of the standard normal divided by its density, for `x >= 0`."""
    near = jnp.where(x < 6, x, 1.0)
    near_ratio = (
        math.sqrt(math.pi / 2) * erfc(near * math.sqrt(0.5)) * jnp.exp(near**2 / 2)
    )
    # Laplace's continued fraction: for x >= 6, this many levels are exact to rounding.
    far = jnp.where(x < 6, 6.0, x)
    fraction = far
    for level in range(8 if jnp.finfo(x.dtype).bits <= 32 else 16, 0, -1):
        fraction = far + level / fraction
    return jnp.where(x < 6, near_ratio, 1 / fraction)
