import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._check import check_between, check_bools
from .._time import at_least_float32

# The low-pass filter of the wavelet "sym6", with which EDM resamples. It is orthogonal to
# its shifts by two, so halving what was doubled returns the image.
_SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057),
        *(-0.048311742585633, 0.4910559419267466, 0.787641141030194),
        *(0.3379294217276218, -0.07263752278646252, -0.021060292512300564),
        *(0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)


class AugmentationParameters(eqx.Module):
    """The transformations of one image, or with a batch axis of several.

    All zeros is the image as it is.

    **Arguments:**

    - `mirror`, `flip`: 1 to swap left and right, or top and bottom.
    - `shift`: the shift (right, up) by whole pixels, as a share of an eighth of the
      width and height.
    - `zoom`: the logarithm of the magnification, in units of 0.2 octaves.
    - `angle`: the angle of rotation, in radians.
    - `stretch`, `axis`: the logarithm of the magnification along an axis, in units of 0.2
      octaves, and the angle of this axis. The perpendicular axis shrinks by as much.
    - `move`: the shift (right, down), in units of an eighth of the width and height.
    """

    mirror: Float[Array, "*batch"]
    flip: Float[Array, "*batch"]
    shift: Float[Array, "*batch 2"]
    zoom: Float[Array, "*batch"]
    angle: Float[Array, "*batch"]
    stretch: Float[Array, "*batch"]
    axis: Float[Array, "*batch"]
    move: Float[Array, "*batch 2"]


