from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._time import times_like
from .._tree import ravel, scale, squared_norm
from .._types import Args, Scalar, State, Time, TwoTimeMap, VectorField
from ._quadrature import path_residuals, radau


def lagrangian_bound(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    growth: Callable[[Time, State, Args], Scalar] | float | None = None,
    num_nodes: int = 8,
) -> Scalar:
    r"""Bounds the norm of the error, by the residuals along the map's own path.

    With $r_u = \partial_u \hat X_{s,u}(x) - b_u(\hat X_{s,u}(x))$ and the rate $C_u$ at
    which small differences grow under the ODE,

    $$|e| \le \int_s^t \exp\Big(\int_u^t C_w\,dw\Big)\,|r_u|\,du,$$

    with equality in one dimension if $b$ is linear and $r_u$ does not change sign. It
    needs no true trajectory. Norms are Euclidean, over all entries.

    !!! info "Numerics"

        It takes `num_nodes` forward-mode passes through the map and calls of the teacher.
        Without `growth`, it also takes one forward-mode pass through the teacher for each
        entry of the state and each node. The rate is then taken along the map's path, so
        for a nonlinear ODE the bound only holds to first order in the error. For a
        rigorous bound, pass a number that bounds the rate wherever the two trajectories
        can be. Both hold up to the quadrature's error: a residual of short duration can
        fall between its nodes.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field that it should follow.
    - `s`, `t`: start and end of the jump, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to both.
    - `growth`: $C_u$ in the jump's direction of time, a number or a function
      `(u, x, args)`; `None` for [`flowdiffrax.estimates.logarithmic_norm`][] along the
      path.
    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Returns:** a scalar.

    **Raises:** `ValueError` if `num_nodes` is less than 1.

    ??? cite "Reference"

        Grönwall's inequality, as in flow map matching, proposition 3.7:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    s, t = times_like(x, s, t)
    direction = jnp.where(t < s, -1, 1).astype(t.dtype)
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)
    lengths = jax.vmap(lambda r: jnp.sqrt(squared_norm(r)))(residuals)
    if growth is None:
        field = lambda u, y, args: scale(direction, teacher(u, y, args))
        rate = lambda u, y: logarithmic_norm(field, u, y, args)
    elif callable(growth):
        rate = lambda u, y: jnp.asarray(growth(u, y, args), s.dtype)
    else:
        rate = lambda u, y: jnp.asarray(growth, s.dtype)
    rates = jax.vmap(rate)(us, path).astype(s.dtype)
    rule = radau(num_nodes)
    exponents = jnp.asarray(rule.to_end, s.dtype) @ rates
    h = jnp.abs(t - s)
    # A residual of zero contributes nothing, even if the growth overflows.
    grown = jnp.where(lengths == 0, 0, jnp.exp(h * exponents) * lengths)
    return h * jnp.sum(jnp.asarray(rule.weights, s.dtype) * grown)


def logarithmic_norm(
    vector_field: VectorField, t: Time, x: State, args: Args = None
) -> Scalar:
    r"""The maximum rate at which neighbouring solutions separate: $\lambda_{\max}$ of the
    symmetric part of $\nabla b_t(x)$.

    It is negative where all neighbouring solutions converge. It takes one forward-mode
    pass for each entry of the state, and the eigenvalues of a matrix of that size.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `t`, `x`, `args`: the point at which to evaluate it.

    **Returns:** a scalar, in units of one over time.
    """
    (t,) = times_like(x, t)
    flat, unravel = ravel(x, "`logarithmic_norm`")
    field = lambda y: ravel(vector_field(t, unravel(y), args), "`logarithmic_norm`")[0]
    jacobian = jax.jacfwd(field)(flat)
    return jnp.linalg.eigvalsh((jacobian + jacobian.T) / 2)[-1]
