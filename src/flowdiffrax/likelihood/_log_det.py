r"""Log-determinants of jumps, $\log |\det \nabla X_{s,t}(x)|$."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._check import (
    check_callable,
    check_count,
    check_flow_map,
    check_instance,
    check_like,
)
from .._time import time_dtype, times_like
from .._types import Args, Scalar, State, Time, TwoTimeMap, VectorField
from ._log_density import LogDensityFlowMap
from ._trace import AbstractTrace, ExactTrace, Hutchinson, divergence, ravel_floats


class AbstractLogDet(eqx.Module):
    """How to compute the log-determinant of a jump."""

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
        r"""Returns the end of the jump and its log-determinant.

        The arguments are those of [`flowdiffrax.likelihood.log_det`][], already checked.
        """


class ExactJacobian(AbstractLogDet):
    r"""The determinant of the Jacobian, from one forward-mode pass per dimension.

    Use it for states of up to a few hundred numbers. Wherever the map is one-to-one, it
    gives the density of the map's samples, whether or not the map is accurate.

    A flow never reverses orientation. Where the determinant is not positive, the map is
    not the map of any flow, and is not locally one-to-one at some time on the way there.
    The value is then NaN.
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

    With $A = \nabla X_{s,t}(x) - I$, which is small if $t - s$ is small,
    $\log\det(I + A) = \operatorname{tr} \sum_{k \ge 1} (-1)^{k+1} A^k / k$. The series is
    truncated after $K$ terms. For $\|A\| = c < 1$ in $d$ dimensions, the truncation error
    is at most $d\,c^{K+1} / ((K + 1)(1 - c))$.

    The value is NaN if the series does not seem to converge, that is, if $|A^K z| > |z|$
    for some probe $z$. In that case, take more and shorter jumps.

    !!! info "Numerics"

        It takes one evaluation of the map, linearised, and $K$ Jacobian-vector products
        for each product of the trace. It forms no Jacobian.

    **Arguments:**

    - `trace`: how to compute the trace.
    - `num_terms`: the number of terms $K$, at least 1.

    **Raises:** `ValueError` if `num_terms` is below 1.

    ??? cite "Reference"

        For residual networks, [arXiv:1811.00995](https://arxiv.org/abs/1811.00995),
        section 3.2.
    """

    trace: AbstractTrace = Hutchinson()
    num_terms: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_count(self.num_terms, 1, "num_terms")

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
    The states on the way are single jumps from $x$, so all nodes are evaluated in
    parallel; an ODE solver would need them in sequence.

    The result is only as accurate as the map is consistent: by default $b_u$ is the map's
    own velocity $v_{u,u}$, and the identity holds if the map follows its own velocity.
    [`flowdiffrax.likelihood.ExactJacobian`][] makes no such assumption.

    **Arguments:**

    - `num_nodes`: the number of nodes, at least 1. The quadrature is exact for
      divergences that are polynomials in $u$ up to the degree `2 * num_nodes - 1`.
    - `trace`: how to compute the divergence.
    - `vector_field`: a teacher `(t, x, args) -> dx/dt`, whose divergence is used instead
      of that of the map's velocity.

    Each node costs a jump, a velocity and the products of the trace.

    **Raises:** `ValueError` if `num_nodes` is below 1; when called, `TypeError` if no
    `vector_field` is given and the map has no velocity.
    """

    num_nodes: int = eqx.field(static=True, default=8)
    trace: AbstractTrace = ExactTrace()
    vector_field: VectorField | None = None

    def __check_init__(self):
        check_count(self.num_nodes, 1, "num_nodes")

    def __call__(self, flow_map, s, t, x, args, key) -> tuple[State, Scalar]:
        field: Any = self.vector_field
        if field is None:
            field = getattr(flow_map, "velocity", None)
        check_callable(field, "vector_field", "vector_field(t, x, args)")
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        nodes = jnp.asarray((nodes + 1) / 2, s.dtype)
        weights = jnp.asarray(weights / 2, s.dtype)

        def rate(u, index):
            # Each node has its own probes, so that their errors average out.
            probe_key = None if key is None else jr.fold_in(key, index)
            X_su = _jump(flow_map, s, u, x, args)
            return divergence(field, u, X_su, args, trace=self.trace, key=probe_key)[1]

        rates = jax.vmap(rate)(s + (t - s) * nodes, jnp.arange(self.num_nodes))
        total = (t - s) * (weights @ rates.astype(s.dtype))
        return _jump(flow_map, s, t, x, args), total


class LearnedLogDet(AbstractLogDet):
    """The log-determinant that a [`flowdiffrax.likelihood.LogDensityFlowMap`][] learned.

    It takes no derivatives.
    """

    def __call__(self, flow_map: Any, s, t, x, args, key) -> tuple[State, Scalar]:
        del key
        check_instance(flow_map, LogDensityFlowMap, "flow_map")
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
    r"""A jump and its log-determinant, $\log |\det \nabla X_{s,t}(x)|$.

    The log-determinant tells how the jump changes volumes. Along a flow, densities change
    accordingly:
    $\log \rho_t(X_{s,t}(x)) = \log \rho_s(x) - \log |\det \nabla X_{s,t}(x)|$.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `s`, `t`: start and end of the jump, in either order.
    - `x`: one state at time `s`, of floating-point numbers; use `jax.vmap` for a batch.
    - `args`: passed to the map.
    - `method`: how to compute it: [`flowdiffrax.likelihood.ExactJacobian`][] for few
      dimensions, [`flowdiffrax.likelihood.PowerSeries`][] or
      [`flowdiffrax.likelihood.DivergenceIntegral`][] for many,
      [`flowdiffrax.likelihood.LearnedLogDet`][] for a map that was trained on it.
    - `key`: a random key, if the method has a stochastic trace. Use a different key for
      each example.

    **Returns:** the pair of $X_{s,t}(x)$ and its log-determinant, the latter in float32
    at least.

    **Raises:** `ValueError` if a key is missing or the map's output has another shape
    than `x`, `TypeError` if it has another dtype or the state is complex.
    """
    check_flow_map(flow_map)
    x = jax.tree_util.tree_map(jnp.asarray, x)
    s, t = times_like(x, s, t)
    return method(flow_map, s, t, x, args, key)


def _jump(flow_map: TwoTimeMap, s: Time, t: Time, x: State, args: Args) -> State:
    return check_like(flow_map(s, t, x, args), x, "`flow_map`")
