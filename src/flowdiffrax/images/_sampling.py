"""Samples in a number of jumps, drawn in blocks on all devices."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, PyTree, Real

from .._types import Args, State, TwoTimeMap
from ..train._reports import placed, rows_of


@eqx.filter_jit
def jump(
    flow_map: TwoTimeMap,
    s: Real[ArrayLike, ""],
    t: Real[ArrayLike, ""],
    x: State,
    args: Args,
) -> State:
    """One jump of a whole batch."""
    axes = eqx.if_array(0)
    one = lambda x, args: flow_map(s, t, x, args)
    return eqx.filter_vmap(one, in_axes=(axes, axes))(x, args)


def in_jumps(
    flow_map: TwoTimeMap,
    num_jumps: int,
    x: State,
    args: Args,
    time_range: tuple[float, float] = (0.0, 1.0),
) -> State:
    """Takes a batch over the interval in jumps of equal length."""
    # In Python: in an XLA loop, convolutions on CPUs are many times slower.
    times = np.linspace(*time_range, num_jumps + 1, dtype=np.float32)
    for s, t in zip(times[:-1], times[1:], strict=True):
        x = jump(flow_map, s, t, x, args)
    return x


def in_blocks(
    draw: Callable[..., PyTree],
    inputs: tuple[Any, ...],
    size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> Iterator[PyTree[np.ndarray]]:
    """Yields samples on the host. Only one block of rows is on the devices at a time.

    **Arguments:**

    - `draw`: a function of a block of each of the inputs.
    - `inputs`: PyTrees whose arrays have a common leading axis, or no axis.
    - `size`: the number of rows.
    - `batch_size`: the number of rows of a block; the last may be shorter.
    - `sharding`: where the map is. If there are several devices whose number divides the
      rows of a block, each of them computes its part of the block.
    """
    for start in range(0, size, batch_size):
        stop = min(start + batch_size, size)
        rows = _over_devices(sharding, stop - start)

        def put(leaf, rows=rows):
            leaf = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
            return placed(leaf, rows if np.ndim(leaf) > 0 else sharding)

        drawn = draw(*jtu.tree_map(put, rows_of(inputs, start, stop)))
        yield jtu.tree_map(np.asarray, placed(drawn, sharding))


def _over_devices(sharding: jax.sharding.Sharding, number: int) -> jax.sharding.Sharding:
    """The sharding of a number of rows over the devices, if it divides them."""
    if isinstance(sharding, NamedSharding) and number % sharding.mesh.size == 0:
        return NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
    return sharding
