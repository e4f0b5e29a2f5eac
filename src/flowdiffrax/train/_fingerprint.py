import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

# Entries at a time: a set of images may be mapped from a file larger than the memory.
_AT_ONCE = 1 << 22


def fingerprint(tree: PyTree) -> str:
    """The first 16 hex digits of a sha256 of all arrays of a PyTree.

    It covers their places in the tree, shapes, dtypes and values, so it is the same in
    every process and on every device. In the configuration of a
    [`flowdiffrax.train.Run`][], it keeps a run from going on with other data or another
    teacher.

    **Arguments:**

    - `tree`: any PyTree, such as a map or `(images.images, images.labels)`. Leaves other
      than arrays of JAX and NumPy do not count.
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
