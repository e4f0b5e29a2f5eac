from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from .._check import check_callable, check_like, check_positive
from .._time import as_times, at_least_float32, real_dtype, times_like
from .._tree import Frozen, num_rows, subtract
from .._types import Args, Scalar, State, Time, VectorField
from ._autonomous import AutonomousFlowMap, check_inner
from ._base import AbstractFlowMap, check_times


def _as_arrays(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.asarray, tree)


class Normalisation(eqx.Module):
    r"""Units in which states are of order one and times lie in [0, 1].

    The units are $z = (x - \mu) / \sigma$, entry by entry, and
    $\tau = (t - t_0) / (t_1 - t_0)$. Networks are designed for states of order one;
    distributions of times, weights and their defaults are designed for times in [0, 1].
    Convert the problem to these units, train, and convert the map back:

    ```python
    normalisation = Normalisation.of(ts, ys)
    batches = data.TrajectoryBatches(*normalisation.trajectories(ts, ys), 256)
    teacher = normalisation.vector_field(vector_field)
    state = train.fit(FlowMap(net), objective, batches, optim, teacher=teacher, ...)
    flow_map = normalisation.flow_map(state.ema_map)
    ```

    The final `flow_map` takes the user's states and times, and works with
    [`flowdiffrax.FlowMapSolver`][] like any other map.

    Methods take one example; use `jax.vmap` for a batch. States keep their dtypes. In
    training, all numbers here are held fixed.

    **Arguments:**

    - `mean`, `std`: PyTrees with the structure of the state. Each leaf is an array with
      the shape of the state's leaf, one number for all its entries, or an array with
      axes of length 1 where entries share a number, such as `(1, 1, channels)`.
    - `t0`, `t1`: the time interval that is mapped to [0, 1]; Python numbers with
      `t0 < t1`.
    - `args_mean`, `args_std`: the same for `args`, if they vary between examples; `None`
      leaves `args` unchanged.

    **Raises:** `ValueError` unless `t0 < t1`, for structures that do not match, or for a
    concrete `std` that is not positive.
    """

    mean: PyTree = eqx.field(converter=_as_arrays)
    std: PyTree = eqx.field(converter=_as_arrays)
    t0: float = eqx.field(static=True, default=0.0, converter=float)
    t1: float = eqx.field(static=True, default=1.0, converter=float)
    args_mean: PyTree = eqx.field(converter=_as_arrays, default=None)
    args_std: PyTree = eqx.field(converter=_as_arrays, default=None)

    def __check_init__(self):
        if not self.t0 < self.t1:
            raise ValueError(f"`t0` must be less than `t1`; got {self.t0}, {self.t1}.")
        pairs = {"": (self.mean, self.std), "args_": (self.args_mean, self.args_std)}
        for prefix, (mean, std) in pairs.items():
            if jtu.tree_structure(mean) != jtu.tree_structure(std):
                raise ValueError(f"`{prefix}mean` and `{prefix}std` differ in structure.")
            for leaf in jtu.tree_leaves(std):
                check_positive(leaf, f"{prefix}std")

    @classmethod
    def of(
        cls,
        ts: Array | np.ndarray,
        ys: State,
        args: Args = None,
        *,
        by_channel: bool = False,
    ) -> "Normalisation":
        """Computes units in which each entry of a pool has mean 0 and variance 1.

        An entry that does not vary gets a `std` of 1. Integers in `args`, such as labels,
        are unchanged: they get a mean of 0 and a `std` of 1. Call it outside `jit`: the
        range of the times must be known.

        **Arguments:**

        - `ts`: the times, of shape `(times,)` or `(pool, times)`, in any order.
        - `ys`: the pool of trajectories, every leaf of shape `(pool, times, ...)`, as
          [`flowdiffrax.solve_trajectories`][] returns it.
        - `args`: the conditions to normalise as well, one row for each trajectory; `None`
          to leave them unchanged.
        - `by_channel`: whether all points of a grid share the units of their channel, for
          states that are fields, of shape `(*grid, channels)`. The units then hold on any
          grid, and the PDE keeps its symmetry under translation.

        **Raises:** `ValueError` for shapes that do not match, for trajectories that are
        not finite, or for a state without channels and `by_channel`; `TypeError` for
        integer trajectories.
        """
        real_dtype(ys)
        _check_pool(ts, ys)
        mean, std = _statistics(ys, 2, by_channel)
        if not all(np.isfinite(leaf).all() for leaf in jtu.tree_leaves((mean, std))):
            raise ValueError("Trajectories must be finite, and so must their squares.")
        args_mean, args_std = None, None
        if args is not None:
            num_rows((ys, args), "Trajectories and conditions")
            args_mean, args_std = _statistics(args, 1, False)
        t0, t1 = float(np.min(ts)), float(np.max(ts))
        return cls(mean, std, t0, t1, args_mean, args_std)

    def time(self, t: Time) -> Inexact[Array, ""]:
        r"""Returns the normalised time $\tau$, in the precision of `t`."""
        (t,) = as_times(t)
        return self._unit(t)

    def undo_time(self, t: Time) -> Inexact[Array, ""]:
        r"""Returns the user's time for $\tau$, in the precision of $\tau$."""
        (t,) = as_times(t)
        # This form gives exactly `t1` at 1.
        return (1 - t) * self.t0 + t * self.t1

    def state(self, x: State) -> State:
        """Returns the normalised state."""
        return _normalise(x, self.mean, self.std, "state")

    def undo_state(self, z: State) -> State:
        """Returns the state in the user's units."""
        return _undo(z, self.mean, self.std, "state")

    def args(self, args: Args) -> Args:
        """Returns the normalised conditions, or `args` without `args_mean`."""
        if self.args_mean is None:
            return args
        return _normalise(args, self.args_mean, self.args_std, "args")

    def undo_args(self, args: Args) -> Args:
        """Returns the conditions in the user's units."""
        if self.args_mean is None:
            return args
        return _undo(args, self.args_mean, self.args_std, "args")

    def trajectories(self, ts: Array | np.ndarray, ys: State) -> tuple[Array, State]:
        """Normalises a pool of trajectories.

        To normalise `args` as well, use `jax.vmap(normalisation.args)(args)`.

        **Arguments:**

        - `ts`: the times, of shape `(times,)` or `(pool, times)`.
        - `ys`: the pool, every leaf of shape `(pool, times, ...)`.

        **Returns:** the normalised times and states, in the same shapes.

        **Raises:** `ValueError` for shapes that do not match.
        """
        _check_pool(ts, ys)
        ts = jnp.asarray(ts)
        ts = ts.astype(float) if _is_integer(ts) else ts
        return self._unit(ts), jax.vmap(jax.vmap(self.state))(ys)

    def vector_field(self, vector_field: VectorField) -> VectorField:
        r"""Returns the vector field of the ODE in normalised units.

        The ODE is $\tfrac{dz}{d\tau} = \tfrac{t_1 - t_0}{\sigma}\, b_t(x)$.

        **Arguments:**

        - `vector_field`: a callable `(t, x, args) -> dx/dt` in the user's units.

        **Returns:** a callable `(tau, z, args) -> dz/dtau`.
        """
        return _NormalisedField(vector_field, self)

    def flow_map(self, flow_map: AbstractFlowMap) -> "NormalisedFlowMap":
        """Converts a map in normalised units to the user's units.

        **Arguments:**

        - `flow_map`: the map that was learned in normalised units.

        **Returns:** a [`flowdiffrax.NormalisedFlowMap`][].
        """
        return NormalisedFlowMap(flow_map, self)

    def _unit(self, t: Inexact[Array, "*any"]) -> Inexact[Array, "*any"]:
        # All in the precision of `t`, so that `t1` becomes exactly 1.
        t0, t1 = jnp.asarray(self.t0, t.dtype), jnp.asarray(self.t1, t.dtype)
        return (t - t0) / (t1 - t0)

    def _rate(self, v: State) -> State:
        """Converts a velocity from normalised units to the user's."""
        factor = lambda v, std: _like(std, v) / (self.t1 - self.t0)
        return jtu.tree_map(lambda v, std: factor(v, std) * v, v, self.std)


