"""PyTrees of arrays: arithmetic, ravelling, and arrays that training does not change."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Inexact, Num, PyTree

from ._types import Scalar, State


def ravel(x: State, name: str) -> tuple[Num[Array, " size"], Callable]:
    """Flattens a real state to one vector; also returns the inverse function.

    **Raises:** `TypeError` for a complex leaf.
    """
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise TypeError(
            f"{name} takes real arrays; got dtypes {dtypes}. Carry the real and the "
            "imaginary part as two leaves."
        )
    # The vector has the highest precision of the leaves; the inverse restores theirs.
    with jax.numpy_dtype_promotion("standard"):
        return ravel_pytree(x)


class Frozen(eqx.Module):
    """A PyTree whose floating-point arrays are hidden from optimisers.

    Training updates the floating-point arrays of a module. Stopping gradients is not
    enough to hold them fixed: weight decay would still shrink a physical constant. This
    class stores them as integers with the same bits. Neither `equinox.filter_grad` nor
    Optax nor a moving average changes integers, while `jit`, `vmap` and checkpoints treat
    them as arrays.
    """

    bits: PyTree
    dtypes: tuple[np.dtype | None, ...] = eqx.field(static=True)

    def __init__(self, tree: Any):
        # A NumPy array would become a constant of the compiled code.
        as_jax = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        tree = jtu.tree_map(as_jax, tree)
        is_hidden = eqx.is_inexact_array
        leaves = jtu.tree_leaves(tree)
        self.dtypes = tuple(leaf.dtype if is_hidden(leaf) else None for leaf in leaves)
        self.bits = jtu.tree_map(
            lambda leaf: _to_bits(leaf) if is_hidden(leaf) else leaf, tree
        )

    def thaw(self) -> Any:
        """Returns the original PyTree."""
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
            f"An array that is held fixed was cast to {leaf.dtype}. Cast only the "
            "`equinox.is_inexact_array` leaves, or build the map from arrays as cast."
        )
    parts = lax.bitcast_convert_type(leaf, part)
    return lax.complex(parts[0], parts[1]) if is_complex else parts


def _bits_of(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{jnp.finfo(dtype).bits}")


def scale(factor: Scalar, x: State) -> State:
    """Returns `factor * x`; every leaf keeps its dtype."""
    if isinstance(x, Array) and factor.dtype == x.dtype:
        return factor * x
    return jtu.tree_map(lambda leaf: _cast_factor(factor, leaf) * leaf, x)


def add_scaled(x: State, factor: Scalar, v: State) -> State:
    """Returns `x + factor * v`; every leaf keeps its dtype."""
    if isinstance(v, Array) and factor.dtype == v.dtype:
        return x + factor * v
    return jtu.tree_map(lambda a, b: a + _cast_factor(factor, b) * b, x, v)


def subtract(x: State, y: State) -> State:
    """Returns `x - y`, leaf by leaf."""
    return jtu.tree_map(operator.sub, x, y)


def _cast_factor(factor: Scalar, leaf: ArrayLike) -> Inexact[Array, ""]:
    # Times may be more precise than the state (float64 steps of a float32 state) or less
    # (float32 times of a float64 state). The state's precision decides.
    dtype = jnp.result_type(leaf)
    return factor.astype(jnp.finfo(dtype).dtype).astype(dtype)


def squared_norm(x: State) -> Scalar:
    """Returns the sum of squares of all entries of all leaves."""
    leaves = [jnp.sum(jnp.real(leaf * jnp.conj(leaf))) for leaf in jtu.tree_leaves(x)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(sum(leaves))


def vary_like(value: Array, like: Array) -> Array:
    """Returns `value`, varying along the same `jax.shard_map` axes as `like`.

    Linearised functions and loops refuse a constant in place of a varying value.
    """
    return value + jnp.zeros_like(like, value.dtype, shape=())


def all_finite(x: State) -> Array:
    """Whether every entry of every leaf is finite, as a scalar boolean array."""
    # Counts compile faster than booleans. XLA would turn booleans into one `and` for each
    # leaf and copy them all into every kernel that reads the result, which takes minutes.
    broken = [jnp.sum(~jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(x)]
    return jnp.all(jnp.asarray(broken, jnp.int32) == 0)


def nan_where(condition: Array, x: State) -> State:
    """Returns `x`, but NaN where the condition holds. Integer leaves are unchanged."""

    def replace(leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.where(condition, jnp.nan, leaf) if inexact else leaf

    return jtu.tree_map(replace, x)


def is_concrete(x: PyTree) -> bool:
    """Whether no leaf is a tracer, so that an `if` may depend on the values."""
    return not any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(x))


def freeze(tree: PyTree) -> PyTree:
    """Stops the gradient of every array of a PyTree. Other leaves are unchanged."""
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
    return jtu.tree_map(stop, tree)


def num_rows(tree: PyTree, name: str) -> int:
    """Returns the length of the leading axis that all arrays of a batch share.

    **Raises:** `ValueError` if they share no leading axis, or if it is empty.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(tree)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            f"{name} must be arrays with one common leading axis that is not empty; got "
            f"leading axes {sorted(sizes)}."
        )
    return sizes.pop()[0]


def rows_not_finite(tree: PyTree) -> Bool[np.ndarray, " rows"]:
    """Returns which rows of a batch are known to have an entry that is not finite."""
    leaves = jtu.tree_leaves(tree)
    bad = np.zeros(jnp.shape(leaves[0])[0], bool)
    is_inexact = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    for leaf in filter(is_inexact, leaves):
        # Each host knows only its own part of an array that is spread over several.
        is_known = is_concrete(leaf) and getattr(leaf, "is_fully_addressable", True)
        if is_known and isinstance(leaf, jax.Array):
            # A constant within `jit` is concrete, but results computed from it are not.
            with jax.ensure_compile_time_eval():
                bad |= np.asarray(_has_not_finite(leaf))
        elif is_known:
            bad |= ~np.isfinite(leaf).all(axis=tuple(range(1, np.ndim(leaf))))
    return bad


@jax.jit
def _has_not_finite(leaf: Array) -> Bool[Array, " rows"]:
    return jnp.any(~jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
