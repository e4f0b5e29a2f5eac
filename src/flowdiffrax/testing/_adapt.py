"""Anyone's callables as flow maps and vector fields: the one place that knows them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._check import check_callable, check_like
from .._derivative import Derivative, FiniteDifference
from .._time import real_dtype, times_like
from .._types import Args, Scalar, State, Time, VectorField
from ..flow_maps._base import AbstractFlowMap


class _ForeignFlowMap(AbstractFlowMap):
    """Any `(s, t, x)` or `(s, t, x, args)` as a flow map."""

    fn: Callable
    jvp: Derivative
    outside_jax: bool = eqx.field(static=True)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The callable's own."""
        out = _evaluate(self.fn, (s, t), x, args, self.outside_jax)
        return check_like(out, x, "`flow_map`")

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """By the derivative that suits the callable."""
        end = lambda end: self.jump(t, end, x, args)
        return self.jvp(end, (t,), (jnp.ones_like(t),))[1]


class _ForeignField(eqx.Module):
    """Any `(t, x)` or `(t, x, args)` as a vector field."""

    fn: Callable
    outside_jax: bool = eqx.field(static=True)

    def __call__(self, t: Time, x: State, args: Args) -> State:
        return _evaluate(self.fn, times_like(x, t), x, args, self.outside_jax)


def adapt(
    flow_map: Callable,
    vector_field: Callable | None,
    s: Time,
    x: State,
    args: Args,
    jvp: Derivative | None,
) -> tuple[AbstractFlowMap, VectorField, Derivative]:
    """The map, the field and the derivative to use, from whatever the user has.

    **Arguments:**

    - `flow_map`, `vector_field`: the user's; the map's own velocity for `None`.
    - `s`, `x`, `args`: a time, one state, and what goes with it, to try them at.
    - `jvp`: the user's, or `None` for forward mode, and central differences for
      callables that are not written in JAX.
    """
    signatures = "flow_map(s, t, x)", "flow_map(s, t, x, args)"
    check_callable(flow_map, "flow_map", *signatures)
    inputs = (*times_like(x, s, s), x)
    if isinstance(flow_map, AbstractFlowMap):
        jvp = jax.jvp if jvp is None else jvp
    else:
        outside = not _traces(flow_map, inputs, args)
        if jvp is None:
            jvp = FiniteDifference(_best_step(x)) if outside else jax.jvp
        fn = functools.partial(flow_map) if is_opaque(flow_map) else flow_map
        flow_map = _ForeignFlowMap(fn, jvp, outside)
    if vector_field is None:
        return flow_map, flow_map.velocity, jvp
    signatures = "vector_field(t, x, args)", "vector_field(t, x)"
    check_callable(vector_field, "vector_field", *signatures)
    outside = not _traces(vector_field, inputs[1:], args)
    return flow_map, _ForeignField(vector_field, outside), jvp


def is_opaque(fn: Callable) -> bool:
    """Whether JAX cannot see the arrays that a callable carries.

    What is compiled of such a callable has them as constants. It must not be kept, since
    the same callable may have other weights a moment later; `adapt` makes a new object
    of it each time.
    """
    return jtu.all_leaves([fn])


def _best_step(x: State) -> float:
    """The step at which rounding and truncation of a central difference are equal."""
    return float(jnp.finfo(real_dtype(x)).eps) ** (1 / 3)


def _traces(fn: Callable, inputs: tuple, args: Args) -> bool:
    """Whether JAX can trace it; if not, it can be called, or raises its own error."""
    try:
        jax.eval_shape(lambda *inputs: _call(fn, inputs, args), *inputs)
    except Exception:  # NumPy, PyTorch and others each have their own
        _call(fn, _on_host(inputs), _on_host(args))
        return False
    return True


def _on_host(tree: Any) -> Any:
    return jtu.tree_map(
        lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, tree
    )


def _call(fn: Callable, inputs: tuple, args: Args) -> Any:
    """Calls it without `args` where there are none, and it does without."""
    if args is None:
        try:
            inspect.signature(fn).bind(*inputs)
        except TypeError:
            return fn(*inputs, None)
        except ValueError:  # what is written in C may have no signature
            pass
        return fn(*inputs)
    return fn(*inputs, args)


def _evaluate(fn: Callable, times: tuple, x: State, args: Args, outside_jax: bool):
    if not outside_jax:
        return jtu.tree_map(jnp.asarray, _call(fn, (*times, x), args))
    like = jax.eval_shape(lambda x: x, x)

    def on_host(inputs, args):
        # NumPy has its own rules of promotion, of which nobody wants to hear.
        cast = lambda out, x: np.asarray(out, x.dtype)
        return jtu.tree_map(cast, _call(fn, _on_host(inputs), _on_host(args)), like)

    return eqx.filter_pure_callback(
        on_host, (*times, x), args, result_shape_dtypes=like, vmap_method="sequential"
    )
