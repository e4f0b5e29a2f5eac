from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import einops
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from ._condition import Condition
from ._grids import check_boundary
from ._images import AbstractImageNetwork, Level, down_and_up, levels, num_heads_for
from ._layers import Conv, GroupNorm, Linear, attend, modulate


class UNet(AbstractImageNetwork):
    """A convolutional U-Net for images and grids, `net(s, t, x, args)`, similar to ADM.

    It has residual blocks at several resolutions, each half of the one before, on the way
    down and on the way up, with skip connections. From the times and the condition, each
    block computes scales and shifts for its normalised channels.

    The last convolution starts at zero, so a [`flowdiffrax.FlowMap`][] of the network
    starts as the identity. As in the paper, the last convolution of every block starts at
    zero too.

    !!! info "Numerics"

        Dropout acts in training only, and there on some rows only; see
        [Networks](../networks.md#dropout). Everywhere else, the network is a
        deterministic function of its inputs. All evaluations for one example drop the
        same entries.

        With `dtype`, convolutions and matrix products of activations round their operands
        to it. Everything else keeps the precision of the state, and at least float32:
        times, embeddings, sums, statistics of normalisation, attention weights, the last
        convolution, and the tangents of all these. Weights keep their own dtype, and are
        cast when they are used.

    **Arguments:**

    - `shape`: the shape of one image, (height, width, channels), or of a field on a grid
      of one to three dimensions, `(*grid, channels)`.
    - `channels`: the base number of channels, which `multipliers` multiply.
    - `multipliers`: the multipliers of `channels`, one for each resolution.
    - `num_blocks`: the number of residual blocks at each resolution on the way down.
      There is one more on the way up.
    - `attention`: the image heights, or lengths of the first axis of a grid, at which the
      blocks have attention. One block at the lowest resolution always has it.
    - `num_heads`: the number of attention heads; `None` for one head per 64 channels.
    - `boundary`: how fields continue beyond their ends: `"zero"`, `"periodic"` or
      `"reflect"`, for all axes, or a sequence with one for each.
    - `args_size`: the length of the vector `args`, or 1 for a number, in place of a
      class; 0 for none.
    - `num_classes`: the number of classes. `args` is a label from 0 to `num_classes - 1`;
      `None` and `num_classes` stand for no class. A traced label out of range gives NaN.
    - `guidance`: whether `args` may be [`flowdiffrax.velocities.GuidanceArgs`][], a label
      and a guidance scale. For other `args`, the scale is 1.
    - `augment_size`: the number of labels of an augmentation, such as
      [`flowdiffrax.images.Augmentation`][]; 0 for none. `args` may then be
      [`flowdiffrax.velocities.AugmentationArgs`][]. For other `args`, as in sampling, the
      labels are zero.
    - `scale`: the typical size of the state's entries. Inputs are divided by it, and
      outputs are multiplied by it.
    - `max_frequency`: as for [`flowdiffrax.nn.TwoTimeEmbedding`][].
    - `two_times`: `False` for a velocity, which ignores the end time; see
      [`flowdiffrax.nn.two_times`][].
    - `dropout`: the rate at which entries are dropped in training, before the last
      convolution of each block, in [0, 1).
    - `dtype`: the dtype of convolutions and matrix products, such as `jnp.bfloat16`;
      `None` for the dtype of the state.
    - `remat`: whether the reverse pass recomputes each block, to save memory.
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` for settings that are invalid or do not fit together. When
    called, `ValueError` or `TypeError` for a state or `args` of the wrong shape or type.

    ??? cite "Reference"

        ADM, [arXiv:2105.05233](https://arxiv.org/abs/2105.05233).
    """

    num_dims: ClassVar[tuple[int, ...]] = (1, 2, 3)

    first: Conv
    down: list["_Block"]
    up: list["_Block"]
    last_norm: GroupNorm
    last: Conv

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        num_blocks: int = 3,
        *,
        attention: Sequence[int] = (),
        num_heads: int | None = None,
        boundary: str | Sequence[str] = "zero",
        args_size: int = 0,
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
        down, up = levels(self.shape, channels, multipliers, num_blocks, attention)
        first_key, condition_key, down_key, up_key = jr.split(key, 4)
        size = 4 * channels
        inputs = num_classes, guidance, two_times, max_frequency, args_size
        sides = check_boundary(boundary, len(self.shape) - 1)
        self.condition = Condition(
            size, channels, *inputs, augment_size=augment_size, key=condition_key
        )
        self.first = Conv(self.shape[-1], down[0].inputs, sides, key=first_key)
        block = lambda key, index, level: _Block(
            level, size, num_heads, sides, key=jr.fold_in(key, index)
        )
        self.down = [block(down_key, *item) for item in enumerate(down)]
        self.up = [block(up_key, *item) for item in enumerate(up)]
        self.last_norm = GroupNorm(up[-1].outputs)
        self.last = Conv(up[-1].outputs, self.shape[-1], sides, key=None)

    def normalised(self, x, vector):
        return through_levels(self, x, vector)


