import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._time import as_times, times_like
from .._tree import add_scaled, is_concrete
from .._types import Args, Scalar, State, Time


class AbstractFlowMap(eqx.Module):
    r"""A two-time map $X_{s,t}$: it takes a state at time $s$ to time $t$.

    For an ODE $\dot x_t = b_t(x_t)$ the flow map is the one map with
    $X_{s,t}(x_s) = x_t$ along every solution, for $s < t$ and for $s > t$. Every map
    has $X_{s,s}(x) = x$, and defines an average velocity $v_{s,t}$ by
    $X_{s,t}(x) = x + (t - s) v_{s,t}(x)$. On the diagonal, $v_{t,t} = b_t$.

    To write your own, subclass this and define `jump`; the velocities follow from it.
    Define `chord` and `tangent` as well if your map knows them without a derivative. If
    your map computes the average velocity, subclass
    [`flowdiffrax.flow_maps.AbstractChordFlowMap`][] instead. All three methods receive
    times as scalar arrays in the precision of the state, within `time_range` if known.

    **Attributes:**

    - `time_range`: the interval `(low, high)` that both times must lie in; `None` for
      any times. [`flowdiffrax.FlowMapSolver`][] and [`flowdiffrax.sample`][] refuse
      times outside it.

    ??? cite "Reference"

        Flow map matching, definition 2.1 and proposition 2.2:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507),
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    time_range = None

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        """Takes a state from time `s` to time `t`.

        **Arguments:**

        - `s`, `t`: start and end of the jump, in either order.
        - `x`: one state at time `s`, an array or a PyTree of arrays; use `jax.vmap` for
          a batch.
        - `args`: whatever the map is conditioned on, as in Diffrax.

        **Returns:** the state at time `t`, like `x` in structure, shapes and dtypes.

        **Raises:** `ValueError` for concrete times outside `time_range`.
        """
        s, t = self._times(s, t, x)
        return self.jump(s, t, x, args)

    def velocity(self, t: Time, x: State, args: Args = None) -> State:
        r"""The instantaneous velocity $v_{t,t}(x) = \partial_t X_{s,t}(x) |_{s=t}$.

        It has the signature of a vector field: `diffrax.ODETerm(flow_map.velocity)` is
        the ODE that the map implies.
        """
        _, t = self._times(t, t, x)
        return self.tangent(t, x, args)

    def average_velocity(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        r"""The slope of the chord, $v_{s,t}(x) = (X_{s,t}(x) - x) / (t - s)$.

        At `s == t` it is [`velocity`][flowdiffrax.AbstractFlowMap.velocity].
        """
        s, t = self._times(s, t, x)
        return self.chord(s, t, x, args)

    @abc.abstractmethod
    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the state at time `t`; calling the map calls this."""

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity: by default that of `jump`, or `tangent` if
        `s == t`.
        """
        h = t - s
        # `where` evaluates both branches, so the division must be safe in the one that
        # is not taken: a NaN there would reach the gradient.
        safe = jnp.where(h == 0, 1, h)
        X_st = self.jump(s, t, x, args)
        v_tt = self.tangent(t, x, args)

        def slope(end: Array, start: Array, v: Array) -> Array:
            # A float64 gap may round to zero in the precision of the leaf.
            width = safe.astype(jnp.finfo(end.dtype).dtype).astype(end.dtype)
            at_rest = (h == 0) | (width == 0)
            return jnp.where(at_rest, v, (end - start) / jnp.where(width == 0, 1, width))

        return jtu.tree_map(slope, X_st, x, v_tt)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity: by default the derivative of `jump` in its end time."""
        end = lambda end: self.jump(t, end, x, args)
        return jax.jvp(end, (t,), (jnp.ones_like(t),))[1]

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        """Checks the times and converts them for `jump`, `chord` and `tangent`."""
        if self.time_range is not None:
            check_times(self, s, t)
        s, t = times_like(x, s, t)
        return s, t


class AbstractChordFlowMap(AbstractFlowMap):
    r"""A map given by its average velocity: $X_{s,t}(x) = x + (t - s)\,v_{s,t}(x)$.

    To write your own, subclass this and define `chord`, which must also be correct at
    `s == t`.
    """

    @abc.abstractmethod
    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity, or the velocity if `s == t`."""

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Moves along the chord."""
        return add_scaled(x, t - s, self.chord(s, t, x, args))

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the chord of zero length."""
        return self.chord(t, t, x, args)


def times_out_of_range(flow_map: object, s: Time, t: Time) -> Bool[Array, ""] | None:
    """Whether a jump leaves the map's `time_range`; `None` if the map has none."""
    time_range = getattr(flow_map, "time_range", None)
    if time_range is None:
        return None
    s, t = as_times(s, t)
    low, high = _with_slack(time_range)
    return ((jnp.minimum(s, t) < low) | (jnp.maximum(s, t) > high)) & (s != t)


def _with_slack(time_range: tuple[float, float]) -> tuple[float, float]:
    # Evenly spaced times are rounded: 10 * 0.1 > 1. A millionth does not extrapolate.
    low, high = time_range
    slack = 1e-6 * (high - low)
    return low - slack, high + slack


def out_of_range_message(flow_map: object) -> str:
    low, high = getattr(flow_map, "time_range", (None, None))
    return (
        f"A jump leaves the time range of the flow map, [{low}, {high}]. A map "
        "extrapolates badly: integrate within its range, or declare a wider "
        "`time_range` if it was trained on one."
    )


def check_times(flow_map: object, s: Time, t: Time, given: str = "") -> None:
    """**Raises:** `ValueError` if the times are concrete and leave the range.

    `given` says which times the user gave, where these are not they.
    """
    time_range = getattr(flow_map, "time_range", None)
    is_known = is_concrete((s, t)) and jnp.shape(s) == jnp.shape(t) == ()
    if time_range is None or not is_known:
        return
    low, high = _with_slack(time_range)
    first, last = sorted([float(s), float(t)])
    if first != last and (first < low or last > high):
        raise ValueError(f"{out_of_range_message(flow_map)} Got {given}s={s}, t={t}.")


def times_as_given(flow_map: Any, s: Time, t: Time) -> tuple[Scalar, Scalar]:
    """Checks the times of a wrapper, and keeps their precision for the inner map."""
    check_times(flow_map, s, t)
    s, t = as_times(s, t)
    return s, t


def as_time_range(time_range: Any) -> tuple[float, float] | None:
    """Converts a time range to two Python numbers, as a static field needs; or `None`.

    **Raises:** `TypeError` unless it is two numbers, `ValueError` unless they increase.
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
        raise ValueError(f"`time_range` must have low < high; got {time_range}.")
    return low, high
