"""Code shared by the image networks: shapes, precision, and the levels of a U-Net."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from .._check import (
    check_bools,
    check_count,
    check_counts,
    check_key,
    check_positive,
)
from .._time import time_dtype, times_like
from .._types import Args, Time
from ._condition import Condition
from ._describe import describe
from ._dropout import Dropout
from ._layers import double, halve

Shape = tuple[int, ...]


class Level(NamedTuple):
    """One block of a U-Net: its widths, and what it does besides convolutions."""

    inputs: int
    outputs: int
    resample: Callable[[Array], Array] | None = None
    attention: bool = False
    # How many of the `inputs` channels come from the skip connection.
    skip: int = 0


class AbstractImageNetwork(eqx.Module):
    """The base class of image networks, with their checks, precision and scaling."""

    is_network: ClassVar[bool] = True
    num_dims: ClassVar[tuple[int, ...]] = (2,)

    condition: Condition
    dropout: Dropout
    shape: Shape = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    dtype: jnp.dtype | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        scale: float,
        dtype: Any,
        remat: bool,
        dropout: float,
        key: Key[Array, ""],
    ):
        # Subclasses split the key, and make `condition` with one of the new ones.
        check_key(key)
        check_positive(scale, "scale")
        check_bools(remat=remat)
        self.shape = check_shape(shape, self.num_dims)
        # A NumPy or JAX number, such as `data.std()`, cannot be a static field.
        self.scale = float(scale)
        self.dtype = check_dtype(dtype)
        self.remat = remat
        self.dropout = Dropout(dropout)

    def __call__(
        self,
        s: Time,
        t: Time,
        x: Float[Array, "*grid channels"],
        args: Args = None,
    ) -> Float[Array, "*grid channels"]:
        check_image(x, self.shape)
        s, t = times_like(x, s, t)
        precise = x.astype(time_dtype(x))
        y = self.normalised(precise / self.scale, self.condition(s, t, args))
        return (self.scale * y).astype(x.dtype)

    def __pdoc__(self, **kwargs):
        classes = self.condition.num_classes
        settings = f"{self.shape}" + (f", num_classes={classes}" if classes else "")
        return describe(self, settings)

    @abc.abstractmethod
    def normalised(
        self, x: Float[Array, "*grid channels"], vector: Float[Array, " size"]
    ) -> Float[Array, "*grid channels"]:
        """Applies the network to a state of unit scale, given the condition vector."""


def levels(
    shape: Shape,
    channels: int,
    multipliers: Sequence[int],
    num_blocks: int,
    attention: Sequence[int],
    *,
    resample: tuple[Callable, Callable] = (halve, double),
    attend_last: bool = False,
    first: int | None = None,
) -> tuple[list[Level], list[Level]]:
    """Returns the blocks on the way down, after a first convolution, and on the way up.

    The blocks up begin with two at the lowest resolution, the first with attention. With
    `attend_last`, only the last block up of a resolution has attention. `resample` halves
    and doubles an image. `first` is the width of the first convolution, by default that
    of the first resolution.
    """
    check_count(channels, 1, "channels")
    check_count(num_blocks, 1, "num_blocks")
    check_counts(multipliers, 1, "multipliers")
    *grid, _ = shape
    factor = 2 ** (len(multipliers) - 1)
    if any(side % factor != 0 for side in grid):
        raise ValueError(
            f"With {len(multipliers)} `multipliers`, images must have sides that are "
            f"multiples of {factor}; got {' by '.join(map(str, grid))}."
        )
    heights = [grid[0] // 2**level for level in range(len(multipliers))]
    if not set(attention) <= set(heights):
        raise ValueError(
            f"`attention` must list heights out of {heights}; got {tuple(attention)}."
        )
    widths = [channels * multiplier for multiplier in multipliers]
    now = widths[0] if first is None else first
    down, skips = [], [now]
    for level, (height, width) in enumerate(zip(heights, widths, strict=True)):
        if level > 0:
            down.append(Level(now, now, resample[0]))
            skips.append(now)
        for _ in range(num_blocks):
            down.append(Level(now, width, None, height in attention))
            skips.append(width)
            now = width
    up = [Level(now, now, None, True), Level(now, now)]
    for level in reversed(range(len(widths))):
        if level < len(widths) - 1:
            up.append(Level(now, now, resample[1]))
        for index in range(num_blocks + 1):
            skip, width = skips.pop(), widths[level]
            attends = heights[level] in attention
            attends = attends and (index == num_blocks or not attend_last)
            up.append(Level(now + skip, width, None, attends, skip))
            now = width
    return down, up


def down_and_up(
    net: Any,
    h: Float[Array, "*grid channels"],
    vector: Float[Array, " size"],
    join: Callable[[Array, Array], Array],
) -> Float[Array, "*grid outputs"]:
    """Runs the blocks of a U-Net. On the way up, `join` adds the skip connections."""
    skips = [h]
    for index, block in enumerate(net.down):
        h = run(block, net.remat, h, vector, net.dtype, net.dropout.at(index))
        skips.append(h)
    for index, block in enumerate(net.up, len(net.down)):
        if block.skip > 0:
            h = join(h, skips.pop())
        h = run(block, net.remat, h, vector, net.dtype, net.dropout.at(index))
    return h


def num_heads_for(channels: int, num_heads: int | None) -> int:
    """Returns the given number of heads, or by default one head per 64 channels.

    **Raises:** `ValueError` if it does not divide the number of channels.
    """
    number = max(1, channels // 64) if num_heads is None else num_heads
    if number < 1 or channels % number != 0:
        raise ValueError(f"`num_heads` must divide {channels} channels; got {number}.")
    return number


def check_shape(shape: Sequence[int], num_dims: tuple[int, ...] = (2,)) -> Shape:
    """**Raises:** `ValueError` unless it is the shape of an image, channels last.

    `num_dims` are the numbers of axes of the grid that the network can take.
    """
    is_shape = np.ndim(shape) == 1 and len(shape) - 1 in num_dims and min(shape) >= 1
    if not is_shape:
        cure = " A field has shape (*grid, channels), on one to three axes."
        raise ValueError(
            f"`shape` must be that of one image, (height, width, channels); got {shape}."
            + (cure if len(num_dims) > 1 else "")
        )
    return tuple(int(size) for size in shape)


def check_dtype(dtype: Any) -> jnp.dtype | None:
    """**Raises:** `TypeError` for a dtype that is not floating-point."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating-point dtype; got {dtype}.")
    return None if dtype is None else jnp.dtype(dtype)


def check_image(x: Array, shape: Shape) -> None:
    """**Raises:** `ValueError` for another shape."""
    if jnp.shape(x) != shape:
        what = "image" if len(shape) == 3 else "field"
        raise ValueError(
            f"This network takes one {what} of shape {shape}, the channels last; got "
            f"{jnp.shape(x)}. For a batch, use `jax.vmap`."
        )


def run(block: Callable, remat: bool, *args: Any) -> Any:
    """Calls a block. With `remat`, the reverse pass recomputes it."""
    return (eqx.filter_checkpoint(block) if remat else block)(*args)
