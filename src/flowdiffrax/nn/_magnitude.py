"""Layers that preserve the magnitude of activations.

If the inputs have independent entries of mean square 1, so do the outputs. Only the
direction of the weights matters: the weights of each output are normalised to norm 1
when they are used.

??? cite "Reference"

    EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696), section 2 and appendix B.
"""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree

from ._layers import convolve, product, unit_rms

_Tree = TypeVar("_Tree", bound=PyTree)


class ForcedWeight(eqx.Module):
    """A weight of which only the direction matters, for each index of the last axis.

    Calling it returns the weight, normalised to root mean square 1 in its own dtype.
    """

    value: Float[Array, "*inputs outputs"]

    def __init__(self, *shape: int, key: Key[Array, ""]):
        self.value = _directions(jr.normal(key, shape))

    def __call__(self, dtype: jnp.dtype) -> Float[Array, "*inputs outputs"]:
        return _directions(self.value).astype(dtype)


class ForcedLinear(eqx.Module):
    """A magnitude-preserving linear map of the last axis, without bias."""

    weight: ForcedWeight

    def __init__(self, inputs: int, outputs: int, *, key: Key[Array, ""]):
        self.weight = ForcedWeight(inputs, outputs, key=key)

    def __call__(
        self, x: Float[Array, "*shape inputs"], dtype: jnp.dtype | None = None
    ) -> Float[Array, "*shape outputs"]:
        return product(x, self.weight(x.dtype) / math.sqrt(x.shape[-1]), dtype)


class ForcedConv(eqx.Module):
    """A magnitude-preserving 3x3 convolution, without bias."""

    weight: ForcedWeight

    def __init__(self, inputs: int, outputs: int, *, key: Key[Array, ""]):
        self.weight = ForcedWeight(3, 3, inputs, outputs, key=key)

    def __call__(
        self, x: Float[Array, "height width inputs"], dtype: jnp.dtype | None = None
    ) -> Float[Array, "height width outputs"]:
        return convolve(x, self.weight(x.dtype) / math.sqrt(9 * x.shape[-1]), dtype)


def normalise_weights(tree: _Tree) -> _Tree:
    """Normalises the weights of magnitude-preserving layers.

    These layers use only the direction of their weights, so this does not change any
    output. It does affect training: gradients are orthogonal to the weights, so the
    weights grow with every step, and the direction of a longer weight changes more
    slowly. Call this function after each step to keep the effective learning rate
    constant.

    All other leaves, including gains, are unchanged.

    **Arguments:**

    - `tree`: any PyTree, such as a network, a map, a training state, or only the weights
      that an optimiser sees.

    **Returns:** the same PyTree, in which the weights of each output have root mean
    square 1.

    ??? cite "Reference"

        Forced weight normalisation in EDM2,
        [arXiv:2312.02696](https://arxiv.org/abs/2312.02696), section 2.3.
    """
    is_forced = lambda node: isinstance(node, ForcedWeight)

    def normalise(node):
        if not is_forced(node) or not eqx.is_inexact_array(node.value):
            return node
        return eqx.tree_at(lambda node: node.value, node, _directions(node.value))

    return jtu.tree_map(normalise, tree, is_leaf=is_forced)


def _directions(weight: Float[Array, "*inputs outputs"]):
    return unit_rms(weight, tuple(range(weight.ndim - 1)))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # 0.596 is the root mean square of SiLU of a standard normal variable.
    return jax.nn.silu(x) / 0.596


def balanced(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], share: float
) -> Float[Array, "*shape"]:
    """A weighted sum that preserves magnitude; `share` is the weight of `y`."""
    norm = math.hypot(1 - share, share)
    return x * ((1 - share) / norm) + y * (share / norm)


def joined(
    x: Float[Array, "*shape xs"], y: Float[Array, "*shape ys"]
) -> Float[Array, "*shape both"]:
    """Concatenates along the last axis, and rescales so that both contribute equally."""
    nx, ny = x.shape[-1], y.shape[-1]
    factor = lambda n: math.sqrt((nx + ny) / (2 * n))
    return jnp.concatenate([x * factor(nx), y * factor(ny)], -1)


def gained(x: Float[Array, "*shape"], gain: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Multiplies by a learned gain, in the precision of `x`."""
    return x * gain.astype(x.dtype)
