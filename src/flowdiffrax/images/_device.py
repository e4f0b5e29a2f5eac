import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer, Key, UInt8

from .._time import at_least_float32
from .._tree import is_concrete
from ..data import ConditionedPoints
from .sets._images import Images, check_images, check_labels


class DeviceImages(eqx.Module):
    """Images on the device as 8-bit values, made into batches of points there.

    As `data` of [`flowdiffrax.data.InterpolantBatches`][], it draws rows with
    replacement, flips some, and scales them to [-1, 1] in float32: a function of the
    key, and so of the run's seed and the step. The labels are the conditions. A copy in
    floats would take four times the memory.

    **Arguments:**

    - `images`: the images, with labels or without; or an array of them, as a stream
      gives it.
    - `labels`: the labels of an array.
    - `flip`: whether to mirror each image left to right with probability 1/2. Not for
      digits and letters.
    - `draw`: whether to draw. Without it, a batch is all the images as they come, those
      of one batch of [`flowdiffrax.data.stream`][].

    **Raises:** as [`flowdiffrax.images.Images`][]; `ValueError`, when called without
    `draw`, for another batch size.
    """

    images: UInt8[Array, "n height width channels"]
    labels: Integer[Array, " n"] | None
    flip: bool = eqx.field(static=True)
    draw: bool = eqx.field(static=True)

    def __init__(
        self,
        images: Images | UInt8[Array | np.ndarray, "n height width channels"],
        labels: Integer[Array | np.ndarray, " n"] | None = None,
        *,
        flip: bool = False,
        draw: bool = True,
    ):
        if isinstance(images, Images):
            if labels is not None:
                raise ValueError("`Images` have labels of their own; `labels` came too.")
            images, labels = images.images, images.labels
        self.images = jnp.asarray(images)
        self.labels = None if labels is None else jnp.asarray(labels)
        self.flip = flip
        self.draw = draw

    def __check_init__(self):
        check_images(self.images)
        if self.labels is not None:
            check_labels(self.labels, len(self.images))

    def __call__(self, key: Key[Array, ""], batch_size: int) -> ConditionedPoints:
        """A batch of points, of shape `(batch_size, height, width, channels)`."""
        rows_key, flip_key = jr.split(key)
        num_images = self.images.shape[0]
        images, labels = self.images, self.labels
        if self.draw:
            rows = jr.randint(rows_key, (batch_size,), 0, num_images)
            images, labels = jtu.tree_map(lambda leaf: leaf[rows], (images, labels))
        elif batch_size != num_images:
            raise ValueError(
                f"Without `draw`, the batch is all {num_images} images; got "
                f"`batch_size` {batch_size}."
            )
        if self.flip:
            images = _mirror(images, jr.bernoulli(flip_key, shape=(batch_size,)))
        return ConditionedPoints(from_uint8(images), labels)


def _mirror(
    images: UInt8[Array, "n height width channels"], which: Bool[Array, " n"]
) -> UInt8[Array, "n height width channels"]:
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def from_uint8(
    images: UInt8[Array | np.ndarray, "*shape"],
) -> Float32[Array, "*shape"]:
    """Scales 8-bit values to [-1, 1]: 0 to -1, and 255 to 1.

    **Arguments:**

    - `images`: of any shape.

    **Raises:** `TypeError` for another dtype, which may have been scaled already.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"`from_uint8` scales uint8; got {images.dtype}.")
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


def to_uint8(
    x: Float[Array | np.ndarray, "*shape"],
) -> UInt8[Array, "*shape"]:
    """Samples as 8-bit values: the inverse of [`flowdiffrax.images.from_uint8`][].

    Rounds to the nearest value, in float32 at least, and clips to [-1, 1]. A sampler
    that fails does not draw black images, so what is not finite is refused.
    `flowdiffrax.images.to_uint8` is this function.

    **Arguments:**

    - `x`: of any shape; images have their last three axes.

    **Raises:** `TypeError` for what is not of floating point, and `ValueError` for values
    that are not finite; under `jax.jit`, an error at run time.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`to_uint8` takes floats in [-1, 1]; got {dtype}. Images of 8 bits need no "
            "rounding."
        )
    x = jnp.asarray(x)
    # Bfloat16 has 8 bits for [-1, 1]: in it, the sum below would round once more.
    x = x.astype(at_least_float32(x.dtype))
    finite = jnp.isfinite(x)
    whole = finite.all(axis=(-3, -2, -1)) if x.ndim >= 3 else finite
    advice = "A score without them would flatter the sampler: find out why."
    if is_concrete(whole):
        if not whole.all():
            what = "images hold values that" if x.ndim >= 3 else "values"
            raise ValueError(
                f"{jnp.sum(~whole)} of {whole.size} {what} are not finite. {advice}"
            )
    else:
        x = eqx.error_if(x, ~whole, f"Some values of `x` are not finite. {advice}")
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
