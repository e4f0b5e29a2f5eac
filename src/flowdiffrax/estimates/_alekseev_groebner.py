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
    """The jump and its Alekseev-Gröbner estimate, which has the jump in it."""
    s, t = times_like(x, s, t)
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)

    def to_end(u, y, r):
        return jax.jvp(lambda y: flow_map(u, t, y, args), (y,), (r,))[1]

    weights = radau(num_nodes)[1]
    carried = integral(jax.vmap(to_end)(us, path, residuals), weights)
    return last(path), scale(t - s, carried)


class AlekseevGroebner(AbstractAtNodes):
    r"""The error to first order, by the Jacobian of the map.

    The Alekseev-Gröbner formula carries each residual of the map's own path to the end,
    $e = \int_s^t \nabla X_{u,t}(\hat X_{s,u}(x))\,r_u\,du$. Here the map's own Jacobian
    replaces that of the unknown $X_{u,t}$, which leaves a relative error of the size of
    the residuals. Subtract the estimate from the jump for a better one:
    [`flowdiffrax.estimates.DefectCorrectedFlowMap`][].

    This is the sharpest estimate, as far as the map's Jacobian can be trusted. It costs
    `2 * num_nodes` forward-mode passes through the map and `num_nodes` calls of the
    teacher.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one.

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
