from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from .._check import check_bools, check_callable, check_instance, check_positive
from .._time import real_dtype
from .._tree import is_concrete, num_rows, rows_not_finite
from .._types import Args, State
from ..paths._base import AbstractInterpolant
from ..paths._coupling import AbstractCoupling, IndependentCoupling
from ..paths._plug_in import plug_in_paths
from ..paths._trajectory import StatePath, TrajectoryPath, check_one_length
from ..times._base import check_batch_size

Batch = tuple[diffrax.AbstractPath, Args]


def _as_jax(tree: Any) -> Any:
    # Equinox treats NumPy arrays as constants, which `jit` would compile in.
    return tree if callable(tree) else jtu.tree_map(_to_device, tree)


def _to_device(leaf: Any) -> Array:
    if isinstance(leaf, np.memmap):
        raise TypeError(
            "A memory map would be copied whole to the device. Stream it from the disk "
            "with `data.StreamBatches`; if it fits in memory, pass `np.array(memmap)`."
        )
    return jnp.asarray(leaf)


def _as_saved_times(ts: Any) -> Array:
    check_one_length(ts)
    return _to_device(ts)


def finite_rows(tree: PyTree) -> tuple[PyTree, int]:
    """Drops the rows of a pool that have an entry that is not finite.

    For example, [`flowdiffrax.solve_trajectories`][] returns failed solves as NaN if
    `throw=False`:

    ```python
    ys = fd.solve_trajectories(vector_field, x0, ts, throw=False)
    (ys, x0), num_dropped = fd.data.finite_rows((ys, x0))
    ```

    **Arguments:**

    - `tree`: arrays with a common leading axis.

    **Returns:** the arrays without these rows, and how many were dropped.

    **Raises:** `ValueError` for arrays without a common leading axis.
    """
    num_rows(tree, "A pool")
    bad = rows_not_finite(tree)
    # Avoid a copy if there are no bad rows.
    kept = jtu.tree_map(lambda leaf: leaf[~bad], tree) if bad.any() else tree
    return kept, int(bad.sum())


def _as_number_or_jax(value: ArrayLike) -> ArrayLike:
    # Keep a number as it is: an array would initialise JAX when the library is imported.
    return value if isinstance(value, float | int) else jnp.asarray(value)


class GaussianBase(eqx.Module):
    """The base distribution of most flows: independent normal variables.

    Set `std` to the standard deviation of the data, and `mean` to their mean if they are
    not centred. A flow that has to move every point by many standard deviations is hard
    to learn, especially by objectives that work along the data (`MeanFlow`, the
    consistency objectives).

    **Arguments:**

    - `std`: the standard deviation, positive.
    - `mean`: the mean, a number or an array that broadcasts against a data point.

    **Raises:** `ValueError` if `std` is not positive.
    """

    std: float = 1.0
    mean: ArrayLike = eqx.field(default=0.0, converter=_as_number_or_jax)

    def __check_init__(self):
        check_positive(self.std, "std")

    def __call__(self, key: Key[Array, ""], x1: State) -> State:
        """Draws base points with the structure and shape of the batch `x1`."""

        noise = _normal_like(key, x1, self.std)
        return jtu.tree_map(jnp.add, noise, self.mean_like(x1))

    def mean_like(self, x1: State) -> State:
        """The mean with the structure and shape of the batch `x1`."""
        return jtu.tree_map(
            lambda leaf: jnp.broadcast_to(jnp.asarray(self.mean, leaf.dtype), leaf.shape),
            x1,
        )


class ConditionedPoints(NamedTuple):
    """A batch of data points with their conditions, as returned by a `data` function.

    **Attributes:**

    - `x1`: the points, every leaf with the batch axis.
    - `args`: the conditions, every leaf with the batch axis, or `None`.
    """

    x1: State
    args: Args = None


