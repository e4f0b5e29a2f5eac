import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Complex, Float, Key

from .._check import check_count, check_counts
from ._grids import AbstractGridNetwork, FiLM, VectorCondition
from ._layers import Linear, extend


class FNO(AbstractGridNetwork):
    r"""A Fourier neural operator for fields on a grid, `net(s, t, x, args)`.

    The state has shape `(*grid, channels)`, the channels last, on a grid of one to three
    dimensions. Each layer multiplies the Fourier coefficients of low wavenumbers by
    learned matrices, and adds a learned matrix times the field at each point. Then the
    times and the parameters scale and shift every channel (FiLM), before the activation.

    The weights belong to wavenumbers, not to points, so a network trained on one grid
    may be called on another grid of the same domain. It computes the same function of the
    field there, up to aliasing by the activations.

    The last layer starts at zero, so a [`flowdiffrax.FlowMap`][] of the network starts as
    the identity.

    !!! info "Numerics"

        The domain has length $L$ along an axis, and the network keeps the wavenumbers
        $|k| \le K$ of the waves $\exp(2 \pi i k x / L)$, with $K$ from `modes`.
        Transforms are periodic. With the boundary `"zero"`, each layer first extends the
        field by a quarter of the grid, filled with zeros. With `"reflect"`, it extends
        the field by its mirror image, to twice the length, as a cosine transform does. It
        then removes the extension. Here $L$ is the extended length, so the same
        wavelength needs more modes: 1.25 times, or twice as many.

        With the boundary `"periodic"`, the network commutes with translations by whole
        points. The coordinates of the points, which the paper has as inputs, would
        prevent that. Weights are real: their first axis holds real and imaginary parts.

    **Arguments:**

    - `shape`: the shape of one field, `(*grid, channels)`. When the network is called,
      the grid may have another size.
    - `width`: the number of channels of hidden layers.
    - `modes`: the largest wavenumber $K$ that is kept, one for all axes or a sequence
      with one for each. The grid needs more than $2 K$ points.
    - `depth`: the number of Fourier layers.
    - `boundary`: `"periodic"`, `"zero"` or `"reflect"`, one for all axes, or a sequence
      with one for each. For `"reflect"`, the first and the last point are on the
      boundary.
    - `args_size`, `scale`, `max_frequency`, `two_times`: as for
      [`flowdiffrax.nn.DilatedResNet`][].
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` or `TypeError` for invalid settings, such as more `modes`
    than the grid resolves. When called, `ValueError` for another number of axes or
    channels, for `args` of another shape, and for a grid that does not resolve the modes.

    ??? cite "Reference"

        Fourier neural operator for parametric partial differential equations,
        [arXiv:2010.08895](https://arxiv.org/abs/2010.08895).
    """

    first: Linear
    layers: list["_Layer"]
    hidden: Linear
    last: Linear
    modes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        modes: int | Sequence[int] = 12,
        depth: int = 4,
        *,
        boundary: str | Sequence[str] = "periodic",
        args_size: int = 0,
        scale: float = 1.0,
        max_frequency: float = 1.0,
        two_times: bool = True,
        key: Key[Array, ""],
    ):
        super().__init__(shape, boundary, scale, key)
        check_count(width, 1, "width")
        check_count(depth, 1, "depth")
        self.modes = _check_modes(modes, len(self.shape) - 1)
        self.check_grid(self.shape[:-1])
        condition_key, first_key, layer_key, hidden_key = jr.split(key, 4)
        size = 2 * width
        inputs = args_size, two_times, max_frequency
        self.condition = VectorCondition(size, *inputs, key=condition_key)
        self.first = Linear(self.shape[-1], width, key=first_key)
        layer = lambda key: _Layer(width, size, self.modes, self.boundary, key=key)
        self.layers = [layer(key) for key in jr.split(layer_key, depth)]
        self.hidden = Linear(width, 2 * width, key=hidden_key)
        self.last = Linear(2 * width, self.shape[-1], key=None)

    def normalised(self, x, vector):
        h = self.first(x)
        for index, layer in enumerate(self.layers):
            h = layer(h, vector)
            # As in the paper, the last Fourier layer has no activation.
            h = jax.nn.gelu(h) if index < len(self.layers) - 1 else h
        return self.last(jax.nn.gelu(self.hidden(h)))

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """**Raises:** `ValueError` for a grid that does not resolve the modes."""
        extra = _extra(grid, self.boundary)
        sizes = [n + more for n, more in zip(grid, extra, strict=True)]
        if any(n <= 2 * most for n, most in zip(sizes, self.modes, strict=True)):
            raise ValueError(
                f"`modes` of {self.modes} need more than {[2 * k for k in self.modes]} "
                f"points along the axes; got a grid of {grid}"
                + (f", extended to {(*sizes,)}" if (*sizes,) != grid else "")
                + ". Use fewer modes, or a finer grid."
            )


