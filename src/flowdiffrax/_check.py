"""Checks of arguments, with error messages that name a cure."""

import enum
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike

from ._tree import is_concrete
from ._types import State

_Member = TypeVar("_Member", bound=enum.Enum)


def check_like(out: State, x: State, name: str, *, any_dtype: bool = False) -> State:
    """Checks at trace time that `out` has the structure of `x`, and returns it.

    **Raises:** `ValueError` if the PyTree structures or shapes differ, `TypeError` if the
    dtypes differ and may not.
    """
    if isinstance(out, Array) and isinstance(x, Array):
        if out.shape == x.shape and out.dtype == x.dtype:
            return out
    got, own = jtu.tree_structure(out), jtu.tree_structure(x)
    if got != own:
        raise ValueError(
            f"{name} must return the structure of the state, {own}; got {got}."
        )
    for got_leaf, leaf in zip(jtu.tree_leaves(out), jtu.tree_leaves(x), strict=True):
        got, own = jnp.shape(got_leaf), jnp.shape(leaf)
        if got != own:
            if got == ():
                cure = "Look at the order of its arguments: times, state, `args`."
            else:
                cure = "A state is one example: to work on a batch, use `jax.vmap`."
            raise ValueError(
                f"{name} must return the shape of the state, {own}; got {got}. {cure}"
            )
        got, own = jnp.result_type(got_leaf), jnp.result_type(leaf)
        if got != own and not any_dtype:
            # Diffrax promotes the state to the dtype of the times.
            raise TypeError(
                f"{name} must return the dtype of the state, {own}; got {got}. Give "
                "state and weights one dtype, or cast with `.astype(x.dtype)`. In a "
                "solve, give times of that dtype too: Python floats may be float64."
            )
    return out


def check_callable(
    fn: object, name: str, *signatures: str, may_be_class: bool = False
) -> None:
    """**Raises:** `TypeError` unless `fn` can be called with one of the signatures."""
    signature = signatures[0]
    if not callable(fn) or (inspect.isclass(fn) and not may_be_class):
        # A `TrainState` has `ema_map`, and a Diffrax term has `vector_field`.
        parts = [part for part in ("ema_map", "vector_field") if hasattr(fn, part)]
        cure = f" Pass its `.{parts[0]}`." if parts else ""
        raise TypeError(
            f"`{name}` must be a callable `{signature}`; got {_kind(fn)}.{cure}"
        )
    try:
        own = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    is_map = hasattr(fn, "velocity") and _takes(own, "flow_map(s, t, x, args)")
    if is_map and signature.endswith("(t, x, args)"):
        raise TypeError(
            f"`{name}` must be a velocity `{signature}`; got the flow map "
            f"{type(fn).__name__}. Pass its `.velocity`."
        )
    if not any(_takes(own, signature) for signature in signatures):
        what = getattr(fn, "__name__", type(fn).__name__)
        bare = [part.replace(annotation=part.empty) for part in own.parameters.values()]
        what += str(inspect.Signature(bare))
        raise TypeError(
            f"`{name}` is called as `{signature}`, which `{what}` does not allow. Wrap "
            "it in a function, or an `eqx.Module`, of these arguments."
        )


def check_flow_map(fn: object, name: str = "flow_map") -> None:
    """**Raises:** `TypeError` if `fn` is not a two-time map, or is a known network.

    A network takes the arguments of a flow map, so its velocity would be used as a state.
    """
    # Look inside `jax.jit` and similar wrappers.
    inner = inspect.unwrap(fn)  # pyright: ignore
    if not inspect.isclass(inner) and _is_network(inner):
        raise TypeError(
            f"`{name}` is a bare network, {type(inner).__name__}, whose output is a "
            "velocity. Wrap it as `FlowMap(net)`."
        )
    check_callable(fn, name, f"{name}(s, t, x, args)")


def _is_network(fn: object) -> bool:
    # Our networks have `is_network`, since `nn` imports this module; Equinox's do not.
    modules = [cls.__module__ for cls in type(fn).__mro__]
    of_equinox = any(module.startswith("equinox.nn") for module in modules)
    return of_equinox or getattr(fn, "is_network", False)


def _takes(own: inspect.Signature, signature: str) -> bool:
    """Whether a function with signature `own` can be called as `signature`."""
    arguments = signature[signature.index("(") + 1 : -1].split(", ")
    try:
        own.bind(*arguments)
    except TypeError:
        return False
    return True


def check_optimiser(optim: object) -> None:
    """**Raises:** `TypeError` if `optim` is not an Optax optimiser."""
    if not (hasattr(optim, "init") and hasattr(optim, "update")):
        raise TypeError(
            "`optim` must be an Optax optimiser, for example `optax.adam(1e-3)`; got "
            f"{getattr(optim, '__name__', optim)!r}."
        )


def check_key(key: Any) -> None:
    """**Raises:** `TypeError` if `key` is not a key, `ValueError` for several keys."""
    try:
        shape = jax.random.key_data(key).shape[:-1]
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"`key` must be a key of JAX, for example `jax.random.key(0)`; got {key!r}."
        ) from error
    if shape != ():
        raise ValueError(
            f"`key` must be a single key; got an array of them, of shape {shape}."
        )


