"""Networks whose features are used to compare distributions of images."""

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

    It takes one image with values from 0 to 255 and does its own resizing and scaling, so
    that there is only one way to use it.

    **Attributes:**

    - `name`: the name of the network, which scores report.
    """

    name: AbstractVar[str]

    @abc.abstractmethod
    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        """Returns the features of one image with values from 0 to 255."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, str]:
        """Other settings that affect the features, such as how images are resized."""

    def __pdoc__(self, **kwargs):
        return describe(self, self.name)

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a sha256 of the network's arrays.

        It covers the places, shapes, dtypes and values of the arrays in use, not the file
        that they were read from. The same weights have the same fingerprint in every
        file format.
        """
        return fingerprint(eqx.filter(self, eqx.is_array))


class ConvStack(eqx.Module):
    """Convolutions over three by three pixels with ReLUs, then means over the image.

    The first convolution keeps the image's size. Each later one halves it, until each
    side has at most four pixels.
    """

    kernels: list[Float32[Array, "..."]]
    biases: list[Float32[Array, "..."]]

    def __init__(self, shape: Sequence[int], width: int, *, key: Key[Array, ""]):
        num_halvings = max(2, math.ceil(math.log2(max(shape[:2]) / 4)))
        # Fewer channels at high resolutions.
        widths = [max(1, width // 4), max(1, width // 2), *[width] * (num_halvings - 1)]
        inputs = [shape[2], *widths[:-1]]
        keys = jr.split(key, (len(widths), 2))
        self.kernels = [
            # Keeps the scale of the features, since a ReLU follows.
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
    """The features of a convolutional network with fixed random weights.

    They need no file and no training, and they change when images change, so they suit
    regression tests. They do not tell which of two models makes better images.

    **Arguments:**

    - `shape`: the shape of one image, (height, width, channels).
    - `key`: for the weights, which determine the features.
    - `width`: the number of features.

    **Raises:** `ValueError` if `shape` is not that of an image, or if `width` is below 1;
    when called, `ValueError` for an image of another shape.
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
    """Computes the features of many images.

    The last batch is padded to the size of the others, so that the network is compiled
    once. Products use full float32, whatever the device's default, so that a score does
    not depend on it.

    **Arguments:**

    - `features`: the network.
    - `images`: 8-bit images.
    - `batch_size`: the number of images at a time, at least 1.

    **Returns:** one vector per image.

    **Raises:** `TypeError` if the values are not 8-bit (convert samples with
    [`flowdiffrax.images.to_uint8`][]); `ValueError` for arrays of another shape, or if
    `batch_size` is below 1.
    """
    return np.concatenate(list(feature_batches(features, images, batch_size)))


def feature_batches(
    features: AbstractFeatures, images: Images | np.ndarray | Array, batch_size: int
) -> Iterator[Float32[np.ndarray, "batch features"]]:
    """Yields features in batches, for sets whose features do not fit into memory."""
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
    """Returns the array of an `Images`, or checks an array in the same way."""
    if isinstance(images, Images):
        return images.images
    return Images(np.asarray(images)).images


# --- parts that networks share ----------------------------------------------------------


def convolve(
    x: Float[Array, "height width inputs"],
    kernel: Float[Array, "kh kw inputs outputs"],
    bias: Float[Array, " outputs"],
    stride: int,
    padding: str | Sequence[tuple[int, int]],
) -> Float[Array, "h w outputs"]:
    """Convolves one image; under `jax.vmap`, the whole batch in one convolution."""
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
    """The maximum over three by three pixels."""
    window = functools.partial(jax.lax.reduce_window, x, -jnp.inf, jax.lax.max)
    return window((3, 3, 1), (stride, stride, 1), padding)


def resize(
    x: Float[Array, "height width channels"], size: int
) -> Float[Array, "size size channels"]:
    """Resizes bilinearly between pixel centres, without antialiasing.

    It equals `torch.nn.functional.interpolate` with `align_corners=False`.
    """
    shape = (size, size, x.shape[2])
    return jax.image.resize(x, shape, "linear", antialias=False)


def in_colour(
    x: Float[Array, "height width channels"],
) -> Float[Array, "height width 3"]:
    """Repeats the channel of a grey image three times.

    **Raises:** `ValueError` unless there are 1 or 3 channels.
    """
    if x.ndim != 3 or x.shape[2] not in (1, 3):
        raise ValueError(
            f"Expected one image (height, width, 1 or 3 channels); got shape {x.shape}. "
            "For many images, use `image_features`."
        )
    return jnp.broadcast_to(x, (*x.shape[:2], 3))


def check_shape(shape: Sequence[int], width: int) -> tuple[int, int, int]:
    """Returns the shape of an image as a tuple of integers.

    **Raises:** `ValueError` if it is not the shape of an image, or if `width` is below 1.
    """
    if len(shape) != 3 or min(*shape, width) < 1:
        raise ValueError(
            "`shape` must be (height, width, channels) and `width` at least 1; got "
            f"{tuple(shape)} and {width}."
        )
    height, width, channels = map(int, shape)
    return height, width, channels


def check_image(x: Array, shape: tuple[int, int, int]) -> None:
    """Checks the shape of an image.

    **Raises:** `ValueError` if it has another shape.
    """
    if x.shape != shape:
        raise ValueError(
            f"These features are for images of shape {shape}; got {x.shape}. For many "
            "images, use `image_features`."
        )