class _Layer(eqx.Module):
    """A convolution in Fourier space plus a linear map at each point."""

    spectral: "SpectralConv"
    linear: Linear
    film: FiLM

    def __init__(
        self,
        width: int,
        size: int,
        modes: tuple[int, ...],
        boundary: tuple[str, ...],
        *,
        key: Key[Array, ""],
    ):
        spectral_key, linear_key, film_key = jr.split(key, 3)
        self.spectral = SpectralConv(width, width, modes, boundary, key=spectral_key)
        self.linear = Linear(width, width, key=linear_key)
        self.film = FiLM(size, width, key=film_key)

    def __call__(
        self, x: Float[Array, "*grid width"], vector: Float[Array, " size"]
    ) -> Float[Array, "*grid width"]:
        # Both have about the variance of the input.
        return self.film((self.spectral(x) + self.linear(x)) / math.sqrt(2), vector)


class SpectralConv(eqx.Module):
    """Multiplies the Fourier coefficients of low wavenumbers by complex matrices.

    All other coefficients become zero. Along the last axis of the grid, wavenumbers are 0
    to `modes[-1]`, since the field is real. Along the others they are 0 to `modes[i]`,
    then `-modes[i]` to -1.
    """

    weight: Float[Array, "2 *modes inputs outputs"]
    modes: tuple[int, ...] = eqx.field(static=True)
    boundary: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        modes: tuple[int, ...],
        boundary: tuple[str, ...],
        *,
        key: Key[Array, ""],
    ):
        numbers = [*(2 * most + 1 for most in modes[:-1]), modes[-1] + 1]
        shape = (2, *numbers, inputs, outputs)
        self.weight = jr.normal(key, shape) / math.sqrt(2 * inputs)
        self.modes = modes
        self.boundary = boundary

    def __call__(self, x: Float[Array, "*grid inputs"]) -> Float[Array, "*grid outputs"]:
        grid, axes = x.shape[:-1], tuple(range(x.ndim - 1))
        after = [(0, extra) for extra in _extra(grid, self.boundary)]
        x = extend(x, after, self.boundary)
        sizes = x.shape[:-1]
        # With this norm, coefficients do not depend on the resolution.
        waves = jnp.fft.rfftn(x, axes=axes, norm="forward")
        for axis in axes:
            waves = _low(waves, axis, self.modes[axis], axis == axes[-1])
        weight = self.weight.astype(x.dtype)
        waves = jnp.einsum("...i,...io->...o", waves, jax.lax.complex(*weight))
        # One axis after the other: of the coefficients at wavenumber 0 of the last axis,
        # a transform of all axes may assume that they are those of a real field.
        for axis in axes[:-1]:
            waves = _with_zeros(waves, axis, self.modes[axis], sizes[axis])
            waves = jnp.fft.ifft(waves, axis=axis, norm="forward")
        y = jnp.fft.irfft(waves, sizes[-1], axis=axes[-1], norm="forward")
        return y[tuple(slice(n) for n in grid)]


def _extra(grid: tuple[int, ...], boundary: tuple[str, ...]) -> list[int]:
    """How many points a Fourier layer adds at the end of each axis."""
    numbers = {"periodic": lambda n: 0, "zero": lambda n: -(-n // 4)}
    numbers["reflect"] = lambda n: n - 2
    return [max(0, numbers[side](n)) for n, side in zip(grid, boundary, strict=True)]


def _low(
    waves: Complex[Array, "*waves channels"], axis: int, most: int, is_half: bool
) -> Complex[Array, "*kept channels"]:
    """Keeps the wavenumbers up to `most` of one axis."""
    take = lambda first, last: jax.lax.slice_in_dim(waves, first, last, axis=axis)
    n = waves.shape[axis]
    kept = [take(0, most + 1)] if is_half else [take(0, most + 1), take(n - most, n)]
    return jnp.concatenate(kept, axis)


def _with_zeros(
    waves: Complex[Array, "*kept channels"], axis: int, most: int, size: int
) -> Complex[Array, "*waves channels"]:
    """Inserts zeros for the wavenumbers beyond `most`, the inverse of `_low`."""
    low, negative = jnp.split(waves, [most + 1], axis)
    shape = [*waves.shape]
    shape[axis] = size - waves.shape[axis]
    return jnp.concatenate([low, jnp.zeros(shape, waves.dtype), negative], axis)


def _check_modes(modes: int | Sequence[int], num_dims: int) -> tuple[int, ...]:
    """Returns the largest wavenumber of each axis.

    **Raises:** `ValueError` for another number of them or one below 1, `TypeError` unless
    they are whole numbers.
    """
    each = tuple(modes) if isinstance(modes, Sequence) else (modes,) * num_dims
    if len(each) != num_dims:
        raise ValueError(
            f"`modes` must be one number, or one for each of the {num_dims} axes; got "
            f"{modes}."
        )
    check_counts(each, 1, "modes")
    return tuple(int(number) for number in each)
