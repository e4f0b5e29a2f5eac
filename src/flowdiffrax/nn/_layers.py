"""Layers on images and grids: channels last, one example, any floating-point dtype.

Matrix products and convolutions round their operands to a given dtype, and return the
dtype of their input. So all values between them, and their tangents, can stay in float32.
"""

import math
from collections.abc import Sequence

import einops
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key


class Linear(eqx.Module):
    """An affine map of the last axis, which is also a one-pixel convolution.

    Without a key, it starts at zero, as does `Conv`.
    """

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"] | None

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, *, key: Key[Array, ""] | None
    ):
        self.weight = _random_weight(key, (inputs, outputs))
        self.bias = jnp.zeros(outputs) if bias else None

    def __call__(
        self, x: Float[Array, "*shape inputs"], dtype: jnp.dtype | None = None
    ) -> Float[Array, "*shape outputs"]:
        y = product(x, self.weight, dtype)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)


class Conv(eqx.Module):
    """A convolution with three points along each axis, by default of an image.

    `boundary` says how the field continues beyond each end of each axis: `"zero"`,
    `"periodic"` or `"reflect"`.
    """

    weight: Float[Array, "*points inputs outputs"]
    bias: Float[Array, " outputs"]
    boundary: tuple[str, ...] = eqx.field(static=True)
    dilation: int = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        boundary: tuple[str, ...] = ("zero", "zero"),
        dilation: int = 1,
        *,
        key: Key[Array, ""] | None,
    ):
        self.weight = _random_weight(key, (*[3] * len(boundary), inputs, outputs))
        self.bias = jnp.zeros(outputs)
        self.boundary = boundary
        self.dilation = dilation

    def __call__(
        self, x: Float[Array, "*grid inputs"], dtype: jnp.dtype | None = None
    ) -> Float[Array, "*grid outputs"]:
        y = convolve(x, self.weight, dtype, self.boundary, self.dilation)
        return y + jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)