def check_at_least(
    number: Any, least: float, name: str, *, or_none: bool = False
) -> None:
    """**Raises:** `TypeError` unless it is a real number, `ValueError` if it is less.

    Tracers are not checked, here and in the following verbs.
    """
    if _is_false(number, name, lambda number: number >= least, or_none):
        raise ValueError(f"`{name}` must be at least {least}; got {number}.")


def check_count(number: Any, least: int, name: str, *, or_none: bool = False) -> None:
    """**Raises:** `TypeError` unless a number is whole, `ValueError` if it is less."""
    if number is None:
        if or_none:
            return
        raise TypeError(f"`{name}` must be an integer; got None.")
    if not is_concrete(number):
        return
    try:
        operator.index(number)
    except TypeError as error:
        raise TypeError(f"`{name}` must be an integer; got {number!r}.") from error
    check_at_least(number, least, name)


def check_counts(numbers: Sequence[Any], least: int, name: str) -> None:
    """**Raises:** as `check_count` for each of several, and `ValueError` for none."""
    if len(numbers) == 0:
        raise ValueError(f"`{name}` is empty; it must have at least one entry.")
    for number in numbers:
        check_count(number, least, name)


def check_positive(number: Any, name: str, *, or_none: bool = False) -> None:
    """**Raises:** `TypeError` unless it is a real number, `ValueError` below or at 0."""
    if _is_false(number, name, lambda number: number > 0, or_none):
        raise ValueError(f"`{name}` must be positive; got {number}.")


def check_finite_number(number: Any, name: str, *, or_none: bool = False) -> None:
    """**Raises:** `TypeError` unless it is a real number, `ValueError` if not finite."""
    if _is_false(number, name, np.isfinite, or_none):
        raise ValueError(f"`{name}` must be finite; got {number}.")


def check_between(
    number: Any,
    low: Any,
    high: Any,
    name: str,
    ends: str = "[]",
    *,
    or_none: bool = False,
) -> None:
    """**Raises:** `TypeError` unless it is a real number, `ValueError` if it is outside.

    `ends` are the brackets of the interval; a round one excludes that end.
    """
    above = operator.ge if ends[0] == "[" else operator.gt
    below = operator.le if ends[1] == "]" else operator.lt
    if not is_concrete((low, high)):
        return
    first, last = np.asarray(low), np.asarray(high)
    inside = lambda number: above(number, first) & below(number, last)
    if _is_false(number, name, inside, or_none):
        interval = f"{ends[0]}{low}, {high}{ends[1]}"
        raise ValueError(f"`{name}` must be in {interval}; got {number}.")


def _is_false(
    number: Any, name: str, condition: Callable[[np.ndarray], Any], or_none: bool
) -> bool:
    """Whether a known number fails a condition; a tracer does not.

    **Raises:** `TypeError` for what is not a real number, or an array of them.
    """
    if not is_concrete(number) or (or_none and number is None):
        return False
    # In NumPy: inside `jit`, JAX would trace a comparison of known numbers too.
    value = np.asarray(number)
    # NumPy does not know that bfloat16 is a floating dtype.
    kinds = np.bool_, np.integer, jnp.floating
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        what = "a real number or `None`" if or_none else "a real number"
        raise TypeError(f"`{name}` must be {what}; got {number!r}.")
    return not np.all(condition(value))


def check_bools(**values: Any) -> None:
    """**Raises:** `TypeError` unless all are `True` or `False`, by their names.

    Any other value would pass for one of them: the string "no" is true.
    """
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"`{name}` must be `True` or `False`; got {value!r}.")


def check_scalar(value: Any, name: str) -> None:
    """**Raises:** `TypeError` if it is no number, `ValueError` if there are several."""
    check_instance(value, ArrayLike, name, "a number")
    if jnp.shape(value) != ():
        raise ValueError(
            f"`{name}` must be a scalar; got shape {jnp.shape(value)}. For a batch, use "
            "`jax.vmap`."
        )


def check_instance(value: object, kind: Any, name: str, what: str | None = None) -> None:
    """**Raises:** `TypeError` if `value` is not of the type `kind`, in words `what`."""
    # A tracer is an instance of an array, but not of a union with arrays.
    if not isinstance(value, get_args(kind) or kind):
        what = what or f"an instance of `{kind.__name__}`"
        raise TypeError(f"`{name}` must be {what}; got {_kind(value)}.")


def as_member(value: Any, kind: type[_Member], name: str) -> _Member:
    """**Raises:** `ValueError` for what is neither a member of `kind` nor its value."""
    try:
        return kind(value)
    except ValueError as error:
        values = ", ".join(f'"{member.value}"' for member in kind)
        raise ValueError(
            f"`{name}` must be a `{kind.__name__}`, or one of {values}; got {value!r}."
        ) from error


def _kind(value: object) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}, not an instance of it"
    return getattr(value, "__name__", type(value).__name__)
