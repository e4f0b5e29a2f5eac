"""Adapters from arbitrary callables to flow maps and vector fields."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

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
    """Any callable `(s, t, x)` or `(s, t, x, args)` as a flow map."""

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
    """Any callable `(t, x)` or `(t, x, args)` as a vector field."""

    fn: Callable
    outside_jax: bool = eqx.field(static=True)

    def __call__(self, t: Time, x: State, args: Args) -> State:
        return _evaluate(self.fn, times_like(x, t), x, args, self.outside_jax)


class Adapted(NamedTuple):
    """The flow map, vector field and derivative to use, and whether JAX traces them."""

    flow_map: AbstractFlowMap
    vector_field: VectorField
    jvp: Derivative
    outside_jax: bool

    def vectorises(self, s: Time, x: State, args: Args) -> bool:
        """Whether `jax.vmap` takes both."""
        (s,) = times_like(x, s)
        rows = jtu.tree_map(lambda leaf: jnp.stack([leaf, leaf]), (s, x))

        def both(s: Time, x: State) -> State:
            return self.flow_map(s, s, x, args), self.vector_field(s, x, args)

        try:
            jax.eval_shape(jax.vmap(both), *rows)
        except Exception:  # each primitive raises its own
            return False
        return True


def adapt(
    flow_map: Callable,
    vector_field: Callable | None,
    s: Time,
    x: State,
    args: Args,
    jvp: Derivative | None,
) -> Adapted:
    """Adapts given callables.

    **Arguments:**

    - `flow_map`, `vector_field`: the user's callables. If `vector_field` is `None`, the
      map's own velocity is used.
    - `s`, `x`, `args`: a time, a state and `args` at which to try the callables.
    - `jvp`: the user's choice. `None` selects forward mode, or central differences for
      maps that are not written in JAX.
    """
    signatures = "flow_map(s, t, x)", "flow_map(s, t, x, args)"
    check_callable(flow_map, "flow_map", *signatures)
    inputs = (*times_like(x, s, s), x)
    outside = False
    if isinstance(flow_map, AbstractFlowMap):
        jvp = jax.jvp if jvp is None else jvp
    else:
        outside = not _traces(flow_map, inputs, args)
        if jvp is None:
            jvp = FiniteDifference(_best_step(x)) if outside else jax.jvp
        fn = functools.partial(flow_map) if is_opaque(flow_map) else flow_map
        flow_map = _ForeignFlowMap(fn, jvp, outside)
    if vector_field is None:
        return Adapted(flow_map, flow_map.velocity, jvp, outside)
    signatures = "vector_field(t, x, args)", "vector_field(t, x)"
    check_callable(vector_field, "vector_field", *signatures)
    field_outside = not _traces(vector_field, inputs[1:], args)
    field = _ForeignField(vector_field, field_outside)
    return Adapted(flow_map, field, jvp, outside or field_outside)


def is_opaque(fn: Callable) -> bool:
    """Whether JAX cannot see the arrays that a callable holds.

    Compiled code contains the arrays of such a callable as constants. It must not be
    cached, because the callable may hold other weights later, so `adapt` wraps the
    callable in a new object each time.
    """
    return jtu.all_leaves([fn])


def _best_step(x: State) -> float:
    """The step that balances rounding and truncation errors of a central difference."""
    return float(jnp.finfo(real_dtype(x)).eps) ** (1 / 3)


def _traces(fn: Callable, inputs: tuple, args: Args) -> bool:
    """Whether JAX can trace `fn`. If not, calls `fn` once, so that its errors surface."""
    try:
        jax.eval_shape(lambda *inputs: _call(fn, inputs, args), *inputs)
    except Exception:  # NumPy, PyTorch and others raise different errors
        _call(fn, _on_host(inputs), _on_host(args))
        return False
    return True


def _on_host(tree: Any) -> Any:
    return jtu.tree_map(
        lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, tree
    )


def _call(fn: Callable, inputs: tuple, args: Args) -> Any:
    """Calls `fn`, without `args` if they are `None` and `fn` does not need them."""
    if args is None:
        try:
            inspect.signature(fn).bind(*inputs)
        except TypeError:
            return fn(*inputs, None)
        except ValueError:  # functions written in C may have no signature
            pass
        return fn(*inputs)
    return fn(*inputs, args)


def _evaluate(fn: Callable, times: tuple, x: State, args: Args, outside_jax: bool):
    if not outside_jax:
        return jtu.tree_map(jnp.asarray, _call(fn, (*times, x), args))
    like = jax.eval_shape(lambda x: x, x)

    def on_host(inputs, args):
        # NumPy promotes types by its own rules, so cast back.
        cast = lambda out, x: np.asarray(out, x.dtype)
        return jtu.tree_map(cast, _call(fn, _on_host(inputs), _on_host(args)), like)

    return eqx.filter_pure_callback(
        on_host, (*times, x), args, result_shape_dtypes=like, vmap_method="sequential"
    )
