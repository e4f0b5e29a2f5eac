import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def null_like(null: PyTree, condition: PyTree) -> PyTree:
    """The condition that stands for none, as arrays of the dtypes of a condition.

    **Raises:** `ValueError` for another PyTree structure or other shapes than those of
    `condition`, `TypeError` for a fraction where it has integers.
    """
    got, expected = jtu.tree_structure(null), jtu.tree_structure(condition)
    if got != expected:
        raise ValueError(
            f"`null` must be a PyTree of the structure of the condition, {expected}; got "
            f"{got}. The condition comes as `args`, as `GuidanceArgs` only where the "
            "scale comes with it."
        )

    def cast(leaf, like):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"`null` must have the shape of the condition, {jnp.shape(like)}; got "
                f"{jnp.shape(leaf)}. It stands for the condition of one example: to work "
                "on a batch, use `jax.vmap`."
            )
        dtype = jnp.result_type(like)
        is_exact = lambda dtype: not jnp.issubdtype(dtype, jnp.inexact)
        if is_exact(dtype) and not is_exact(jnp.result_type(leaf)):
            raise TypeError(
                f"`null` must be an integer where the condition is one, of {dtype}; got "
                f"{jnp.result_type(leaf)}. Of labels, mostly the number of classes."
            )
        # Keeps a weak type too: beside a Python number, a number.
        return jnp.full_like(like, leaf)

    return jtu.tree_map(cast, null, condition)
