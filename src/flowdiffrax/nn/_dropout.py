from collections.abc import Hashable
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree, UInt32

from .._check import check_between, check_key

_Tree = TypeVar("_Tree", bound=PyTree)


class Dropout(eqx.Module):
    """Sets entries to zero at random, and divides the others by the share that remains.

    Without a key, it returns its input. Give a network of your own one of these, without
    a key: the training step sets the key in the rows that have dropout, see
    [Networks](../networks.md#dropout).

    **Arguments:**

    - `rate`: the probability that an entry is dropped, in [0, 1).
    - `key`: a random key, or `None`.

    **Raises:** `ValueError` for a rate outside [0, 1).
    """

    # As numbers: several evaluations use one key on purpose, which JAX's check of keys
    # would report as a mistake.
    key_data: UInt32[Array, "*batch numbers"] | None
    key_impl: Hashable = eqx.field(static=True)
    rate: float = eqx.field(static=True)

    def __init__(self, rate: float, key: Key[Array, "*batch"] | None = None):
        check_between(rate, 0, 1, "dropout", "[)")
        self.rate = float(rate)
        self.key_data = None if key is None else jr.key_data(key)
        self.key_impl = None if key is None else jr.key_impl(key)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        key = self._key()
        if key is None:
            return x
        kept = jr.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)

    def at(self, index: int) -> "Dropout":
        """Returns the same with another key, for one of several places in a network.

        **Arguments:**

        - `index`: the number of the place.
        """
        key = self._key()
        return self if key is None else Dropout(self.rate, jr.fold_in(key, index))

    def each(self, number: int) -> "Dropout":
        """Returns the same with an array of keys, for a loop over blocks.

        **Arguments:**

        - `number`: the number of blocks.
        """
        key = self._key()
        return self if key is None else Dropout(self.rate, jr.split(key, number))

    def _key(self) -> Key[Array, ""] | None:
        if self.key_data is None:
            return None
        return jr.wrap_key_data(self.key_data, impl=self.key_impl)


def with_dropout(tree: _Tree, key: Key[Array, ""]) -> _Tree:
    """Switches dropout on in all networks of a PyTree.

    All evaluations of the returned networks drop the same entries, so derivatives and
    differences are those of one function. Training does this for you, with another key
    for each example; see [Networks](../networks.md#dropout). Call it yourself in a
    training loop that does not use [`flowdiffrax.objectives.batch_loss`][].

    **Arguments:**

    - `tree`: a network with `dropout`, a map of it, or any PyTree with such networks.
      Networks without dropout are unchanged.
    - `key`: a random key. It decides which entries are dropped.
    """
    check_key(key)
    nodes, structure = jtu.tree_flatten(tree, is_leaf=_is_dropout)
    places = [place for place, node in enumerate(nodes) if _is_dropout(node)]
    for place in places:
        if nodes[place].rate > 0:
            nodes[place] = Dropout(nodes[place].rate, jr.fold_in(key, place))
    return jtu.tree_unflatten(structure, nodes)


def has_dropout(tree: PyTree) -> bool:
    """Whether a network of a PyTree has dropout."""
    nodes = jtu.tree_leaves(tree, is_leaf=_is_dropout)
    return any(_is_dropout(node) and node.rate > 0 for node in nodes)


def _is_dropout(node: object) -> bool:
    return isinstance(node, Dropout)
