import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl


def describe(module: eqx.Module, settings: str) -> wl.AbstractDoc:
    """One line instead of all layers, for the `__pdoc__` of a network."""
    sizes = [math.prod(leaf.shape) for leaf in jtu.tree_leaves(module) if _is_real(leaf)]
    settings = f"{settings}; " if settings else ""
    text = f"{type(module).__name__}({settings}{sum(sizes):,} parameters)"
    return wl.TextDoc(text)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)
