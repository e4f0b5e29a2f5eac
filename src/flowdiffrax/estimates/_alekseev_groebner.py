import jax

from .._time import times_like
from .._tree import scale
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._quadrature import integral, last, path_residuals, radau
from ._residual_integral import AbstractAtNodes


def end_and_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[State, State]:
    """Returns the jump and its Alekseev-Gröbner estimate, which computes the jump."""
    s, t = times_like(x, s, t)
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)

    def to_end(u, y, r):
        return jax.jvp(lambda y: flow_map(u, t, y, args), (y,), (r,))[1]

    weights = radau(num_nodes)[1]
    carried = integral(jax.vmap(to_end)(us, path, residuals), weights)
    return last(path), scale(t - s, carried)


class AlekseevGroebner(AbstractAtNodes):
    r"""Estimates the error to first order, with the Jacobian of the map.

    The Alekseev-Gröbner formula transports each residual of the map's path to the end,
    $e = \int_s^t \nabla X_{u,t}(\hat X_{s,u}(x))\,r_u\,du$. This estimate replaces the
    Jacobian of the unknown $X_{u,t}$ by that of the map, which causes a relative error of
    the size of the residuals. Subtracting the estimate from the jump improves the jump:
    see [`flowdiffrax.estimates.DefectCorrectedFlowMap`][].

    If the map's Jacobian is accurate, this is the sharpest estimate. It costs
    `2 * num_nodes` forward-mode passes through the map and `num_nodes` calls of the
    teacher.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1.

    ??? cite "Reference"

        Hairer, Nørsett, Wanner: Solving Ordinary Differential Equations I, theorem
        I.14.5.
    """

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State]:
        return end_and_error(flow_map, teacher, s, t, x, args, self.num_nodes)
