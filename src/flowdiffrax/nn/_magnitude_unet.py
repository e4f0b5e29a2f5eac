from collections.abc import Callable, Sequence
from typing import Any

import einops
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from ._condition import Condition
from ._images import AbstractImageNetwork, Level, down_and_up, levels, num_heads_for
from ._layers import attend, modulate, unit_rms
from ._magnitude import ForcedConv, ForcedLinear, balanced, gained, joined, silu


class MagnitudePreservingUNet(AbstractImageNetwork):
    r"""A U-Net that preserves the magnitude of its activations, `net(s, t, x, args)`.

    This is configuration G of EDM2. Only the directions of weights matter. Sums,
    concatenations and activation functions preserve the mean square. Pixels are
    normalised on the way down, and attention uses cosines. There is no other
    normalisation, so nothing depends on statistics over an image. Instead of biases, the
    input has a channel of ones.

    A learned gain of the output starts at zero, so a [`flowdiffrax.FlowMap`][] of the
    network starts as the identity. The gains by which the times and the class act on
    blocks also start at zero.

    To train it as in the paper, call [`flowdiffrax.nn.normalise_weights`][] after each
    step of the optimiser.

    !!! info "Numerics"

        Precision and dropout are as for [`flowdiffrax.nn.UNet`][].
        Activations are not clipped, which float16 would require.

    **Arguments:**

    - `shape`, `channels`, `multipliers`, `num_blocks`, `attention`, `num_heads`,
      `num_classes`, `guidance`, `augment_size`, `max_frequency`, `two_times`, `dropout`,
      `dtype`, `remat`, `key`: as for [`flowdiffrax.nn.UNet`][].
    - `scale`: the standard deviation of the state's entries, 1/2 for images in [-1, 1].
      Inputs are divided by it, and outputs are multiplied by it.

    **Raises:** as [`flowdiffrax.nn.UNet`][].

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696); with two times,
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    first: ForcedConv
    down: list["_Block"]
    up: list["_Block"]
    last: ForcedConv
    last_gain: Float[Array, ""]

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        *,
        attention: Sequence[int] = (),
        num_heads: int | None = None,
        num_classes: int = 0,
        guidance: bool = False,
        augment_size: int = 0,
        scale: float = 0.5,
        max_frequency: float = 1.0,
        two_times: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        remat: bool = False,
        key: Key[Array, ""],
    ):
        super().__init__(shape, scale, dtype, remat, dropout, key)
        down, up = levels(self.shape, channels, multipliers, num_blocks, attention)
        keys = jr.split(key, 5)
        first_key, condition_key, down_key, up_key, last_key = keys
        size, num_features = channels * max(multipliers), channels * multipliers[0]
        inputs = num_features, num_classes, guidance, two_times, max_frequency
        self.condition = Condition(
            size, *inputs, augment_size=augment_size, preserving=True, key=condition_key
        )
        self.first = ForcedConv(self.shape[-1] + 1, down[0].inputs, key=first_key)
        block = lambda key, index, level, is_down: _Block(
            level, size, num_heads, is_down, key=jr.fold_in(key, index)
        )
        self.down = [block(down_key, *item, True) for item in enumerate(down)]
        self.up = [block(up_key, *item, False) for item in enumerate(up)]
        self.last = ForcedConv(up[-1].outputs, self.shape[-1], key=last_key)
        self.last_gain = jnp.zeros(())

    def normalised(self, x, vector):
        vector = silu(vector)
        ones = jnp.ones((*self.shape[:2], 1), x.dtype)
        h = self.first(jnp.concatenate([x, ones], -1), self.dtype)
        h = down_and_up(self, h, vector, joined)
        return gained(self.last(h), self.last_gain)


class _Block(eqx.Module):
    """A residual block, optionally followed by attention."""

    first: ForcedConv
    modulation: ForcedLinear
    modulation_gain: Float[Array, ""]
    last: ForcedConv
    across: ForcedLinear | None
    attention: "_Attention | None"
    resample: Callable[[Array], Array] | None = eqx.field(static=True)
    skip: int = eqx.field(static=True)
    is_down: bool = eqx.field(static=True)

    def __init__(
        self,
        level: Level,
        size: int,
        num_heads: int | None,
        is_down: bool,
        *,
        key: Key[Array, ""],
    ):
        inputs, outputs = level.inputs, level.outputs
        first_key, modulation_key, last_key, across_key, attention_key = jr.split(key, 5)
        # The width changes at the start of a block on the way down, else at its end.
        self.first = ForcedConv(outputs if is_down else inputs, outputs, key=first_key)
        self.modulation = ForcedLinear(size, outputs, key=modulation_key)
        self.modulation_gain = jnp.zeros(())
        self.last = ForcedConv(outputs, outputs, key=last_key)
        same = inputs == outputs
        self.across = None if same else ForcedLinear(inputs, outputs, key=across_key)
        self.attention = None
        if level.attention:
            self.attention = _Attention(outputs, num_heads, key=attention_key)
        self.resample = level.resample
        self.skip = level.skip
        self.is_down = is_down

    def __call__(self, x, vector, dtype, dropout):
        if self.resample is not None:
            x = self.resample(x)
        if self.is_down:
            x = unit_rms(self._widen(x, dtype), -1)
        h = self.first(silu(x), dtype)
        factor = 1 + gained(self.modulation(vector), self.modulation_gain)
        h = self.last(dropout(silu(modulate(h, factor))), dtype)
        if not self.is_down:
            x = self._widen(x, dtype)
        # The shares of the residual branches, here and below, are those of the paper.
        x = balanced(x, h, 0.3)
        return x if self.attention is None else self.attention(x, dtype)

    def _widen(self, x, dtype):
        return x if self.across is None else self.across(x, dtype)


class _Attention(eqx.Module):
    """Attention between all pixels, by the cosine between queries and keys."""

    first: ForcedLinear
    last: ForcedLinear
    num_heads: int = eqx.field(static=True)

    def __init__(self, channels: int, num_heads: int | None, *, key: Key[Array, ""]):
        first_key, last_key = jr.split(key)
        self.num_heads = num_heads_for(channels, num_heads)
        self.first = ForcedLinear(channels, 3 * channels, key=first_key)
        self.last = ForcedLinear(channels, channels, key=last_key)

    def __call__(self, x, dtype):
        height = x.shape[0]
        qkv = einops.rearrange(
            self.first(x, dtype),
            "h w (three n c) -> three n (h w) c",
            three=3,
            n=self.num_heads,
        )
        q, k, v = unit_rms(qkv, -1)
        h = einops.rearrange(attend(q, k, v, dtype), "n (h w) c -> h w (n c)", h=height)
        return balanced(x, self.last(h, dtype), 0.3)
