from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, PyTree

from .._types import State


def with_derivative(value: State, taken: Bool[Array, ""], fn: Callable) -> State:
    """The value of `fn`, with its derivative if it was taken, and with none if not.

    `fn` comes from `equinox.filter_closure_convert`, and `value` from it with gradients
    stopped.
    """
    inexact, rest = eqx.partition(value, eqx.is_inexact_array)
    return eqx.combine(_taken_value(inexact, taken, fn), rest)


@eqx.filter_custom_jvp
def _taken_value(value, taken, fn):
    return value


@_taken_value.def_jvp
def _taken_value_jvp(primals, tangents):
    value, taken, fn = primals
    # Masked on its way in, too: backwards, that is where the zero cotangents of a refused
    # jump come out, multiplied by derivatives that may be NaN.
    mask = lambda tangent: jtu.tree_map(lambda leaf: jnp.where(taken, leaf, 0), tangent)

    def run():
        call = lambda fn: eqx.filter(fn(), eqx.is_inexact_array)
        return eqx.filter_jvp(call, (fn,), (mask(tangents[2]),))[1]

    # Of the value itself, for the derivatives of higher order.
    return _taken_value(value, taken, fn), mask(run_if_any(taken, run))


def where(condition, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(condition, a, b), x, y)


def run_if_any(condition: Bool[ArrayLike, ""], fn: Callable[[], PyTree]) -> PyTree:
    """What `fn` returns if the condition holds for any example, and zeros otherwise.

    A `lax.cond` whose condition differs from example to example would copy everything
    that `fn` closes over, the network's weights among it, for each of them.
    """
    shapes = jax.eval_shape(fn)
    # Like the shapes, so that under `jax.shard_map` they vary along the same axes.
    zeros = lambda: jtu.tree_map(jnp.zeros_like, shapes)
    return lax.cond(eqxi.unvmap_any(condition), fn, zeros)
