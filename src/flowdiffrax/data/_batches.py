from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key

from .._coupling import AbstractCoupling, IndependentCoupling
from .._custom_types import Args, State
from .._interpolant import AbstractInterpolant
from .._misc import check_callable, is_concrete, num_rows
from .._times import check_batch_size
from .._trajectory import StatePath, TrajectoryPath

Batch = tuple[diffrax.AbstractPath, Args]


def _as_jax(tree: Any) -> Any:
    # Equinox takes NumPy arrays for constants, which `jit` would compile in.
    return tree if callable(tree) else jtu.tree_map(jnp.asarray, tree)


class GaussianBase(eqx.Module):
    """The base of most flows: independent normals around zero.

    **Arguments:**

    - `std`: the standard deviation, positive.

    **Raises:** `ValueError` if it is not positive.
    """

    std: float = 1.0

    def __check_init__(self):
        if self.std <= 0:
            raise ValueError(f"`std` must be positive; got {self.std}.")

    def __call__(self, key: Key[Array, ""], x1: State) -> State:
        """A draw like the batch `x1`."""
        return _normal_like(key, x1, self.std)


class ConditionedPoints(NamedTuple):
    """A batch of data points with their conditions, as a function may draw them.

    **Attributes:**

    - `x1`: the points, every leaf with the batch axis.
    - `args`: the conditions, likewise, or `None`.
    """

    x1: State
    args: Args = None


class InterpolantBatches(eqx.Module):
    """Batches of interpolant paths, a function of a key alone.

    **Arguments:**

    - `interpolant`: how base and data are joined; its latent, if any, is drawn here.
    - `data`: the data points, arrays with a leading axis from which rows are drawn with
      replacement, or a function `(key, batch_size) -> points`. A function may return
      [`flowdiffrax.data.ConditionedPoints`][] too, points with conditions of their own.
    - `batch_size`: paths a batch, at least 1.
    - `base`: a function `(key, x1) -> x0` that draws base points like a batch of data.
    - `coupling`: how the two are paired.
    - `args`: conditions, one row for each data point, or `None`. Only with array data.

    **Raises:** `ValueError` for a batch size below 1, data without points, or conditions
    that do not go with the data; `TypeError` for data of integers, for what is no
    interpolant, and for functions of other arguments.
    """

    interpolant: AbstractInterpolant
    data: State | Callable[[Key[Array, ""], int], State | ConditionedPoints] = eqx.field(
        converter=_as_jax
    )
    batch_size: int = eqx.field(static=True)
    base: Callable[[Key[Array, ""], State], State] = GaussianBase()
    coupling: AbstractCoupling = IndependentCoupling()
    args: Args = eqx.field(converter=_as_jax, default=None)

    def __check_init__(self):
        check_batch_size(self.batch_size)
        if not isinstance(self.interpolant, AbstractInterpolant):
            raise TypeError(
                "`interpolant` comes first, an instance such as `LinearInterpolant()`; "
                f"got {self.interpolant!r}."
            )
        check_callable(self.base, "base", "base(key, x1)")
        check_callable(self.coupling, "coupling", "coupling(key, x0, x1, args)")
        if callable(self.data):
            check_callable(self.data, "data", "data(key, batch_size)")
            if self.args is not None:
                raise ValueError(
                    "`args` needs data given as arrays, row for row. A function may "
                    "return `ConditionedPoints(points, args)`."
                )
        else:
            _num_rows((self.data, self.args))
            dtypes = [leaf.dtype for leaf in jtu.tree_leaves(self.data)]
            if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
                raise TypeError(
                    f"`data` must be floating-point or complex; got {dtypes}. Convert "
                    "integers with `.astype(float)`."
                )

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every array with the batch axis.

        Map over it with `equinox.filter_vmap`, since the interpolant's own Python numbers
        stay what they are.
        """
        data_key, base_key, pair_key, latent_key = jr.split(key, 4)
        if callable(self.data):
            drawn = self.data(data_key, self.batch_size)
            has_args = isinstance(drawn, ConditionedPoints)
            x1, args = drawn if has_args else (drawn, None)
        else:
            x1, args = _draw_rows(data_key, (self.data, self.args), self.batch_size)
        x0 = self.coupling(pair_key, self.base(base_key, x1), x1, args)
        has_latent = self.interpolant.has_latent
        z = _normal_like(latent_key, x1, 1.0) if has_latent else None
        # Filtered, since an interpolant may hold plain functions.
        paths = eqx.filter_vmap(lambda *points: self.interpolant(*points))(x0, x1, z)
        # The interpolant's own numbers are shared by all paths of the batch.
        broadcast = lambda leaf: (
            jnp.broadcast_to(leaf, (self.batch_size, *jnp.shape(leaf)))
            if eqx.is_array(leaf)
            else leaf
        )
        shared = jtu.tree_map(broadcast, self.interpolant)
        return eqx.tree_at(lambda p: p.interpolant, paths, shared), args


class TrajectoryBatches(eqx.Module):
    """Batches of solved trajectories, drawn with replacement from a pool.

    **Arguments:**

    - `ts`: the times at which the pool was saved, rising, of shape `(times,)`, or
      `(pool, times)` if each trajectory has its own.
    - `ys`: the pool, every leaf of shape `(pool, times, ...)`, as
      [`flowdiffrax.solve_trajectories`][] returns it.
    - `batch_size`: trajectories a batch, at least 1.
    - `args`: conditions, one row for each trajectory, or `None`.

    **Raises:** `ValueError` for a batch size below 1, shapes that do not match, or times
    that are known and do not rise.
    """

    ts: Array = eqx.field(converter=jnp.asarray)
    ys: State = eqx.field(converter=_as_jax)
    batch_size: int = eqx.field(static=True)
    args: Args = eqx.field(converter=_as_jax, default=None)

    def __check_init__(self):
        check_batch_size(self.batch_size)
        _num_rows((self.ys, self.args))
        for leaf in jtu.tree_leaves(self.ys):
            if jnp.shape(self.ts) not in (leaf.shape[1:2], leaf.shape[:2]):
                raise ValueError(
                    "`ys` must have shape (pool, times, ...) with the times of `ts`, of "
                    f"shape (times,) or (pool, times); got {leaf.shape} and "
                    f"{jnp.shape(self.ts)}."
                )
        if is_concrete(self.ts) and not np.all(np.diff(np.asarray(self.ts)) > 0):
            raise ValueError(
                f"`ts` must rise; got {self.ts}. For trajectories solved backwards in "
                "time, flip the last axis of `ts`, and the second of `ys`."
            )

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every leaf with the batch axis."""
        own = self.ts if self.ts.ndim == 2 else None
        ts, ys, args = _draw_rows(key, (own, self.ys, self.args), self.batch_size)
        if ts is None:
            ts = jnp.broadcast_to(self.ts, (self.batch_size, *self.ts.shape))
        return TrajectoryPath(ts, ys), args


