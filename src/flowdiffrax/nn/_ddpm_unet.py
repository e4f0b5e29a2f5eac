import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from ._condition import Condition
from ._images import AbstractImageNetwork, Level, levels, num_heads_for
from ._layers import Conv, GroupNorm, Linear, smooth_double, smooth_halve
from ._unet import Attention, through_levels

# The sum of a branch and its input has about twice the variance of each.
_SHARE = math.sqrt(0.5)

_EPSILON = 1e-6


class DDPMUNet(AbstractImageNetwork):
    r"""The U-Net of DDPM++, as EDM and MeanFlow train it, `net(s, t, x, args)`.

    It differs from [`flowdiffrax.nn.UNet`][] in the choices of DDPM++ and NCSN++. The
    times and the condition shift the channels of each block before they are normalised,
    and do not scale them. The sum of each residual branch and its input is multiplied by
    $\sqrt{1/2}$. Images are halved and doubled with the filter (1, 3, 3, 1). On the way
    up, only the last block of a resolution has attention.

    The last convolution starts at zero, so a [`flowdiffrax.FlowMap`][] of the network
    starts as the identity, and so does the last convolution of every branch. (The
    authors' start at $10^{-5}$ of the usual size.)

    !!! info "Numerics"

        Precision and dropout are as for [`flowdiffrax.nn.UNet`][].

    **Arguments:**

    - `shape`, `channels`, `multipliers`, `num_blocks`, `num_classes`, `guidance`,
      `augment_size`, `scale`, `max_frequency`, `two_times`, `dropout`, `dtype`, `remat`,
      `key`: as for [`flowdiffrax.nn.UNet`][].
    - `attention`: the image heights at which blocks have attention: all on the way down,
      and the last on the way up. One block at the lowest resolution always has it.
    - `num_heads`: the number of attention heads; `None` for one head per 64 channels.

    **Raises:** as [`flowdiffrax.nn.UNet`][].

    ??? cite "Reference"

        DDPM++ and NCSN++, [arXiv:2011.13456](https://arxiv.org/abs/2011.13456), in the
        version of EDM, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364), and of
        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447).
    """

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
        num_blocks: int = 4,
        *,
        attention: Sequence[int] = (),
        num_heads: int | None = 1,
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
        down, up = levels(
            self.shape,
            channels,
            multipliers,
            num_blocks,
            attention,
            resample=(smooth_halve, smooth_double),
            attend_last=True,
            first=channels,
        )
        first_key, condition_key, down_key, up_key = jr.split(key, 4)
        size = 4 * channels
        inputs = num_classes, guidance, two_times, max_frequency
        # Twice as many features of a time as in ADM.
        self.condition = Condition(
            size, 2 * channels, *inputs, augment_size=augment_size, key=condition_key
        )
        self.first = Conv(self.shape[-1], down[0].inputs, key=first_key)
        block = lambda key, index, level: _Block(
            level, size, num_heads, key=jr.fold_in(key, index)
        )
        self.down = [block(down_key, *item) for item in enumerate(down)]
        self.up = [block(up_key, *item) for item in enumerate(up)]
        self.last_norm = GroupNorm(up[-1].outputs, _EPSILON)
        self.last = Conv(up[-1].outputs, self.shape[-1], key=None)

    def normalised(self, x, vector):
        return through_levels(self, x, vector)


class _Block(eqx.Module):
    """A residual block, optionally followed by attention."""

    first_norm: GroupNorm
    first: Conv
    shift: Linear
    last_norm: GroupNorm
    last: Conv
    across: Linear | None
    attention: Attention | None
    resample: Callable[[Array], Array] | None = eqx.field(static=True)
    skip: int = eqx.field(static=True)

    def __init__(
        self, level: Level, size: int, num_heads: int | None, *, key: Key[Array, ""]
    ):
        inputs, outputs = level.inputs, level.outputs
        first_key, shift_key, across_key, attention_key = jr.split(key, 4)
        self.first_norm = GroupNorm(inputs, _EPSILON)
        self.first = Conv(inputs, outputs, key=first_key)
        self.shift = Linear(size, outputs, key=shift_key)
        self.last_norm = GroupNorm(outputs, _EPSILON)
        self.last = Conv(outputs, outputs, key=None)
        same = inputs == outputs and level.resample is None
        self.across = None if same else Linear(inputs, outputs, key=across_key)
        self.attention = None
        if level.attention:
            heads = num_heads_for(outputs, num_heads)
            self.attention = Attention(outputs, heads, _EPSILON, key=attention_key)
        self.resample = level.resample
        self.skip = level.skip

    def __call__(self, x, vector, dtype, dropout):
        h = jax.nn.silu(self.first_norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.first(h, dtype)
        h = h + jnp.broadcast_to(self.shift(vector).astype(h.dtype), h.shape)
        h = self.last(dropout(jax.nn.silu(self.last_norm(h))), dtype)
        x = _SHARE * ((x if self.across is None else self.across(x, dtype)) + h)
        return x if self.attention is None else _SHARE * self.attention(x, dtype)