class Augmentation(eqx.Module):
    """EDM's augmentation, whose parameters the network sees as labels.

    Images are mirrored, and with the probability `rate` each: flipped, shifted by whole
    pixels, magnified, rotated, stretched along an axis, and moved. The labels are an
    input of the network, [`flowdiffrax.velocities.AugmentationArgs`][]. When sampling,
    they are zero, so the transformations do not leak into the samples. As `augmentation`
    of [`flowdiffrax.images.DeviceImages`][], it transforms each batch.

    The last four transformations are one affine map. The image is reflected at its
    border, doubled in size with the wavelet filter sym6, resampled bilinearly, and halved
    again, at least in float32. Beyond one reflection, it is zero. Given the same
    parameters, values and labels are EDM's. EDM's rotations by quarter turns and changes
    of colour, which its own runs do not use, are not included.

    **Arguments:**

    - `rate`: the probability of each transformation, except `mirror`.
    - `mirror`: whether to mirror images with probability 1/2, whatever the `rate`
      (`xflip=1e8` in EDM).
    - `flip`, `shift`, `zoom`, `rotate`, `stretch`, `move`: which of the others to use
      (`yflip`, `translate_int`, `scale`, `rotate_frac`, `aniso` and `translate_frac` in
      EDM). A flip is a coin toss, so it happens with probability `rate / 2`. The defaults
      are those of EDM's runs.

    **Raises:** `ValueError` for a `rate` outside [0, 1], `TypeError` for settings of
    another type.

    ??? cite "Reference"

        EDM, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364), appendix F.2.
    """

    rate: float = eqx.field(static=True, default=0.12)
    mirror: bool = eqx.field(static=True, default=True)
    flip: bool = eqx.field(static=True, default=True)
    shift: bool = eqx.field(static=True, default=False)
    zoom: bool = eqx.field(static=True, default=True)
    rotate: bool = eqx.field(static=True, default=True)
    stretch: bool = eqx.field(static=True, default=True)
    move: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_between(self.rate, 0, 1, "rate")
        which = "mirror", "flip", "shift", "zoom", "rotate", "stretch", "move"
        check_bools(**{name: getattr(self, name) for name in which})

    @property
    def size(self) -> int:
        """The number of labels of an image, for `augment_size` of a network."""
        singles = self.mirror + self.flip + self.zoom
        return singles + 2 * (self.shift + self.rotate + self.stretch + self.move)

    def __call__(
        self, key: Key[Array, ""], images: Float[Array, "n height width channels"]
    ) -> tuple[Float[Array, "n height width channels"], Float[Array, "n labels"]]:
        """Transforms a batch of images.

        **Arguments:**

        - `key`: a random key for the parameters.
        - `images`: the images, of a floating dtype and in any scale.

        **Returns:** the images, and their labels.

        **Raises:** `TypeError` for integers, `ValueError` unless they are a batch.
        """
        _check_images(images)
        parameters = self.draw(key, images.shape[0])
        return self.apply(images, parameters), self.labels(parameters, images.shape)

    def draw(self, key: Key[Array, ""], batch_size: int) -> AugmentationParameters:
        """Draws the parameters of a batch.

        **Arguments:**

        - `key`: a random key.
        - `batch_size`: the number of images.
        """
        keys = iter(jr.split(key, 16))
        n = (batch_size,)

        def gated(used: bool, rate: float, value: Array) -> Array:
            happens = jr.uniform(next(keys), n) < rate
            happens = happens.reshape(n + (1,) * (value.ndim - 1))
            return jnp.where(happens & used, value, 0)

        coin = lambda: jr.bernoulli(next(keys), shape=n).astype(jnp.float32)
        normal = lambda *more: jr.normal(next(keys), (*n, *more), jnp.float32)
        between = lambda size, *more: jr.uniform(
            next(keys), (*n, *more), jnp.float32, -size, size
        )
        return AugmentationParameters(
            mirror=gated(self.mirror, 1.0, coin()),
            flip=gated(self.flip, self.rate, coin()),
            shift=gated(self.shift, self.rate, between(1.0, 2)),
            zoom=gated(self.zoom, self.rate, normal()),
            angle=gated(self.rotate, self.rate, between(np.pi)),
            stretch=gated(self.stretch, self.rate, normal()),
            # Half of the stretches are along the axes of the image. The axis is drawn for
            # every image, as in EDM, and means nothing without a stretch.
            axis=gated(self.stretch, 0.5, between(np.pi)),
            move=gated(self.move, self.rate, normal(2)),
        )

    def apply(
        self,
        images: Float[Array, "n height width channels"],
        parameters: AugmentationParameters,
    ) -> Float[Array, "n height width channels"]:
        """Transforms a batch by the given parameters.

        **Arguments:**

        - `images`: the images, of a floating dtype.
        - `parameters`: the parameters of each image.

        **Raises:** as for a call.
        """
        _check_images(images)
        is_affine = self.zoom or self.rotate or self.stretch or self.move
        one = functools.partial(_transformed, is_affine=is_affine)
        return jax.vmap(one)(images, parameters)

    def labels(
        self, parameters: AugmentationParameters, shape: tuple[int, ...]
    ) -> Float[Array, "n labels"]:
        """The labels of a batch, in the order of EDM.

        **Arguments:**

        - `parameters`: the parameters of each image.
        - `shape`: the shape of an image, or of a batch. A shift is rounded to pixels.
        """
        height, width = shape[-3:-1]
        return jax.vmap(lambda p: self._labels(p, height, width))(parameters)

    def _labels(
        self, p: AugmentationParameters, height: int, width: int
    ) -> Float[Array, " labels"]:
        circle = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        pixels = _pixels(p.shift, height, width)
        parts = [
            (self.mirror, p.mirror),
            (self.flip, p.flip),
            (self.shift, pixels / _eighth(height, width)),
            (self.zoom, p.zoom),
            (self.rotate, circle(p.angle) - np.array([1, 0], np.float32)),
            (self.stretch, p.stretch * circle(p.axis)),
            (self.move, p.move),
        ]
        used = [jnp.atleast_1d(values) for is_used, values in parts if is_used]
        return jnp.concatenate([jnp.zeros(0, p.mirror.dtype), *used])


def _check_images(images: Array) -> None:
    """**Raises:** `TypeError` for integers, `ValueError` unless they are a batch."""
    if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
        raise TypeError(
            f"`images` must be of a floating dtype; got {jnp.result_type(images)}. Scale "
            "8-bit images with `images.from_uint8`."
        )
    if jnp.ndim(images) != 4:
        raise ValueError(
            "`images` must be a batch, of shape (n, height, width, channels); got shape "
            f"{jnp.shape(images)}. For one image, use `image[None]`."
        )


