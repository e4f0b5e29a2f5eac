"""Type aliases for annotations."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jaxtyping import Array, ArrayLike, Float, PyTree, Real

if TYPE_CHECKING:
    # Static checkers treat an abstract variable as a field, and would require it in
    # `__init__`. A class variable is the closest type that they know.
    from typing import ClassVar as AbstractVar  # noqa: F401

    # They do not know scalars either.
    Time: TypeAlias = Any
else:
    from equinox import AbstractVar as AbstractVar

    # A Python number, a NumPy scalar or a JAX scalar, traced or not.
    Time: TypeAlias = Real[ArrayLike, ""]


# One state: an array of any shape, or a PyTree of arrays.
State: TypeAlias = PyTree


# Whatever the user passes to the vector field or the network.
Args: TypeAlias = Any


# `(t, x, args) -> dx/dt`: what `diffrax.ODETerm` wraps. A teacher has this type.
VectorField: TypeAlias = Callable[[Time, State, Args], State]


# `(s, t, x, args) -> x_t`: any flow map, whether or not an `AbstractFlowMap`.
TwoTimeMap: TypeAlias = Callable[[Time, Time, State, Args], State]


# Whatever `jnp.asarray` accepts: an array, a number, or nested lists of numbers.
Numbers: TypeAlias = ArrayLike | list | tuple


Scalar: TypeAlias = Float[Array, ""]


class GuidanceArgs(NamedTuple):
    """The `args` of a network that takes the guidance scale as an input.

    **Arguments:**

    - `condition`: the condition, such as a label or an embedding; any PyTree.
    - `scale`: the guidance scale, a number for each example; 1 is no guidance.
    """

    condition: Args
    scale: Time


class AugmentationArgs(NamedTuple):
    """The `args` of a network that takes the labels of an augmentation as an input.

    With a guidance scale too, they are the condition of
    [`flowdiffrax.velocities.GuidanceArgs`][].

    **Arguments:**

    - `condition`: the condition, such as a label; `None` if there is none.
    - `labels`: how the example was transformed; zeros if it was not.
    """

    condition: Args
    labels: Float[Array, " labels"]
