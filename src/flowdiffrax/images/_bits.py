"""Likelihoods of 8-bit images, by densities of dequantised ones."""

import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Key, UInt8

from .._check import check_count, check_key
from ._device import from_uint8

# The width of a level, in the units of `from_uint8`.
_WIDTH = 2 / 255


def dequantise(
    key: Key[Array, ""], images: UInt8[Array | np.ndarray, "*shape"]
) -> Float32[Array, "*shape"]:
    """Draws each value from its level, uniformly: 8-bit images become a density.

    The values are those of [`flowdiffrax.images.from_uint8`][] plus noise of half a level
    to either side, so they reach from -256/255 to 256/255. A model that is trained on
    such images has a bounded log-likelihood, which
    [`flowdiffrax.images.bits_per_dim`][] converts.

    **Arguments:**

    - `key`: a random key.
    - `images`: an array of any shape.

    **Raises:** `TypeError` for any other dtype.

    ??? cite "Reference"

        [arXiv:1511.01844](https://arxiv.org/abs/1511.01844), section 3.1.
    """
    check_key(key)
    levels = from_uint8(images)
    return levels + _WIDTH * jr.uniform(key, levels.shape, levels.dtype, -0.5, 0.5)


def bits_per_dim(
    log_prob: Float[ArrayLike, "*shape"], size: int
) -> Float[Array, "*shape"]:
    r"""Converts log-densities of dequantised images to bits per dimension.

    It is $-(\log \rho(x) / d + \log \Delta) / \log 2$ with $\Delta = 2/255$, the width of
    a level. The mean over images and draws of [`flowdiffrax.images.dequantise`][] is at
    least the number of bits that the model needs for a value of an 8-bit image. Uniform
    noise has 8.

    **Arguments:**

    - `log_prob`: log-densities in nats, for example from
      [`flowdiffrax.likelihood.log_prob`][], of images on the scale of `dequantise`.
    - `size`: the number of values of one image, $d$: height times width times channels.

    **Raises:** `ValueError` if `size` is below 1.

    ??? cite "Reference"

        [arXiv:1511.01844](https://arxiv.org/abs/1511.01844), section 3.1.
    """
    check_count(size, 1, "size")
    return -(jnp.asarray(log_prob) / size + math.log(_WIDTH)) / math.log(2)