def _transformed(
    image: Float[Array, "height width channels"],
    parameters: AugmentationParameters,
    *,
    is_affine: bool,
) -> Float[Array, "height width channels"]:
    given = image.dtype
    # Half precision would round shifts and angles.
    dtype = at_least_float32(given)
    image = image.astype(dtype)
    p = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    height, width, _ = image.shape
    image = jnp.where(p.mirror == 1, image[:, ::-1], image)
    image = jnp.where(p.flip == 1, image[::-1], image)
    right, up = _pixels(p.shift, height, width).astype(int)
    image = image[_reflected(jnp.arange(height) + up, height)]
    image = image[:, _reflected(jnp.arange(width) - right, width)]
    if not is_affine:
        return image.astype(given)
    # From the pixels of the result to those of the image, both from its centre.
    factor = jnp.exp2(0.2 * p.stretch)
    inverse = (
        jnp.exp2(-0.2 * p.zoom)
        * _rotation(p.angle)
        @ _rotation(-p.axis)
        @ jnp.diag(jnp.stack([1 / factor, factor]))
        @ _rotation(p.axis)
    )
    origin = inverse @ (-p.move * _eighth(height, width))
    return _resampled(image, inverse, origin).astype(given)


def _resampled(
    image: Float[Array, "height width channels"],
    inverse: Float[Array, "2 2"],
    origin: Float[Array, "2"],
) -> Float[Array, "height width channels"]:
    """The image at `inverse @ p + origin` for each pixel `p`, from the centre."""
    (double_y, halve_y), (double_x, halve_x) = map(_filters, image.shape[:2])
    # TF32 would change the pixels.
    product = functools.partial(jnp.einsum, precision="highest")
    doubled = product("yh,xw,hwc->cyx", double_y, double_x, image)
    # Pixel p of the doubled result has its centre at p / 2 + 1 / 4.
    ys, xs = (_centred(matrix.shape[1], image.dtype) for matrix in (halve_y, halve_x))
    places = jnp.stack(jnp.meshgrid(xs, ys)) / 2 + 0.25
    places = product("ij,jyx->iyx", inverse, places) + origin[:, None, None]
    sizes = jnp.array([double_x.shape[0], double_y.shape[0]], image.dtype)
    x, y = 2 * places - 0.5 + (sizes[:, None, None] - 1) / 2
    sample = lambda channel: jax.scipy.ndimage.map_coordinates(channel, [y, x], order=1)
    warped = jax.vmap(sample)(doubled)
    return product("hy,wx,cyx->hwc", halve_y, halve_x, warped)


@functools.cache
def _filters(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices that double an axis, reflected on both sides, and that halve it again.

    The halved axis has three more points on each side, for the filter.
    """
    taps, padding = len(_SYM6), size - 1
    padded = size + 2 * padding
    double = np.zeros((2 * padded, size), np.float32)
    for place in range(padded):
        source = _reflected(place - padding, size)
        for tap, value in enumerate(_SYM6):
            row = 2 * place + tap - (taps // 2 - 1)
            if 0 <= row < 2 * padded:
                double[row, source] += value
    halve = np.zeros((size, 2 * (size + 2 * (taps // 4))), np.float32)
    for place in range(size):
        halve[place, 2 * place + 1 : 2 * place + 1 + taps] = _SYM6
    return double, halve


def _reflected(index: Any, size: int) -> Any:
    """Continues indices beyond the ends by reflection, without repeating the ends."""
    period = max(2 * size - 2, 1)
    return size - 1 - abs(size - 1 - index % period)


def _rotation(angle: Float[Array, ""]) -> Float[Array, "2 2"]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def _eighth(height: int, width: int) -> Float[np.ndarray, "2"]:
    return np.array([width / 8, height / 8], np.float32)


def _pixels(shift: Float[Array, "2"], height: int, width: int) -> Float[Array, "2"]:
    return jnp.round(shift * _eighth(height, width))


def _centred(size: int, dtype: np.dtype) -> Float[Array, " size"]:
    return jnp.arange(size, dtype=dtype) - (size - 1) / 2
