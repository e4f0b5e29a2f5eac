"""Code shared by the networks on grids: shapes, boundaries, precision, conditioning."""

import abc
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._check import check_count, check_key, check_positive
from .._time import time_dtype, times_like
from .._types import Args, Time
from ._condition import VectorEmbedding
from ._describe import describe
from ._embedding import TwoTimeEmbedding
from ._layers import Linear, modulate

BOUNDARIES = ("periodic", "zero", "reflect")


class VectorCondition(eqx.Module):
    """Embeds both times and a vector of parameters in one vector, by adding them up."""

    times: TwoTimeEmbedding
    vector: VectorEmbedding | None

    def __init__(
        self,
        size: int,
        args_size: int,
        two_times: bool,
        max_frequency: float,
        *,
        key: Key[Array, ""],
    ):
        check_count(args_size, 0, "args_size")
        time_key, vector_key = jr.split(key)
        self.times = TwoTimeEmbedding(
            size, max_frequency=max_frequency, two_times=two_times, key=time_key
        )
        self.vector = None
        if args_size > 0:
            self.vector = VectorEmbedding(size, args_size, key=vector_key)

    def __call__(self, s: Time, t: Time, args: Args) -> Float[Array, " size"]:
        vector = self.times(s, t)
        # Without an input for them, `args` may be meant for the vector field alone.
        return vector if self.vector is None else vector + self.vector(args, vector.dtype)


class FiLM(eqx.Module):
    """Scales and shifts each channel by numbers computed from the condition."""

    linear: Linear

    def __init__(self, size: int, channels: int, *, key: Key[Array, ""]):
        self.linear = Linear(size, 2 * channels, key=key)

    def __call__(
        self, x: Float[Array, "*grid channels"], vector: Float[Array, " size"]
    ) -> Float[Array, "*grid channels"]:
        factor, shift = jnp.split(self.linear(vector), 2)
        return modulate(x, 1 + factor, shift)


class AbstractGridNetwork(eqx.Module):
    """The base class of networks on grids, with their checks, precision and scaling."""

    is_network: ClassVar[bool] = True

    condition: VectorCondition
    shape: tuple[int, ...] = eqx.field(static=True)
    boundary: tuple[str, ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        boundary: str | Sequence[str],
        scale: float,
        key: Key[Array, ""],
    ):
        # Subclasses split the key, and make `condition` with one of the new ones.
        check_key(key)
        self.shape = check_shape(shape)
        self.boundary = check_boundary(boundary, len(self.shape) - 1)
        # A NumPy or JAX number, such as `data.std()`, cannot be a static field.
        check_positive(scale, "scale")
        self.scale = float(scale)

    def __call__(
        self, s: Time, t: Time, x: Float[Array, "*grid channels"], args: Args = None
    ) -> Float[Array, "*grid channels"]:
        check_field(x, self.shape)
        self.check_grid(jnp.shape(x)[:-1])
        s, t = times_like(x, s, t)
        precise = jnp.asarray(x, time_dtype(x))
        vector = jax.nn.silu(self.condition(s, t, args))
        y = self.normalised(precise / self.scale, vector)
        return (self.scale * y).astype(jnp.result_type(x))

    def __pdoc__(self, **kwargs):
        sides = self.boundary[0] if len({*self.boundary}) == 1 else self.boundary
        return describe(self, f"{self.shape}, boundary={sides!r}")

    @abc.abstractmethod
    def normalised(
        self, x: Float[Array, "*grid channels"], vector: Float[Array, " size"]
    ) -> Float[Array, "*grid channels"]:
        """Applies the network to a state of unit scale, given the condition vector."""

    @abc.abstractmethod
    def check_grid(self, grid: tuple[int, ...]) -> None:
        """**Raises:** `ValueError` for a grid with too few points."""


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """**Raises:** `ValueError` unless it is the shape of a field of 1 to 3 dimensions."""
    is_shape = np.ndim(shape) == 1 and 2 <= len(shape) <= 4 and min(shape) >= 1
    if not is_shape:
        raise ValueError(
            "`shape` must be that of one field, a grid of one to three dimensions and "
            f"then the channels, for example (128, 1); got {shape}."
        )
    return tuple(int(number) for number in shape)


def check_boundary(boundary: str | Sequence[str], num_dims: int) -> tuple[str, ...]:
    """Returns the boundary of each axis.

    **Raises:** `ValueError` for others than `BOUNDARIES`, or another number of them.
    """
    one = isinstance(boundary, str)
    sides = (boundary,) * num_dims if one else tuple(boundary)
    if len(sides) != num_dims or not {*sides} <= {*BOUNDARIES}:
        names = ", ".join(f'"{name}"' for name in BOUNDARIES)
        raise ValueError(
            f"`boundary` must be one of {names}, or one of them for each of the "
            f"{num_dims} axes; got {boundary!r}."
        )
    return sides


def check_field(x: Array, shape: tuple[int, ...]) -> None:
    """**Raises:** `TypeError` for complex fields, `ValueError` for other axes."""
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"This network takes real fields; got {jnp.result_type(x)}. Carry the real "
            "and the imaginary part as two channels."
        )
    found, (*grid, channels) = jnp.shape(x), shape
    if len(found) == len(shape) and found[-1] == channels:
        return
    if len(found) == len(shape) and found[0] == channels:
        cure = "If the channels come first, move them: `jnp.moveaxis(x, 0, -1)`."
    elif len(found) == len(grid) and channels == 1:
        cure = "Add the axis of the channel: `x[..., None]`."
    else:
        cure = "For a batch, use `jax.vmap`."
    axes = ", ".join("nml"[: len(grid)])
    raise ValueError(
        f"This network takes one field of shape ({axes}, {channels}), the channels last; "
        f"got {found}. {cure}"
    )
