import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._time import times_like
from .._tree import ravel
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._quadrature import last, path_residuals, radau, start_error
from ._residual_integral import AbstractAtNodes


def linearised_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    num_nodes: int = 4,
) -> State:
    r"""A first-order estimate of the error as a vector, for stiff systems too.

    To first order the error follows $e' = \nabla b_u(\hat X_{s,u}(x))\,e + r_u$ from
    zero: the ODE carries its own residuals. Here that linear ODE is solved by collocation
    at the Radau nodes (a step of Radau IIA), so that directions in which all errors die
    out at once are damped as they should be.
    [`flowdiffrax.estimates.alekseev_groebner_error`][] asks the map for the same
    derivatives; this asks the ODE, and is right about maps whose own are wrong. Growth by
    much more than $e^3$ in one jump (for three nodes) is underestimated, as it is by
    implicit solvers.

    !!! info "Numerics"

        `num_nodes + 1` forward-mode passes through the map and calls of the teacher, a
        forward-mode pass through the teacher for each entry of the state and each
        node, and a linear solve for all of them at once: for states of few entries. The
        pass at the start shows a fast layer there, which the nodes would miss.

    **Arguments:** as for [`flowdiffrax.estimates.lagrangian_bound`][].

    **Returns:** a state like `x`.

    **Raises:** `TypeError` for a complex state, `ValueError` for fewer nodes than one.

    ??? cite "Reference"

        The method: Hairer, Wanner: Solving Ordinary Differential Equations II, section
        IV.5.
    """
    return last(path_and_errors(flow_map, teacher, s, t, x, args, num_nodes)[1])


def path_and_errors(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[State, State]:
    """The map's path at the Radau nodes, and what the linearised equation says of it."""
    s, t = times_like(x, s, t)
    _, unravel = ravel(x, "`linearised_error`")
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)
    flat = lambda y: ravel(y, "`linearised_error`")[0]
    field = lambda u, y: flat(teacher(u, unravel(y), args))
    r = jax.vmap(flat)(residuals)
    start = flat(start_error(flow_map, teacher, s, t, x, args, residuals, num_nodes))
    jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(us, jax.vmap(flat)(path))
    weights, to_end = radau(num_nodes)[1:3]
    # Weights from the start to each node, times the length of the jump.
    collocation = (t - s).astype(r.dtype) * jnp.asarray(weights - to_end, r.dtype)
    coupling = jnp.einsum("ij,jkl->ikjl", collocation, jacobians).reshape(r.size, r.size)
    identity = jnp.eye(r.size, dtype=r.dtype)
    forcing = start[None, :] + collocation @ r
    errors = _solve(identity - coupling, forcing.reshape(-1))
    return path, jax.vmap(unravel)(errors.reshape(r.shape))


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
    """The error to first order by the ODE's own Jacobian,
    [`flowdiffrax.estimates.linearised_error`][].

    The estimate for stiff systems, and for small ones the sharpest: it knows what the ODE
    makes of a residual. `num_nodes + 1` forward-mode passes through the map and calls of
    the teacher, `num_nodes` Jacobians of the teacher, and a linear solve for
    `num_nodes * entries` unknowns.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one; when called, `TypeError` for a
    complex state.
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
        path, errors = path_and_errors(flow_map, teacher, s, t, x, args, self.num_nodes)
        return last(path), last(errors)
