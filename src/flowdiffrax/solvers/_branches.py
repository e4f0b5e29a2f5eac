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
    """Returns `value`, with the derivative of `fn` if `taken`, and without one otherwise.

    `fn` comes from `equinox.filter_closure_convert`. `value` is the value of `fn` with
    gradients stopped.
    """
    inexact, rest = eqx.partition(value, eqx.is_inexact_array)
    return eqx.combine(_taken_value(inexact, taken, fn), rest)


@eqx.filter_custom_jvp
def _taken_value(value, taken, fn):
    return value


@_taken_value.def_jvp
def _taken_value_jvp(primals, tangents):
    value, taken, fn = primals
    # The input tangents are masked too. In reverse mode, the zero cotangents of a refused
    # jump leave there, after multiplication by derivatives that may be NaN.
    mask = lambda tangent: jtu.tree_map(lambda leaf: jnp.where(taken, leaf, 0), tangent)

    def run():
        call = lambda fn: eqx.filter(fn(), eqx.is_inexact_array)
        return eqx.filter_jvp(call, (fn,), (mask(tangents[2]),))[1]

    # Call `_taken_value` again, for derivatives of higher order.
    return _taken_value(value, taken, fn), mask(run_if_any(taken, run))


def where(condition, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(condition, a, b), x, y)


def run_if_any(condition: Bool[ArrayLike, ""], fn: Callable[[], PyTree]) -> PyTree:
    """Returns `fn()` if the condition holds for any example, and zeros otherwise.

    Under `vmap`, a `lax.cond` with one condition for each example would copy everything
    that `fn` closes over, including the network's weights, for each example.
    """
    shapes = jax.eval_shape(fn)
    # `zeros_like`, so that under `jax.shard_map` they vary along the same axes.
    zeros = lambda: jtu.tree_map(jnp.zeros_like, shapes)
    return lax.cond(eqxi.unvmap_any(condition), fn, zeros)
