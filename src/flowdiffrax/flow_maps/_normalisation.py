from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from .._check import check_callable, check_like
from .._time import as_times, at_least_float32, real_dtype, times_like
from .._tree import Frozen, is_concrete, num_rows, subtract
from .._types import Args, Scalar, State, Time, VectorField
from ._autonomous import AutonomousFlowMap, check_inner
from ._base import AbstractFlowMap, check_times


def _as_arrays(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.asarray, tree)


class Normalisation(eqx.Module):
    r"""Units in which a problem is of order one, on the clock [0, 1].

    $z = (x - \mu) / \sigma$ entry by entry, and $\tau = (t - t_0) / (t_1 - t_0)$.
    Networks are made for such numbers, and laws of times, weights and their defaults for
    such a clock. Bring the problem there, learn, and take the map back:

    ```python
    normalisation = Normalisation.of(ts, ys)
    batches = data.TrajectoryBatches(*normalisation.trajectories(ts, ys), 256)
    teacher = normalisation.vector_field(vector_field)
    state = train.fit(FlowMap(net), objective, batches, optim, teacher=teacher, ...)
    flow_map = normalisation.flow_map(state.ema_map)
    ```

    The last is a map of the user's own states and times, and serves
    [`flowdiffrax.FlowMapSolver`][] as any other.

    Methods take one example; use `jax.vmap` for a batch. States keep their dtypes
    throughout. In training, all numbers here are held fixed.

    **Arguments:**

    - `mean`, `std`: PyTrees of the structure of the state. A leaf is an array of the
      shape of its leaf in the state, or one number for all its entries.
    - `t0`, `t1`: the interval of time that becomes [0, 1]; Python numbers, rising.
    - `args_mean`, `args_std`: the same of `args`, where those vary between examples;
      `None` leaves `args` as they are.

    **Raises:** `ValueError` for times that do not rise, structures that do not match, or
    if known, a `std` that is not positive.
    """

    mean: PyTree = eqx.field(converter=_as_arrays)
    std: PyTree = eqx.field(converter=_as_arrays)
    t0: float = eqx.field(static=True, default=0.0, converter=float)
    t1: float = eqx.field(static=True, default=1.0, converter=float)
    args_mean: PyTree = eqx.field(converter=_as_arrays, default=None)
    args_std: PyTree = eqx.field(converter=_as_arrays, default=None)

    def __check_init__(self):
        if not self.t0 < self.t1:
            raise ValueError(
                f"`t0` must be less than `t1`; got {self.t0} and {self.t1}. A map serves "
                "both directions of time, so that no order is needed."
            )
        pairs = {"": (self.mean, self.std), "args_": (self.args_mean, self.args_std)}
        for prefix, (mean, std) in pairs.items():
            mean_structure, std_structure = map(jtu.tree_structure, (mean, std))
            if mean_structure != std_structure:
                raise ValueError(
                    f"`{prefix}mean` and `{prefix}std` must have the same structure; got "
                    f"{mean_structure} and {std_structure}."
                )
            for leaf in jtu.tree_leaves(std):
                if is_concrete(leaf) and not np.all(np.asarray(leaf) > 0):
                    raise ValueError(
                        f"`{prefix}std` must be positive; got {leaf}. For what does not "
                        "vary, any positive number will do, such as 1."
                    )

    @classmethod
    def of(cls, ts: Array | np.ndarray, ys: State, args: Args = None) -> "Normalisation":
        """The units of a pool of trajectories: each entry has mean 0 and variance 1.

        An entry that does not vary has `std` 1, and so has what is integer in `args`,
        with mean 0: labels stay what they are.

        **Arguments:**

        - `ts`: the times, of shape `(times,)` or `(pool, times)`, in any order.
        - `ys`: the pool, every leaf of shape `(pool, times, ...)`, as
          [`flowdiffrax.solve_trajectories`][] returns it.
        - `args`: the conditions, one row for each trajectory, to be normalised too;
          `None` to leave them as they are.

        **Raises:** `ValueError` inside `jit`, for shapes that do not match, or for
        trajectories that are not finite; `TypeError` for trajectories of integers.
        """
        if not is_concrete((ts, ys, args)):
            raise ValueError(
                "`Normalisation.of` reads the range of the times, which is unknown "
                "inside `jit`. Call it outside."
            )
        real_dtype(ys)
        _check_pool(ts, ys)
        mean, std = _statistics(ys, 2)
        if not all(np.isfinite(leaf).all() for leaf in jtu.tree_leaves((mean, std))):
            raise ValueError(
                "The trajectories are not finite, or too large to be squared. Drop the "
                "solves that failed."
            )
        args_mean, args_std = None, None
        if args is not None:
            num_rows((ys, args), "Trajectories and conditions")
            args_mean, args_std = _statistics(args, 1)
        t0, t1 = float(np.min(ts)), float(np.max(ts))
        return cls(mean, std, t0, t1, args_mean, args_std)

    def time(self, t: Time) -> Inexact[Array, ""]:
        r"""The time $\tau$ on the clock [0, 1], in the precision of `t`."""
        (t,) = as_times(t)
        return self._unit(t)

    def undo_time(self, t: Time) -> Inexact[Array, ""]:
        r"""The user's time at $\tau$, in its precision."""
        (t,) = as_times(t)
        # A convex combination, which ends at `t1` to the last bit.
        return (1 - t) * self.t0 + t * self.t1

    def state(self, x: State) -> State:
        """The state in units of order one."""
        return _normalise(x, self.mean, self.std, "state")

    def undo_state(self, z: State) -> State:
        """The state in the user's units."""
        return _undo(z, self.mean, self.std, "state")

    def args(self, args: Args) -> Args:
        """The conditions in units of order one, or as they are."""
        if self.args_mean is None:
            return args
        return _normalise(args, self.args_mean, self.args_std, "args")

    def undo_args(self, args: Args) -> Args:
        """The conditions in the user's units."""
        if self.args_mean is None:
            return args
        return _undo(args, self.args_mean, self.args_std, "args")

    def trajectories(self, ts: Array | np.ndarray, ys: State) -> tuple[Array, State]:
        """A pool of trajectories, in units of order one.

        For `args` that are normalised too, `jax.vmap(normalisation.args)(args)`.

        **Arguments:** as for [`flowdiffrax.Normalisation.of`][].

        **Returns:** the times and the states, in the same shapes.

        **Raises:** `ValueError` for shapes that do not match.
        """
        _check_pool(ts, ys)
        ts = jnp.asarray(ts)
        ts = ts.astype(float) if _is_integer(ts) else ts
        return self._unit(ts), jax.vmap(jax.vmap(self.state))(ys)

    def vector_field(self, vector_field: VectorField) -> VectorField:
        r"""The same ODE in units of order one.

        $\tfrac{dz}{d\tau} = \tfrac{t_1 - t_0}{\sigma}\, b_t(x)$.

        **Arguments:**

        - `vector_field`: a callable `(t, x, args) -> dx/dt` in the user's units.

        **Returns:** a callable `(tau, z, args) -> dz/dtau`.
        """
        return _NormalisedField(vector_field, self)

    def flow_map(self, flow_map: AbstractFlowMap) -> "NormalisedFlowMap":
        """A map in units of order one, in the user's own.

        **Arguments:**

        - `flow_map`: the map that was learned on [0, 1].

        **Returns:** a [`flowdiffrax.NormalisedFlowMap`][].
        """
        return NormalisedFlowMap(flow_map, self)

    def _unit(self, t: Inexact[Array, "*any"]) -> Inexact[Array, "*any"]:
        # In the precision of `t` throughout, so that `t1` becomes 1 to the last bit.
        t0, t1 = jnp.asarray(self.t0, t.dtype), jnp.asarray(self.t1, t.dtype)
        return (t - t0) / (t1 - t0)

    def _rate(self, v: State) -> State:
        """A velocity in units of order one, in the user's."""
        factor = lambda v, std: _like(std, v) / (self.t1 - self.t0)
        return jtu.tree_map(lambda v, std: factor(v, std) * v, v, self.std)


