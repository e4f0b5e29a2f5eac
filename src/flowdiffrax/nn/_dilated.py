from collections.abc import Sequence

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._check import check_count, check_counts
from ._grids import AbstractGridNetwork, FiLM, VectorCondition
from ._layers import Conv


class DilatedResNet(AbstractGridNetwork):
    r"""A dilated residual network for fields on a grid, `net(s, t, x, args)`.

    The state has shape `(*grid, channels)`, the channels last, on a grid of one to three
    dimensions. Each block has one convolution for each dilation, and adds its result to
    its input. Before each activation, the times and the parameters scale and shift every
    channel (FiLM).

    A network made for one grid runs on any other with the same number of axes. But its
    stencils have a fixed width in points, so a network trained on one resolution is not
    accurate on another. See [`flowdiffrax.nn.FNO`][] for networks that are.

    The last convolution starts at zero, so a [`flowdiffrax.FlowMap`][] of the network
    starts as the identity.

    !!! info "Numerics"

        With the boundary `"periodic"`, the network commutes with translations by whole
        points. The default dilations let a block see 22 points to each side. Activations
        are smooth, since many objectives contain time derivatives. The paper has ReLU,
        and no conditions.

    **Arguments:**

    - `shape`: the shape of one field, `(*grid, channels)`. When the network is called,
      the grid may have another size.
    - `width`: the number of channels of hidden layers.
    - `num_blocks`: the number of residual blocks.
    - `dilations`: the distances between the three points of the convolutions of a block,
      in order.
    - `boundary`: how fields continue beyond the grid, in every hidden layer too:
      `"periodic"`; `"zero"`, by zeros; or `"reflect"`, mirrored at the outermost points.
      One for all axes, or a sequence with one for each.
    - `args_size`: the length of the vector `args`, or 1 for a number. With 0, there is no
      condition, and `args` is ignored: it may be meant for the vector field alone.
      Parameters should be of order one, so take logarithms of those that span several
      orders of magnitude.
    - `scale`: the typical size of the state's entries. Inputs are divided by it, and
      outputs are multiplied by it.
    - `max_frequency`: as for [`flowdiffrax.nn.TwoTimeEmbedding`][].
    - `two_times`: `False` for a velocity, which ignores the end time; see
      [`flowdiffrax.nn.two_times`][].
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` or `TypeError` for invalid settings. When called,
    `ValueError` for another number of axes or channels, for `args` of another shape, and
    for a grid that has no more points along an axis than the largest dilation.

    ??? cite "Reference"

        Learned coarse models for efficient turbulence simulation,
        [arXiv:2112.15275](https://arxiv.org/abs/2112.15275).
    """

    first: Conv
    blocks: list["_Block"]
    last: Conv
    dilations: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 48,
        num_blocks: int = 4,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8, 4, 2, 1),
        boundary: str | Sequence[str] = "periodic",
        args_size: int = 0,
        scale: float = 1.0,
        max_frequency: float = 1.0,
        two_times: bool = True,
        key: Key[Array, ""],
    ):
        super().__init__(shape, boundary, scale, key)
        check_count(width, 1, "width")
        check_count(num_blocks, 1, "num_blocks")
        check_counts(dilations, 1, "dilations")
        self.dilations = tuple(int(dilation) for dilation in dilations)
        self.check_grid(self.shape[:-1])
        condition_key, first_key, block_key = jr.split(key, 3)
        size = 2 * width
        inputs = args_size, two_times, max_frequency
        self.condition = VectorCondition(size, *inputs, key=condition_key)
        self.first = Conv(self.shape[-1], width, self.boundary, key=first_key)
        block = lambda key: _Block(width, size, self.dilations, self.boundary, key=key)
        self.blocks = [block(key) for key in jr.split(block_key, num_blocks)]
        self.last = Conv(width, self.shape[-1], self.boundary, key=None)

    def normalised(self, x, vector):
        h = self.first(x)
        for block in self.blocks:
            h = block(h, vector)
        return self.last(h)

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """**Raises:** `ValueError` for a grid that a dilation steps over."""
        most = max(self.dilations, default=1)
        if min(grid) <= most:
            raise ValueError(
                f"With dilations up to {most}, the grid must have more than {most} "
                f"points along each axis; got {grid}. For a smaller grid, choose smaller "
                "`dilations`."
            )


class _Block(eqx.Module):
    """Convolutions with the given dilations, whose result is added to the input."""

    convolutions: list[Conv]
    films: list[FiLM]

    def __init__(
        self,
        width: int,
        size: int,
        dilations: tuple[int, ...],
        boundary: tuple[str, ...],
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key, (len(dilations), 2))
        self.convolutions = [
            Conv(width, width, boundary, dilation, key=keys[index, 0])
            for index, dilation in enumerate(dilations)
        ]
        self.films = [
            FiLM(size, width, key=keys[index, 1]) for index in range(len(dilations))
        ]

    def __call__(
        self, x: Float[Array, "*grid width"], vector: Float[Array, " size"]
    ) -> Float[Array, "*grid width"]:
        h = x
        for convolution, film in zip(self.convolutions, self.films, strict=True):
            h = jax.nn.gelu(film(convolution(h), vector))
        return x + h
