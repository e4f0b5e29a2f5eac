r"""Conversions between velocities and other predictions.

Let $\eta_0 = E[x_0 | I_t = x]$ be the predicted noise and $\eta_1 = E[x_1 | I_t = x]$ the
denoiser. Every prediction in the literature is a linear combination of the two, such as
$x = \alpha_t \eta_0 + \beta_t \eta_1$ and
$b_t = \dot\alpha_t \eta_0 + \dot\beta_t \eta_1$. This holds for interpolants without a
latent; the score also needs a Gaussian base.
"""

import equinox as eqx
import jax.numpy as jnp

from .._time import times_like
from .._tree import add_scaled, is_concrete, scale
from .._types import Args, Scalar, State, Time, VectorField
from ..paths._base import AbstractInterpolant


def noise_from_velocity(
    interpolant: AbstractInterpolant, t: Time, x: State, velocity: State
) -> State:
    r"""The noise $\eta_0 = E[x_0 | I_t = x]$ that a velocity $b_t(x)$ implies.

    **Arguments:**

    - `interpolant`: an interpolant without a latent.
    - `t`: a time; `x`: a state at that time; `velocity`: $b_t(x)$.

    **Returns:** a state like `x`.

    **Raises:** `ValueError` if the interpolant has a latent.
    """
    alpha, beta, d_alpha, d_beta = _weights(interpolant, t, x)
    wronskian = alpha * d_beta - d_alpha * beta
    return _combine(d_beta / wronskian, x, -beta / wronskian, velocity)


def denoiser_from_velocity(
    interpolant: AbstractInterpolant, t: Time, x: State, velocity: State
) -> State:
    r"""The denoiser $\eta_1 = E[x_1 | I_t = x]$ that a velocity $b_t(x)$ implies.

    The arguments, return value and errors are those of
    [`flowdiffrax.velocities.noise_from_velocity`][].
    """
    alpha, beta, d_alpha, d_beta = _weights(interpolant, t, x)
    wronskian = alpha * d_beta - d_alpha * beta
    return _combine(-d_alpha / wronskian, x, alpha / wronskian, velocity)


def score_from_velocity(
    interpolant: AbstractInterpolant,
    t: Time,
    x: State,
    velocity: State,
    base_std: float = 1.0,
) -> State:
    r"""The score $\nabla \log \rho_t(x) = -\eta_0 / (\alpha_t \sigma_0^2)$.

    **Arguments:** as for [`flowdiffrax.velocities.noise_from_velocity`][], and

    - `base_std`: the standard deviation $\sigma_0$ of the Gaussian base.

    **Returns:** a state like `x`. It is infinite where $\alpha_t = 0$, at the data end.
    """
    noise = noise_from_velocity(interpolant, t, x, velocity)
    alpha, *_ = _weights(interpolant, t, x)
    return scale(-1 / (alpha * base_std**2), noise)


def velocity_from_noise(
    interpolant: AbstractInterpolant, t: Time, x: State, noise: State
) -> State:
    r"""The velocity $b_t(x)$ that a noise prediction $\eta_0$ implies.

    The arguments and errors are those of
    [`flowdiffrax.velocities.noise_from_velocity`][]. The velocity is infinite where
    $\beta_t = 0$, at the base end: the noise does not determine the data there.
    """
    alpha, beta, d_alpha, d_beta = _weights(interpolant, t, x)
    return _combine(d_beta / beta, x, d_alpha - alpha * d_beta / beta, noise)


def velocity_from_denoiser(
    interpolant: AbstractInterpolant, t: Time, x: State, denoiser: State
) -> State:
    r"""The velocity $b_t(x)$ that a denoiser's prediction $\eta_1$ implies.

    The arguments and errors are those of
    [`flowdiffrax.velocities.noise_from_velocity`][]. The velocity is infinite where
    $\alpha_t = 0$, at the data end.
    """
    alpha, beta, d_alpha, d_beta = _weights(interpolant, t, x)
    return _combine(d_alpha / alpha, x, d_beta - beta * d_alpha / alpha, denoiser)


