"""Newton steps for the equations of collocation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float

from .._tree import freeze, ravel, subtract
from .._types import Args, State, VectorField
from ._clock import Clock
from ._collocation import Miss, Nodes, misses, picard_defects
from ._krylov import Krylov, KrylovLinearised
from ._quadrature import radau
from ._transport import Transport, solve, transport

_NAME = "A Newton step"


class Linearised(NamedTuple):
    """The vector field along a path, to first order.

    **Attributes:**

    - `jacobians`: of the rates, at the nodes.
    - `carried`: what takes errors from node to node.
    """

    jacobians: Float[Array, "nodes size size"]
    carried: Transport

    def errors(
        self, defects: Float[Array, "nodes size"], gaps: Float[Array, "nodes size"]
    ) -> Float[Array, "2 nodes size"]:
        """Returns the errors at the nodes of both, to first order."""
        return jax.vmap(self._errors)(jnp.stack([defects, gaps]))

    def fine_errors(
        self, defects: Float[Array, "nodes size"]
    ) -> Float[Array, "nodes size"]:
        """Returns the errors at the nodes more accurately, with derivatives."""
        return self._errors(defects, num_passes=4)

    def damped(
        self, miss: Miss, *rates: Float[Array, " size"]
    ) -> Float[Array, "rates size"]:
        """Returns what is missing at the end of an interval, of each rate."""
        width = miss.width.astype(self.jacobians.dtype)
        matrix = jnp.eye(len(rates[0]), dtype=width.dtype)
        matrix -= width * self.jacobians[miss.node]
        return jnp.abs(solve(matrix, width * jnp.stack(rates, axis=1))).T

    def _errors(self, defects, num_passes=2):
        matrix = jnp.asarray(radau(len(defects)).from_start, defects.dtype)

        # Each pass is for what the others leave of the linear equations.
        def improve(_, found):
            slopes = jnp.einsum("kij,kj->ki", self.jacobians, found)
            rest = defects - found + matrix @ slopes
            return found + self.carried.errors(rest)

        return lax.fori_loop(0, num_passes, improve, jnp.zeros_like(defects))


def check_real(x: State) -> None:
    """**Raises:** `TypeError` for a complex state."""
    ravel(x, _NAME)


def linearise(
    nodes: Nodes, teacher: VectorField, args: Args, solver: Krylov | None = None
) -> Linearised | KrylovLinearised:
    """Linearises the rates at the nodes, by their Jacobians if no solver is given."""
    if solver is not None:
        return solver.linearise(nodes, teacher, args)
    _, unravel = ravel(nodes.start, _NAME)
    field = lambda u, y: ravel(teacher(u, unravel(y), args), _NAME)[0]
    states = flat_rows(nodes.states)
    jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(nodes.us, states)
    paces = nodes.clock.paces(radau(nodes.num_nodes).nodes).astype(jacobians.dtype)
    jacobians *= paces[:, None, None]
    return Linearised(jacobians, transport(jacobians))


def flat_rows(states: State) -> Float[Array, "nodes size"]:
    """Flattens the state at each node."""
    return jax.vmap(lambda y: ravel(y, _NAME)[0])(states)


class NewtonStep(NamedTuple):
    """Errors along a jump to first order.

    **Attributes:**

    - `errors`: of the states at the nodes, which are the leading axis of every leaf.
    - `gap`: how wrong the quadrature may be at the end.
    - `between`: how wrong the polynomial through the states may be at the probe.
    """

    errors: State
    gap: State
    between: State


def newton_step(nodes: Nodes, linear: Linearised | KrylovLinearised) -> NewtonStep:
    """Solves the linearised equations for the errors of the states at the nodes."""
    _, unravel = ravel(nodes.start, _NAME)

    def damped(miss):
        # What decays within the interval is not missing at its end.
        rates = [ravel(rate, _NAME)[0] for rate in (miss.reduced, miss.rate)]
        return linear.damped(miss, *rates)

    (at_start, _), (at_probe, between) = map(damped, misses(nodes))
    defects = flat_rows(picard_defects(nodes))
    # What is missing in an interval is missing at every node that follows.
    gaps = jnp.broadcast_to(at_start + at_probe, defects.shape)
    errors, gaps = linear.errors(defects, gaps)
    return NewtonStep(jax.vmap(unravel)(errors), unravel(gaps[-1]), unravel(between))


def implicit_states(
    states: State,
    teacher: VectorField,
    clock: Clock,
    x: State,
    args: Args,
    solver: Krylov | None = None,
) -> State:
    """Returns the states at the nodes, with derivatives by the implicit function theorem.

    The value is one more Newton step from `states`. Its derivatives in `x`, the times and
    what the vector field depends on are those of the solution of the equations.
    """
    fixed = freeze(states)
    shares = radau(len(jtu.tree_leaves(states)[0])).nodes
    rates = clock.rates(shares, fixed, teacher, args)
    nodes = Nodes(x, x, clock, fixed, rates, clock.end, x)
    linear = freeze(linearise(*freeze((nodes, teacher, args)), solver=solver))
    defects = flat_rows(picard_defects(nodes))
    _, unravel = ravel(x, _NAME)
    errors = jax.vmap(unravel)(linear.fine_errors(defects))
    return subtract(fixed, errors)
