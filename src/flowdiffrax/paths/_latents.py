import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import check_positive


class BrownianLatent(eqx.Module):
    r"""The latent weight of a Brownian bridge, $\gamma_t = \sqrt{a\,t(1-t)}$.

    Its rate is infinite at both ends: draw times in the open interval (0, 1).

    **Arguments:**

    - `a`: the squared scale, positive.

    **Raises:** `ValueError` if `a` is not positive.
    """

    a: float = 1.0

    def __check_init__(self):
        check_positive(self.a, "a")

    def __call__(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.sqrt(self.a * t * (1 - t))


class SineSquaredLatent(eqx.Module):
    r"""The smooth latent weight $\gamma_t = a \sin^2(\pi t)$, with bounded rates.

    **Arguments:**

    - `a`: the weight at time 1/2.
    """

    a: float = 1.0

    def __call__(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return self.a * jnp.sin(math.pi * t) ** 2
