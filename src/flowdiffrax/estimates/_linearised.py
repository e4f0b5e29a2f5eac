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

    `jnp.linalg.solve` calls LAPACK. In JAX 0.10 on a CPU with two cores, thousands of
    such calls at once in a loop, as in a batch of Diffrax solves, never return.
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
    r"""Estimates the error to first order, with the Jacobian of the ODE.

    To first order, the error solves $e' = \nabla b_u(\hat X_{s,u}(x))\,e + r_u$ from
    zero: the linearised ODE transports the residuals. The estimate solves this linear ODE
    by collocation at the Radau nodes (a step of Radau IIA), so that directions in which
    all errors decay at once are damped correctly. Use it for stiff systems. For small
    systems it is the sharpest estimate: unlike
    [`flowdiffrax.estimates.AlekseevGroebner`][], it is also right about maps whose own
    Jacobian is wrong. It underestimates growth by much more than $\exp(3)$ in one jump
    (for three nodes), as implicit solvers do.

    !!! info "Numerics"

        It takes `num_nodes + 1` forward-mode passes through the map and calls of the
        teacher, `num_nodes` Jacobians of the teacher, and a linear solve for
        `num_nodes * entries` unknowns. It is therefore meant for states of few entries.
        The pass at the start detects a fast layer there, which the nodes would miss.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1; when called, `TypeError` for a
    complex state.

    ??? cite "Reference"

        Hairer, Wanner: Solving Ordinary Differential Equations II, section
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
        # Weights for integrals from the start to each node, times the length of the jump.
        collocation = (t - s).astype(r.dtype) * jnp.asarray(weights - to_end, r.dtype)
        coupling = jnp.einsum("ij,jkl->ikjl", collocation, jacobians)
        matrix = jnp.eye(r.size, dtype=r.dtype) - coupling.reshape(r.size, r.size)
        forcing = start[None, :] + collocation @ r
        errors = _solve(matrix, forcing.reshape(-1)).reshape(r.shape)
        return last(path), unravel(errors[-1])
