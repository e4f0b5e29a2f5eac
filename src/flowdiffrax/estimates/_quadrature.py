r"""Quadrature along the path of a jump, for error estimates without the true solution.

Each estimate takes a map $\hat X$, the vector field $b$ that it should follow and a jump,
and estimates or bounds its error $e = \hat X_{s,t}(x) - X_{s,t}(x)$. All identities and
bounds hold up to the quadrature's error. Errors that vanish at every node go undetected.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._check import check_count
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..identities import end_and_residual


def path_residuals(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[Array, State, State]:
    """Returns times, states and Lagrangian residuals of the path, at the Radau nodes.

    Every leaf has the nodes as its leading axis; the last node is the end of the jump.
    """
    us = between(s, t, radau(num_nodes).nodes)
    along = lambda u: end_and_residual(flow_map, teacher, s, u, x, args)
    path, residuals = jax.vmap(along)(us)
    return us, path, residuals


def between(s: Time, t: Time, fractions: np.ndarray | Array) -> Float[Array, " nodes"]:
    share = jnp.asarray(fractions, jnp.result_type(t))
    # In this form the last node is exactly `t`.
    return (1 - share) * s + share * t


def integral(values: State, weights: np.ndarray | Array) -> State:
    """Returns the weighted sum over the leading axis of every leaf."""
    total = lambda leaf: jnp.tensordot(jnp.asarray(weights, leaf.dtype), leaf, axes=1)
    return jtu.tree_map(total, values)


def last(values: State) -> State:
    """Returns the values at the last node, the end of the jump."""
    return jtu.tree_map(lambda leaf: leaf[-1], values)


@functools.cache
def to_chebyshev(num_nodes: int) -> Float[np.ndarray, "degrees values"]:
    """The matrix from values at the start and the nodes to Chebyshev coefficients."""
    ends = np.concatenate([[0.0], radau(num_nodes).nodes])
    return np.linalg.inv(np.polynomial.chebyshev.chebvander(2 * ends - 1, num_nodes))


def barycentric_weights(nodes: np.ndarray) -> Float[np.ndarray, " nodes"]:
    """Returns the weights of barycentric interpolation, of which only ratios matter.

    The largest is 1: for many nodes they would be too large for float32 otherwise.
    """
    gaps = nodes[:, None] - nodes
    np.fill_diagonal(gaps, 1.0)
    weights = 1 / np.prod(gaps, axis=1)
    return weights / np.abs(weights).max()


class Radau(NamedTuple):
    """Right Radau quadrature on [0, 1], exact for polynomials as far as there are nodes.

    **Attributes:**

    - `nodes`: in rising order. The last one is 1, so that the end of a jump is a node.
    - `weights`: for integrals from 0 to 1.
    - `from_start`: for integrals from 0 to each node, in rows.
    - `at_start`: for the value at 0 of the polynomial through the nodes.
    """

    nodes: Float[np.ndarray, " nodes"]
    weights: Float[np.ndarray, " nodes"]
    from_start: Float[np.ndarray, "nodes nodes"]
    at_start: Float[np.ndarray, " nodes"]

    @property
    def to_end(self) -> Float[np.ndarray, "nodes nodes"]:
        """The weights for integrals from each node to 1, in rows."""
        return self.weights - self.from_start


@functools.cache
def radau(num_nodes: int) -> Radau:
    """Right Radau quadrature with so many nodes."""
    check_count(num_nodes, 1, "num_nodes")
    series = np.zeros(num_nodes + 1)
    series[-2:] = 1.0
    left = np.sort(np.real(np.polynomial.legendre.legroots(series)))
    nodes = np.sort(1 - left) / 2
    nodes[-1] = 1.0
    # In terms of Legendre's polynomials, this works for any number of nodes.
    legendre = np.polynomial.legendre.legvander(2 * nodes - 1, num_nodes)
    degrees = np.arange(num_nodes)
    lower = np.concatenate([np.ones((num_nodes, 1)), legendre[:, :-2]], axis=1)
    to_node = (legendre[:, 1:] - lower) / (2 * (2 * degrees + 1))
    # The integral of the first one, a constant.
    to_node[:, 0] = nodes
    rules = np.stack([degrees == 0, (-1.0) ** degrees, *to_node], axis=1)
    weights, at_start, *rows = np.linalg.solve(legendre[:, :-1].T, rules).T
    return Radau(nodes, weights, np.stack(rows), at_start)
