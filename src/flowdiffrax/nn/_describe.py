import equinox as eqx
import jax.tree_util as jtu
import wadler_lindig as wl


def describe(module: eqx.Module, settings: str) -> wl.AbstractDoc:
    """One line instead of all layers, for the `__pdoc__` of a network."""
    size = sum(getattr(leaf, "size", 0) for leaf in jtu.tree_leaves(module))
    return wl.TextDoc(f"{type(module).__name__}({settings}; {size:,} parameters)")
