from collections.abc import Sequence
from typing import Any

import einops
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._check import check_count
from ._condition import Condition
from ._images import AbstractImageNetwork, num_heads_for, run
from ._layers import Linear, attend, modulate, standardise, unit_rms


class DiT(AbstractImageNetwork):
    """A transformer on patches of an image, `net(s, t, x, args)`.

    Each square patch becomes a token, to which sines and cosines of its position are
    added. From the times and the class, each block computes scales and shifts for its
    normalised tokens, and gates for its residual branches. Queries and keys are
    normalised to root mean square 1, and then multiplied by a learned factor for each
    channel. Without this normalisation, attention could have arbitrarily large time
    derivatives.

    The gates and the last layer start at zero, so every block starts as the identity,
    and so does a [`flowdiffrax.FlowMap`][] of the network.

    !!! info "Numerics"

        Precision and dropout are as for [`flowdiffrax.nn.UNet`][]. All blocks run as a
        single compiled block in a loop, so their weights have a leading axis for the
        depth.

    **Arguments:**

    - `shape`: the shape of one image, (height, width, channels).
    - `patch`: the side length of a patch, in pixels.
    - `width`: the number of entries of a token, a multiple of 4.
    - `depth`: the number of blocks.
    - `num_heads`: the number of attention heads; `None` for one head per 64 entries.
    - `ratio`: the width of a block's hidden layer, divided by `width`.
    - `dropout`: the rate at which the outputs of attention and of the hidden layer are
      dropped in training, in [0, 1).
    - `num_classes`, `guidance`, `augment_size`, `scale`, `max_frequency`, `two_times`,
      `dtype`, `remat`, `key`: as for [`flowdiffrax.nn.UNet`][].

    **Raises:** `ValueError` for settings that are invalid or do not fit together. When
    called, `ValueError` or `TypeError` for a state or `args` of the wrong shape or type.

    ??? cite "Reference"

        DiT, [arXiv:2212.09748](https://arxiv.org/abs/2212.09748).
    """

    first: Linear
    blocks: "_Block"
    last_modulation: Linear
    last: Linear
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 768,
        depth: int = 12,
        *,
        num_heads: int | None = None,
        ratio: int = 4,
        num_classes: int = 0,
        guidance: bool = False,
        augment_size: int = 0,
        scale: float = 1.0,
        max_frequency: float = 1.0,
        two_times: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        remat: bool = False,
        key: Key[Array, ""],
    ):
        super().__init__(shape, scale, dtype, remat, dropout, key)
        sizes = {"patch": patch, "width": width, "depth": depth, "ratio": ratio}
        for name, number in sizes.items():
            check_count(number, 1, name)
        if width % 4 != 0:
            raise ValueError(f"`width` must be a multiple of 4; got {width}.")
        num_heads = num_heads_for(width, num_heads)
        first_key, condition_key, block_key = jr.split(key, 3)
        inputs = num_classes, guidance, two_times, max_frequency
        self.condition = Condition(
            width, 256, *inputs, augment_size=augment_size, key=condition_key
        )
        size = patch**2 * self.shape[-1]
        self.first = Linear(size, width, key=first_key)
        block = lambda key: _Block(width, num_heads, ratio, key=key)
        self.blocks = eqx.filter_vmap(block)(jr.split(block_key, depth))
        self.last_modulation = Linear(width, 2 * width, key=None)
        self.last = Linear(width, size, key=None)
        self.patch = patch

    def normalised(self, x, vector):
        vector = jax.nn.silu(vector)
        patches = einops.rearrange(
            x, "(h a) (w b) c -> (h w) (a b c)", a=self.patch, b=self.patch
        )
        tokens = self.first(patches, self.dtype)
        rows, columns = self.shape[0] // self.patch, self.shape[1] // self.patch
        tokens = tokens + _places(rows, columns, tokens)
        weights, static = eqx.partition(self.blocks, eqx.is_array)

        def step(tokens, one):
            weights, dropout = one
            block = eqx.combine(weights, static)
            return run(block, self.remat, tokens, vector, self.dtype, dropout), None

        depth = self.blocks.qkv.weight.shape[0]
        each = weights, self.dropout.each(depth)
        tokens, _ = jax.lax.scan(step, tokens, each)
        factor, shift = jnp.split(self.last_modulation(vector), 2)
        tokens = _modulated(tokens, factor, shift)
        return einops.rearrange(
            self.last(tokens),
            "(h w) (a b c) -> (h a) (w b) c",
            h=rows,
            a=self.patch,
            b=self.patch,
        )


class _Block(eqx.Module):
    """Attention, followed by a hidden layer for each token. Both are gated."""

    modulation: Linear
    qkv: Linear
    q_factor: Float[Array, " channels"]
    k_factor: Float[Array, " channels"]
    mixed: Linear
    hidden: Linear
    last: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, ratio: int, *, key: Key[Array, ""]):
        qkv_key, mixed_key, hidden_key, last_key = jr.split(key, 4)
        self.modulation = Linear(width, 6 * width, key=None)
        self.qkv = Linear(width, 3 * width, key=qkv_key)
        self.q_factor = jnp.ones(width // num_heads)
        self.k_factor = jnp.ones(width // num_heads)
        self.mixed = Linear(width, width, key=mixed_key)
        self.hidden = Linear(width, ratio * width, key=hidden_key)
        self.last = Linear(ratio * width, width, key=last_key)
        self.num_heads = num_heads

    def __call__(self, tokens, vector, dtype, dropout):
        numbers = jnp.split(self.modulation(vector), 6)
        h = self._mix(_modulated(tokens, *numbers[:2]), dtype)
        tokens = tokens + modulate(dropout.at(0)(h), numbers[2])
        h = self.hidden(_modulated(tokens, *numbers[3:5]), dtype)
        h = self.last(jax.nn.gelu(h), dtype)
        return tokens + modulate(dropout.at(1)(h), numbers[5])

    def _mix(self, tokens, dtype):
        q, k, v = einops.rearrange(
            self.qkv(tokens, dtype),
            "m (three n c) -> three n m c",
            three=3,
            n=self.num_heads,
        )
        q = modulate(unit_rms(q, -1), self.q_factor)
        k = modulate(unit_rms(k, -1), self.k_factor)
        h = einops.rearrange(attend(q, k, v, dtype), "n m c -> m (n c)")
        return self.mixed(h, dtype)


def _modulated(tokens, factor, shift):
    """Normalises each token to mean 0 and variance 1, then scales and shifts it."""
    return modulate(standardise(tokens, -1, 1e-6), 1 + factor, shift)


def _places(
    height: int, width: int, tokens: Float[Array, "tokens size"]
) -> Float[Array, "tokens size"]:
    """Sines and cosines of the row and the column, each in a quarter of the entries."""
    number = tokens.shape[-1] // 4
    # The frequencies of "Attention is all you need", as in DiT.
    falling = jnp.arange(number, dtype=tokens.dtype) / number
    wave = lambda length: jnp.outer(jnp.arange(length, dtype=tokens.dtype), 1e4**-falling)
    both = lambda angles: jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    rows = einops.repeat(both(wave(height)), "h c -> (h w) c", w=width)
    columns = einops.repeat(both(wave(width)), "w c -> (h w) c", h=height)
    return jnp.concatenate([rows, columns], -1)
