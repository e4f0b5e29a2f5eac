import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array

from .._types import Args, Numbers, Scalar, State
from ..flow_maps._base import AbstractFlowMap


class LinearFlowMap(AbstractFlowMap):
    r"""The exact flow map of $\dot x = A x + c$, from the matrix exponential.

    **Arguments:**

    - `matrix`: the matrix $A$, of shape `(d, d)`. It need not be symmetric.
    - `offset`: the vector $c$, of shape `(d,)`; `None` for zero.

    **Raises:** `ValueError` if the matrix is not square.
    """

    generator: Array

    def __init__(self, matrix: Numbers, offset: Numbers | None = None):
        matrix = jnp.asarray(matrix, float)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be square; got shape {matrix.shape}.")
        size = matrix.shape[0]
        offset = jnp.zeros(size) if offset is None else jnp.asarray(offset, float)
        # An extra coordinate that stays 1 turns the affine ODE into a linear one.
        self.generator = jnp.zeros((size + 1, size + 1))
        self.generator = self.generator.at[:-1, :-1].set(matrix).at[:-1, -1].set(offset)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """By the matrix exponential."""
        del args
        propagator = expm((t - s) * self.generator.astype(t.dtype)).astype(x.dtype)
        return propagator[:-1, :-1] @ x + propagator[:-1, -1]

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """The linear field."""
        del t, args
        generator = self.generator.astype(x.dtype)
        return generator[:-1, :-1] @ x + generator[:-1, -1]