class NormalisedFlowMap(AbstractFlowMap):
    r"""A map that was learned in units of order one, in the user's own.

    $X_{s,t}(x) = x + \sigma\,(\tilde X_{\tau(s),\tau(t)}(z) - z)$ with $z = (x - \mu) /
    \sigma$: the inner map's jump, scaled, so that nothing is lost where it is short.

    Its time range is that of the inner map in the user's time, or `(t0, t1)` if it
    declares none. An [`flowdiffrax.AutonomousFlowMap`][] starts anywhere, and has none
    here either.

    **Arguments:**

    - `flow_map`: the map in units of order one.
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
        """The units, their arrays held fixed."""
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
        """The jump of the inner map, in the user's units."""
        units = self.normalisation
        z = units.state(x)
        end = self.flow_map(s, t, z, units.args(args))
        move = lambda x, std, jump: x + _like(std, x) * jump
        return jtu.tree_map(move, x, units.std, subtract(end, z))

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The average velocity of the inner map, in the user's units."""
        units = self.normalisation
        z, args = units.state(x), units.args(args)
        return units._rate(self.flow_map.average_velocity(s, t, z, args))

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """The velocity of the inner map, in the user's units."""
        units = self.normalisation
        return units._rate(self.flow_map.velocity(t, units.state(x), units.args(args)))

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        """The times on the inner map's clock, with all their digits."""
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
    # Through wrappers, such as a projection.
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
    got, expected = jtu.tree_structure(x), jtu.tree_structure(mean)
    if got != expected:
        raise ValueError(
            f"The normalisation is of a {name} of the structure {expected}; got {got}."
        )
    for leaf, unit in zip(jtu.tree_leaves(x), jtu.tree_leaves(mean), strict=True):
        if jnp.shape(unit) not in ((), jnp.shape(leaf)):
            raise ValueError(
                f"The normalisation is of a {name} of shape {jnp.shape(unit)}; got "
                f"{jnp.shape(leaf)}. It is for one example: to work on a batch, use "
                "`jax.vmap`."
            )
    return jtu.tree_map(one, x, mean, std)


