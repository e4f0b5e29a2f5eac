import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

# Hash this many entries at a time: a memory map may be larger than the memory.
_AT_ONCE = 1 << 22


def fingerprint(tree: PyTree) -> str:
    """Returns the first 16 hex digits of a SHA-256 hash of all arrays in a PyTree.

    The hash covers the arrays' paths in the tree, shapes, dtypes and values, so it is
    the same in every process and on every device. Put it in the configuration of a
    [`flowdiffrax.train.Run`][] to prevent a run from resuming with other data or another
    teacher.

    **Arguments:**

    - `tree`: any PyTree, such as a map or `(images.images, images.labels)`. Leaves that
      are not JAX or NumPy arrays are ignored.
    """
    found = hashlib.sha256()
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray):
            continue
        array = _as_numpy(leaf)
        found.update(f"{jtu.keystr(path)} {array.shape} {array.dtype.str};".encode())
        flat = array.reshape(-1)
        for start in range(0, flat.size, _AT_ONCE):
            found.update(flat[start : start + _AT_ONCE].tobytes())
    return found.hexdigest()[:16]


def _as_numpy(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(leaf) if is_key else leaf)
