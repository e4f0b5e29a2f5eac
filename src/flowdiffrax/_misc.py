"""Small helpers with two callers or more."""

import inspect
import math
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import wadler_lindig as wl
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Inexact, PyTree

from ._custom_types import Scalar, State, Time


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


def scale(factor: Scalar, x: State) -> State:
    """`factor * x`, every leaf keeping its own dtype."""
    return jtu.tree_map(lambda leaf: _cast_factor(factor, leaf) * leaf, x)


def add_scaled(x: State, factor: Scalar, v: State) -> State:
    """`x + factor * v`, every leaf keeping its own dtype."""
    return jtu.tree_map(lambda a, b: a + _cast_factor(factor, b) * b, x, v)


def subtract(x: State, y: State) -> State:
    """`x - y`, leaf by leaf."""
    return jtu.tree_map(lambda a, b: a - b, x, y)


def _cast_factor(factor: Scalar, leaf: ArrayLike) -> Inexact[Array, ""]:
    # Times often carry more digits than the state (float64 steps of a float32 state)
    # or fewer (float32 times of a float64 state): the state's precision decides.
    dtype = jnp.result_type(leaf)
    return factor.astype(jnp.finfo(dtype).dtype).astype(dtype)


def squared_norm(x: State) -> Scalar:
    """The sum of squares of all entries of all leaves."""
    leaves = [jnp.sum(jnp.real(leaf * jnp.conj(leaf))) for leaf in jtu.tree_leaves(x)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(sum(leaves))


def vary_like(value: Array, like: Array) -> Array:
    """`value`, varying along those axes of `jax.shard_map` along which `like` varies.

    Linearised functions and loops refuse a constant in place of what varies.
    """
    return value + jnp.zeros_like(like, value.dtype, shape=())


def all_finite(x: State) -> Array:
    """Whether every entry of every leaf is finite, as a scalar boolean array."""
    # As counts, for the compiler: booleans would become one `and` a leaf, and all of them
    # be copied into every kernel that reads the result, minutes of compilation.
    broken = [jnp.sum(~jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(x)]
    return jnp.all(jnp.asarray(broken, jnp.int32) == 0)


def nan_where(condition: Array, x: State) -> State:
    """`x`, but NaN where the condition holds; integers cannot say so, and stay."""

    def replace(leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.where(condition, jnp.nan, leaf) if inexact else leaf

    return jtu.tree_map(replace, x)


def is_concrete(x: PyTree) -> bool:
    """Whether no leaf is a tracer, so that its values may decide an `if`."""
    return not any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(x))


def describe(module: eqx.Module, settings: str) -> wl.AbstractDoc:
    """One line in the place of all layers, for the `__pdoc__` of a network."""
    sizes = [math.prod(leaf.shape) for leaf in jtu.tree_leaves(module) if _is_real(leaf)]
    settings = f"{settings}; " if settings else ""
    text = f"{type(module).__name__}({settings}{sum(sizes):,} parameters)"
    return wl.TextDoc(text)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def freeze(tree: PyTree) -> PyTree:
    """Every array of a PyTree with its gradient stopped; the rest as it is."""
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
    return jtu.tree_map(stop, tree)


def check_like(out: State, x: State, name: str) -> State:
    """Returns `out`, having checked at trace time that it could stand in for `x`.

    **Raises:** `ValueError` for another PyTree structure or other shapes, `TypeError`
    for other dtypes.
    """
    got, expected = jtu.tree_structure(out), jtu.tree_structure(x)
    if got != expected:
        raise ValueError(
            f"{name} must return a PyTree of the structure of the state, {expected}; "
            f"got {got}."
        )
    for got_leaf, leaf in zip(jtu.tree_leaves(out), jtu.tree_leaves(x), strict=True):
        if jnp.shape(got_leaf) != jnp.shape(leaf):
            if jnp.shape(got_leaf) == ():
                cure = "Look at the order of its arguments: times, state, `args`."
            else:
                cure = "A state is one example: to work on a batch, use `jax.vmap`."
            raise ValueError(
                f"{name} must return the shape of the state, {jnp.shape(leaf)}; got "
                f"{jnp.shape(got_leaf)}. {cure}"
            )
        if jnp.result_type(got_leaf) != jnp.result_type(leaf):
            raise TypeError(
                f"{name} must return the dtype of the state, {jnp.result_type(leaf)}; "
                f"got {jnp.result_type(got_leaf)}. Give state and weights one dtype, or "
                "cast with `.astype(x.dtype)` where the value is returned. (Diffrax "
                "promotes the state to the dtype of the times: Python-float times are "
                "float64 when x64 is enabled.)"
            )
    return out


def split_by_shares(size: int, shares: tuple[float, ...]) -> list[slice]:
    """Cuts `size` rows into consecutive slices in the proportion of the shares.

    **Raises:** `ValueError` if a share gets no row.
    """
    ends = [round(size * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    slices = [slice(low, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]
    if any(part.start == part.stop for part in slices):
        raise ValueError(
            f"A batch of {size} is too small for the shares {shares}: one of them gets "
            "nothing. Use a larger batch or fewer shares."
        )
    return slices


def check_shares(shares: tuple[float, ...], number: int, of: str) -> None:
    """**Raises:** `ValueError` unless there is one positive share for each part."""
    if len(shares) != number or number == 0:
        raise ValueError(
            f"There must be one share for each of the {of}, and at least one; got "
            f"{number} {of} and {len(shares)} shares."
        )
    if min(shares) <= 0:
        raise ValueError(f"`shares` must be positive; got {shares}.")


def num_rows(tree: PyTree, name: str) -> int:
    """The length of the leading axis that all arrays of a batch have in common.

    **Raises:** `ValueError` if there is none, or if it is empty.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(tree)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            f"{name} must be arrays with one common leading axis that is not empty; got "
            f"leading axes {sorted(sizes)}."
        )
    return sizes.pop()[0]


def rows_not_finite(tree: PyTree) -> Bool[np.ndarray, " rows"]:
    """Which rows of a batch are known to have an entry that is not finite."""
    leaves = jtu.tree_leaves(tree)
    bad = np.zeros(jnp.shape(leaves[0])[0], bool)
    is_inexact = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    for leaf in filter(is_inexact, leaves):
        # Of an array on several hosts, each knows its own part alone.
        is_known = is_concrete(leaf) and getattr(leaf, "is_fully_addressable", True)
        if is_known and isinstance(leaf, jax.Array):
            # A constant within `jit` is concrete, but what is computed from it is not.
            with jax.ensure_compile_time_eval():
                bad |= np.asarray(_has_not_finite(leaf))
        elif is_known:
            bad |= ~np.isfinite(leaf).all(axis=tuple(range(1, np.ndim(leaf))))
    return bad


@jax.jit
def _has_not_finite(leaf: Array) -> Bool[Array, " rows"]:
    return jnp.any(~jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))


def null_like(null: PyTree, condition: PyTree) -> PyTree:
    """The condition that stands for none, as arrays of the dtypes of a condition.

    **Raises:** `ValueError` for another PyTree structure or other shapes than those of
    `condition`, `TypeError` for a fraction where it has integers.
    """
    got, expected = jtu.tree_structure(null), jtu.tree_structure(condition)
    if got != expected:
        raise ValueError(
            f"`null` must be a PyTree of the structure of the condition, {expected}; got "
            f"{got}. The condition comes as `args`, as `GuidanceArgs` only where the "
            "scale comes with it."
        )

    def cast(leaf, like):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"`null` must have the shape of the condition, {jnp.shape(like)}; got "
                f"{jnp.shape(leaf)}. It stands for the condition of one example: to work "
                "on a batch, use `jax.vmap`."
            )
        dtype = jnp.result_type(like)
        is_exact = lambda dtype: not jnp.issubdtype(dtype, jnp.inexact)
        if is_exact(dtype) and not is_exact(jnp.result_type(leaf)):
            raise TypeError(
                f"`null` must be an integer where the condition is one, of {dtype}; got "
                f"{jnp.result_type(leaf)}. Of labels, mostly the number of classes."
            )
        # Keeps a weak type too: beside a Python number, a number.
        return jnp.full_like(like, leaf)

    return jtu.tree_map(cast, null, condition)


def check_callable(
    fn: object, name: str, *signatures: str, may_be_class: bool = False
) -> None:
    """**Raises:** `TypeError` for what cannot be called in any of the ways given."""
    signature = signatures[0]
    if inspect.isclass(fn) and not may_be_class:
        raise TypeError(
            f"`{name}` must be a callable `{signature}`; got the class {fn.__name__}, "
            "not an instance of it."
        )
    if not callable(fn):
        # A `TrainState` has the one, a term of Diffrax the other.
        parts = [part for part in ("ema_map", "vector_field") if hasattr(fn, part)]
        cure = f" Pass its `.{parts[0]}`." if parts else ""
        raise TypeError(
            f"`{name}` must be a callable `{signature}`; got {type(fn).__name__}.{cure}"
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
        raise TypeError(
            f"`{name}` is called as `{signature}`, which `{what}"
            f"{inspect.Signature(bare)}` does not allow. Wrap it in a function, or an "
            "`eqx.Module`, of these arguments."
        )


def check_flow_map(fn: object, name: str = "flow_map") -> None:
    """**Raises:** `TypeError` if it is not a two-time map, or is known to be a network.

    A network has the arguments of a flow map, so that its velocity would pass for a
    state.
    """
    # `jax.jit` and the like keep what they wrap.
    inner = inspect.unwrap(fn)  # pyright: ignore
    if not inspect.isclass(inner) and _is_network(inner):
        raise TypeError(
            f"`{name}` is a bare network, {type(inner).__name__}, whose output is a "
            "velocity. Wrap it as `FlowMap(net)`."
        )
    check_callable(fn, name, f"{name}(s, t, x, args)")


def _is_network(fn: object) -> bool:
    # By a mark, since `nn` builds on this module; Equinox's own have none.
    modules = [cls.__module__ for cls in type(fn).__mro__]
    of_equinox = any(module.startswith("equinox.nn") for module in modules)
    return of_equinox or getattr(fn, "is_network", False)


def _takes(own: inspect.Signature, signature: str) -> bool:
    """Whether a call as `name(a, b, c)` is possible."""
    arguments = signature[signature.index("(") + 1 : -1].split(", ")
    try:
        own.bind(*arguments)
    except TypeError:
        return False
    return True


def check_optimiser(optim: object) -> None:
    """**Raises:** `TypeError` for what is no optimiser of Optax."""
    if not (hasattr(optim, "init") and hasattr(optim, "update")):
        raise TypeError(
            "`optim` must be an Optax optimiser, for example `optax.adam(1e-3)`; got "
            f"{getattr(optim, '__name__', optim)!r}."
        )


def check_key(key: Any) -> None:
    """**Raises:** `TypeError` for what is no key, `ValueError` for several."""
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


def check_whole(number: Any, name: str) -> None:
    """**Raises:** `TypeError` for a number that is no integer."""
    try:
        operator.index(number)
    except TypeError as error:
        raise TypeError(f"`{name}` must be an integer; got {number!r}.") from error
