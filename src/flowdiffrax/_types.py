"""Aliases used in annotations throughout."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jaxtyping import Array, ArrayLike, Float, PyTree, Real

if TYPE_CHECKING:
    # Static checkers take an abstract variable for a field, and would ask for it in
    # `__init__`; a class variable is the nearest thing that they know.
    from typing import ClassVar as AbstractVar  # noqa: F401

    # Nor do they know scalars.
    Time: TypeAlias = Any
else:
    from equinox import AbstractVar as AbstractVar

    # A Python number, a NumPy scalar or a JAX scalar, traced or not.
    Time: TypeAlias = Real[ArrayLike, ""]


# One state: an array of any shape, or a PyTree of arrays.
State: TypeAlias = PyTree


# Whatever the user wants to reach the vector field or the network.
Args: TypeAlias = Any


# `(t, x, args) -> dx/dt`: what `diffrax.ODETerm` wraps, and what a teacher is.
VectorField: TypeAlias = Callable[[Time, State, Args], State]


# `(s, t, x, args) -> x_t`: a flow map, ours or anyone's.
TwoTimeMap: TypeAlias = Callable[[Time, Time, State, Args], State]


# What `jnp.asarray` takes: an array, a number, or nested lists of numbers.
Numbers: TypeAlias = ArrayLike | list | tuple


Scalar: TypeAlias = Float[Array, ""]


class GuidanceArgs(NamedTuple):
    """What a network that takes the guidance scale as an input receives as `args`.

    **Arguments:**

    - `condition`: the condition: a label, an embedding, any PyTree.
    - `scale`: the guidance scale, a number for each example; 1 is no guidance.
    """

    condition: Args
    scale: Time
