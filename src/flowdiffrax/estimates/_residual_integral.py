import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._time import times_like
from .._tree import add_scaled
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._base import AbstractErrorEstimate
from ._quadrature import (
    check_num_nodes,
    integral,
    last,
    path_residuals,
    radau,
    start_error,
)


class AbstractAtNodes(AbstractErrorEstimate):
    """An estimate from residuals at the nodes of a quadrature over the jump."""

    num_nodes: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        check_num_nodes(self.num_nodes)

    @property
    def order(self) -> int:
        return 1


class ResidualIntegral(AbstractAtNodes):
    r"""The residuals along the whole jump, $\int_s^t |\partial_u X_{s,u}(x) -
    b_u(X_{s,u}(x))|\,du$, entry by entry.

    [`flowdiffrax.estimates.lagrangian_bound`][] without growth: what the ODE itself makes
    of an error, for better or worse, is left out, as it is when a classical solver
    estimates the error of a step. Unlike [`flowdiffrax.estimates.LagrangianDefect`][] it
    cannot be deceived by a map that is right at the end of the jump alone.

    `num_nodes + 1` forward-mode passes through the map and calls of the teacher, with the
    jump among them. The one at the start shows a fast layer there.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one.
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
        s, t = times_like(x, s, t)
        _, path, residuals = path_residuals(
            flow_map, teacher, s, t, x, args, self.num_nodes
        )
        start = start_error(flow_map, teacher, s, t, x, args, residuals, self.num_nodes)
        size = lambda tree: jtu.tree_map(lambda r: jnp.abs(r).astype(r.dtype), tree)
        whole = integral(size(residuals), radau(self.num_nodes)[1])
        return last(path), add_scaled(size(start), jnp.abs(t - s), whole)