class NormalisedFlowMap(AbstractFlowMap):
    r"""Converts a map that was learned in normalised units to the user's units.

    $X_{s,t}(x) = x + \sigma\,(\tilde X_{\tau(s),\tau(t)}(z) - z)$ with
    $z = (x - \mu) / \sigma$. Only the inner map's displacement is scaled, so short jumps
    lose no precision.

    Its time range is that of the inner map, converted to the user's times, or `(t0, t1)`
    if the inner map declares none. An [`flowdiffrax.AutonomousFlowMap`][] can start at
    any time, and has no time range here either.

    **Arguments:**

    - `flow_map`: the map in normalised units.
    - `normalisation`: the units. Its arrays are held fixed in training.

    **Raises:** `TypeError` for an inner map that is not a
    [`flowdiffrax.AbstractFlowMap`][].
    """

    flow_map: AbstractFlowMap
    frozen_normalisation: Frozen

    def __init__(self, flow_map: AbstractFlowMap, normalisation: Normalisation):
        check_inner(flow_map)
        self.flow_map = flow_map
        self.frozen_normalisation = Frozen(normalisation)

    @property
    def normalisation(self) -> Normalisation:
        """The units, with their arrays held fixed."""
        return self.frozen_normalisation.thaw()

    @property
    def time_range(self):
        units = self.normalisation
        time_range = getattr(self.flow_map, "time_range", None)
        if time_range is None:
            return None if _starts_anywhere(self.flow_map) else (units.t0, units.t1)
        low, high = ((1 - end) * units.t0 + end * units.t1 for end in time_range)
        return (low, high)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Jumps with the inner map, in the user's units."""
        units = self.normalisation
        z = units.state(x)
        end = self.flow_map(s, t, z, units.args(args))
        move = lambda x, std, jump: x + _like(std, x) * jump
        return jtu.tree_map(move, x, units.std, subtract(end, z))

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity of the inner map, in the user's units."""
        units = self.normalisation
        z, args = units.state(x), units.args(args)
        return units._rate(self.flow_map.average_velocity(s, t, z, args))

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity of the inner map, in the user's units."""
        units = self.normalisation
        return units._rate(self.flow_map.velocity(t, units.state(x), units.args(args)))

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        """Normalises the times, and keeps their precision."""
        check_times(self, s, t)
        units = self.normalisation
        return units.time(s), units.time(t)