class GroupNorm(eqx.Module):
    """Normalises groups of channels to mean 0 and variance 1.

    Each channel is then multiplied by a factor, and a shift is added.
    """

    factor: Float[Array, " channels"]
    shift: Float[Array, " channels"]
    num_groups: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, channels: int, epsilon: float = 1e-5):
        self.factor = jnp.ones(channels)
        self.shift = jnp.zeros(channels)
        # 32 groups, or fewer so that each has at least four channels.
        most = max(1, min(32, channels // 4))
        self.num_groups = max(n for n in range(1, most + 1) if channels % n == 0)
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "*grid channels"]
    ) -> Float[Array, "*grid channels"]:
        # Average over the image first: splitting the channels of an image is slow.
        def mean(x):
            means = jnp.mean(x, range(x.ndim - 1), keepdims=True)
            groups = einops.reduce(means, "... (g c) -> ... g", "mean", g=self.num_groups)
            return jnp.repeat(groups, means.size // groups.size, -1)

        centred = x - mean(x)
        y = centred * jax.lax.rsqrt(mean(centred**2) + self.epsilon)
        return modulate(y, self.factor, self.shift)


def _random_weight(key: Key[Array, ""] | None, shape: tuple[int, ...]) -> Array:
    if key is None:
        return jnp.zeros(shape)
    # This scale preserves the variance of independent inputs.
    return jr.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def product(
    x: Float[Array, "*shape inputs"],
    weight: Float[Array, "inputs outputs"],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*shape outputs"]:
    """`x @ weight`, computed in the given dtype, by default the dtype of `x`."""
    dtype = x.dtype if dtype is None else dtype
    return jnp.tensordot(x.astype(dtype), weight.astype(dtype), 1).astype(x.dtype)


def convolve(
    x: Float[Array, "*grid inputs"],
    weight: Float[Array, "*points inputs outputs"],
    dtype: jnp.dtype | None = None,
    boundary: tuple[str, ...] = ("zero", "zero"),
    dilation: int = 1,
) -> Float[Array, "*grid outputs"]:
    """A convolution in the given dtype. Under `jax.vmap`, it is one call per batch."""
    num_dims = len(boundary)
    dtype = x.dtype if dtype is None else dtype
    axes = "DHW"[-num_dims:]
    # The convolution itself continues by zeros, without a copy of the field.
    by_itself = [dilation if side == "zero" else 0 for side in boundary]
    around = [(dilation - number, dilation - number) for number in by_itself]
    y = jax.lax.conv_general_dilated(
        extend(x.astype(dtype), around, boundary)[None],
        weight.astype(dtype),
        window_strides=[1] * num_dims,
        padding=[(number, number) for number in by_itself],
        rhs_dilation=[dilation] * num_dims,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    return y[0].astype(x.dtype)


def extend(
    x: Float[Array, "*grid channels"],
    around: Sequence[tuple[int, int]],
    boundary: tuple[str, ...],
) -> Float[Array, "*larger channels"]:
    """Continues a field by numbers of points before and after each axis."""
    modes = {"periodic": "wrap", "zero": "constant", "reflect": "reflect"}
    for axis, (pair, side) in enumerate(zip(around, boundary, strict=True)):
        pairs = [pair if other == axis else (0, 0) for other in range(x.ndim)]
        x = x if pair == (0, 0) else jnp.pad(x, pairs, mode=modes[side])
    return x


def standardise(
    x: Float[Array, "*shape"], axes: int | tuple[int, ...], epsilon: float
) -> Float[Array, "*shape"]:
    """Normalises to mean 0 and variance 1 over the given axes."""
    x = x - jnp.mean(x, axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + epsilon)


def unit_rms(
    x: Float[Array, "*shape"], axes: int | tuple[int, ...], epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """Normalises to root mean square 1 over the given axes."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + epsilon)


def modulate(
    x: Float[Array, "*shape channels"],
    factor: Float[Array, " channels"],
    shift: Float[Array, " channels"] | None = None,
) -> Float[Array, "*shape channels"]:
    """`factor * x + shift`, channel by channel, in the precision of `x`."""
    along = lambda vector: jnp.broadcast_to(vector.astype(x.dtype), x.shape)
    return x * along(factor) if shift is None else x * along(factor) + along(shift)


def attend(
    q: Float[Array, "heads tokens channels"],
    k: Float[Array, "heads tokens channels"],
    v: Float[Array, "heads tokens channels"],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "heads tokens channels"]:
    """Attention without a fused kernel, since those do not support forward mode."""
    low = lambda value: value.astype(value.dtype if dtype is None else dtype)
    q = q / math.sqrt(q.shape[-1])
    logits = jnp.einsum("nqc,nkc->nqk", low(q), low(k), preferred_element_type=q.dtype)
    # The maximum cancels in the ratio, so its derivative is not needed.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    # Divide after the product, which has fewer entries than the weights.
    y = jnp.einsum("nqk,nkc->nqc", low(weights), low(v)).astype(v.dtype)
    return y / jnp.sum(weights, -1, keepdims=True)


# The axes of a grid of one to three dimensions, apart and in pairs of points.
_APART = {1: "h", 2: "h w", 3: "h w d"}
_IN_PAIRS = {1: "(h a)", 2: "(h a) (w b)", 3: "(h a) (w b) (d e)"}


def halve(x: Float[Array, "*grid channels"]) -> Float[Array, "*half channels"]:
    """Averages each 2x2 square of pixels, or the pairs or cubes of another grid."""
    pairs, apart = _IN_PAIRS[x.ndim - 1], _APART[x.ndim - 1]
    twos = dict.fromkeys("abe"[: x.ndim - 1], 2)
    return einops.reduce(x, f"{pairs} c -> {apart} c", "mean", **twos)


def double(x: Float[Array, "*grid channels"]) -> Float[Array, "*twice channels"]:
    """Repeats each pixel in a 2x2 square, a pair or a cube."""
    pairs, apart = _IN_PAIRS[x.ndim - 1], _APART[x.ndim - 1]
    twos = dict.fromkeys("abe"[: x.ndim - 1], 2)
    return einops.repeat(x, f"{apart} c -> {pairs} c", **twos)


def smooth_halve(
    x: Float[Array, "height width channels"],
) -> Float[Array, "half_height half_width channels"]:
    """Averages four pixels along each axis with the weights 1, 3, 3, 1."""
    for axis in (0, 1):
        pads = [(1, 1) if other == axis else (0, 0) for other in range(3)]
        size, padded = x.shape[axis], jnp.pad(x, pads)
        a, b, c, d = (
            jax.lax.slice_in_dim(padded, first, first + size - 1, 2, axis)
            for first in range(4)
        )
        x = (a + 3 * b + 3 * c + d) / 8
    return x


def smooth_double(
    x: Float[Array, "height width channels"],
) -> Float[Array, "twice_height twice_width channels"]:
    """Doubles each axis with the filter of `smooth_halve`: three parts of the pixel, and
    one of the neighbour that is nearer."""
    for axis in (0, 1):
        pads = [(1, 1) if other == axis else (0, 0) for other in range(3)]
        size, padded = x.shape[axis], jnp.pad(x, pads)
        before = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
        pairs = jnp.stack([3 * x + before, 3 * x + after], axis + 1) / 4
        shape = [2 * n if other == axis else n for other, n in enumerate(x.shape)]
        x = pairs.reshape(shape)
    return x
