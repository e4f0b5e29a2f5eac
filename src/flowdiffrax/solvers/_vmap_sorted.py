from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree, Real

from .._check import check_at_least
from .._tree import num_rows


def vmap_sorted(
    fn: Callable[[Any], PyTree],
    xs: PyTree,
    difficulty: Real[Array, " batch"],
    *,
    chunk_size: int,
) -> PyTree:
    """Computes `jax.vmap(fn)(xs)` in chunks of examples that are about equally hard.

    Under `jax.vmap`, all adaptive solves of a batch run until the slowest is done. If the
    examples are sorted by difficulty, a chunk of easy examples ends early. With
    [`flowdiffrax.HybridSolver`][], examples that only need the jump neither wait nor pay
    for the classical steps of the others. It works inside `jit`.

    ```python
    def difficulty(y0):
        _, error = PicardDefect()(flow_map, vector_field, t0, t1, y0)
        return jnp.linalg.norm(error)

    ys = vmap_sorted(solve, y0s, jax.vmap(difficulty)(y0s), chunk_size=256)
    ```

    **Arguments:**

    - `fn`: a function of one example.
    - `xs`: a batch of examples, every leaf with the same leading axis.
    - `difficulty`: a number for each example, to sort by; NaN counts as hardest.
    - `chunk_size`: the number of examples in a chunk, at least 1.

    **Returns:** the results of `fn`, every leaf with the batch axis, in the order of
    `xs`.

    **Raises:** `ValueError` for a batch without a common leading axis, if the number of
    difficulties differs from the number of examples, or for a `chunk_size` less than 1.
    """
    size = num_rows(xs, "`xs` is a batch of examples: its leaves")
    if jnp.shape(difficulty) != (size,):
        raise ValueError(
            f"`difficulty` must have shape {(size,)}; got {jnp.shape(difficulty)}."
        )
    check_at_least(chunk_size, 1, "chunk_size")
    order = jnp.argsort(difficulty)
    take = lambda rows, tree: jtu.tree_map(lambda leaf: jnp.asarray(leaf)[rows], tree)
    # The hardest examples come last, and form the remainder.
    results = lax.map(fn, take(order, xs), batch_size=chunk_size)
    return take(jnp.argsort(order), results)
