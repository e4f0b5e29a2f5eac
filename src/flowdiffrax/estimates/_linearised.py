import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._time import times_like
from .._tree import ravel
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._quadrature import last, path_residuals, radau, start_error
from ._residual_integral import AbstractAtNodes


def _solve(
    matrix: Float[Array, "size size"], right: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Gauss-Jordan elimination, with the largest entry of each column as its pivot.

    `jnp.linalg.solve` calls LAPACK, and of JAX 0.10 on a CPU with two cores, thousands of
    such calls at once in a loop, as in a batch of Diffrax's solves, never return.
    """
    rows = jnp.arange(right.size)

    def eliminate(k, table):
        column = table[:, k]
        pivot = jnp.argmax(jnp.where(rows < k, -1, jnp.abs(column)))
        new = table[pivot] / column[pivot]
        table = table.at[pivot].set(table[k])
        table = table - table[:, k, None] * new[None, :]
        return table.at[k].set(new)

    table = jnp.concatenate([matrix, right[:, None]], axis=1)
    return lax.fori_loop(0, right.size, eliminate, table)[:, -1]


class LinearisedError(AbstractAtNodes):
    r"""The error to first order, by the Jacobian of the ODE.

    To first order the error follows $e' = \nabla b_u(\hat X_{s,u}(x))\,e + r_u$ from
    zero: the ODE carries its own residuals. Here that linear ODE is solved by collocation
    at the Radau nodes (a step of Radau IIA), so that directions in which all errors die
    out at once are damped as they should be. This makes it the estimate for stiff
    systems, and the sharpest for small ones: it is right about maps whose own Jacobian is
    wrong, which [`flowdiffrax.estimates.AlekseevGroebner`][] is not. Growth by much more
    than $e^3$ in one jump (for three nodes) is underestimated, as it is by implicit
    solvers.

    !!! info "Numerics"

        `num_nodes + 1` forward-mode passes through the map and calls of the teacher,
        `num_nodes` Jacobians of the teacher, and a linear solve for
        `num_nodes * entries` unknowns: for states of few entries. The pass at the start
        shows a fast layer there, which the nodes would miss.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one; when called, `TypeError` for a
    complex state.

    ??? cite "Reference"

        The method: Hairer, Wanner: Solving Ordinary Differential Equations II, section
        IV.5.
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
        flat = lambda y: ravel(y, "`LinearisedError`")[0]
        _, unravel = ravel(x, "`LinearisedError`")
        inputs = flow_map, teacher, s, t, x, args
        us, path, residuals = path_residuals(*inputs, self.num_nodes)
        field = lambda u, y: flat(teacher(u, unravel(y), args))
        r = jax.vmap(flat)(residuals)
        start = flat(start_error(*inputs, residuals, self.num_nodes))
        jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(us, jax.vmap(flat)(path))
        weights, to_end = radau(self.num_nodes)[1:3]
        # Weights from the start to each node, times the length of the jump.
        collocation = (t - s).astype(r.dtype) * jnp.asarray(weights - to_end, r.dtype)
        coupling = jnp.einsum("ij,jkl->ikjl", collocation, jacobians)
        matrix = jnp.eye(r.size, dtype=r.dtype) - coupling.reshape(r.size, r.size)
        forcing = start[None, :] + collocation @ r
        errors = _solve(matrix, forcing.reshape(-1)).reshape(r.shape)
        return last(path), unravel(errors[-1])
