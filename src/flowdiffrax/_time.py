"""Conversion of times to scalar arrays of one dtype."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact

from ._types import State, Time


def times_like(x: State, *times: Time) -> tuple[Inexact[Array, ""], ...]:
    """Converts times to scalar arrays in the precision of the state, float32 at least.

    Hence Python-float times do not promote a float32 network when x64 is enabled, and a
    bfloat16 state does not round its times to two digits.

    **Raises:** `ValueError` for times that are not scalars.
    """
    # A fast path: every call of every map comes here, mostly with a single array.
    dtype = at_least_float32(_real(x.dtype)) if isinstance(x, Array) else time_dtype(x)
    out = []
    for time in times:
        if not isinstance(time, Array):
            # Converting by NumPy first takes half the time.
            time = jnp.asarray(np.asarray(time, dtype))
        elif time.dtype != dtype:
            time = time.astype(dtype)
        if time.shape != ():
            raise _not_scalar(times)
        out.append(time)
    return tuple(out)


def as_times(*times: Time) -> tuple[Inexact[Array, ""], ...]:
    """Converts times to scalar arrays of one floating dtype, without loss of precision.

    Python numbers adopt the dtype of the arrays among the times, as in JAX.

    **Raises:** `ValueError` for times that are not scalars.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(dtype, float)
    out = tuple([jnp.asarray(time, dtype) for time in times])
    for time in out:
        if time.shape != ():
            raise _not_scalar(times)
    return out


def _not_scalar(times: tuple[Time, ...]) -> ValueError:
    return ValueError(
        "Times are single numbers, and come before the state; got shapes "
        f"{[jnp.shape(time) for time in times]}. For a batch of times, use `jax.vmap`."
    )


def time_dtype(x: State) -> jnp.dtype:
    """Returns the dtype of times for a state: its real dtype, or float32 at least."""
    return at_least_float32(real_dtype(x))


def real_dtype(x: State) -> jnp.dtype:
    """Returns the real dtype of the most precise leaf."""
    return _real(*map(jnp.result_type, jtu.tree_leaves(x)))


@functools.cache
def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Returns `dtype`, or float32 if that is more precise."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


@functools.cache
def _real(*dtypes: jnp.dtype) -> jnp.dtype:
    inexact = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    if len(inexact) == 0:
        raise TypeError(
            f"A state must have a floating-point or complex leaf; got dtypes {[*dtypes]}."
            " Convert integers with `.astype(float)`."
        )
    with jax.numpy_dtype_promotion("standard"):
        return jnp.finfo(jnp.result_type(*inexact)).dtype
