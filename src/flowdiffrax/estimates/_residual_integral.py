import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._check import check_at_least
from .._time import times_like
from .._tree import add_scaled
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._base import AbstractErrorEstimate
from ._quadrature import (
    integral,
    last,
    path_residuals,
    radau,
    start_error,
)


class AbstractAtNodes(AbstractErrorEstimate):
    """Base class of estimates from residuals at quadrature nodes along the jump."""

    num_nodes: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        check_at_least(self.num_nodes, 1, "num_nodes")

    @property
    def order(self) -> int:
        return 1


class ResidualIntegral(AbstractAtNodes):
    r"""The residuals along the whole jump, $\int_s^t |\partial_u X_{s,u}(x) -
    b_u(X_{s,u}(x))|\,du$, entry by entry.

    This is [`flowdiffrax.estimates.lagrangian_bound`][] without growth: it ignores
    whether the ODE amplifies or damps an error, as classical solvers do when they
    estimate the error of a step. Unlike [`flowdiffrax.estimates.LagrangianDefect`][], it
    detects a map that is right only at the end of the jump.

    It takes `num_nodes + 1` forward-mode passes through the map and calls of the teacher,
    which include the jump. The pass at the start detects a fast layer there.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1.
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
