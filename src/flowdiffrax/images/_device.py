import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer, Key, UInt8

from .._check import check_bools
from .._time import at_least_float32
from .._tree import is_concrete
from .._types import AugmentationArgs
from ..data import ConditionedPoints
from ._augmentation import Augmentation
from .sets._images import Images, check_images, check_labels


class DeviceImages(eqx.Module):
    """8-bit images kept on the device, where batches of points are drawn from them.

    As `data` of [`flowdiffrax.data.InterpolantBatches`][], it draws images with
    replacement, mirrors some of them, and scales them to [-1, 1] in float32. A batch
    depends on the key only, and so on the run's seed and the step. The labels become the
    conditions. Storing the images as floats would take four times the memory.

    **Arguments:**

    - `images`: an `Images`, with or without labels; or an array of images, as a stream
      yields it.
    - `labels`: the labels, if `images` is an array.
    - `flip`: whether to mirror each image left to right with probability 1/2. Not
      suitable for digits and letters.
    - `augmentation`: an [`flowdiffrax.images.Augmentation`][] of each batch, after
      mirroring, or `None`. The conditions are then
      [`flowdiffrax.velocities.AugmentationArgs`][].
    - `draw`: whether to draw images at random. If `False`, a batch is all the images in
      order, for example one batch of [`flowdiffrax.data.stream`][].

    **Raises:** as [`flowdiffrax.images.Images`][]; `ValueError`, when called with
    `draw=False`, if the batch size is not the number of images.
    """

    images: UInt8[Array, "n height width channels"]
    labels: Integer[Array, " n"] | None
    flip: bool = eqx.field(static=True)
    augmentation: Augmentation | None
    draw: bool = eqx.field(static=True)

    def __init__(
        self,
        images: Images | UInt8[Array | np.ndarray, "n height width channels"],
        labels: Integer[Array | np.ndarray, " n"] | None = None,
        *,
        flip: bool = False,
        augmentation: Augmentation | None = None,
        draw: bool = True,
    ):
        if isinstance(images, Images):
            if labels is not None:
                raise ValueError("`Images` carry their labels; do not pass `labels` too.")
            images, labels = images.images, images.labels
        self.images = jnp.asarray(images)
        self.labels = None if labels is None else jnp.asarray(labels)
        self.flip = flip
        self.augmentation = augmentation
        self.draw = draw

    def __check_init__(self):
        check_images(self.images)
        check_bools(flip=self.flip, draw=self.draw)
        if self.labels is not None:
            check_labels(self.labels, len(self.images))

    def __call__(self, key: Key[Array, ""], batch_size: int) -> ConditionedPoints:
        """Returns a batch of points, `(batch_size, height, width, channels)`."""
        rows_key, flip_key, augment_key = jr.split(key, 3)
        num_images = self.images.shape[0]
        images, labels = self.images, self.labels
        if self.draw:
            rows = jr.randint(rows_key, (batch_size,), 0, num_images)
            images, labels = jtu.tree_map(lambda leaf: leaf[rows], (images, labels))
        elif batch_size != num_images:
            raise ValueError(
                f"With `draw=False`, a batch is all {num_images} images; got "
                f"`batch_size` {batch_size}."
            )
        if self.flip:
            images = _mirror(images, jr.bernoulli(flip_key, shape=(batch_size,)))
        points = from_uint8(images)
        if self.augmentation is None:
            return ConditionedPoints(points, labels)
        points, how = self.augmentation(augment_key, points)
        return ConditionedPoints(points, AugmentationArgs(labels, how))


def _mirror(
    images: UInt8[Array, "n height width channels"], which: Bool[Array, " n"]
) -> UInt8[Array, "n height width channels"]:
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def from_uint8(
    images: UInt8[Array | np.ndarray, "*shape"],
) -> Float32[Array, "*shape"]:
    """Scales 8-bit values to [-1, 1]: 0 becomes -1, and 255 becomes 1.

    **Arguments:**

    - `images`: an array of any shape.

    **Raises:** `TypeError` for any other dtype, since its values may already be scaled.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"`from_uint8` scales uint8; got {images.dtype}.")
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


def to_uint8(
    x: Float[Array | np.ndarray, "*shape"],
) -> UInt8[Array, "*shape"]:
    """Converts samples to 8-bit values.

    The inverse of [`flowdiffrax.images.from_uint8`][]. It clips to [-1, 1] and rounds to
    the nearest value, in at least float32. Values that are not finite raise an error
    rather than become black pixels, since they show that a sampler failed.

    **Arguments:**

    - `x`: an array of any shape. Images occupy the last three axes.

    **Raises:** `TypeError` if the dtype is not floating-point; `ValueError` if a value is
    not finite, which under `jax.jit` is an error at run time.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`to_uint8` takes floats in [-1, 1]; got {dtype}. 8-bit images need no "
            "rounding."
        )
    x = jnp.asarray(x)
    # With the 8 bits of bfloat16, the sum below would round a second time.
    x = x.astype(at_least_float32(x.dtype))
    finite = jnp.isfinite(x)
    whole = finite.all(axis=(-3, -2, -1)) if x.ndim >= 3 else finite
    advice = "Find out why: a score without them would flatter the sampler."
    if is_concrete(whole):
        if not whole.all():
            what = "images hold values that" if x.ndim >= 3 else "values"
            raise ValueError(
                f"{jnp.sum(~whole)} of {whole.size} {what} are not finite. {advice}"
            )
    else:
        x = eqx.error_if(x, ~whole, f"Some values of `x` are not finite. {advice}")
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
