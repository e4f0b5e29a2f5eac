"""Times where they enter: one dtype, and range checks."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact

from ._types import State, Time


def as_times(*times: Time) -> tuple[Inexact[Array, ""], ...]:
    """The times as scalar arrays of one floating dtype, ready for `jax.jvp`.

    Python numbers adopt the dtype of the arrays beside them, as they do in JAX.

    **Raises:** `ValueError` for times that are no single numbers.
    """
    shapes = [jnp.shape(time) for time in times]
    if any(shape != () for shape in shapes):
        raise ValueError(
            f"Times are single numbers, and come before the state; got shapes {shapes}. "
            "For a batch of times, use `jax.vmap`."
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(dtype, float)
    return tuple(jnp.asarray(time, dtype) for time in times)


def times_like(x: State, *times: Time) -> tuple[Inexact[Array, ""], ...]:
    """The times in the precision of the state, and in float32 at least.

    So a float32 network is not promoted by Python-float times when x64 is enabled, and
    a bfloat16 state does not round its clock to two digits.
    """
    return tuple(time.astype(time_dtype(x)) for time in as_times(*times))


def time_dtype(x: State) -> jnp.dtype:
    """The dtype of the times that go with a state."""
    return at_least_float32(real_dtype(x))


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype itself, or float32 instead of one with fewer digits."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def real_dtype(x: State) -> jnp.dtype:
    """The dtype of the real part of the most precise leaf."""
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    inexact = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    if len(inexact) == 0:
        raise TypeError(
            f"A state must have a floating-point or complex leaf; got dtypes {dtypes}. "
            "Convert integers with `.astype(float)`."
        )
    with jax.numpy_dtype_promotion("standard"):
        return jnp.finfo(jnp.result_type(*inexact)).dtype
