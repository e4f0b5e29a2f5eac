"""The examples of a batch as rows of a matrix."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._types import Args, State


def same_label(args: Args, size: int) -> Bool[Array, "batch batch"]:
    """Which pairs of examples have equal conditions."""
    same = jnp.ones((size, size), bool)
    for leaf in jtu.tree_leaves(args):
        rows = jnp.reshape(leaf, (size, -1))
        same = same & jnp.all(rows[:, None] == rows[None, :], axis=-1)
    return same


def centred_rows(x: State, dtype: jnp.dtype) -> Float[Array, "batch entries"]:
    """All real entries of each example, less their mean over the batch."""
    leaves = [jnp.reshape(leaf, (jnp.shape(leaf)[0], -1)) for leaf in jtu.tree_leaves(x)]
    parts = [
        part(leaf).astype(dtype)
        for leaf in leaves
        for part in ((jnp.real, jnp.imag) if jnp.iscomplexobj(leaf) else (jnp.real,))
    ]
    rows = jnp.concatenate(parts, axis=1)
    return rows - jnp.mean(rows, axis=0, keepdims=True)