def _check_pool(ts, ys) -> None:
    num_rows(ys, "Trajectories")
    for leaf in jtu.tree_leaves(ys):
        if jnp.shape(ts) not in (jnp.shape(leaf)[1:2], jnp.shape(leaf)[:2]):
            raise ValueError(
                "Trajectories have shape (pool, times, ...), with times of shape "
                f"(times,) or (pool, times); got {jnp.shape(leaf)} and {jnp.shape(ts)}."
            )


def _statistics(tree, num_axes):
    """Means and standard deviations over the leading axes, leaf by leaf."""
    axes = tuple(range(num_axes))

    def mean(leaf):
        if _is_integer(leaf):
            return jnp.zeros(jnp.shape(leaf)[num_axes:])
        wide = jnp.asarray(leaf, at_least_float32(jnp.result_type(leaf)))
        return jnp.mean(wide, axis=axes)

    def std(leaf, mean):
        if _is_integer(leaf):
            return jnp.ones_like(mean)
        wide = jnp.asarray(leaf, mean.dtype)
        deviation = jnp.abs(wide - jnp.expand_dims(mean, axes))
        spread = jnp.sqrt(jnp.mean(deviation**2, axis=axes))
        # The mean of equal numbers is rounded, and differs from each of them.
        rounding = 100 * jnp.finfo(wide.dtype).eps * jnp.max(jnp.abs(wide), axis=axes)
        return jnp.where(spread > rounding, spread, jnp.ones_like(spread))

    means = jtu.tree_map(mean, tree)
    return means, jtu.tree_map(std, tree, means)
