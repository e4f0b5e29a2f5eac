import jax
import jax.numpy as jnp
from jax import lax

from .._check import check_flow_map
from .._tree import scale
from .._types import Args, Scalar, State, TwoTimeMap
from ..paths._base import AbstractInterpolant, check_no_latent
from ._base import AbstractFlowMap


class RescheduledFlowMap(AbstractFlowMap):
    r"""Uses a map learned under one interpolant for another, without retraining.

    Two interpolants whose coefficients have the same direction,
    $(\tilde\alpha_t, \tilde\beta_t) = c_t\,(\alpha_{t'}, \beta_{t'})$, differ only by a
    scaling of space and a change of clock, so that
    $\tilde X_{s,t}(x) = c_t\, X_{s',t'}(x / c_s)$. This holds for any base and data, if
    the coupling is the same.

    !!! info "Numerics"

        The clock $t'$ is found by bisection on the angle of $(\alpha, \beta)$, followed
        by two Newton steps, which also carry its derivatives. A jump costs one evaluation
        of the inner map.

    **Arguments:**

    - `flow_map`: a map for the interpolant `source`.
    - `source`, `target`: the interpolant it was learned under, and the one to use it for.

    **Raises:** `ValueError` if either interpolant has a latent.

    ??? cite "Reference"

        [arXiv:2206.00364](https://arxiv.org/abs/2206.00364), appendix B.2, for
        diffusions.
    """

    flow_map: TwoTimeMap
    source: AbstractInterpolant
    target: AbstractInterpolant

    def __check_init__(self):
        check_flow_map(self.flow_map)
        for interpolant in (self.source, self.target):
            check_no_latent(interpolant)

    @property
    def time_range(self):
        return (0.0, 1.0)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Jumps with the inner map, on its clock and scale."""
        source_s, c_s = self._clock(s)
        source_t, c_t = self._clock(t)
        return scale(c_t, self.flow_map(source_s, source_t, scale(1 / c_s, x), args))

    def _clock(self, t):
        """Returns the source's time of the same angle, and the ratio of lengths."""
        zero, one = jnp.zeros_like(t), jnp.ones_like(t)
        angle = _angle(self.target, t)
        # A diffusion's schedule may stop short of its base or of the data. If the target
        # goes further, use the source's end: the map is not trained beyond it. The slack
        # leaves a rounded end point and its derivatives unchanged.
        slack = 8 * jnp.finfo(t.dtype).eps
        lowest, highest = _angle(self.source, zero), _angle(self.source, one)
        angle = jnp.where(angle < lowest - slack, lowest, angle)
        angle = jnp.where(angle > highest + slack, highest, angle)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            below = _angle(self.source, middle) < angle
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        # Sixty halvings exhaust the digits of float64.
        low, high = lax.fori_loop(0, 60, halve, lax.stop_gradient((zero, one)))
        clock = lax.stop_gradient((low + high) / 2)
        # Bisection has no derivative. Newton's correction is zero in value here, but its
        # two steps give the first and second derivatives of the inverse function.
        for _ in range(2):
            value, slope = jax.jvp(
                lambda clock: _angle(self.source, clock), (clock,), (one,)
            )
            clock = clock + (angle - value) / slope
        length = lambda interpolant, t: jnp.hypot(*interpolant.coefficients(t)[:2])
        return clock, length(self.target, t) / length(self.source, clock)


def _angle(interpolant: AbstractInterpolant, t):
    alpha, beta, _ = interpolant.coefficients(t)
    return jnp.arctan2(beta, alpha)
