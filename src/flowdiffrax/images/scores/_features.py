"""Networks whose features distributions of images are compared by."""

import abc
import functools
import math
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt8

from ..._types import AbstractVar
from ...nn._describe import describe
from ...train import fingerprint
from ..sets._images import Images


class AbstractFeatures(eqx.Module):
    """A network from an image to a vector of features.

    It is called on one image with values from 0 to 255, and does its own resizing and
    scaling, so that there is one way to use it.

    **Attributes:**

    - `name`: of the network, as it is written beside scores.
    """

    name: AbstractVar[str]

    @abc.abstractmethod
    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        """The features of one image with values from 0 to 255."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, str]:
        """What else decides the features, such as how images are resized."""

    def __pdoc__(self, **kwargs):
        return describe(self, self.name)

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a sha256 of the network's arrays.

        Of their places, shapes, dtypes and values as they are used, not of the file that
        they came in: the same weights have the same one in every form.
        """
        return fingerprint(eqx.filter(self, eqx.is_array))


class ConvStack(eqx.Module):
    """Convolutions by three pixels, a ReLU after each, and means over the image.

    The first keeps the image's size; each after it halves the size, until at most four
    pixels a side are left.
    """

    kernels: list[Float32[Array, "..."]]
    biases: list[Float32[Array, "..."]]

    def __init__(self, shape: Sequence[int], width: int, *, key: Key[Array, ""]):
        num_halvings = max(2, math.ceil(math.log2(max(shape[:2]) / 4)))
        # Few channels where there are many pixels.
        widths = [max(1, width // 4), max(1, width // 2), *[width] * (num_halvings - 1)]
        inputs = [shape[2], *widths[:-1]]
        keys = jr.split(key, (len(widths), 2))
        self.kernels = [
            # Keeps the size of what a ReLU follows.
            jr.normal(k, (3, 3, n, m), np.float32) * np.float32((2 / (9 * n)) ** 0.5)
            for k, n, m in zip(keys[:, 0], inputs, widths, strict=True)
        ]
        self.biases = [
            0.1 * jr.normal(k, (m,), np.float32)
            for k, m in zip(keys[:, 1], widths, strict=True)
        ]

    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        x = x / 127.5 - 1
        for layer, (kernel, bias) in enumerate(
            zip(self.kernels, self.biases, strict=True)
        ):
            x = jax.nn.relu(convolve(x, kernel, bias, 2 if layer else 1, "SAME"))
        return jnp.mean(x, (0, 1))


class RandomFeatures(AbstractFeatures):
    """The features of a convolutional network with random weights, always the same ones.

    They need no file and no training, and notice when images change: for tests of a
    program from one day to the next. Which of two models makes better images, they
    don't tell.

    **Arguments:**

    - `shape`: of one image, (height, width, channels).
    - `key`: for the weights, and so for the features.
    - `width`: the number of features.

    **Raises:** `ValueError` for a shape that is none of images, or no features; and when
    called, for an image of another shape.
    """

    stack: ConvStack
    shape: tuple[int, int, int] = eqx.field(static=True)
    name: str = eqx.field(static=True, default="random network")

    def __init__(self, shape: Sequence[int], *, key: Key[Array, ""], width: int = 64):
        self.shape = check_shape(shape, width)
        self.stack = ConvStack(self.shape, width, key=key)

    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        check_image(x, self.shape)
        return self.stack(x)

    @property
    def settings(self) -> dict[str, str]:
        return {"resize": "none", "shape": "x".join(map(str, self.shape))}


def image_features(
    features: AbstractFeatures,
    images: Images | UInt8[np.ndarray | Array, "n height width channels"],
    *,
    batch_size: int = 256,
) -> Float32[np.ndarray, "n features"]:
    """The features of many images.

    All batches have one size, the last one being filled up, so that the network is
    compiled once. Products are made in full float32, whatever the device does by
    default: a score should not depend on it.

    **Arguments:**

    - `features`: the network.
    - `images`: of 8 bits.
    - `batch_size`: images at once, at least 1.

    **Returns:** one vector an image.

    **Raises:** `TypeError` for other values than 8-bit ones, which
    [`flowdiffrax.images.to_uint8`][] makes; `ValueError` for arrays of other shapes, or
    no batches.
    """
    return np.concatenate(list(feature_batches(features, images, batch_size)))


def feature_batches(
    features: AbstractFeatures, images: Images | np.ndarray | Array, batch_size: int
) -> Iterator[Float32[np.ndarray, "batch features"]]:
    """The same, a batch at a time, for sets whose features would not fit into memory."""
    rows = as_images(images)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    batch_size = min(batch_size, len(rows))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        missing = batch_size - len(batch)
        filled = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)])
        yield np.asarray(_features_of(features, filled))[: len(batch)]


@eqx.filter_jit
def _features_of(features, images):
    with jax.default_matmul_precision("highest"):
        return jax.vmap(features)(jnp.asarray(images).astype(jnp.float32))


def as_images(
    images: Images | np.ndarray | Array,
) -> UInt8[np.ndarray, "n height width channels"]:
    """The array of a set of 8-bit images, or an array, checked as those of sets are."""
    if isinstance(images, Images):
        return images.images
    return Images(np.asarray(images)).images


# --- what extractors have in common -----------------------------------------------------


def convolve(
    x: Float[Array, "height width inputs"],
    kernel: Float[Array, "kh kw inputs outputs"],
    bias: Float[Array, " outputs"],
    stride: int,
    padding: str | Sequence[tuple[int, int]],
) -> Float[Array, "h w outputs"]:
    """Under `jax.vmap` this is one convolution of the batch."""
    y = jax.lax.conv_general_dilated(
        x[None],
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    return y + jnp.broadcast_to(bias, y.shape)


def pool_max(
    x: Float[Array, "height width channels"], stride: int, padding: str = "VALID"
) -> Float[Array, "h w channels"]:
    """The largest of three by three pixels."""
    window = functools.partial(jax.lax.reduce_window, x, -jnp.inf, jax.lax.max)
    return window((3, 3, 1), (stride, stride, 1), padding)


def resize(
    x: Float[Array, "height width channels"], size: int
) -> Float[Array, "size size channels"]:
    """Bilinear between pixel centres, without smoothing where images shrink.

    What `torch.nn.functional.interpolate` does with `align_corners=False`.
    """
    shape = (size, size, x.shape[2])
    return jax.image.resize(x, shape, "linear", antialias=False)


def in_colour(
    x: Float[Array, "height width channels"],
) -> Float[Array, "height width 3"]:
    """Grey images three times over.

    **Raises:** `ValueError` for another number of channels than 1 or 3.
    """
    if x.ndim != 3 or x.shape[2] not in (1, 3):
        raise ValueError(
            f"Expected an image (height, width, 1 or 3 channels); got shape {x.shape}. "
            "For many images, use `image_features`."
        )
    return jnp.broadcast_to(x, (*x.shape[:2], 3))


def check_shape(shape: Sequence[int], width: int) -> tuple[int, int, int]:
    """**Raises:** `ValueError` for a shape that is none of images, or no features."""
    if len(shape) != 3 or min(*shape, width) < 1:
        raise ValueError(
            "`shape` must be (height, width, channels) and `width` at least 1; got "
            f"{tuple(shape)} and {width}."
        )
    height, width, channels = map(int, shape)
    return height, width, channels


def check_image(x: Array, shape: tuple[int, int, int]) -> None:
    """**Raises:** `ValueError` for an image of another shape."""
    if x.shape != shape:
        raise ValueError(
            f"These are features of images of shape {shape}; got {x.shape}. For many "
            "images, use `image_features`."
        )
