r"""Log-determinants of jumps, $\log |\det \nabla X_{s,t}(x)|$."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._check import check_callable, check_flow_map, check_like
from .._time import time_dtype, times_like
from .._types import Args, Scalar, State, Time, TwoTimeMap, VectorField
from ._log_density import LogDensityFlowMap
from ._trace import AbstractTrace, ExactTrace, Hutchinson, divergence, ravel_floats


class AbstractLogDet(eqx.Module):
    """How the log-determinant of a jump is found."""

    @abc.abstractmethod
    def __call__(
        self,
        flow_map: TwoTimeMap,
        s: Time,
        t: Time,
        x: State,
        args: Args,
        key: Key[Array, ""] | None,
    ) -> tuple[State, Scalar]:
        r"""The end of the jump and its log-determinant.

        Arguments as for [`flowdiffrax.likelihood.log_det`][], which has checked them.
        """


class ExactJacobian(AbstractLogDet):
    r"""The determinant of the Jacobian: one forward-mode pass for each dimension.

    For states of up to some hundred numbers. It is the density of the map's samples,
    whether or not the map is accurate, wherever the map is one-to-one.

    A flow never flips orientation. Where the determinant is not positive, the map is not
    the map of any flow, nor locally one-to-one on the way there, and the value is NaN.
    """

    def __call__(self, flow_map, s, t, x, args, key) -> tuple[State, Scalar]:
        del key
        vector, unravel = ravel_floats(x)

        def end(vector):
            X_st = _jump(flow_map, s, t, unravel(vector), args)
            return ravel_floats(X_st)[0], X_st

        jacobian, X_st = jax.jacfwd(end, has_aux=True)(vector)
        # LAPACK has no bfloat16.
        sign, log_abs = jnp.linalg.slogdet(jacobian.astype(time_dtype(x)))
        return X_st, jnp.where(sign > 0, log_abs, jnp.nan)


class PowerSeries(AbstractLogDet):
    r"""The trace of a power series, for short jumps in many dimensions.

    With $A = \nabla X_{s,t}(x) - I$, which is small where $t - s$ is,
    $\log\det(I + A) = \operatorname{tr} \sum_{k \ge 1} (-1)^{k+1} A^k / k$. It is cut
    after $K$ terms. What is missing, for $\|A\| = c < 1$ in $d$ dimensions, is at most
    $d\,c^{K+1} / ((K + 1)(1 - c))$.

    The value is NaN where the series shows no convergence, $|A^K z| > |z|$ for some
    probe $z$: take more and shorter jumps.

    !!! info "Numerics"

        One evaluation of the map, linearised, and $K$ Jacobian-vector products for each
        product of the trace; no Jacobian is formed.

    **Arguments:**

    - `trace`: how the trace is found.
    - `num_terms`: the number of terms $K$, at least 1.

    **Raises:** `ValueError` if `num_terms` is below 1.

    ??? cite "Reference"

        For residual networks, [arXiv:1811.00995](https://arxiv.org/abs/1811.00995),
        section 3.2.
    """

    trace: AbstractTrace = Hutchinson()
    num_terms: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        if self.num_terms < 1:
            raise ValueError(f"`num_terms` must be at least 1; got {self.num_terms}.")

    def __call__(self, flow_map, s, t, x, args, key) -> tuple[State, Scalar]:
        vector, unravel = ravel_floats(x)
        end = lambda vector: ravel_floats(_jump(flow_map, s, t, unravel(vector), args))[0]
        X_st, product = jax.linearize(end, vector)

        def logarithm(z):
            power, total = z, jnp.zeros_like(z)
            for k in range(1, self.num_terms + 1):
                power = product(power) - power
                total = total + power * ((-1) ** (k + 1) / k)
            grows = jnp.sum(power**2) > jnp.sum(z**2)
            return jnp.where(grows, jnp.nan, total)

        return unravel(X_st), self.trace(logarithm, vector, key)


class DivergenceIntegral(AbstractLogDet):
    r"""The integral of the divergence along the jump, by Gauss–Legendre quadrature.

    For a flow, $\log\det \nabla X_{s,t}(x) = \int_s^t \nabla \cdot b_u(X_{s,u}(x))\,du$.
    The states on the way are single jumps from $x$, so that the nodes are evaluated side
    by side; an ODE solver would need them in turn.

    The result is as good as the map is consistent: by default $b_u$ is the map's own
    velocity $v_{u,u}$, and the identity holds for a map that follows its own velocity.
    [`flowdiffrax.likelihood.ExactJacobian`][] makes no such assumption.

    **Arguments:**

    - `num_nodes`: the number of nodes, at least 1. The quadrature is exact for
      divergences that are polynomials in $u$ up to the degree `2 * num_nodes - 1`.
    - `trace`: how the divergence is found.
    - `vector_field`: a teacher `(t, x, args) -> dx/dt` to take the divergence of, in the
      place of the map's velocity.

    Cost: a jump, a velocity and the products of the trace for each node.

    **Raises:** `ValueError` if `num_nodes` is below 1; when called, `TypeError` for a map
    that knows no velocity where no `vector_field` is given.
    """

    num_nodes: int = eqx.field(static=True, default=8)
    trace: AbstractTrace = ExactTrace()
    vector_field: VectorField | None = None

    def __check_init__(self):
        if self.num_nodes < 1:
            raise ValueError(f"`num_nodes` must be at least 1; got {self.num_nodes}.")

    def __call__(self, flow_map, s, t, x, args, key) -> tuple[State, Scalar]:
        field: Any = self.vector_field
        if field is None:
            field = getattr(flow_map, "velocity", None)
        check_callable(field, "vector_field", "vector_field(t, x, args)")
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        nodes = jnp.asarray((nodes + 1) / 2, s.dtype)
        weights = jnp.asarray(weights / 2, s.dtype)

        def rate(u, index):
            # Probes of its own for each node: their errors then average out.
            probe_key = None if key is None else jr.fold_in(key, index)
            X_su = _jump(flow_map, s, u, x, args)
            return divergence(field, u, X_su, args, trace=self.trace, key=probe_key)[1]

        rates = jax.vmap(rate)(s + (t - s) * nodes, jnp.arange(self.num_nodes))
        total = (t - s) * (weights @ rates.astype(s.dtype))
        return _jump(flow_map, s, t, x, args), total


class LearnedLogDet(AbstractLogDet):
    """What a [`flowdiffrax.likelihood.LogDensityFlowMap`][] has learned.

    It takes no derivative at all.
    """

    def __call__(self, flow_map, s, t, x, args, key) -> tuple[State, Scalar]:
        del key
        if not isinstance(flow_map, LogDensityFlowMap):
            raise TypeError(
                "`LearnedLogDet` needs a `LogDensityFlowMap`, made from a map that is "
                f"trained on states and log-densities; got {type(flow_map).__name__}."
            )
        return flow_map.with_log_det(s, t, x, args)


def log_det(
    flow_map: TwoTimeMap,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    method: AbstractLogDet = ExactJacobian(),
    key: Key[Array, ""] | None = None,
) -> tuple[State, Scalar]:
    r"""A jump, and by how much it stretches volumes: $\log |\det \nabla X_{s,t}(x)|$.

    Along a flow, densities change by it:
    $\log \rho_t(X_{s,t}(x)) = \log \rho_s(x) - \log |\det \nabla X_{s,t}(x)|$.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `s`, `t`: start and end of the jump, in either order.
    - `x`: one state at time `s`, of floating-point numbers; use `jax.vmap` for a batch.
    - `args`: passed on to the map.
    - `method`: how: [`flowdiffrax.likelihood.ExactJacobian`][] for few dimensions,
      [`flowdiffrax.likelihood.PowerSeries`][] or
      [`flowdiffrax.likelihood.DivergenceIntegral`][] for many,
      [`flowdiffrax.likelihood.LearnedLogDet`][] for a map that was trained to know.
    - `key`: a random key, if the method has a stochastic trace; another for each example.

    **Returns:** the pair $X_{s,t}(x)$ and its log-determinant, the latter in float32 at
    least.

    **Raises:** `ValueError` for a missing key or a map whose output has another shape
    than `x`, `TypeError` for another dtype or a complex state.
    """
    check_flow_map(flow_map)
    x = jax.tree_util.tree_map(jnp.asarray, x)
    s, t = times_like(x, s, t)
    return method(flow_map, s, t, x, args, key)


def _jump(flow_map: TwoTimeMap, s: Time, t: Time, x: State, args: Args) -> State:
    return check_like(flow_map(s, t, x, args), x, "`flow_map`")
