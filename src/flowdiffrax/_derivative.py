from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._check import check_positive
from ._tree import add_scaled, scale, subtract

# `(fn, primals, tangents) -> (value, derivative)`: `jax.jvp` or a replacement.
Derivative: TypeAlias = Callable[[Callable, tuple, tuple], tuple[PyTree, PyTree]]


class FiniteDifference(eqx.Module):
    r"""Directional derivatives by central differences, to use in place of `jax.jvp`.

    Use it for networks whose layers do not support forward mode. Objectives and
    identities accept it as `jvp`. It evaluates the function three times, at the point and
    one step to either side, so times may leave their interval by a step.

    **Arguments:**

    - `step`: the positive step $h$ along the tangent. In objectives and identities it is
      a step in time, and the default is for times in [0, 1]: for a physical ODE, scale
      it with the interval. The error is of order $h^2$, plus the rounding error over $h$.
      The default suits float32; use 1e-5 for float64.

    **Raises:** `ValueError` for a step that is not positive.
    """

    step: float = 5e-3

    def __check_init__(self):
        check_positive(self.step, "step")

    def __call__(
        self, fn: Callable, primals: tuple, tangents: tuple
    ) -> tuple[PyTree, PyTree]:
        """Returns the value of `fn` at `primals`, and its derivative along `tangents`."""
        step = jnp.asarray(self.step, float)
        ahead = fn(*_moved(primals, step, tangents))
        behind = fn(*_moved(primals, -step, tangents))
        return fn(*primals), scale(1 / (2 * step), subtract(ahead, behind))


def _moved(primals: tuple, step: Array, tangents: tuple) -> tuple:
    return jtu.tree_map(lambda x, dx: add_scaled(x, step, dx), primals, tangents)
