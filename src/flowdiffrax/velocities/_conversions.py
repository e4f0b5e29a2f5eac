r"""Conversions between velocities and other predictions.

Let $\eta_0 = E[x_0 | I_t = x]$ be the predicted noise and $\eta_1 = E[x_1 | I_t = x]$ the
denoiser. Every prediction in the literature is a linear combination of the two, such as
$x = \alpha_t \eta_0 + \beta_t \eta_1$ and
$b_t = \dot\alpha_t \eta_0 + \dot\beta_t \eta_1$. This holds for interpolants without a
latent; the score also needs a Gaussian base.
"""

import enum

import equinox as eqx
import jax.numpy as jnp

from .._check import as_member, check_at_least
from .._time import times_like
from .._tree import add_scaled, scale
from .._types import Args, Scalar, State, Time, VectorField
from ..paths._base import AbstractInterpolant, check_no_latent


class Prediction(enum.Enum):
    r"""What a network predicts of a path, given $I_t = x$.

    - `VELOCITY`: $b_t(x) = E[\dot I_t | I_t = x]$.
    - `NOISE`: $\eta_0 = E[x_0 | I_t = x]$.
    - `DENOISER`: $\eta_1 = E[x_1 | I_t = x]$.
    - `SCORE`: $\nabla \log \rho_t(x) = -\eta_0 / (\alpha_t \sigma_0^2)$, for a Gaussian
      base with standard deviation $\sigma_0$.
    """

    VELOCITY = "velocity"
    NOISE = "noise"
    DENOISER = "denoiser"
    SCORE = "score"


def convert(
    value: State,
    interpolant: AbstractInterpolant,
    t: Time,
    x: State,
    *,
    source: Prediction | str,
    target: Prediction | str = Prediction.VELOCITY,
    base_std: float = 1.0,
) -> State:
    r"""Converts one prediction into another, such as a score into a velocity.

    The result is not finite where the source does not determine the target: a velocity
    from a noise or a score at the base end, where $\beta_t = 0$; a velocity from a
    denoiser, and any score, at the data end, where $\alpha_t = 0$.

    **Arguments:**

    - `value`: the prediction at time `t` and state `x`.
    - `interpolant`: an interpolant without a latent.
    - `t`, `x`: a time, and a state at that time.
    - `source`: what `value` is.
    - `target`: what to return.
    - `base_std`: the standard deviation $\sigma_0$ of the Gaussian base, for scores.

    **Returns:** a state like `x`.

    **Raises:** `ValueError` if the interpolant has a latent, or for another prediction.
    """
    source = as_member(source, Prediction, "source")
    target = as_member(target, Prediction, "target")
    check_no_latent(interpolant)
    (t,) = times_like(x, t)
    alpha, beta, _ = interpolant.coefficients(t)
    # A score is a multiple of the noise. It is converted by way of it, since the multiple
    # is infinite at the data end.
    if source is Prediction.SCORE:
        value = scale(-alpha * base_std**2, value)
    p, q = _weights(interpolant, t, source)
    p_out, q_out = _weights(interpolant, t, target)
    # x and the value are two equations for the noise and the denoiser.
    wronskian = alpha * q - beta * p
    of_x = (p_out * q - q_out * p) / wronskian
    of_value = (alpha * q_out - beta * p_out) / wronskian
    out = add_scaled(scale(of_x, x), of_value, value)
    if target is Prediction.SCORE:
        out = scale(-1 / (alpha * base_std**2), out)
    return out


class PredictedVelocity(eqx.Module):
    """Another prediction as a teacher velocity.

    **Arguments:**

    - `predictor`: a callable `(t, x, args) -> prediction`.
    - `interpolant`: the interpolant that it was trained with, without a latent.
    - `source`: what it predicts, a [`flowdiffrax.velocities.Prediction`][] or its name.
    - `base_std`: the standard deviation of the Gaussian base, for scores.
    - `margin`: the smallest distance in time from the end where the velocity is infinite.
      Closer times are moved to this distance. Not negative.

    **Raises:** `ValueError` if `margin` is negative, or for an unknown prediction.
    """

    predictor: VectorField
    interpolant: AbstractInterpolant
    source: Prediction = eqx.field(
        static=True, converter=lambda source: as_member(source, Prediction, "source")
    )
    base_std: float = 1.0
    margin: float = 1e-3

    def __check_init__(self):
        check_at_least(self.margin, 0, "margin")

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        (t,) = times_like(x, t)
        if self.source in (Prediction.NOISE, Prediction.SCORE):
            t = jnp.maximum(t, self.margin)
        elif self.source is Prediction.DENOISER:
            t = jnp.minimum(t, 1 - self.margin)
        return convert(
            self.predictor(t, x, args),
            self.interpolant,
            t,
            x,
            source=self.source,
            base_std=self.base_std,
        )


def _weights(
    interpolant: AbstractInterpolant, t: Scalar, prediction: Prediction
) -> tuple[Scalar, Scalar]:
    """The weights of noise and denoiser in a prediction; for a score, in the noise."""
    if prediction is Prediction.VELOCITY:
        return interpolant.rates(t)[:2]
    zero, one = jnp.zeros_like(t), jnp.ones_like(t)
    return (zero, one) if prediction is Prediction.DENOISER else (one, zero)
