import jax.numpy as jnp
from jax import lax

from .._check import check_like
from .._time import as_times, times_like
from .._tree import nan_where
from .._types import Args, State, Time
from ._base import AbstractFlowMap, check_times, times_out_of_range
from ._inverse import check_composable


class AutonomousFlowMap(AbstractFlowMap):
    r"""One map for all start times: $X_{s,t} = X_{0,h}$ with $h = t - s$.

    For an ODE whose vector field does not depend on time. The flow then depends on the
    step alone, so that a network need not learn the same map at every $s$, and a map
    that is trained on steps $h$ is never asked to extrapolate in time.

    The map itself has no time range, since it starts anywhere. That of the inner map is
    one of steps: `(0, 0.5)` allows steps up to a half forwards, `(-0.5, 0.5)` in both
    directions. A longer step is refused; inside `jit`, where there is nobody to refuse
    it for one example of a batch, the state is NaN, which ends a solve, as one that
    diverged, or makes a [`flowdiffrax.HybridSolver`][] step classically.

    !!! info "Numerics"

        The step is taken in the precision of the times, and rounded to that of the state
        afterwards: late times in float64 do not spoil a float32 state's short steps.

    **Arguments:**

    - `flow_map`: the inner map, which sees the times $0$ and $h$.

    **Raises:** `TypeError` for an inner map that is not a
    [`flowdiffrax.AbstractFlowMap`][], `ValueError` if its time range leaves out 0; when
    it is called, `ValueError` for a step outside that range, if known.
    """

    flow_map: AbstractFlowMap

    def __check_init__(self):
        check_inner(self.flow_map)
        time_range = getattr(self.flow_map, "time_range", None)
        if time_range is not None and not time_range[0] <= 0 <= time_range[1]:
            raise ValueError(
                "The inner map starts at time 0, which its `time_range`, "
                f"{time_range}, leaves out. It is a range of steps t - s: for steps up "
                "to h in both directions, (-h, h)."
            )

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        zero, h, outside = self._step(s, t, x)
        out = check_like(self.flow_map(zero, h, x, args), x, "`flow_map`")
        return out if outside is None else nan_where(outside, out)

    def velocity(self, t: Time, x: State, args: Args = None) -> State:
        zero, _, _ = self._step(t, t, x)
        return self.flow_map.velocity(zero, x, args)

    def average_velocity(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        zero, h, outside = self._step(s, t, x)
        out = self.flow_map.average_velocity(zero, h, x, args)
        return out if outside is None else nan_where(outside, out)

    def _step(self, s, t, x):
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
        check_times(self.flow_map, zero, h)
        outside = times_out_of_range(self.flow_map, zero, h)
        # No solver can check this: it knows the times, which may be any. Diffrax also
        # evaluates beyond the step of an example that is done.
        return zero, h if outside is None else jnp.where(outside, 0, h), outside


def check_inner(flow_map: object) -> None:
    """**Raises:** `TypeError` for what is no `AbstractFlowMap`, or does not compose."""
    check_composable(flow_map)
    if not isinstance(flow_map, AbstractFlowMap):
        raise TypeError(
            "`flow_map` must be an `AbstractFlowMap`, which has velocities too; got "
            f"{type(flow_map).__name__}. Subclass it and define `__call__`."
        )
