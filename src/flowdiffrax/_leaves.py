"""PyTrees of arrays as one vector, and PyTrees of arrays that training leaves alone."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Num, PyTree

from ._custom_types import State


def ravel(x: State, name: str) -> tuple[Num[Array, " size"], Callable]:
    """All entries of a real state as one vector, and the way back.

    **Raises:** `TypeError` for a complex leaf.
    """
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise TypeError(
            f"{name} takes real arrays; got dtypes {dtypes}. Carry the real and the "
            "imaginary part as two leaves."
        )
    # Leaves of several precisions travel in the highest, and return to their own.
    with jax.numpy_dtype_promotion("standard"):
        return ravel_pytree(x)


class Frozen(eqx.Module):
    """A PyTree whose floating-point arrays no optimiser sees.

    What is trained of a module is its floating-point arrays. To stop gradients is not
    enough: weight decay would still shrink a physical constant. Here they are kept as
    the integers of the same bits, which neither `equinox.filter_grad` nor Optax nor a
    moving average touches, while `jit`, `vmap` and checkpoints carry them as arrays.
    """

    bits: PyTree
    dtypes: tuple[np.dtype | None, ...] = eqx.field(static=True)

    def __init__(self, tree: Any):
        # A NumPy array would be a constant of the compiled code.
        as_jax = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        tree = jtu.tree_map(as_jax, tree)
        is_hidden = eqx.is_inexact_array
        leaves = jtu.tree_leaves(tree)
        self.dtypes = tuple(leaf.dtype if is_hidden(leaf) else None for leaf in leaves)
        self.bits = jtu.tree_map(
            lambda leaf: _to_bits(leaf) if is_hidden(leaf) else leaf, tree
        )

    def thaw(self) -> Any:
        """The PyTree as it was."""
        leaves, structure = jtu.tree_flatten(self.bits)
        restored = [
            leaf if dtype is None else _from_bits(leaf, dtype)
            for leaf, dtype in zip(leaves, self.dtypes, strict=True)
        ]
        return jtu.tree_unflatten(structure, restored)


def _to_bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    return lax.bitcast_convert_type(leaf, _bits_of(leaf.dtype))


def _from_bits(leaf: Array, dtype: np.dtype) -> Array:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    part = jnp.finfo(dtype).dtype
    if leaf.dtype != _bits_of(part):
        raise TypeError(
            f"An array that is held fixed was cast to {leaf.dtype}. To cast a map, map "
            "over its `equinox.is_inexact_array` leaves, and build it anew around what "
            "is held fixed."
        )
    parts = lax.bitcast_convert_type(leaf, part)
    return lax.complex(parts[0], parts[1]) if is_complex else parts


def _bits_of(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{jnp.finfo(dtype).bits}")
