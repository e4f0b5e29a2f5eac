import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._tree import ravel
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._collocation import (
    AbstractCollocationEstimate,
    at_nodes,
    misses,
    picard_defects,
)
from ._quadrature import last, radau


def _solve(
    matrix: Float[Array, "size size"], right: Float[Array, "size sides"]
) -> Float[Array, "size sides"]:
    """Gauss-Jordan elimination, with the largest entry of each column as its pivot.

    `jnp.linalg.solve` calls LAPACK. In JAX 0.10 on a CPU with two cores, thousands of
    such calls at once in a loop, as in a batch of Diffrax solves, never return.
    """
    num_rows = len(matrix)
    rows = jnp.arange(num_rows)

    def eliminate(k, table):
        sizes = jnp.where(rows < k, -1, jnp.abs(table[:, k]))
        # Masks rather than indices, which would differ between the examples of a batch.
        is_pivot = (rows == jnp.argmax(sizes))[:, None]
        pivot = jnp.sum(jnp.where(is_pivot, table, 0), axis=0)
        new = pivot / pivot[k]
        table = jnp.where(is_pivot, table[k], table)
        rest = table - table[:, k, None] * new[None, :]
        return jnp.where((rows == k)[:, None], new, rest)

    table = jnp.concatenate([matrix, right], axis=1)
    return lax.fori_loop(0, num_rows, eliminate, table)[:, num_rows:]


class LinearisedError(AbstractCollocationEstimate):
    r"""Estimates the error to first order, with the Jacobian of the ODE.

    This is one Newton step for the equations of collocation, from the map's states $\hat
    X_k$ at the Radau nodes: with the Picard defects $d_k$ and the Jacobians $J_k = \nabla
    b(\hat X_k)$, the errors solve $e_k - h \sum_j A_{kj} J_j e_j = d_k$. The linearised
    ODE transports the defects, so that directions in which all errors decay at once are
    damped correctly. Use it for stiff systems. For small systems it is the sharpest
    estimate: unlike [`flowdiffrax.estimates.AlekseevGroebner`][], it is also right about
    maps whose own Jacobian is wrong. It underestimates growth that is too fast for the
    nodes, as implicit solvers do.

    !!! info "Numerics"

        It takes `num_nodes` evaluations of the map, `num_nodes + 1` calls of the teacher,
        `num_nodes` Jacobians of the teacher, and a linear solve for `num_nodes * entries`
        unknowns. It is therefore meant for states of few entries.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1; when called, `TypeError` for a
    complex state.

    ??? cite "Reference"

        Hairer, Wanner: Solving Ordinary Differential Equations II, section
        IV.5.
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
        flat = lambda y: ravel(y, "`LinearisedError`")[0]
        _, unravel = ravel(x, "`LinearisedError`")
        nodes = at_nodes(flow_map, teacher, s, t, x, args, self.num_nodes)
        defects = jax.vmap(flat)(picard_defects(nodes))
        field = lambda u, y: flat(teacher(u, unravel(y), args))
        states = jax.vmap(flat)(nodes.states)
        jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(nodes.us, states)
        size, dtype = defects.size, defects.dtype
        from_start = jnp.asarray(radau(self.num_nodes).from_start, dtype)
        coupling = jnp.einsum(
            "ij,jkl->ikjl", nodes.length.astype(dtype) * from_start, jacobians
        )
        matrix = jnp.eye(size, dtype=dtype) - coupling.reshape(size, size)
        identity = jnp.eye(defects.shape[1], dtype=dtype)

        def damped(miss):
            # What decays within the interval is not missing at its end.
            width = miss.width.astype(dtype)
            right = width * flat(miss.rate)[:, None]
            return jnp.abs(_solve(identity - width * jacobians[miss.node], right)[:, 0])

        gap = sum(map(damped, misses(nodes)), start=jnp.zeros_like(defects[0]))
        # What is missing in an interval is missing at every node that follows.
        forcing = jnp.stack([defects, jnp.broadcast_to(gap, defects.shape)], axis=-1)
        solved = _solve(matrix, forcing.reshape(size, 2)).reshape(forcing.shape)
        error, gap = solved[-1, :, 0], solved[-1, :, 1]
        return last(nodes.states), unravel(error), unravel(gap)
