import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._collocation import (
    AbstractCollocationEstimate,
    at_nodes,
    picard_defects,
    quadrature_gap,
)
from ._quadrature import integral, last, radau


class AlekseevGroebner(AbstractCollocationEstimate):
    r"""Estimates the error to first order, with the Jacobian of the map.

    The Alekseev-Gröbner formula transports each residual of the map's path to the end,
    $e = \int_s^t \nabla X_{u,t}(\hat X_{s,u}(x))\,r_u\,du$. This estimate replaces the
    Jacobian of the unknown $X_{u,t}$ by that of the map, which causes a relative error of
    the size of the residuals, and takes the residuals of the polynomial through the
    map's states at the nodes. Subtracting the estimate from the jump improves the jump:
    see [`flowdiffrax.estimates.DefectCorrectedFlowMap`][].

    If the map's Jacobian is accurate, this is sharp for states of any size. It takes
    `num_nodes + 1` evaluations of the map, `num_nodes` forward-mode passes through it,
    and `num_nodes + 2` calls of the teacher.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1.

    ??? cite "Reference"

        Hairer, Nørsett, Wanner: Solving Ordinary Differential Equations I, theorem
        I.14.5.
    """

    def errors(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State, State]:
        """Returns the jump, its estimated error, and how wrong the quadrature may be."""
        nodes = at_nodes(flow_map, teacher, s, t, x, args, self.num_nodes)
        rule = radau(self.num_nodes)
        # The derivative of the polynomial through the defects, times the length.
        slopes = np.linalg.inv(rule.from_start)
        times_length = lambda d: jnp.tensordot(jnp.asarray(slopes, d.dtype), d, axes=1)
        residuals = jtu.tree_map(times_length, picard_defects(nodes))

        def to_end(u, y, r):
            return jax.jvp(lambda y: flow_map(u, t, y, args), (y,), (r,))[1]

        carried = jax.vmap(to_end)(nodes.us, nodes.states, residuals)
        error = integral(carried, rule.weights)
        return last(nodes.states), error, quadrature_gap(nodes)
