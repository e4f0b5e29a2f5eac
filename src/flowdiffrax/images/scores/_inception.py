import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from ..._io import StrPath
from ._features import AbstractFeatures, convolve, in_colour, pool_max, resize
from ._weights import SCRIPT, Arrays, check_shapes, read_weights

_CURE = (
    "Fetch `pt_inception-2015-12-05-6726825d.pth` from the releases of pytorch-fid, or "
    "`weights-inception-2015-12-05-6726825d.pth` from those of torch-fidelity, and "
    f"convert it with {SCRIPT}."
)


_SIZE = 299


_EPSILON = 1e-3


# Convolutions by name: input channels, output channels, height and width of the kernel.
_Shapes = dict[str, tuple[int, int, int, int]]


def _stem() -> _Shapes:
    return {
        "Conv2d_1a_3x3": (3, 32, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (32, 64, 3, 3),
        "Conv2d_3b_1x1": (64, 80, 1, 1),
        "Conv2d_4a_3x3": (80, 192, 3, 3),
    }


def _block_a(inputs: int, pooled: int) -> _Shapes:
    return {
        "branch1x1": (inputs, 64, 1, 1),
        "branch5x5_1": (inputs, 48, 1, 1),
        "branch5x5_2": (48, 64, 5, 5),
        "branch3x3dbl_1": (inputs, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (inputs, pooled, 1, 1),
    }


def _block_b(inputs: int) -> _Shapes:
    return {
        "branch3x3": (inputs, 384, 3, 3),
        "branch3x3dbl_1": (inputs, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    }


def _block_c(inputs: int, width: int) -> _Shapes:
    return {
        "branch1x1": (inputs, 192, 1, 1),
        "branch7x7_1": (inputs, width, 1, 1),
        "branch7x7_2": (width, width, 1, 7),
        "branch7x7_3": (width, 192, 7, 1),
        "branch7x7dbl_1": (inputs, width, 1, 1),
        "branch7x7dbl_2": (width, width, 7, 1),
        "branch7x7dbl_3": (width, width, 1, 7),
        "branch7x7dbl_4": (width, width, 7, 1),
        "branch7x7dbl_5": (width, 192, 1, 7),
        "branch_pool": (inputs, 192, 1, 1),
    }


def _block_d(inputs: int) -> _Shapes:
    return {
        "branch3x3_1": (inputs, 192, 1, 1),
        "branch3x3_2": (192, 320, 3, 3),
        "branch7x7x3_1": (inputs, 192, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    }


def _block_e(inputs: int) -> _Shapes:
    return {
        "branch1x1": (inputs, 320, 1, 1),
        "branch3x3_1": (inputs, 384, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (inputs, 448, 1, 1),
        "branch3x3dbl_2": (448, 384, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (inputs, 192, 1, 1),
    }


_BLOCKS = {
    "Mixed_5b": _block_a(192, 32),
    "Mixed_5c": _block_a(256, 64),
    "Mixed_5d": _block_a(288, 64),
    "Mixed_6a": _block_b(288),
    "Mixed_6b": _block_c(768, 128),
    "Mixed_6c": _block_c(768, 160),
    "Mixed_6d": _block_c(768, 160),
    "Mixed_6e": _block_c(768, 192),
    "Mixed_7a": _block_d(768),
    "Mixed_7b": _block_e(1280),
    "Mixed_7c": _block_e(2048),
}


def layout() -> _Shapes:
    """Returns all convolutions of the network, by their names in torch's files."""
    blocks = {
        f"{block}.{name}": shape
        for block, shapes in _BLOCKS.items()
        for name, shape in shapes.items()
    }
    return _stem() | blocks


class InceptionFeatures(AbstractFeatures):
    """The Inception-v3 of the FID: the 2048 means of its last layer, `pool3`.

    This is not torchvision's Inception-v3. It is the network of 2015, with 1008 classes;
    it excludes padding from its means, and its last block takes the maximum instead of
    the mean. `load` reads the weights from a file.

    Images are resized as in pytorch-fid. Statistics made with other code, such as
    clean-fid's bicubic or TensorFlow's own resizing, are of other features: do not mix
    them.

    !!! info "Numerics"

        Batch normalisation by running averages is folded into the preceding convolutions,
        in float64.

    ??? cite "Reference"

        FID, [arXiv:1706.08500](https://arxiv.org/abs/1706.08500); Inception-v3,
        [arXiv:1512.00567](https://arxiv.org/abs/1512.00567).
    """

    kernels: dict[str, Float32[Array, "..."]]
    biases: dict[str, Float32[Array, "..."]]
    name: str = eqx.field(static=True, default="Inception-v3")

    @classmethod
    def load(cls, path: StrPath) -> "InceptionFeatures":
        """Reads the weights. This does not need torch.

        **Arguments:**

        - `path`: a `.safetensors` or `.npz` file with the names of the published `.pth`.
          `examples/convert_weights.py`, in the source repository, makes one from it.

        **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged
        or of another network.
        """
        arrays = read_weights(path, _CURE)
        _check(path, arrays)
        kernels, biases = {}, {}
        for name in layout():
            part = lambda key, name=name: arrays[f"{name}.{key}"].astype(np.float64)
            factor = part("bn.weight") / np.sqrt(part("bn.running_var") + _EPSILON)
            kernel = part("conv.weight").transpose(2, 3, 1, 0) * factor
            bias = part("bn.bias") - part("bn.running_mean") * factor
            kernels[name] = jnp.asarray(kernel, np.float32)
            biases[name] = jnp.asarray(bias, np.float32)
        return cls(kernels=kernels, biases=biases)

    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        x = resize(in_colour(x), _SIZE) * (2 / 255) - 1
        x = self._conv("Conv2d_1a_3x3", x, 2)
        x = self._conv("Conv2d_2a_3x3", x, padding="VALID")
        x = self._conv("Conv2d_2b_3x3", x)
        x = pool_max(x, 2)
        x = self._conv("Conv2d_3b_1x1", x)
        x = self._conv("Conv2d_4a_3x3", x, padding="VALID")
        x = pool_max(x, 2)
        for block in _BLOCKS:
            x = self._block(block, x)
        return jnp.mean(x, (0, 1))

    @property
    def settings(self) -> dict[str, str]:
        return {
            "resize": f"bilinear to {_SIZE}, align_corners=False, not antialiased",
            "values": "2x/255 - 1",
        }

    def _conv(self, name: str, x: Array, stride: int = 1, padding: str = "") -> Array:
        # Convolutions that halve the image are not padded; nearly all others are.
        padding = padding or ("SAME" if stride == 1 else "VALID")
        kernel, bias = self.kernels[name], self.biases[name]
        return jax.nn.relu(convolve(x, kernel, bias, stride, padding))

    def _chain(self, block: str, names: str, x: Array, last_stride: int = 1) -> Array:
        *first, last = [f"{block}.{name}" for name in names.split()]
        for name in first:
            x = self._conv(name, x)
        return self._conv(last, x, last_stride)

    def _block(self, block: str, x: Array) -> Array:
        # Branches are in the order in which their channels are concatenated.
        if block.startswith("Mixed_5"):
            long = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
            branches = [
                self._chain(block, "branch1x1", x),
                self._chain(block, "branch5x5_1 branch5x5_2", x),
                self._chain(block, long, x),
                self._chain(block, "branch_pool", _pool_mean(x)),
            ]
        elif block == "Mixed_6a":
            long = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
            branches = [
                self._chain(block, "branch3x3", x, 2),
                self._chain(block, long, x, 2),
                pool_max(x, 2),
            ]
        elif block.startswith("Mixed_6"):
            short = "branch7x7_1 branch7x7_2 branch7x7_3"
            long = " ".join(f"branch7x7dbl_{n}" for n in range(1, 6))
            branches = [
                self._chain(block, "branch1x1", x),
                self._chain(block, short, x),
                self._chain(block, long, x),
                self._chain(block, "branch_pool", _pool_mean(x)),
            ]
        elif block == "Mixed_7a":
            long = " ".join(f"branch7x7x3_{n}" for n in range(1, 5))
            branches = [
                self._chain(block, "branch3x3_1 branch3x3_2", x, 2),
                self._chain(block, long, x, 2),
                pool_max(x, 2),
            ]
        else:
            short = self._chain(block, "branch3x3_1", x)
            long = self._chain(block, "branch3x3dbl_1 branch3x3dbl_2", x)
            # Only the last block takes the maximum. The published network has a mean
            # there too, but these weights have always been used with the maximum.
            last = block == "Mixed_7c"
            pooled = pool_max(x, 1, "SAME") if last else _pool_mean(x)
            branches = [
                self._chain(block, "branch1x1", x),
                self._chain(block, "branch3x3_2a", short),
                self._chain(block, "branch3x3_2b", short),
                self._chain(block, "branch3x3dbl_3a", long),
                self._chain(block, "branch3x3dbl_3b", long),
                self._chain(block, "branch_pool", pooled),
            ]
        return jnp.concatenate(branches, -1)


def _pool_mean(
    x: Float[Array, "height width channels"],
) -> Float[Array, "height width channels"]:
    """Means over three by three pixels, counting only those inside the image."""
    window = (3, 3, 1), (1, 1, 1), "SAME"
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, *window)
    inside = np.ones(x.shape[:2], np.float32)[..., None]
    counts = jax.lax.reduce_window(inside, np.float32(0), jax.lax.add, *window)
    return sums / jnp.broadcast_to(counts, sums.shape)


def _check(path: StrPath, arrays: Arrays) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs, height, width) in layout().items():
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{key}"] = (outputs,)
        # Older files do not have this counter.
        if f"{name}.bn.num_batches_tracked" in arrays:
            shapes[f"{name}.bn.num_batches_tracked"] = ()
    # No feature depends on the classes, but they identify torchvision's own network: it
    # has 1000, and otherwise the same shapes.
    if "fc.weight" in arrays:
        shapes |= {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    check_shapes(path, arrays, shapes, _CURE)
