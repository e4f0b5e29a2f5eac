"""Newton steps for the equations of collocation, for states of few entries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float

from .._tree import freeze, ravel, subtract
from .._types import Args, State, Time, VectorField
from ._collocation import Nodes, misses, picard_defects
from ._quadrature import radau
from ._transport import Transport, solve, transport

_NAME = "A Newton step"


class Linearised(NamedTuple):
    """The vector field along a path, to first order.

    **Attributes:**

    - `jacobians`: of the vector field, at the nodes.
    - `carried`: what takes errors from node to node.
    - `length`: the length of the jump in time, with its sign.
    """

    jacobians: Float[Array, "nodes size size"]
    carried: Transport
    length: Float[Array, ""]

    def errors(
        self, defects: Float[Array, "nodes size"], num_passes: int = 2
    ) -> Float[Array, "nodes size"]:
        """Returns the errors at the nodes, to first order in the defects."""
        matrix = jnp.asarray(radau(len(defects)).from_start, defects.dtype)
        length = self.length.astype(defects.dtype)

        # Each pass is for what the others leave of the linear equations.
        def improve(_, found):
            slopes = jnp.einsum("kij,kj->ki", self.jacobians, found)
            rest = defects - found + length * (matrix @ slopes)
            return found + self.carried.errors(rest)

        return lax.fori_loop(0, num_passes, improve, jnp.zeros_like(defects))

    def gap(self, nodes: Nodes) -> Float[Array, " size"]:
        """Returns how wrong the integral over the jump may be."""
        dtype, size = self.jacobians.dtype, self.jacobians.shape[-1]
        identity = jnp.eye(size, dtype=dtype)

        def damped(rate, width, node):
            # What decays within the interval is not missing at its end.
            right = width * ravel(rate, _NAME)[0][:, None]
            return jnp.abs(solve(identity - width * self.jacobians[node], right)[:, 0])

        both = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *misses(nodes))
        return jax.vmap(damped)(both.rate, both.width.astype(dtype), both.node).sum(0)


def check_real(x: State) -> None:
    """**Raises:** `TypeError` for a complex state."""
    ravel(x, _NAME)


def linearise(nodes: Nodes, teacher: VectorField, args: Args) -> Linearised:
    """Evaluates the Jacobians of the vector field at the nodes."""
    _, unravel = ravel(nodes.start, _NAME)
    field = lambda u, y: ravel(teacher(u, unravel(y), args), _NAME)[0]
    states = flat_rows(nodes.states)
    jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(nodes.us, states)
    return Linearised(jacobians, transport(jacobians, nodes.length), nodes.length)


def flat_rows(states: State) -> Float[Array, "nodes size"]:
    """Flattens the state at each node."""
    return jax.vmap(lambda y: ravel(y, _NAME)[0])(states)


def newton_step(nodes: Nodes, linear: Linearised) -> tuple[State, State]:
    """Returns the errors at the nodes to first order, and how wrong their end may be."""
    _, unravel = ravel(nodes.start, _NAME)
    defects = flat_rows(picard_defects(nodes))
    # What is missing in an interval is missing at every node that follows.
    gaps = jnp.broadcast_to(linear.gap(nodes), defects.shape)
    errors, gaps = jax.vmap(linear.errors)(jnp.stack([defects, gaps]))
    return jax.vmap(unravel)(errors), unravel(gaps[-1])


def implicit_states(
    states: State,
    teacher: VectorField,
    s: Time,
    us: Float[Array, " nodes"],
    x: State,
    args: Args,
) -> State:
    """Returns the states at the nodes, with derivatives by the implicit function theorem.

    The value is one more Newton step from `states`. Its derivatives in `x`, the times and
    what the vector field depends on are those of the solution of the equations.
    """

    fixed = freeze(states)
    rates = jax.vmap(lambda u, y: teacher(u, y, args))(us, fixed)
    nodes = Nodes(x, x, us[-1] - s, us, fixed, rates, us[-1], x)
    linear = freeze(linearise(*freeze((nodes, teacher, args))))
    defects = flat_rows(picard_defects(nodes))
    _, unravel = ravel(x, _NAME)
    errors = jax.vmap(unravel)(linear.errors(defects, num_passes=4))
    return subtract(fixed, errors)
