import jax

from .._time import times_like
from .._tree import scale
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..flow_maps._ode import ODEFlowMap
from ..identities import eulerian_residual
from ._quadrature import between, integral, radau


def eulerian_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    exact: TwoTimeMap | None = None,
    num_nodes: int = 8,
) -> State:
    r"""Computes the error itself, from residuals along the true trajectory.

    With $r_u(y) = \partial_u \hat X_{u,t}(y) + \nabla \hat X_{u,t}(y)\,b_u(y)$ and the
    true trajectory $x_u$, the identity $e = -\int_s^t r_u(x_u)\,du$ holds without
    constants or remainder. The integrand shows which part of the trajectory causes the
    error. The mean square of the error bounds the squared Wasserstein distance to the
    true density.

    !!! info "Numerics"

        It takes `num_nodes` forward-mode passes through the map, calls of the teacher and
        solves of the ODE. Its only error is that of the quadrature.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field that it should follow.
    - `s`, `t`: start and end of the jump, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed to both.
    - `exact`: the true flow map; `None` for [`flowdiffrax.ODEFlowMap`][] of the teacher.
    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Returns:** a state like `x`.

    ??? cite "Reference"

        The pointwise form of flow map matching, proposition 3.8:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    s, t = times_like(x, s, t)
    exact = ODEFlowMap(teacher) if exact is None else exact
    rule = radau(num_nodes)

    def residual(u):
        x_u = exact(s, u, x, args)
        return eulerian_residual(flow_map, teacher, u, t, x_u, args)

    residuals = jax.vmap(residual)(between(s, t, rule.nodes))
    return integral(scale(-1.0 * (t - s), residuals), rule.weights)