def velocity_from_score(
    interpolant: AbstractInterpolant,
    t: Time,
    x: State,
    score: State,
    base_std: float = 1.0,
) -> State:
    r"""The velocity $b_t(x)$ that a score implies, for a Gaussian base.

    The arguments and errors are those of
    [`flowdiffrax.velocities.score_from_velocity`][]. The velocity is infinite where
    $\beta_t = 0$, at the base end.
    """
    alpha, *_ = _weights(interpolant, t, x)
    noise = scale(-alpha * base_std**2, score)
    return velocity_from_noise(interpolant, t, x, noise)


class VelocityFromNoise(eqx.Module):
    """A noise predictor as a teacher velocity.

    **Arguments:**

    - `predictor`: a callable `(t, x, args) -> E[x0 | I_t = x]`.
    - `interpolant`: the interpolant that it was trained with, without a latent.
    - `margin`: the smallest distance in time from the base end, where the velocity is
      infinite. Closer times are moved to this distance. Not negative.

    **Raises:** `ValueError` if `margin` is negative.
    """

    predictor: VectorField
    interpolant: AbstractInterpolant
    margin: float = 1e-3

    def __check_init__(self):
        _check_margin(self.margin)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        t = _after(self.margin, t, x)
        return velocity_from_noise(self.interpolant, t, x, self.predictor(t, x, args))


class VelocityFromDenoiser(eqx.Module):
    """A denoiser as a teacher velocity.

    **Arguments:**

    - `predictor`: a callable `(t, x, args) -> E[x1 | I_t = x]`.
    - `interpolant`: the interpolant that it was trained with, without a latent.
    - `margin`: the smallest distance in time from the data end, where the velocity is
      infinite. Closer times are moved to this distance. Not negative.

    **Raises:** `ValueError` if `margin` is negative.
    """

    predictor: VectorField
    interpolant: AbstractInterpolant
    margin: float = 1e-3

    def __check_init__(self):
        _check_margin(self.margin)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        t = _before(1 - self.margin, t, x)
        return velocity_from_denoiser(self.interpolant, t, x, self.predictor(t, x, args))


class VelocityFromScore(eqx.Module):
    r"""A score model as a teacher velocity.

    **Arguments:**

    - `predictor`: a callable `(t, x, args) -> grad log rho_t(x)`.
    - `interpolant`: the interpolant that it was trained with, without a latent.
    - `base_std`: the standard deviation of the Gaussian base.
    - `margin`: the smallest distance in time from the base end, where the velocity is
      infinite. Closer times are moved to this distance. Not negative.

    **Raises:** `ValueError` if `margin` is negative.
    """

    predictor: VectorField
    interpolant: AbstractInterpolant
    base_std: float = 1.0
    margin: float = 1e-3

    def __check_init__(self):
        _check_margin(self.margin)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        t = _after(self.margin, t, x)
        return velocity_from_score(
            self.interpolant, t, x, self.predictor(t, x, args), self.base_std
        )


def _after(first: float, t: Time, x: State) -> Time:
    (t,) = times_like(x, t)
    return jnp.maximum(t, first)


def _before(last: float, t: Time, x: State) -> Time:
    (t,) = times_like(x, t)
    return jnp.minimum(t, last)


def _check_margin(margin: float) -> None:
    if is_concrete(margin) and margin < 0:
        raise ValueError(f"`margin` must not be negative; got {margin}.")


def _weights(
    interpolant: AbstractInterpolant, t: Time, x: State
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    if interpolant.has_latent:
        raise ValueError(
            "Noise, denoiser and score determine the velocity only for an interpolant "
            f"without latent; got {type(interpolant).__name__} with one."
        )
    (t,) = times_like(x, t)
    alpha, beta, _ = interpolant.coefficients(t)
    d_alpha, d_beta, _ = interpolant.rates(t)
    return alpha, beta, d_alpha, d_beta


def _combine(a: Scalar, x: State, b: Scalar, y: State) -> State:
    return add_scaled(scale(a, x), b, y)
