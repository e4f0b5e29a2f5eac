import math

import jax
import jax.numpy as jnp
import numpy as np

from .._check import check_between, check_positive
from ._base import AbstractInterpolant, Coefficient


class LinearInterpolant(AbstractInterpolant):
    r"""The straight line, $I_t = (1 - (1 - \sigma_{\min}) t)\,x_0 + t\,x_1$.

    **Arguments:**

    - `sigma_min`: the share of the base that remains at the data end, in [0, 1). Zero is
      the exact interpolant. A small positive value blurs the data by that much and keeps
      velocities bounded at $t = 1$.
    - `latent`: a function $\gamma$ with $\gamma_0 = \gamma_1 = 0$, or `None` for no
      latent.

    **Raises:** `ValueError` for a `sigma_min` outside [0, 1), or for a latent that does
    not vanish at both ends.

    ??? cite "Reference"

        Rectified flow, [arXiv:2209.03003](https://arxiv.org/abs/2209.03003); with
        `sigma_min`, [arXiv:2210.02747](https://arxiv.org/abs/2210.02747), equation (20).
    """

    sigma_min: float = 0.0
    latent: Coefficient | None = None

    def __check_init__(self):
        check_between(self.sigma_min, 0, 1, "sigma_min", "[)")
        if self.latent is not None:
            _check_boundary("latent", self.latent, 0.0, 0.0)

    def alpha(self, t):
        return 1 - (1 - self.sigma_min) * t

    def beta(self, t):
        return t

    def gamma(self, t):
        return jnp.zeros_like(t) if self.latent is None else self.latent(t)

    @property
    def has_latent(self):
        return self.latent is not None


class TrigonometricInterpolant(AbstractInterpolant):
    r"""The variance-preserving circle, $I_t = \cos(\pi t/2)\,x_0 + \sin(\pi t/2)\,x_1$.

    **Arguments:**

    - `latent`: a function $\gamma$ with $\gamma_0 = \gamma_1 = 0$, or `None` for no
      latent. With a latent, the other two weights get a factor $\sqrt{1 - \gamma_t^2}$,
      which preserves the variance.

    **Raises:** `ValueError` for a latent that does not vanish at both ends, or that
    reaches 1 between them.

    ??? cite "Reference"

        [arXiv:2303.08797](https://arxiv.org/abs/2303.08797), table 4.
    """

    latent: Coefficient | None = None

    def __check_init__(self):
        if self.latent is not None:
            _check_boundary("latent", self.latent, 0.0, 0.0)
            with jax.ensure_compile_time_eval():
                gamma = np.asarray(jax.vmap(self.latent)(jnp.linspace(0, 1, 65)))
            # The square root in `_rest` has no derivative where gamma is 1.
            if np.max(np.abs(gamma)) >= 1:
                most = np.max(np.abs(gamma))
                raise ValueError(f"`latent` must stay below 1; got {most:g}.")

    def alpha(self, t):
        return self._rest(t) * jnp.cos(math.pi / 2 * t)

    def beta(self, t):
        return self._rest(t) * jnp.sin(math.pi / 2 * t)

    def gamma(self, t):
        return jnp.zeros_like(t) if self.latent is None else self.latent(t)

    @property
    def has_latent(self):
        return self.latent is not None

    def _rest(self, t):
        return 1.0 if self.latent is None else jnp.sqrt(1 - self.latent(t) ** 2)