class InterpolantBatches(eqx.Module):
    """Batches of interpolant paths, as a function of a key.

    **Arguments:**

    - `interpolant`: the interpolant between base and data points. If it has a latent,
      the latent is drawn here.
    - `data`: the data points: arrays with a leading axis, from which rows are drawn with
      replacement, or a function `(key, batch_size) -> points`. The function may also
      return [`flowdiffrax.data.ConditionedPoints`][], which are points with conditions.
    - `batch_size`: the number of paths per batch, at least 1.
    - `base`: a function `(key, x1) -> x0` that draws base points of the same shape as a
      batch of data.
    - `coupling`: how base and data points are paired.
    - `args`: conditions, one row for each data point, or `None`. Only for array data.
    - `draw`: whether to draw rows at random. If `False`, a batch consists of all rows in
      order, as when they are one batch of [`flowdiffrax.data.stream`][], and their values
      are not checked.
    - `plug_in`: whether the rates of the paths are the plug-in velocity, the mean over
      all data points of the batch with an equal condition: see
      [`flowdiffrax.paths.PlugInPath`][]. It has less variance than the rate of one pair,
      and works with every objective that learns from data. It needs a `GaussianBase` and
      independent pairs. If all conditions differ, it changes nothing.

    **Raises:** `ValueError` for a batch size below 1, data without points, rows that are
    not finite (see [`flowdiffrax.data.finite_rows`][]), conditions that do not match
    the data, or `plug_in` with another base or coupling; `TypeError` for integer data, a
    memory map, an `interpolant` that is not an interpolant, functions that do not take
    the arguments above, or `plug_in` with complex data. When called with `draw=False`,
    `ValueError` if the number of rows is not `batch_size`.
    """

    interpolant: AbstractInterpolant
    data: State | Callable[[Key[Array, ""], int], State | ConditionedPoints] = eqx.field(
        converter=_as_jax
    )
    batch_size: int = eqx.field(static=True)
    base: Callable[[Key[Array, ""], State], State] = GaussianBase()
    coupling: AbstractCoupling = IndependentCoupling()
    args: Args = eqx.field(converter=_as_jax, default=None)
    draw: bool = eqx.field(static=True, default=True)
    plug_in: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_batch_size(self.batch_size)
        what = "an instance such as `LinearInterpolant()`, and `interpolant` comes first"
        check_instance(self.interpolant, AbstractInterpolant, "interpolant", what)
        check_callable(self.base, "base", "base(key, x1)")
        check_callable(self.coupling, "coupling", "coupling(key, x0, x1, args)")
        check_bools(draw=self.draw, plug_in=self.plug_in)
        if self.plug_in:
            _check_plug_in(self.base, self.coupling)
        if callable(self.data):
            check_callable(self.data, "data", "data(key, batch_size)")
            _check_no_rows(self.args, "`ConditionedPoints(points, args)`")
        else:
            _num_rows((self.data, self.args))
            real_dtype(self.data)  # refuses integers
            if self.draw:
                check_finite((self.data, self.args), "Data and conditions")

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every array with the batch axis.

        Map over the paths with `equinox.filter_vmap`, since Python numbers in the
        interpolant do not get the batch axis.
        """
        data_key, base_key, pair_key, latent_key = jr.split(key, 4)
        if callable(self.data):
            drawn = self.data(data_key, self.batch_size)
            has_args = isinstance(drawn, ConditionedPoints)
            x1, args = drawn if has_args else (drawn, None)
        else:
            rows = self.data, self.args
            x1, args = _draw_rows(data_key, rows, self.batch_size, self.draw)
        x0 = self.coupling(pair_key, self.base(base_key, x1), x1, args)
        has_latent = self.interpolant.has_latent
        z = _normal_like(latent_key, x1, 1.0) if has_latent else None
        # Filtered, since an interpolant may hold plain functions.
        paths = eqx.filter_vmap(lambda *points: self.interpolant(*points))(x0, x1, z)
        # All paths of the batch share the arrays of the interpolant.
        broadcast = lambda leaf: (
            jnp.broadcast_to(leaf, (self.batch_size, *jnp.shape(leaf)))
            if eqx.is_array(leaf)
            else leaf
        )
        shared = jtu.tree_map(broadcast, self.interpolant)
        paths = eqx.tree_at(lambda p: p.interpolant, paths, shared)
        if self.plug_in:
            base: Any = self.base
            paths = plug_in_paths(paths, args, base.mean_like(x1), base.std)
        return paths, args


class TrajectoryBatches(eqx.Module):
    """Batches of solved trajectories, drawn with replacement from a pool.

    **Arguments:**

    - `ts`: the times at which the pool was saved, increasing, of shape `(times,)`, or
      `(pool, times)` if each trajectory has its own times.
    - `ys`: the pool, every leaf of shape `(pool, times, ...)`, as returned by
      [`flowdiffrax.solve_trajectories`][].
    - `batch_size`: the number of trajectories per batch, at least 1.
    - `args`: conditions, one row for each trajectory, or `None`.
    - `draw`: whether to draw rows at random. If `False`, a batch consists of all rows in
      order, as when they are one batch of [`flowdiffrax.data.stream`][], and their values
      are not checked.

    **Raises:** `ValueError` for a batch size below 1, shapes that do not match,
    trajectories of different lengths, concrete times that do not increase, or rows that
    are not finite (see [`flowdiffrax.data.finite_rows`][]); `TypeError` for a memory map.
    When called with `draw=False`, `ValueError` if the number of rows is not `batch_size`.
    """

    ts: Array = eqx.field(converter=_as_saved_times)
    ys: State = eqx.field(converter=_as_jax)
    batch_size: int = eqx.field(static=True)
    args: Args = eqx.field(converter=_as_jax, default=None)
    draw: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_batch_size(self.batch_size)
        check_bools(draw=self.draw)
        if isinstance(self.ys, list | tuple):
            check_one_length(jtu.tree_leaves(self.ys))
        _num_rows((self.ys, self.args))
        for leaf in jtu.tree_leaves(self.ys):
            if jnp.shape(self.ts) not in (leaf.shape[1:2], leaf.shape[:2]):
                raise ValueError(
                    "`ys` must be (pool, times, ...) and `ts` (times,) or (pool, times); "
                    f"got {leaf.shape} and {jnp.shape(self.ts)}."
                )
        if not self.draw:
            return
        if is_concrete(self.ts) and not np.all(np.diff(np.asarray(self.ts)) > 0):
            raise ValueError(
                f"`ts` must rise; got {self.ts}. For trajectories solved backwards, flip "
                "the last axis of `ts` and the second axis of `ys`."
            )
        check_finite((self.ys, self.args), "Trajectories and conditions")

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every leaf with the batch axis."""
        own = self.ts if self.ts.ndim == 2 else None
        rows = own, self.ys, self.args
        ts, ys, args = _draw_rows(key, rows, self.batch_size, self.draw)
        if ts is None:
            ts = jnp.broadcast_to(self.ts, (self.batch_size, *self.ts.shape))
        return TrajectoryPath(ts, ys), args