def through_levels(
    net: Any, x: Float[Array, "*grid channels"], vector: Float[Array, " size"]
) -> Float[Array, "*grid channels"]:
    """Applies a U-Net whose skip connections are more channels."""
    vector = jax.nn.silu(vector)
    join = lambda h, skip: jnp.concatenate([h, skip], -1)
    h = down_and_up(net, net.first(x, net.dtype), vector, join)
    return net.last(jax.nn.silu(net.last_norm(h)))


class _Block(eqx.Module):
    """A residual block, optionally followed by attention."""

    first_norm: GroupNorm
    first: Conv
    modulation: Linear
    last_norm: GroupNorm
    last: Conv
    across: Linear | None
    attention: "Attention | None"
    resample: Callable[[Array], Array] | None = eqx.field(static=True)
    skip: int = eqx.field(static=True)

    def __init__(
        self,
        level: Level,
        size: int,
        num_heads: int | None,
        sides: tuple[str, ...],
        *,
        key: Key[Array, ""],
    ):
        inputs, outputs = level.inputs, level.outputs
        first_key, modulation_key, across_key, attention_key = jr.split(key, 4)
        self.first_norm = GroupNorm(inputs)
        self.first = Conv(inputs, outputs, sides, key=first_key)
        self.modulation = Linear(size, 2 * outputs, key=modulation_key)
        self.last_norm = GroupNorm(outputs)
        self.last = Conv(outputs, outputs, sides, key=None)
        same = inputs == outputs
        self.across = None if same else Linear(inputs, outputs, key=across_key)
        self.attention = None
        if level.attention:
            self.attention = Attention(outputs, num_heads, key=attention_key)
        self.resample = level.resample
        self.skip = level.skip

    def __call__(self, x, vector, dtype, dropout):
        h = jax.nn.silu(self.first_norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        factor, shift = jnp.split(self.modulation(vector), 2)
        h = modulate(self.last_norm(self.first(h, dtype)), 1 + factor, shift)
        h = self.last(dropout(jax.nn.silu(h)), dtype)
        x = (x if self.across is None else self.across(x, dtype)) + h
        return x if self.attention is None else self.attention(x, dtype)


class Attention(eqx.Module):
    """Attention between all pixels."""

    norm: GroupNorm
    first: Linear
    last: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_heads: int | None,
        epsilon: float = 1e-5,
        *,
        key: Key[Array, ""],
    ):
        self.num_heads = num_heads_for(channels, num_heads)
        self.norm = GroupNorm(channels, epsilon)
        self.first = Linear(channels, 3 * channels, key=key)
        self.last = Linear(channels, channels, key=None)

    def __call__(self, x, dtype):
        qkv = self.first(self.norm(x), dtype)
        q, k, v = einops.rearrange(
            qkv, "... (three n c) -> three n (...) c", three=3, n=self.num_heads
        )
        h = einops.rearrange(attend(q, k, v, dtype), "n tokens c -> tokens (n c)")
        return x + self.last(h.reshape(x.shape), dtype)