class VariancePreservingInterpolant(AbstractInterpolant):
    r"""The schedule of VP diffusion, with noise at time 0 and data at time 1.

    With $\tau = 1 - t$,
    $\beta_t = \exp(-\tfrac14 \tau^2 (b_{\max} - b_{\min}) - \tfrac12 \tau b_{\min})$ and
    $\alpha_t = \sqrt{1 - \beta_t^2}$.

    It does not quite reach the base: with the default constants $\beta_0$ is 0.0066, so
    $I_0$ is the base plus a small share of the data, as in every VP diffusion.

    **Arguments:**

    - `b_min`, `b_max`: the noise rates at the data end and at the base end, positive.

    **Raises:** `ValueError` unless $0 < b_{\min} < b_{\max}$.

    ??? cite "Reference"

        [arXiv:2011.13456](https://arxiv.org/abs/2011.13456), equation (33).
    """

    b_min: float = 0.1
    b_max: float = 20.0

    def __check_init__(self):
        check_positive(self.b_max, "b_max")
        check_between(self.b_min, 0, self.b_max, "b_min", "()")

    def alpha(self, t):
        # Near the data end 1 - beta^2 cancels, so use expm1. The floor keeps the
        # derivative of the square root finite at t = 1 exactly.
        variance = -jnp.expm1(2 * self._log_beta(t))
        floor = jnp.finfo(t.dtype).tiny
        return jnp.sqrt(jnp.maximum(variance, floor))

    def beta(self, t):
        return jnp.exp(self._log_beta(t))

    def gamma(self, t):
        return jnp.zeros_like(t)

    @property
    def has_latent(self):
        return False

    def _log_beta(self, t):
        tau = 1 - t
        return -(tau**2) * (self.b_max - self.b_min) / 4 - tau * self.b_min / 2


class VarianceExplodingInterpolant(AbstractInterpolant):
    r"""The schedule of VE diffusion, with data at time 1: $I_t = \sigma_t x_0 + x_1$.

    It adds noise of standard deviation
    $\sigma_t = \sigma_{\max} (\sigma_{\min}/\sigma_{\max})^t$ to the data, in units of
    the base's standard deviation. $I_0$ is therefore data with much noise rather than the
    base, and $I_1$ is data with little noise. Start samples from
    $\mathcal N(0, \sigma_{\max}^2)$ at $t = 0$.

    **Arguments:**

    - `sigma_min`, `sigma_max`: the lowest and the highest noise level, positive.

    **Raises:** `ValueError` unless $0 < \sigma_{\min} < \sigma_{\max}$.

    ??? cite "Reference"

        [arXiv:2011.13456](https://arxiv.org/abs/2011.13456), equation (31).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __check_init__(self):
        check_positive(self.sigma_max, "sigma_max")
        check_between(self.sigma_min, 0, self.sigma_max, "sigma_min", "()")

    def alpha(self, t):
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** t

    def beta(self, t):
        return jnp.ones_like(t)

    def gamma(self, t):
        return jnp.zeros_like(t)

    @property
    def has_latent(self):
        return False


class Interpolant(AbstractInterpolant):
    r"""A general interpolant, given by three functions of time.

    **Arguments:**

    - `alpha`, `beta`: the weights of base and data, differentiable functions of a scalar
      time with $\alpha_0 = \beta_1 = 1$ and $\alpha_1 = \beta_0 = 0$.
    - `gamma`: the weight of the latent, with $\gamma_0 = \gamma_1 = 0$, or `None` for no
      latent.

    **Raises:** `ValueError` if a function has other boundary values.
    """

    _alpha: Coefficient
    _beta: Coefficient
    _gamma: Coefficient | None

    def __init__(
        self, alpha: Coefficient, beta: Coefficient, gamma: Coefficient | None = None
    ):
        self._alpha = alpha
        self._beta = beta
        self._gamma = gamma

    def __check_init__(self):
        _check_boundary("alpha", self.alpha, 1.0, 0.0)
        _check_boundary("beta", self.beta, 0.0, 1.0)
        _check_boundary("gamma", self.gamma, 0.0, 0.0)

    def alpha(self, t):
        return self._alpha(t)

    def beta(self, t):
        return self._beta(t)

    def gamma(self, t):
        return jnp.zeros_like(t) if self._gamma is None else self._gamma(t)

    @property
    def has_latent(self):
        return self._gamma is not None


def _check_boundary(name: str, fn: Coefficient, at_zero: float, at_one: float) -> None:
    # Boundary values do not depend on traced data, so check them inside `jit` too, where
    # the constants below would otherwise become tracers.
    with jax.ensure_compile_time_eval():
        values = np.asarray([fn(jnp.asarray(0.0)), fn(jnp.asarray(1.0))], float)
    expected = np.asarray([at_zero, at_one])
    # The tolerance allows for the rounding of cos(pi/2) in float32.
    if not np.allclose(values, expected, rtol=0, atol=1e-5):
        raise ValueError(
            f"`{name}` must be {at_zero:g} at t = 0 and {at_one:g} at t = 1; got "
            f"{values[0]:g} and {values[1]:g}. If data are at 0, replace t by 1 - t."
        )