class StateBatches(eqx.Module):
    """Batches of single states, for distillation without data.

    **Arguments:**

    - `draw`: a function `(key, batch_size) -> states`, every leaf with the batch axis;
      or arrays with a leading axis, from which rows are drawn with replacement.
    - `batch_size`: the number of states per batch, at least 1.
    - `args`: conditions, such as the parameters of a physical system: a function
      `(key, batch_size) -> args`, which draws them independently of the states; or, if
      the states are arrays, arrays with one row for each row of states; or `None`.

    **Raises:** `ValueError` for a batch size below 1, arrays without rows, rows that are
    not finite (see [`flowdiffrax.data.finite_rows`][]), or conditions that do not match
    the states; `TypeError` for functions that do not take the arguments above, or a
    memory map.
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
            check_finite((self.draw, rows), "States and conditions")
        else:
            _check_no_rows(rows, "a function that draws `args`")

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


def _check_plug_in(base: object, coupling: object) -> None:
    """**Raises:** `ValueError` if pairs are not independent, or the base not Gaussian."""
    if not isinstance(coupling, IndependentCoupling):
        raise ValueError(
            "`plug_in=True` needs independent pairs, since only then does it know how "
            f"likely each data point is; got `coupling={type(coupling).__name__}(...)`."
        )
    if not isinstance(base, GaussianBase):
        raise ValueError(
            "`plug_in=True` needs a base of known density, `base=GaussianBase(...)`."
        )


def _check_no_rows(args: Args, cure: str) -> None:
    """**Raises:** `ValueError` for rows of conditions without rows of points."""
    if args is not None:
        raise ValueError(
            "`args` as arrays needs points given as arrays, row for row; with a function "
            f"that draws points, use {cure}."
        )


def check_finite(tree: PyTree, name: str, rows: np.ndarray | None = None) -> None:
    """**Raises:** `ValueError` for concrete rows that are not finite.

    `rows` are the numbers of the rows in the data, if the tree has only some of them.
    """
    bad = rows_not_finite(tree)
    if bad.any():
        first = bad.argmax() if rows is None else rows[bad.argmax()]
        raise ValueError(
            f"{name} must be finite; {bad.sum()} of {bad.size} rows are not, the first "
            f"of them row {first}. Drop them, for example with `data.finite_rows`."
        )


def _draw_rows(key, tree, batch_size, draw=True):
    if not draw:
        if _num_rows(tree) != batch_size:
            raise ValueError(
                f"`draw=False` takes all {_num_rows(tree)} rows, not {batch_size}."
            )
        return tree
    rows = jr.randint(key, (batch_size,), 0, _num_rows(tree))
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[rows], tree)
