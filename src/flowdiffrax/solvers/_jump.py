from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._tree import subtract
from .._types import State, Time
from ..estimates._clock import Clock
from ..estimates._quadrature import to_chebyshev


@jtu.register_pytree_node_class
class Jump:
    """The dense output of one step, from `start` or `through`.

    The latter is a polynomial through given states. The former evaluates the map itself
    while Diffrax works on a step, to save at `ts`, which is exact. To store it, for
    `SaveAt(dense=True)` or an event, JAX flattens it to arrays. They cannot include a
    copy of the map's parameters for each step, and a closure would leak tracers. Instead
    they are the start and the Chebyshev series in $t$ of $X_{s,t}(y_0) - y_0$, whose
    error decreases geometrically with the degree. The map is evaluated at the series'
    nodes only if the step is stored.
    """

    # `Any` and not `State`: JAX also unflattens placeholders that are not arrays.
    def __init__(self, y0: Any, series: Any, grade: Any = None, flow: Any = None):
        self.y0 = y0
        self.series = series
        self.grade = grade
        self.flow = flow

    @classmethod
    def start(cls, flow: Callable, t0: Time, t1: Time, y0: State, degree: int):
        """Holds the map itself. `series` is a function until it is needed."""
        series = lambda: _chebyshev_series(flow, t0, t1, y0, degree)
        return cls(y0, series, flow=flow)

    @classmethod
    def through(cls, y0: State, ys: State, grade: Any):
        """Passes through the start and states at the Radau nodes of the step.

        They are shares by the clock of this grade.
        """
        num_nodes = len(jtu.tree_leaves(ys)[0])
        return cls(y0, _series(to_chebyshev(num_nodes), ys, y0), grade)

    def evaluate(self, t: Time, t0: Time, t1: Time) -> State:
        if self.flow is not None:
            return self.flow(t)
        z = 2 * Clock(t0, t1, self.grade).share(t) - 1

        def value(y0, series):
            polynomials = [jnp.ones_like(z), z]
            for _ in range(2, series.shape[0]):
                polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
            basis = jnp.stack(polynomials[: series.shape[0]])
            basis = basis.astype(jnp.finfo(y0.dtype).dtype).astype(y0.dtype)
            return y0 + jnp.tensordot(basis, series, axes=1)

        return jtu.tree_map(value, self.y0, self.series)

    def tree_flatten(self):
        series = self.series if self.flow is None else self.series()
        return (self.y0, series, self.grade), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux
        return cls(*children)


class JumpInterpolation(diffrax.AbstractLocalInterpolation):
    t0: Time
    t1: Time
    jump: Jump

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        return self.jump.evaluate(t0, self.t0, self.t1)


def _chebyshev_series(
    flow: Callable, t0: Time, t1: Time, y0: State, degree: int
) -> State:
    nodes, transform = _chebyshev(degree)
    # The first node is the start, where the displacement is zero.
    times = t0 + jnp.asarray(nodes[1:], jnp.result_type(t0)) * (t1 - t0)

    return _series(transform, jax.vmap(flow)(times), y0)


def _series(transform: np.ndarray, ys: State, y0: State) -> State:
    """The coefficients of the displacements, from the states after the start."""

    def coefficients(ys, y0):
        matrix = jnp.asarray(transform[:, 1:], jnp.finfo(y0.dtype).dtype)
        displacements = ys - jnp.expand_dims(y0, 0)
        return jnp.tensordot(matrix.astype(displacements.dtype), displacements, axes=1)

    return jtu.tree_map(coefficients, ys, y0)


def _chebyshev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes in [0, 1], and the matrix from values to Chebyshev coefficients."""
    angles = np.pi * np.arange(degree + 1) / degree
    # Ascending nodes: z = -cos(angle), and T_k(z) = cos(k (pi - angle)).
    values = np.cos(np.outer(np.pi - angles, np.arange(degree + 1)))
    return (1 - np.cos(angles)) / 2, np.linalg.inv(values)
