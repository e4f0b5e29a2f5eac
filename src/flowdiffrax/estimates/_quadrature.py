r"""Quadrature along the path of a jump, for error estimates without the true solution.

Each estimate takes a map $\hat X$, the vector field $b$ that it should follow and a jump,
and estimates or bounds its error $e = \hat X_{s,t}(x) - X_{s,t}(x)$. All identities and
bounds hold up to the quadrature's error. Errors that vanish at every node go undetected.
"""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._check import check_at_least
from .._tree import add_scaled, subtract
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..identities import end_and_residual

# Quadrature


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
    us = between(s, t, radau(num_nodes)[0])
    along = lambda u: end_and_residual(flow_map, teacher, s, u, x, args)
    path, residuals = jax.vmap(along)(us)
    return us, path, residuals


def start_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    residuals: State,
    num_nodes: int,
) -> State:
    """Returns the error from the start: that of the map at `s`, and of a fast layer.

    If the residual at `s` differs from that of the polynomial through the nodes, the
    difference is assumed to decay by the first node.
    """
    X_ss, r_s = end_and_residual(flow_map, teacher, s, s, x, args)
    nodes, _, _, at_start = radau(num_nodes)
    layer = subtract(r_s, integral(residuals, at_start))
    return add_scaled(subtract(X_ss, x), (t - s) * float(nodes[0] / 2), layer)


def between(s: Time, t: Time, fractions: np.ndarray) -> Float[Array, " nodes"]:
    share = jnp.asarray(fractions, jnp.result_type(t))
    # In this form the last node is exactly `t`.
    return (1 - share) * s + share * t


def integral(values: State, weights: np.ndarray) -> State:
    """Returns the weighted sum over the leading axis of every leaf."""
    total = lambda leaf: jnp.tensordot(jnp.asarray(weights, leaf.dtype), leaf, axes=1)
    return jtu.tree_map(total, values)


def last(values: State) -> State:
    """Returns the values at the last node, the end of the jump."""
    return jtu.tree_map(lambda leaf: leaf[-1], values)


@functools.cache
def radau(num_nodes: int) -> tuple[np.ndarray, ...]:
    """Right Radau quadrature on [0, 1].

    Returns the nodes, the weights, the weights for integrals from each node to 1, and the
    weights that extrapolate the polynomial through the nodes to 0. The last node is 1, so
    that the end of a jump is a node.
    """
    check_at_least(num_nodes, 1, "num_nodes")
    series = np.zeros(num_nodes + 1)
    series[-2:] = 1.0
    left = np.sort(np.real(np.polynomial.legendre.legroots(series)))
    nodes = np.sort(1 - left) / 2
    nodes[-1] = 1.0
    # The rules are exact for all polynomials of the degree that the nodes determine. In
    # terms of Legendre's, that can be solved for any number of nodes.
    legendre = np.polynomial.legendre.legvander(2 * nodes - 1, num_nodes)
    degrees = np.arange(num_nodes)
    whole = np.where(degrees == 0, 1.0, 0.0)
    lower = np.concatenate([np.ones((num_nodes, 1)), legendre[:, :-2]], axis=1)
    to_end = (lower - legendre[:, 1:]) / (2 * (2 * degrees + 1))
    # The integral of the first one, a constant.
    to_end[:, 0] = 1 - nodes
    rules = np.stack([whole, (-1.0) ** degrees, *to_end], axis=1)
    weights, at_start, *ends = np.linalg.solve(legendre[:, :-1].T, rules).T
    return nodes, weights, np.stack(ends), at_start
