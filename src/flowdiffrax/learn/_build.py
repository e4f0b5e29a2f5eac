import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key

from ..data import StreamBatches, TrajectoryBatches
from ..flow_maps._autonomous import AutonomousFlowMap
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._conserve_linear import ConserveLinear
from ..flow_maps._normalisation import Normalisation
from ..flow_maps._projected import ConserveInvariants, ProjectedFlowMap
from ..flow_maps._ravelled import RavelledFlowMap
from ..flow_maps._relaxation import RelaxationFlowMap
from ..flow_maps._residual import FlowMap
from ..nn import MLP, LogUnits, RelaxationMLP
from ..objectives._trajectory import TrajectoryMatching
from ..times import GridTimes, MixedTimes, StartAt
from ..weights import InverseGap, NoWeight
from ._observed import Observed
from ._plan import Plan
from ._pool import Pool
from ._robust import RobustDifference
from ._streamed import Streamed


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is trained, and on what.

    **Attributes:**

    - `flow_map`: the map in training.
    - `objective`: a [`flowdiffrax.TrajectoryMatching`][].
    - `batches`: a [`flowdiffrax.data.TrajectoryBatches`][], or a function of a key that
      draws pairs of observations; or a [`flowdiffrax.data.StreamBatches`][].
    - `in_user_units`: turns the map in training into one of vectors in the user's units.
    - `plan`: what the parts were built from.
    """

    flow_map: AbstractFlowMap
    objective: TrajectoryMatching
    batches: Callable[[Any], Any] | StreamBatches
    in_user_units: Callable[[AbstractFlowMap], AbstractFlowMap]
    plan: Plan

    def finish(self, flow_map: AbstractFlowMap) -> AbstractFlowMap:
        """Turns the map in training into one of the user's states and times."""
        return restore(self.plan, self.in_user_units(flow_map))


def build(
    plan: Plan,
    pool: Pool,
    key: Key[Array, ""],
    observed: Observed | Streamed | None = None,
) -> Parts:
    """Builds the map, the objective and the batches that a plan describes.

    The pool shows the units. If `observed` is given, it is what the map learns from.
    """
    make = {"relaxation": _relaxation, "residual": _residual}[plan.form]
    flow_map, objective, batches, in_user_units = make(plan, pool, key, observed)
    return Parts(flow_map, objective, batches, in_user_units, plan)


def restore(plan: Plan, flow_map: AbstractFlowMap) -> AbstractFlowMap:
    """Adds the invariants to a map of vectors, and the user's structure of states."""
    if len(plan.invariants) > 0:
        flow_map = ProjectedFlowMap(flow_map, _projection(plan))
    return flow_map if plan.is_vector else RavelledFlowMap(flow_map)


def _relaxation(plan: Plan, pool: Pool, key: Any, observed: Any) -> tuple:
    ts = pool.ts - pool.ts[0] if plan.is_autonomous else pool.ts
    time_range = float(ts[0]), float(ts[-1])
    floor = 0.0 if plan.noise is None else plan.noise
    units = _all_single(LogUnits.of(ts, pool.ys, plan.is_positive, pool.args, floor))
    net = RelaxationMLP(
        units,
        plan.width,
        plan.depth,
        args_size=plan.args_size,
        time_range=None if plan.is_autonomous else time_range,
        key=key,
    )
    flow_map = RelaxationFlowMap(_all_single(net), time_range)
    if plan.is_autonomous:
        flow_map = AutonomousFlowMap(flow_map)
    if observed is not None:
        single = observed.convert(lambda ts, ys: (_single(ts), _single(ys)), _single)
        learned = _from_observations(plan, units, plan.noise, single)
        return flow_map, *learned, lambda flow_map: flow_map
    args = None if pool.args is None else _single(pool.args)
    grid = _single(ts)
    pairs = GridTimes(grid)
    # The fast part of a stiff solution is at the start only.
    times = MixedTimes((pairs, StartAt(pairs, time_range[0])), (2, 1))
    difference = RobustDifference(units)
    objective = TrajectoryMatching(times, NoWeight(), difference=difference)
    batches = TrajectoryBatches(grid, _single(pool.ys), plan.batch_size, args)
    return flow_map, objective, batches, lambda flow_map: flow_map


def _residual(plan: Plan, pool: Pool, key: Any, observed: Any) -> tuple:
    args = None if pool.args is None else jnp.asarray(pool.args)
    units = _all_single(Normalisation.of(pool.ts, jnp.asarray(pool.ys), args))
    net = MLP(plan.size, plan.width, plan.depth, args_size=plan.args_size, key=key)
    net = _all_single(net)
    flow_map = FlowMap(net)
    if plan.is_autonomous:
        ends = (-1.0, 1.0) if plan.both_directions else (0.0, 1.0)
        flow_map = AutonomousFlowMap(FlowMap(net, time_range=ends))

    def convert(ts: Any, ys: Any) -> tuple:
        ts, ys = units.trajectories(jnp.asarray(ts), jnp.asarray(ys))
        return _single(ts), _single(ys)

    ts, ys = convert(pool.ts, pool.ys)
    convert_args = lambda args: _single(jax.vmap(units.args)(jnp.asarray(args)))
    if observed is not None:
        log_units = _all_single(LogUnits.of(ts, ys, np.zeros(plan.size, bool)))
        noise = None if plan.noise is None else plan.noise / np.asarray(units.std)
        converted = observed.convert(convert, convert_args)
        learned = _from_observations(plan, log_units, noise, converted)
        return flow_map, *learned, units.flow_map
    args = None if pool.args is None else convert_args(pool.args)
    objective = TrajectoryMatching(GridTimes(ts, plan.both_directions), InverseGap(1.0))
    batches = TrajectoryBatches(ts, ys, plan.batch_size, args)
    return flow_map, objective, batches, units.flow_map


def _from_observations(
    plan: Plan, units: LogUnits, noise: Any, observed: Observed | Streamed
) -> tuple[TrajectoryMatching, Any]:
    """Each batch is of pairs, with a time of their own at both ends."""
    objective = TrajectoryMatching(
        GridTimes([0.0, 1.0]),
        NoWeight(),
        positions=True,
        difference=RobustDifference(units, noise=noise),
    )
    # The fast part of a stiff solution is at the start only, but where states are
    # smoothed, those at the start are the least certain.
    first_share = 1 / 3 if plan.noise is None else 0.0
    return objective, observed.batches(plan.batch_size, first_share)


def _projection(plan: Plan) -> Any:
    matrix = plan.invariants
    # A sum of positive entries is kept without making any of them negative.
    if plan.is_positive[np.abs(matrix).max(0) > 1e-12].all():
        return ConserveLinear(matrix)
    rows = jnp.asarray(matrix)
    return ConserveInvariants(lambda x, args: rows.astype(x.dtype) @ x, num_iterations=1)


def _all_single(tree: Any) -> Any:
    # Training gains nothing from float64, and takes twice as long.
    cast = lambda leaf: _single(leaf) if eqx.is_inexact_array(leaf) else leaf
    return jtu.tree_map(cast, tree)


def _single(values: Any) -> Array:
    return jnp.asarray(values, jnp.float32)
