from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key

from .._check import check_callable, check_count, check_instance, check_key
from .._tree import num_rows, rows_not_finite
from .._types import State
from ._coupling import AbstractCoupling
from ._optimal_transport import OptimalTransportCoupling


def couple_snapshots(
    snapshots: Sequence[State] | Array | np.ndarray,
    num_chains: int | None = None,
    *,
    key: Key[Array, ""],
    coupling: AbstractCoupling | None = None,
    block_size: int = 1024,
) -> State:
    r"""Links members of populations that were observed at different times to chains.

    A snapshot destroys what it measures, as in single-cell sequencing, or does not track
    it. Nothing then says which member at one time became which at the next. This function
    draws members of each snapshot, and pairs those of neighbouring snapshots by optimal
    transport, which assumes that the members together moved as little as possible. A
    chain has one member of each snapshot.

    Every member of a snapshot occurs equally often, to within one, so each snapshot keeps
    its distribution. It follows that a group that grows or dies out between two
    snapshots exchanges members with other groups.

    **Arguments:**

    - `snapshots`: the populations in the order of their times, at least two: arrays, or
      PyTrees of arrays, with a leading axis of any length. Scale entries of different
      units to a common one: transport compares squared distances.
    - `num_chains`: the number of chains; `None` for the size of the largest snapshot.
    - `key`: a random key, which decides who is in which block.
    - `coupling`: how neighbours are paired, `coupling(key, earlier, later, args)` with
      `args=None`. `None` stands for [`flowdiffrax.paths.OptimalTransportCoupling`][],
      which needs ott-jax.
    - `block_size`: the largest number of chains that are coupled at once. Larger blocks
      are nearer to the optimal transport between the populations. On two CPU cores, a
      pair of snapshots in the plane takes 0.2 s for a block of 1024, and 10 s for one of
      4096.

    **Returns:** the chains, every leaf of shape `(chains, snapshots, ...)`, the layout of
    a pool of trajectories. They go to [`flowdiffrax.data.SplineBatches`][], and
    `Normalisation.of(ts, chains)` has their units. With conditions, such as a treatment,
    couple each condition on its own, and concatenate.

    **Raises:** `ValueError` for fewer than two snapshots, for snapshots whose members
    differ in structure or shape, that are empty, or that have members that are not finite
    (see [`flowdiffrax.data.finite_rows`][]), or for a number of chains or a block size
    below 1; `TypeError` for integers, or for something else than a sequence of
    snapshots; `ImportError` without ott-jax.

    ??? cite "Reference"

        Splines through members that transport couples from each snapshot to the next:
        [arXiv:2010.12101](https://arxiv.org/abs/2010.12101).
    """
    what = "a list of populations, one for each time"
    check_instance(snapshots, Sequence | np.ndarray | jax.Array, "snapshots", what)
    if len(snapshots) < 2:
        raise ValueError(
            f"A chain needs at least two snapshots; got {len(snapshots)}. For a flow "
            "from noise to one population, use `data.InterpolantBatches`."
        )
    check_key(key)
    snapshots = [_as_population(each, n) for n, each in enumerate(snapshots)]
    _check_alike(snapshots)
    sizes = [num_rows(each, "A snapshot") for each in snapshots]
    num_chains = max(sizes) if num_chains is None else num_chains
    check_count(num_chains, 1, "num_chains")
    check_count(block_size, 1, "block_size")
    coupling = OptimalTransportCoupling() if coupling is None else coupling
    check_callable(coupling, "coupling", "coupling(key, x0, x1, args)")

    # Blocks of about the same size; dropping rows to make them equal would lose members.
    num_blocks = -(-num_chains // block_size)
    rows_in_block = -(-num_chains // num_blocks)
    draw_key, pair_key = jr.split(key)
    drawn = [
        _deal(jr.fold_in(draw_key, n), each, size, num_chains)
        for n, (each, size) in enumerate(zip(snapshots, sizes, strict=True))
    ]
    blocks = []
    for index, first in enumerate(range(0, num_chains, rows_in_block)):
        rows = slice(first, first + rows_in_block)
        members = [jtu.tree_map(lambda leaf, r=rows: leaf[r], each) for each in drawn]
        blocks.append(_link(coupling, jr.fold_in(pair_key, index), members))
    return jtu.tree_map(lambda *leaves: jnp.concatenate(leaves), *blocks)


@eqx.filter_jit
def _link(coupling: Any, key: Key[Array, ""], members: list[State]) -> State:
    """Orders all but the last snapshot of a block, and stacks them."""
    linked = [members[-1]]
    for n, earlier in reversed(list(enumerate(members[:-1]))):
        linked.append(coupling(jr.fold_in(key, n), earlier, linked[-1], None))
    return jtu.tree_map(lambda *leaves: jnp.stack(leaves, axis=1), *reversed(linked))


def _deal(key: Key[Array, ""], members: State, size: int, number: int) -> State:
    """Draws members in random order, all of them before any is drawn again."""
    num_rounds = -(-number // size)
    order = jax.vmap(lambda key: jr.permutation(key, size))(jr.split(key, num_rounds))
    return jtu.tree_map(lambda leaf: leaf[order.ravel()[:number]], members)


def _as_population(members: Any, index: int) -> State:
    """**Raises:** `ValueError` or `TypeError` for what is not a population."""
    members = jtu.tree_map(jnp.asarray, members)
    name = f"Snapshot {index}"
    num_rows(members, name)
    for leaf in jtu.tree_leaves(members):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"{name} must have floating-point entries; got {leaf.dtype}. Convert it "
                "with `.astype(float)`; counts are usually log-transformed first."
            )
    bad = rows_not_finite(members)
    if bad.any():
        raise ValueError(
            f"{name} must be finite; {bad.sum()} of its {bad.size} members are not, the "
            f"first of them row {bad.argmax()}. Drop them with `data.finite_rows`."
        )
    return members


def _check_alike(snapshots: list[State]) -> None:
    """**Raises:** `ValueError` if members are not like those of the first snapshot."""
    kind = lambda members: (
        jtu.tree_structure(members),
        [(leaf.shape[1:], leaf.dtype) for leaf in jtu.tree_leaves(members)],
    )
    for index, members in enumerate(snapshots):
        if kind(members) != kind(snapshots[0]):
            raise ValueError(
                "Members of all snapshots must be alike in structure, shape and dtype: "
                f"those of snapshot 0 are {kind(snapshots[0])[1]}, of snapshot {index} "
                f"{kind(members)[1]}. Use the same entries at all times."
            )
