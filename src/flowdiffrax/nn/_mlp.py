import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._check import check_count, check_key, check_positive
from .._time import times_like
from .._types import Args, Time
from ._describe import describe


class MLP(eqx.Module):
    r"""A fully connected network of two times and a state, `net(s, t, x, args)`.

    The inputs are the state divided by its scale, sines and cosines of it, both times,
    and cosines of them. All frequencies are low, because many objectives contain time
    derivatives, which each frequency multiplies. Hidden layers after the first are
    residual. `args`, if any, is a vector or a number that is appended to the inputs. For
    parameters in a dictionary, or in any other structure, wrap the network in
    [`flowdiffrax.nn.Ravelled`][].

    The last layer starts at zero, so a [`flowdiffrax.FlowMap`][] of the network starts as
    the identity.

    **Arguments:**

    - `size`: the length of the state vector.
    - `width`, `depth`: the width and the number of hidden layers, each at least 1.
    - `scale`: the typical size of the state's entries. Inputs are divided by it, and
      outputs are multiplied by it.
    - `frequencies`: the frequencies $k$ of $\sin(\pi k x)$ and $\cos(\pi k x)$ of each
      entry $x$, in units of `scale`.
    - `time_frequencies`: the frequencies $k$ of $\cos(\pi k s)$ and $\cos(\pi k t)$.
    - `args_size`: the length of the vector `args`, or 1 for a number. With 0, there is no
      condition, and `args` is ignored: it may be meant for the vector field alone.
    - `activation`: a smooth activation function. With ReLU, objectives that differentiate
      the network in time lose half their gradient.
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` for a width or depth below 1. When called, `ValueError` for a
    state or a condition of another shape.
    """

    is_network: ClassVar[bool] = True

    first: eqx.nn.Linear
    hidden: list[eqx.nn.Linear]
    last: eqx.nn.Linear
    size: int = eqx.field(static=True)
    args_size: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    frequencies: tuple[float, ...] = eqx.field(static=True)
    time_frequencies: tuple[float, ...] = eqx.field(static=True)
    activation: Callable = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        width: int = 256,
        depth: int = 4,
        *,
        scale: float = 1.0,
        frequencies: Sequence[float] = (0.5, 1.0, 2.0),
        time_frequencies: Sequence[float] = (1.0, 2.0),
        args_size: int = 0,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: Key[Array, ""],
    ):
        check_count(width, 1, "width")
        check_count(depth, 1, "depth")
        check_positive(scale, "scale")
        check_key(key)
        first_key, hidden_key, last_key = jr.split(key, 3)
        num_inputs = size * (1 + 2 * len(frequencies))
        num_inputs += 2 * (1 + len(time_frequencies)) + args_size
        self.first = eqx.nn.Linear(num_inputs, width, key=first_key)
        self.hidden = [
            eqx.nn.Linear(width, width, key=jr.fold_in(hidden_key, index))
            for index in range(depth - 1)
        ]
        last = eqx.nn.Linear(width, size, key=last_key)
        self.last = jax.tree_util.tree_map(jnp.zeros_like, last)
        self.size = size
        self.args_size = args_size
        # A NumPy or JAX number, such as `data.std()`, cannot be a static field.
        self.scale = float(scale)
        self.frequencies = tuple(frequencies)
        self.time_frequencies = tuple(time_frequencies)
        self.activation = activation

    def __call__(
        self, s: Time, t: Time, x: Float[Array, " size"], args: Args = None
    ) -> Float[Array, " size"]:
        check_state(x, self.size)
        x = jnp.asarray(x)  # NumPy's may be float64 where JAX has none
        # Weights may be of lower precision than states and times.
        h = self._features(s, t, x, args).astype(self.first.weight.dtype)
        h = self.activation(self.first(h))
        for layer in self.hidden:
            h = h + self.activation(layer(h))
        return self.scale * self.last(h).astype(x.dtype)

    def __pdoc__(self, **kwargs):
        depth = len(self.hidden) + 1
        settings = f"{self.size}, width={self.first.out_features}, depth={depth}"
        return describe(self, settings)

    def _features(self, s, t, x, args):
        # Compute with times in at least float32, whatever the precision of the state.
        times = jnp.stack(times_like(x, s, t))
        x = x / self.scale
        features = [x, times.astype(x.dtype)]
        for frequency in self.frequencies:
            angle = math.pi * frequency * x
            features += [jnp.sin(angle), jnp.cos(angle)]
        for frequency in self.time_frequencies:
            features.append(jnp.cos(math.pi * frequency * times).astype(x.dtype))
        if self.args_size > 0:
            features.append(as_vector(args, self.args_size, x.dtype))
        return jnp.concatenate(features)


def check_state(x: Any, size: int) -> None:
    """**Raises:** `ValueError` unless `x` is a vector of the right length."""
    found = getattr(x, "shape", type(x).__name__)
    if found != (size,):
        raise ValueError(
            f"This network takes one state, an array of shape ({size},); got {found}. "
            "For a batch, use `jax.vmap`; for a PyTree, `nn.Ravelled`."
        )


def as_vector(
    args: Args,
    size: int,
    dtype: Any,
    cure: str = "For other shapes or a dictionary, use `nn.Ravelled(net)`.",
) -> Float[Array, " args_size"]:
    """**Raises:** `ValueError` unless `args` is a vector of the right length."""
    try:
        vector = jnp.atleast_1d(jnp.asarray(args, dtype))
        found = vector.shape
    except (TypeError, ValueError):  # a dictionary, or rows of different lengths
        vector, found = None, type(args).__name__
    if vector is None or found != (size,):
        raise ValueError(
            f"This network takes `args` of shape ({size},); got {found}. {cure}"
        )
    return vector
