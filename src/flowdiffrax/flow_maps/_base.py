import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool

from .._time import as_times, times_like
from .._tree import is_concrete
from .._types import Args, State, Time


class AbstractFlowMap(eqx.Module):
    r"""A two-time map $X_{s,t}$: it takes a state at time $s$ to time $t$.

    For an ODE $\dot x_t = b_t(x_t)$ the flow map is the one map with
    $X_{s,t}(x_s) = x_t$ along every solution, for $s < t$ and for $s > t$. Every map
    has $X_{s,s}(x) = x$, and defines an average velocity $v_{s,t}$ by
    $X_{s,t}(x) = x + (t - s) v_{s,t}(x)$. On the diagonal, $v_{t,t} = b_t$.

    To write your own, subclass and define `__call__`; the velocities follow from it.
    Define them too where your map knows them without a derivative.

    **Attributes:**

    - `time_range`: the interval `(low, high)` that both times must lie in, or `None` if
      the map makes no such promise. [`flowdiffrax.FlowMapSolver`][] and
      [`flowdiffrax.sample`][] refuse times outside.

    ??? cite "Reference"

        Flow map matching, definition 2.1 and proposition 2.2:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507),
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    time_range = None

    @abc.abstractmethod
    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        """Takes a state from time `s` to time `t`.

        **Arguments:**

        - `s`, `t`: start and end of the jump, in either order.
        - `x`: one state at time `s`, an array or a PyTree of arrays; use `jax.vmap` for
          a batch.
        - `args`: anything the map is conditioned on, as in Diffrax.

        **Returns:** the state at time `t`, like `x` in structure, shapes and dtypes.
        """

    def velocity(self, t: Time, x: State, args: Args = None) -> State:
        r"""The instantaneous velocity $v_{t,t}(x) = \partial_t X_{s,t}(x) |_{s=t}$.

        It has the signature of a vector field, so that
        `diffrax.ODETerm(flow_map.velocity)` is the ODE that the map implies.
        """
        (t,) = times_like(x, t)
        _, v_tt = jax.jvp(lambda end: self(t, end, x, args), (t,), (jnp.ones_like(t),))
        return v_tt

    def average_velocity(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        r"""The slope of the chord, $v_{s,t}(x) = (X_{s,t}(x) - x) / (t - s)$.

        At `s == t` it is [`velocity`][flowdiffrax.AbstractFlowMap.velocity].
        """
        s, t = times_like(x, s, t)
        h = t - s
        # Both branches are evaluated, so the division must be safe in the one not
        # taken: a NaN there would reach the gradient.
        safe = jnp.where(h == 0, 1, h)
        X_st = self(s, t, x, args)
        v_tt = self.velocity(t, x, args)

        def slope(end: Array, start: Array, v: Array) -> Array:
            # A gap of float64 may be zero in the precision of the leaf.
            width = safe.astype(jnp.finfo(end.dtype).dtype).astype(end.dtype)
            at_rest = (h == 0) | (width == 0)
            return jnp.where(at_rest, v, (end - start) / jnp.where(width == 0, 1, width))

        return jtu.tree_map(slope, X_st, x, v_tt)


def times_out_of_range(flow_map: object, s: Time, t: Time) -> Bool[Array, ""] | None:
    """Whether a jump leaves the map's declared range; `None` if it declares none."""
    time_range = getattr(flow_map, "time_range", None)
    if time_range is None:
        return None
    s, t = as_times(s, t)
    # Evenly spaced times are rounded: 10 * 0.1 > 1. A millionth is no extrapolation.
    low, high = time_range
    slack = 1e-6 * (high - low)
    return ((jnp.minimum(s, t) < low - slack) | (jnp.maximum(s, t) > high + slack)) & (
        s != t
    )


def out_of_range_message(flow_map: object) -> str:
    low, high = getattr(flow_map, "time_range", (None, None))
    return (
        f"A jump leaves the time range of the flow map, [{low}, {high}]. A map "
        "extrapolates badly: integrate within its range, or declare a wider "
        "`time_range` if it was trained on one."
    )


def check_times(flow_map: object, s: Time, t: Time) -> None:
    """**Raises:** `ValueError` if the times are concrete and leave the range."""
    if is_concrete((s, t)):
        outside = times_out_of_range(flow_map, s, t)
        # Inside `jit` even constants become tracers once an operation touches them.
        if outside is not None and is_concrete(outside) and bool(np.asarray(outside)):
            raise ValueError(f"{out_of_range_message(flow_map)} Got s={s}, t={t}.")


def as_time_range(time_range: Any) -> tuple[float, float] | None:
    """Two Python numbers, as a static field needs them, or `None`.

    **Raises:** `TypeError` for what are not two numbers, `ValueError` unless they rise.
    """
    if time_range is None:
        return None
    try:
        low, high = map(float, time_range)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`time_range` must be two numbers, `(low, high)`; got {time_range}."
        ) from error
    if not low < high:
        raise ValueError(
            f"`time_range` must be `(low, high)` with low < high; got {time_range}. "
            "A map serves both directions of time, so that no order is needed."
        )
    return low, high
