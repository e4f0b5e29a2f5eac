"""Aliases used in annotations throughout."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, ArrayLike, Float, PyTree, Real

# A Python number, a NumPy scalar or a JAX scalar, traced or not.
Time: TypeAlias = Real[ArrayLike, ""]
# One state: an array of any shape, or a PyTree of arrays.
State: TypeAlias = PyTree[ArrayLike]
# Whatever the user wants to reach the vector field or the network.
Args: TypeAlias = Any
# `(t, x, args) -> dx/dt`: what `diffrax.ODETerm` wraps, and what a teacher is.
VectorField: TypeAlias = Callable[[Time, State, Args], State]
# `(s, t, x, args) -> x_t`: a flow map, ours or anyone's.
TwoTimeMap: TypeAlias = Callable[[Time, Time, State, Args], State]

# What `jnp.asarray` takes: an array, a number, or nested lists of numbers.
Numbers: TypeAlias = ArrayLike | list | tuple

Scalar: TypeAlias = Float[Array, ""]
