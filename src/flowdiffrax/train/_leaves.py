"""The leaves of a checkpoint: their names, descriptions and checksums."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, UInt32

_NUMBER = bool | int | float | complex | np.generic


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_saved(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, _NUMBER)


def is_key(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def impl(key: Any) -> Any:
    # `jax.random.key_impl` refuses a `jax.ShapeDtypeStruct`.
    return key.dtype._impl.name


def key_numbers(leaf: Any) -> Any:
    """Replaces a random key by its numbers, and returns other leaves unchanged."""
    if not is_key(leaf):
        return leaf
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.eval_shape(jr.key_data, leaf) if is_shape else jr.key_data(leaf)


def by_name(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the numbers of a tree, each by its path."""
    leaves = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(tree)}
    arrays = {name: leaf for name, leaf in leaves.items() if is_array(leaf)}
    return arrays, {
        name: leaf for name, leaf in leaves.items() if isinstance(leaf, _NUMBER)
    }


def random_keys(arrays: Mapping[str, Any]) -> list[str]:
    return [name for name, leaf in arrays.items() if is_key(leaf)]


def without_keys(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays to write: random keys become numbers, and empty arrays are omitted."""
    return {name: key_numbers(leaf) for name, leaf in arrays.items() if leaf.size > 0}


def describe(arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, str]:
    shapes = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
    return shapes | {name: repr(number) for name, number in numbers.items()}


def read_sums(arrays: Mapping[str, Array]) -> dict[str, int]:
    return {name: int(value) for name, value in _sums(dict(arrays)).items()}


@jax.jit
def _sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return jtu.tree_map(_sum, arrays)


def _sum(leaf: Array) -> UInt32[Array, ""]:
    """A checksum of the bits that does not depend on device or sharding."""
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # The factors are odd, so that no flipped bit is lost, and vary with the position.
    factors = jnp.ones((), jnp.uint32)
    for axis in range(words.ndim):
        places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        factors = factors * jnp.uint32(2654435761) + 2 * places
    return jnp.sum(words * factors, dtype=jnp.uint32)
