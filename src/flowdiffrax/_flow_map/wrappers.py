import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._custom_types import Args, State, Time, TwoTimeMap
from .._interpolant import AbstractInterpolant
from .._misc import check_flow_map, scale, times_like
from .base import AbstractFlowMap, check_times


class ComposedFlowMap(AbstractFlowMap):
    r"""A flow map that takes `num_jumps` equal jumps of another instead of one.

    $X_{t_{K-1},t} \circ \dots \circ X_{s,t_1}$ with $t_k = s + \tfrac kK (t - s)$. For an
    exact map it changes nothing; a learned one is mostly better in short jumps.

    **Arguments:**

    - `flow_map`: the map to compose.
    - `num_jumps`: the number of jumps $K$, at least 1, and of evaluations.

    **Raises:** `ValueError` if `num_jumps` is below 1.
    """

    flow_map: TwoTimeMap
    num_jumps: int = eqx.field(static=True)

    def __check_init__(self):
        check_composable(self.flow_map)
        if self.num_jumps < 1:
            raise ValueError(f"`num_jumps` must be at least 1; got {self.num_jumps}.")

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        check_times(self, s, t)
        s, t = times_like(x, s, t)
        fractions = jnp.arange(self.num_jumps + 1, dtype=s.dtype) / self.num_jumps
        # A convex combination ends at `t` to the last bit, where s + K (t - s)/K may not.
        ts = (1 - fractions) * s + fractions * t
        jump = lambda x, ends: (self.flow_map(ends[0], ends[1], x, args), None)
        out, _ = lax.scan(jump, x, (ts[:-1], ts[1:]))
        return out


class InverseFlowMap(AbstractFlowMap):
    r"""The inverse of each map, $(s, t) \mapsto X_{s,t}^{-1}$.

    For a flow map that is $X_{t,s}$, a single evaluation with the times swapped:
    `InverseFlowMap(X)(s, t, .)` undoes `X(s, t, .)` as far as `X` is consistent, see
    [`flowdiffrax.inverse_residual`][].

    Inverses are for one jump. They do not compose in the order of their times, so that
    the solver, `sample` and `ComposedFlowMap` refuse them: to go back in several jumps,
    run the map itself from `t1` to `t0`.

    **Arguments:**

    - `flow_map`: the map to invert; it must be trained in both directions of time.
    """

    flow_map: TwoTimeMap

    def __check_init__(self):
        check_flow_map(self.flow_map)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        return self.flow_map(t, s, x, args)


def check_composable(flow_map: object) -> None:
    """**Raises:** `TypeError` for what is no map, or does not compose, as an inverse."""
    check_flow_map(flow_map)
    if isinstance(flow_map, InverseFlowMap):
        raise TypeError(
            "An `InverseFlowMap` is for one jump: inverses do not compose in the order "
            "of their times. To go back, run the map itself from `t1` to `t0`."
        )


class RescheduledFlowMap(AbstractFlowMap):
    r"""A map learned under one interpolant, serving another without retraining.

    For a Gaussian base and the same coupling, interpolants whose coefficients point the
    same way, $(\tilde\alpha_t, \tilde\beta_t) = c_t\,(\alpha_{t'}, \beta_{t'})$, differ
    by a scaling of space and a change of clock only, so that
    $\tilde X_{s,t}(x) = c_t\, X_{s',t'}(x / c_s)$. It holds for any base and data.

    !!! info "Numerics"

        The clock $t'$ is found by bisection of the angle of $(\alpha, \beta)$ and two
        Newton steps, which also carry its derivatives. Cost: one evaluation a jump.

    **Arguments:**

    - `flow_map`: a map for the interpolant `source`.
    - `source`, `target`: the interpolant it was learned under, and the one to serve.

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
            if interpolant.has_latent:
                raise ValueError(
                    "A change of schedule needs interpolants without latent; got "
                    f"{type(interpolant).__name__} with one."
                )

    @property
    def time_range(self):
        return (0.0, 1.0)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        check_times(self, s, t)
        s, t = times_like(x, s, t)
        source_s, c_s = self._clock(s)
        source_t, c_t = self._clock(t)
        return scale(c_t, self.flow_map(source_s, source_t, scale(1 / c_s, x), args))

    def _clock(self, t):
        """The source's time at which the directions agree, and the ratio of lengths."""
        zero, one = jnp.zeros_like(t), jnp.ones_like(t)
        angle = _angle(self.target, t)
        # A diffusion's schedule stops short of its base, or of the data. Where the
        # target goes further, the source's end must do: beyond it no map is trained.
        # The slack keeps a rounded end point, and its derivatives, as they are.
        slack = 8 * jnp.finfo(t.dtype).eps
        lowest, highest = _angle(self.source, zero), _angle(self.source, one)
        angle = jnp.where(angle < lowest - slack, lowest, angle)
        angle = jnp.where(angle > highest + slack, highest, angle)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            below = _angle(self.source, middle) < angle
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        # Sixty halvings exhaust float64.
        low, high = lax.fori_loop(0, 60, halve, lax.stop_gradient((zero, one)))
        clock = lax.stop_gradient((low + high) / 2)
        # Bisection has no derivative. Newton's correction is zero in value here, and
        # in two steps gives the inverse function's first and second derivatives.
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
