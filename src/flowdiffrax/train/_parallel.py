import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._check import check_bools
from .._tree import is_concrete

# A weight with fewer entries costs more to gather than to keep on every device.
_MIN_SHARDED = 4096


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Trains on several devices at once, each with its share of every batch.

    Pass it to [`flowdiffrax.train.fit`][] or [`flowdiffrax.train.make_step`][]. A run on
    several devices gives the same result as a run on one, up to round-off, because
    batches are drawn from the same keys. To use several processes, first call
    `jax.distributed.initialize()` in each. The devices are then those of all processes,
    and every process makes the same calls.

    **Arguments:**

    - `devices`: the devices; `None` for all.
    - `shard_weights`: whether each device keeps only its part of the large weights,
      averages and optimiser states, and gathers weights when it needs them. This saves
      memory at the cost of more communication. Otherwise each device has a full copy.
    """

    devices: Sequence[Any] | None = None
    shard_weights: bool = False

    def __post_init__(self):
        check_bools(shard_weights=self.shard_weights)
        devices = jax.devices() if self.devices is None else self.devices
        if len(devices) == 0:
            raise ValueError("`devices` is empty; it must have at least one device.")
        # A frozen class sets its own attributes like this.
        object.__setattr__(self, "devices", tuple(devices))

    def place(self, state: PyTree) -> PyTree:
        """Places the arrays of a state on the devices, replicated or sharded."""
        return jtu.tree_map(self._put_weights, state)

    def replicate(self, tree: PyTree) -> PyTree:
        """Places a copy of all arrays of a PyTree on each device.

        Use it for everything that a step takes or closes over besides the state: the
        data that batches are drawn from, or a teacher. It gathers sharded arrays, so use
        it also before saving part of a state with sharded weights.
        """
        return jtu.tree_map(lambda leaf: self._put(leaf, PartitionSpec()), tree)

    def split(self, batch: PyTree) -> PyTree:
        """Splits the leading axis of a batch over the devices.

        **Raises:** `ValueError` if the number of devices does not divide its length.
        """
        return jtu.tree_map(self._put_rows, batch)

    def gather_rows(self, batch: PyTree) -> PyTree:
        """Assembles a batch on the devices from the rows that each process holds.

        **Raises:** `ValueError` if the number of devices does not divide the rows.
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
        number = len(self._devices)
        if eqx.is_array(leaf) and leaf.shape[0] % number != 0:
            raise ValueError(
                f"{leaf.shape[0]} rows do not divide among {number} devices."
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
