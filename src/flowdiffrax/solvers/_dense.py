import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, Real

from .._time import time_dtype
from .._tree import is_concrete, nan_where, num_rows, subtract
from .._types import Args, State, Time, TwoTimeMap
from ..flow_maps._inverse import check_composable
from ..identities import end_derivative


class FlowMapInterpolation(diffrax.AbstractPath):
    r"""Interpolates a solution between its steps by the flow map itself.

    At a time $t$ between the saved times $t_k$ and $t_{k+1}$, the value is
    $X_{t_k,t}(y_k)$, at the cost of one evaluation of the map. It is as accurate between
    the steps as at their ends, however long they are. `SaveAt(dense=True)` instead stores
    a series of each jump, and does not need the map again. This class stores the steps
    and takes the map, so you can also differentiate it in the map's parameters.

    ```python
    sol = diffrax.diffeqsolve(..., saveat=diffrax.SaveAt(t0=True, steps=True))
    path = FlowMapInterpolation.of(sol, flow_map, args)
    path.evaluate(0.37), path.derivative(jnp.linspace(0, 1, 100))
    ```

    The solution may come from any solver: the map starts again at every saved state.

    **Arguments:**

    - `ts`: the times of the steps, increasing or decreasing, of shape `(steps,)` with at
      least two. They may be padded with infinities, as Diffrax pads its solutions.
    - `ys`: the states at those times, every leaf with leading axis `steps`.
    - `flow_map`: the map, `(s, t, x, args) -> x_t`.
    - `args`: passed to the map.

    **Raises:** `ValueError` for shapes that do not match.
    """

    ts: Real[Array, " steps"] = eqx.field(converter=jnp.asarray)
    ys: State
    flow_map: TwoTimeMap
    args: Args = None

    def __check_init__(self):
        check_composable(self.flow_map)
        if self.ts.ndim != 1 or self.ts.shape[0] < 2:
            raise ValueError(
                f"`ts` must be at least two times; got shape {self.ts.shape}. Save with "
                "`SaveAt(t0=True, steps=True)`; for a batch of solutions, use `jax.vmap`."
            )
        num_rows((self.ts, self.ys), "`ts` and `ys`")

    @classmethod
    def of(cls, solution: diffrax.Solution, flow_map: TwoTimeMap, args: Args = None):
        """Interpolates a solution that was saved with `SaveAt(t0=True, steps=True)`.

        **Raises:** `ValueError` for a solution without saved steps, or if its start is
        concrete and is not one of them.
        """
        ts, ys, t0 = solution.ts, solution.ys, solution.t0
        is_known = ts is not None and is_concrete((ts, t0))
        if ts is None or ys is None or (is_known and jnp.any(ts[..., 0] != t0)):
            raise ValueError(
                f"No state saved at t0 = {t0}. Save with `SaveAt(t0=True, steps=True)`."
            )
        return cls(ts, ys, flow_map, args)

    @property
    def t0(self):  # pyright: ignore
        """The first saved time."""
        return self.ts[0]

    @property
    def t1(self):  # pyright: ignore
        """The last saved time that is not padding."""
        return self.ts[self._last]

    @property
    def _last(self) -> Array:
        return jnp.sum(jnp.isfinite(self.ts), dtype=jnp.int32) - 1

    @eqx.filter_jit
    def evaluate(
        self,
        t0: Real[Array, " *times"] | Time,
        t1: Time | None = None,
        left: bool = True,
    ) -> State:
        """Returns the state at `t0`, or the increment from `t0` to `t1` if `t1` is given.

        **Arguments:**

        - `t0`: a time, or an array of times of any shape, between the first and the last
          saved time.
        - `t1`: the end time of an increment; `None` for the state.
        - `left`: whether a saved time belongs to the step before it.

        **Returns:** the state, every leaf with the axes of `t0` in front. It is NaN
        outside the saved times.
        """
        if t1 is not None:
            return subtract(self.evaluate(t1, left=left), self.evaluate(t0, left=left))

        def at(t):
            s, y = self._start(t, left)
            return self._inside(t, self.flow_map(s, t, y, self.args))

        return self._at_each(at, t0)

    @eqx.filter_jit
    def derivative(self, t: Real[Array, " *times"] | Time, left: bool = True) -> State:
        r"""Returns the derivative in time, $\partial_t X_{t_k,t}(y_k)$, by forward mode.

        **Arguments:**

        - `t`: a time, or an array of times of any shape, between the first and the last
          saved time.
        - `left`: whether a saved time belongs to the step before it.

        **Returns:** the derivative, every leaf with the axes of `t` in front. It is NaN
        outside the saved times.
        """

        def at(t):
            s, y = self._start(t, left)
            _, dX = end_derivative(self.flow_map, s, t, y, self.args)
            return self._inside(t, dX)

        return self._at_each(at, t)

    def _at_each(self, at, ts) -> State:
        ts = jnp.asarray(ts, time_dtype(self.ys))
        for _ in range(ts.ndim):
            at = jax.vmap(at)
        return at(ts)

    def _start(self, t: Inexact[Array, ""], left: bool) -> tuple[Array, State]:
        """Returns the last saved time before `t`, and the state there."""
        ts = self.ts.astype(t.dtype)
        falls = ts[1] < ts[0]
        # Padding is infinite in either direction of time.
        rising = jnp.where(falls & jnp.isfinite(ts), -ts, ts)
        key = jnp.where(falls, -t, t)
        index = jnp.searchsorted(rising, key, side="left" if left else "right")
        index = jnp.clip(index.astype(jnp.int32) - 1, 0, jnp.maximum(self._last - 1, 0))
        return ts[index], jtu.tree_map(lambda leaf: leaf[index], self.ys)

    def _inside(self, t: Inexact[Array, ""], value: State) -> State:
        t0, t1 = self.t0.astype(t.dtype), self.t1.astype(t.dtype)
        outside = (t < jnp.minimum(t0, t1)) | (t > jnp.maximum(t0, t1))
        return nan_where(outside, value)