class _NormalisedField(eqx.Module):
    field: VectorField
    normalisation: Normalisation

    def __check_init__(self):
        check_callable(self.field, "vector_field", "vector_field(t, x, args)")

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        units = self.normalisation
        (t,) = times_like(x, units.undo_time(t))
        y = units.undo_state(x)
        b_t = self.field(t, y, units.undo_args(args))
        b_t = check_like(b_t, y, "`vector_field`")
        factor = lambda b, std: (units.t1 - units.t0) / _like(std, b)
        return jtu.tree_map(lambda b, std: factor(b, std) * b, b_t, units.std)


def _starts_anywhere(flow_map: Any) -> bool:
    # Looks inside wrappers, such as a projection.
    while not isinstance(flow_map, AutonomousFlowMap):
        flow_map = getattr(flow_map, "flow_map", None)
        if flow_map is None:
            return False
    return True


def _like(number, leaf):
    return number.astype(jnp.result_type(leaf))


def _is_integer(leaf) -> bool:
    return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _normalise(x, mean, std, name):
    def one(leaf, mean, std):
        if _is_integer(leaf):
            return leaf
        return (leaf - _like(mean, leaf)) / _like(std, leaf)

    return _map_units(one, x, mean, std, name)


def _undo(z, mean, std, name):
    def one(leaf, mean, std):
        if _is_integer(leaf):
            return leaf
        return _like(mean, leaf) + _like(std, leaf) * leaf

    return _map_units(one, z, mean, std, name)


def _map_units(one, x, mean, std, name):
    def checked(leaf, mean, std):
        # Broadcasting would accept a batch.
        if not _fits(jnp.shape(mean), jnp.shape(leaf)):
            raise ValueError(
                f"The {name} must have the shape of its normalisation, "
                f"{jnp.shape(mean)}; got {jnp.shape(leaf)}. For a batch, use `jax.vmap`."
            )
        return one(leaf, mean, std)

    if jtu.tree_structure(x) != jtu.tree_structure(mean):
        raise ValueError(f"The {name} differs in structure from its normalisation.")
    return jtu.tree_map(checked, x, mean, std)


def _fits(units: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether each entry has its unit, or shares it with others along whole axes."""
    if units == ():
        return True
    pairs = zip(units, shape, strict=False)
    return len(units) == len(shape) and all(unit in (1, size) for unit, size in pairs)


def _check_pool(ts, ys) -> None:
    num_rows(ys, "Trajectories")
    for leaf in jtu.tree_leaves(ys):
        if jnp.shape(ts) not in (jnp.shape(leaf)[1:2], jnp.shape(leaf)[:2]):
            raise ValueError(
                "Trajectories must have shape (pool, times, ...), with times of shape "
                f"(times,) or (pool, times); got {jnp.shape(leaf)} and {jnp.shape(ts)}."
            )


def _statistics(tree, num_axes, by_channel):
    """Returns means and standard deviations over the leading axes, leaf by leaf.

    By channel, they are also over all other axes but the last, which become of length 1.
    """

    def over(statistic, leaf):
        if by_channel and jnp.ndim(leaf) == num_axes:
            raise ValueError(
                "`by_channel` is for fields, in a pool of shape (pool, times, *grid, "
                f"channels); got {jnp.shape(leaf)}."
            )
        num = jnp.ndim(leaf) - 1 if by_channel else num_axes
        value = statistic(leaf, axis=tuple(range(num)), keepdims=True)
        return jnp.reshape(value, jnp.shape(value)[num_axes:])

    def mean(leaf):
        if _is_integer(leaf):
            return jnp.zeros(jnp.shape(leaf)[num_axes:])
        return over(jnp.mean, jnp.asarray(leaf, at_least_float32(jnp.result_type(leaf))))

    def std(leaf, mean):
        if _is_integer(leaf):
            return jnp.ones_like(mean)
        wide = jnp.asarray(leaf, mean.dtype)
        deviation = jnp.abs(wide - jnp.expand_dims(mean, tuple(range(num_axes))))
        spread = jnp.sqrt(over(jnp.mean, deviation**2))
        # Rounding makes the mean of equal numbers differ from them.
        rounding = 100 * jnp.finfo(wide.dtype).eps * over(jnp.max, jnp.abs(wide))
        return jnp.where(spread > rounding, spread, jnp.ones_like(spread))

    means = jtu.tree_map(mean, tree)
    return means, jtu.tree_map(std, tree, means)
