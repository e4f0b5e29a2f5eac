import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._types import AugmentationArgs


def null_like(null: PyTree, condition: PyTree) -> PyTree:
    """Casts the unconditional `null` to arrays with the dtypes of a condition.

    The labels of an augmentation stay: they describe the state, not the condition.

    **Raises:** `ValueError` if the PyTree structure or the shapes differ from those of
    `condition`, `TypeError` if `null` has a fraction where `condition` has an integer.
    """
    if isinstance(condition, AugmentationArgs):
        return condition._replace(condition=null_like(null, condition.condition))
    got, expected = jtu.tree_structure(null), jtu.tree_structure(condition)
    if got != expected:
        raise ValueError(
            f"`null` must have the structure of the condition, {expected}; got {got}. "
            "Pass `GuidanceArgs` only if the scale is read from `args`."
        )

    def cast(leaf, like):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"`null` must have the shape of the condition, {jnp.shape(like)}; got "
                f"{jnp.shape(leaf)}. For a batch, use `jax.vmap`."
            )
        dtype = jnp.result_type(like)
        is_exact = lambda dtype: not jnp.issubdtype(dtype, jnp.inexact)
        if is_exact(dtype) and not is_exact(jnp.result_type(leaf)):
            raise TypeError(
                f"`null` must be an integer of dtype {dtype}, like the condition; got "
                f"{jnp.result_type(leaf)}. For labels, use the number of classes."
            )
        # This keeps weak types too, such as that of a Python number.
        return jnp.full_like(like, leaf)

    return jtu.tree_map(cast, null, condition)
