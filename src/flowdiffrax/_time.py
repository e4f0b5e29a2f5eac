"""Times where they enter: one dtype, the shape of a scalar."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Inexact

from ._types import State, Time


def times_like(x: State, *times: Time) -> tuple[Inexact[Array, ""], ...]:
    """The times as scalar arrays in the precision of the state, in float32 at least.

    So a float32 network is not promoted by Python-float times when x64 is enabled, and
    a bfloat16 state does not round its clock to two digits.

    **Raises:** `ValueError` for times that are not scalars.
    """
    # Every call of every map comes here, mostly with one array.
    dtype = at_least_float32(_real(x.dtype)) if isinstance(x, Array) else time_dtype(x)
    out = []
    for time in times:
        if not isinstance(time, Array):
            # By way of NumPy in half the time.
            time = jnp.asarray(np.asarray(time, dtype))
        elif time.dtype != dtype:
            time = time.astype(dtype)
        if time.shape != ():
            raise _not_scalar(times)
        out.append(time)
    return tuple(out)


def as_times(*times: Time) -> tuple[Inexact[Array, ""], ...]:
    """The times as scalar arrays of one floating dtype, with all their digits.

    Python numbers adopt the dtype of the arrays beside them, as they do in JAX.

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
    """The dtype of the times that go with a state."""
    return at_least_float32(real_dtype(x))


def real_dtype(x: State) -> jnp.dtype:
    """The dtype of the real part of the most precise leaf."""
    return _real(*map(jnp.result_type, jtu.tree_leaves(x)))


@functools.cache
def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype itself, or float32 instead of one with fewer digits."""
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
