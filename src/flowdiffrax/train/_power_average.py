r"""Averages that weigh the weights by a power of the step, and combinations of them.

The average after $n$ steps weighs step $\tau$ by
$p_{\gamma,n}(\tau) = (\gamma + 1)\,\tau^\gamma / n^{\gamma + 1}$. Its width is a fixed
share of the steps so far, so a longer run needs no other setting.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._check import check_between

# At this width, all steps weigh the same, and the exponent is zero.
_WIDEST = 12**-0.5


def _as_width(sigma_rel: Any) -> float:
    check_between(sigma_rel, 0, _WIDEST, "sigma_rel", "()")
    return float(sigma_rel)


class PowerAverage(eqx.Module):
    r"""A power function average of the weights, for `ema_decay`.

    After $n$ steps, the average weighs step $\tau$ in proportion to $\tau^\gamma$. The
    exponent $\gamma$ is given by the relative width of the weights,
    $\sigma_\mathrm{rel} = \sqrt{(\gamma + 1) / ((\gamma + 2)^2 (\gamma + 3))}$: their
    standard deviation, divided by $n$. Unlike an average with a fixed decay, it scales
    with the length of the run, and it has no weight at the initial values.

    From snapshots of two such averages, [`flowdiffrax.train.power_average`][] builds the
    average of any other width after training.

    !!! info "Numerics"

        Step $n$ moves the average by the share $1 - (1 - 1/n)^{\gamma + 1}$ of the
        difference to the weights. The result is the power function average of weights
        that are constant during each step, without an error of discretisation. Skipped
        steps do not count.

    **Arguments:**

    - `sigma_rel`: the relative width, between 0 and $1/\sqrt{12} \approx 0.289$. The
      paper tracks 0.05 and 0.10.

    **Raises:** `ValueError` for a width outside this interval, `TypeError` for what is
    not a number.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696), section 3.1 and
        appendix C.
    """

    sigma_rel: float = eqx.field(static=True, converter=_as_width)

    @property
    def exponent(self) -> float:
        r"""The exponent $\gamma$."""
        ratio = self.sigma_rel**-2
        # The definition of the width as a polynomial in the exponent.
        roots = np.roots([1.0, 7.0, 16.0 - ratio, 12.0 - ratio])
        return float(roots.real.max())

    def rate(self, count: Int[Array, ""]) -> Float[Array, ""]:
        """The share by which the average moves to the weights of step `count`, from 1."""
        kept = jnp.log1p(-1 / count.astype(float))
        return -jnp.expm1((self.exponent + 1) * kept)


def combination(
    counts: Float[np.ndarray, " averages"],
    exponents: Float[np.ndarray, " averages"],
    count: float,
    exponent: float,
) -> tuple[Float[np.ndarray, " averages"], float]:
    r"""The combination of power function averages that is nearest to another one.

    **Arguments:**

    - `counts`, `exponents`: the steps $n$ and exponents $\gamma$ of the averages.
    - `count`, `exponent`: those of the average to build.

    **Returns:** the factors of the averages, whose sum is 1, and the norm of the
    difference between the combined weights and those wanted, relative to the latter.
    """
    products = _products(counts[:, None], exponents[:, None], counts, exponents)
    wanted = _products(counts, exponents, count, exponent)
    square = _products(count, exponent, count, exponent)
    # Scale all weights to norm 1: the averages of early steps are steeper.
    norms = np.sqrt(np.diagonal(products))
    factors, *_ = np.linalg.lstsq(
        products / np.outer(norms, norms), wanted / norms, rcond=None
    )
    factors = factors / norms
    factors = factors / factors.sum()
    error = square - 2 * factors @ wanted + factors @ products @ factors
    return factors, float(np.sqrt(max(error, 0.0) / square))


def _products(n, a, m, b):
    r"""The integrals of $p_{a,n}\,p_{b,m}$ over all steps."""
    # Both weights are powers up to the smaller number of steps. Their product there is a
    # power too. In logarithms, since the factors alone would overflow.
    least = np.minimum(n, m)
    logarithm = a * np.log(least / n) + b * np.log(least / m) + np.log(least / n / m)
    return (a + 1) * (b + 1) / (a + b + 1) * np.exp(logarithm)
