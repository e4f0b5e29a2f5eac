import jax.numpy as jnp
from jax import lax

from .._check import check_instance, check_like
from .._time import as_times, times_like
from .._tree import nan_where
from .._types import Args, Scalar, State, Time
from ._base import AbstractFlowMap, check_times, times_out_of_range
from ._inverse import check_composable


class AutonomousFlowMap(AbstractFlowMap):
    r"""Uses one map for all start times: $X_{s,t} = X_{0,h}$ with $h = t - s$.

    This is for an ODE whose vector field does not depend on time. The flow then depends
    only on the step: the network need not learn the same map at every $s$, and a map
    trained on steps $h$ never has to extrapolate in time.

    The map itself has no time range, since it can start at any time. The time range of
    the inner map is a range of steps: `(0, 0.5)` allows forward steps of up to a half,
    `(-0.5, 0.5)` steps in both directions. A longer step raises an error. Inside `jit`,
    where an error cannot be raised for one example of a batch, the state becomes NaN:
    this ends a solve as diverged, or makes [`flowdiffrax.HybridSolver`][] take a
    classical step.

    !!! info "Numerics"

        The step is computed in the precision of the times, and then rounded to that of
        the state: short steps at late float64 times are accurate for a float32 state.

    **Arguments:**

    - `flow_map`: the inner map. It is called with the times $0$ and $h$.

    **Raises:** `TypeError` for an inner map that is not a
    [`flowdiffrax.AbstractFlowMap`][], `ValueError` if its time range does not contain 0;
    when called, `ValueError` for a concrete step outside that range.
    """

    flow_map: AbstractFlowMap

    def __check_init__(self):
        check_inner(self.flow_map)
        time_range = getattr(self.flow_map, "time_range", None)
        if time_range is not None and not time_range[0] <= 0 <= time_range[1]:
            raise ValueError(
                f"`time_range` is one of steps t - s, and must hold 0; got {time_range}."
            )

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Takes the step `t - s` with the inner map."""
        h, outside = self._step(s, t)
        out = check_like(self.flow_map(jnp.zeros_like(h), h, x, args), x, "`flow_map`")
        return out if outside is None else nan_where(outside, out)

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity of the step `t - s`."""
        h, outside = self._step(s, t)
        out = self.flow_map.average_velocity(jnp.zeros_like(h), h, x, args)
        return out if outside is None else nan_where(outside, out)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity, which is the same at all times."""
        return self.flow_map.velocity(jnp.zeros_like(t), x, args)

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        """Returns 0 and the step, the difference of the times before they are rounded."""
        s, t = as_times(s, t)
        h = t - s
        time_range = getattr(self.flow_map, "time_range", None)
        if time_range is not None:
            # The difference of late times is rounded: 70.4 - 70.1 > 0.3 in float32.
            rounding = 4 * jnp.finfo(h.dtype).eps * jnp.maximum(jnp.abs(s), jnp.abs(t))
            beyond = h - jnp.clip(h, *time_range)
            beyond = jnp.where(jnp.abs(beyond) <= rounding, beyond, 0)
            h = h - lax.stop_gradient(beyond)
        (h,) = times_like(x, h)
        zero = jnp.zeros_like(h)
        check_times(self.flow_map, zero, h, f"s={s}, t={t}, which is the step from ")
        return zero, h

    def _step(self, s, t):
        h = t - s
        outside = times_out_of_range(self.flow_map, jnp.zeros_like(h), h)
        # A solver cannot check this, since all times are allowed. Diffrax also evaluates
        # beyond the last step of an example that has finished.
        return h if outside is None else jnp.where(outside, 0, h), outside


def check_inner(flow_map: object) -> None:
    """**Raises:** `TypeError` unless it is an `AbstractFlowMap` that composes."""
    check_composable(flow_map)
    check_instance(flow_map, AbstractFlowMap, "flow_map")
