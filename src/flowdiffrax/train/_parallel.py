import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._tree import is_concrete

# Below this many entries, a weight costs more to gather than to keep.
_MIN_SHARDED = 4096


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Trains on several devices at once, each with its share of every batch.

    Give it to [`flowdiffrax.train.fit`][] or [`flowdiffrax.train.make_step`][]. A run on
    several devices is the run on one, up to round-off: batches are drawn from the same
    keys. With `jax.distributed.initialize()` called first in every process, the devices
    are those of all processes, and each process makes the same calls.

    **Arguments:**

    - `devices`: the devices; `None` for all.
    - `shard_weights`: whether each device keeps only its part of the large weights,
      averages and optimiser states, and gathers weights when it needs them: less
      memory for more traffic. Otherwise each has a copy.

    **Raises:** `ValueError` for no devices.
    """

    devices: Sequence[Any] | None = None
    shard_weights: bool = False

    def __post_init__(self):
        devices = jax.devices() if self.devices is None else self.devices
        if len(devices) == 0:
            raise ValueError("`devices` must have at least one device; got none.")
        # A frozen class sets its own attributes like this.
        object.__setattr__(self, "devices", tuple(devices))

    def place(self, state: PyTree) -> PyTree:
        """The state with its arrays on the devices, whole or in parts."""
        return jtu.tree_map(self._put_weights, state)

    def replicate(self, tree: PyTree) -> PyTree:
        """Any PyTree with a copy of its arrays on each device.

        What a step closes over or takes besides the state needs it: the data that
        batches are drawn from, a teacher. Parts are gathered: what is to be saved of a
        state with sharded weights needs it too.
        """
        return jtu.tree_map(lambda leaf: self._put(leaf, PartitionSpec()), tree)

    def split(self, batch: PyTree) -> PyTree:
        """A batch with its leading axis spread over the devices.

        **Raises:** `ValueError` if they do not divide it.
        """
        return jtu.tree_map(self._put_rows, batch)

    def gather_rows(self, batch: PyTree) -> PyTree:
        """A batch on the devices, of the rows that each process brings from its host.

        **Raises:** `ValueError` if the devices do not divide the rows.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec("data"))
        put = jax.make_array_from_process_local_data
        return jtu.tree_map(lambda leaf: put(sharding, leaf), batch)

    def _put_weights(self, leaf: Any) -> Any:
        spec = PartitionSpec()
        if self.shard_weights and eqx.is_array(leaf) and leaf.size >= _MIN_SHARDED:
            divisible = [n if n % len(self._devices) == 0 else 0 for n in leaf.shape]
            axis = int(np.argmax(divisible))
            if divisible[axis] > 0:
                spec = PartitionSpec(*(None,) * axis, "data")
        return self._put(leaf, spec)

    def _put_rows(self, leaf: Any) -> Any:
        if eqx.is_array(leaf) and leaf.shape[0] % len(self._devices) != 0:
            raise ValueError(
                f"A batch of {leaf.shape[0]} rows does not divide among "
                f"{len(self._devices)} devices. Choose a multiple for `batch_size`."
            )
        return self._put(leaf, PartitionSpec("data"))

    def _put(self, leaf: Any, spec: PartitionSpec) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        sharding = NamedSharding(self._mesh, spec)
        if is_concrete(leaf):
            return jax.device_put(leaf, sharding)
        return jax.lax.with_sharding_constraint(leaf, sharding)

    @property
    def _devices(self) -> tuple[Any, ...]:
        return tuple(self.devices or ())

    @property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.asarray(self._devices), ("data",))