class StateBatches(eqx.Module):
    """Batches of single states, for distillation without data.

    **Arguments:**

    - `draw`: a function `(key, batch_size) -> states`, every leaf with the batch axis;
      or arrays with a leading axis, from which rows are drawn with replacement.
    - `batch_size`: states a batch, at least 1.
    - `args`: conditions, such as the parameters of a physical system: a function
      `(key, batch_size) -> args`, which draws them independently of the states; or
      arrays, one row for each row of states, if those are arrays; or `None`.

    **Raises:** `ValueError` for a batch size below 1, arrays without rows, or conditions
    that do not go with the states; `TypeError` for functions of other arguments.
    """

    draw: State | Callable[[Key[Array, ""], int], State] = eqx.field(converter=_as_jax)
    batch_size: int = eqx.field(static=True)
    args: Args | Callable[[Key[Array, ""], int], Args] = eqx.field(
        converter=_as_jax, default=None
    )

    def __check_init__(self):
        check_batch_size(self.batch_size)
        rows = None if callable(self.args) else self.args
        for name, fn in (("draw", self.draw), ("args", self.args)):
            if callable(fn):
                check_callable(fn, name, f"{name}(key, batch_size)")
        if not callable(self.draw):
            _num_rows((self.draw, rows))
        elif rows is not None:
            raise ValueError(
                "`args` as arrays needs states given as arrays, row for row. Beside a "
                "function that draws states, give one that draws `args`."
            )

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every array with the batch axis."""
        if callable(self.args):
            key, args_key = jr.split(key)
            rows, args = None, self.args(args_key, self.batch_size)
        else:
            rows, args = self.args, None
        if callable(self.draw):
            return StatePath(self.draw(key, self.batch_size)), args
        states, rows = _draw_rows(key, (self.draw, rows), self.batch_size)
        return StatePath(states), args if rows is None else rows


def _normal_like(key, x, std):
    leaves, structure = jtu.tree_flatten(x)
    keys = jr.split(key, len(leaves))
    draw = lambda key, leaf: std * jr.normal(key, leaf.shape, leaf.dtype)
    return jtu.tree_unflatten(structure, map(draw, keys, leaves))


def _num_rows(tree) -> int:
    return num_rows(tree, "Data and conditions")


def _draw_rows(key, tree, batch_size):
    rows = jr.randint(key, (batch_size,), 0, _num_rows(tree))
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[rows], tree)
