import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from .._check import (
    check_bools,
    check_callable,
    check_instance,
    check_key,
    check_like,
)
from .._time import real_dtype
from .._tree import num_rows, ravel, rows_not_finite
from .._types import Args, State, VectorField

# A batch of vectors, in NumPy and in float64.
Rows = Float[np.ndarray, "rows _"]


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Turns on float64 in JAX, which exact trajectories need."""
    # JAX 0.7 has it in `experimental` only.
    if hasattr(jax, "enable_x64"):
        enable = jax.enable_x64
    else:
        enable = importlib.import_module("jax.experimental").enable_x64
    with enable(True):
        yield


def call_afresh(function: Callable, *args: Any) -> Any:
    """Calls a function that traces the user's, and once more if JAX mixes up precisions.

    What indexes by a NumPy array and was traced in one precision can fail to be traced in
    the other, with a `TypeError`, until JAX's caches are empty.
    """
    try:
        return function(*args)
    except TypeError:
        jax.clear_caches()
        return function(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """The times, states and parameters that a map is for.

    The user's states and parameters may be any PyTrees of real arrays. Here they are
    vectors in float64.

    **Attributes:**

    - `t0`, `t1`: the time interval.
    - `x`, `args`: one state of the user's, and one `args`; `None` if nothing varies.
    - `size`, `args_size`: the number of their entries.
    """

    t0: float
    t1: float
    x: State
    args: Args
    size: int
    args_size: int

    @property
    def is_vector(self) -> bool:
        """Whether the user's states and parameters are vectors already."""
        plain = isinstance(self.x, Array) and jnp.ndim(self.x) == 1
        few = self.args is None or isinstance(self.args, Array) and self.args.ndim <= 1
        return plain and few

    def to_user(self, x: Rows, args: Rows | None) -> tuple[State, Args]:
        """Batches of the user's states and parameters, in the user's precision."""
        cast = lambda rows, leaf: jnp.asarray(rows, jnp.result_type(leaf))
        states = jtu.tree_map(cast, _unravel(x, self.x), self.x)
        if args is None:
            return states, None
        return states, jtu.tree_map(cast, _unravel(args, self.args), self.args)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(Domain):
    """An ODE on vectors, with its initial states and its parameters.

    **Attributes:** those of a `Domain`, and

    - `vector_field`: a callable `(t, x, args) -> dx/dt` of vectors.
    - `num_rows`: how many initial states there are; `None` if any number can be drawn.
    """

    vector_field: VectorField
    num_rows: int | None
    _draw: Callable[[Any, int, bool], tuple[Rows, Rows | None]]

    @functools.cached_property
    def _rates(self) -> Callable:
        axes = (0, 0, None if self.args_size == 0 else 0)
        return jax.jit(jax.vmap(self.vector_field, axes))

    def rates(self, ts: Any, xs: Rows, args: Rows | None) -> Rows:
        """The vector field at a batch of times, states and parameters."""
        with double_precision():
            given = map(in_double, (ts, xs, args))
            return np.asarray(call_afresh(self._rates, *given))

    def give_back(self) -> None:
        """Leaves JAX able to trace the user's vector field in the user's precision."""
        shapes = (), (self.size,), (self.args_size,)
        dtype = jnp.result_type(float)
        at = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        call_afresh(jax.eval_shape, lambda *at: self.vector_field(*at), *at)

    def draw(
        self, key: Key[Array, ""], num: int, held_out: bool = False
    ) -> tuple[Rows, Rows | None]:
        """Draws initial states, and parameters if they vary.

        If there is a certain number of them, it returns at most `num` different ones, and
        a fifth of them only if `held_out`.

        **Raises:** `ValueError` if some of them are not finite.
        """
        x0, args = self._draw(key, num, held_out)
        bad = np.flatnonzero(rows_not_finite((x0, args)))
        if bad.size > 0:
            raise ValueError(
                f"Initial states and `args` must be finite; {bad.size} of {len(x0)} "
                f"drawn are not, the first of them example {bad[0]}."
            )
        return x0, args


def make_problem(
    vector_field: VectorField,
    x0: State | Callable[[Any], State],
    t0: float,
    t1: float,
    args: Args | Callable[[Any], Args],
    args_per_example: bool,
) -> Problem:
    """Checks what the user states, and turns it into vectors.

    **Raises:** `ValueError` for times that do not rise, initial states that are no batch
    or a single point, or a vector field with values that are not finite or unlike the
    state; `TypeError` for states or parameters that are not real arrays, or functions
    that do not take the arguments above.
    """
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    check_bools(args_per_example=args_per_example)
    t0, t1 = _as_times(t0, t1)
    draws_x0 = callable(x0)
    # A network in `args` can be called as well, but is no function of a key.
    draws_args = callable(args) and not isinstance(args, eqx.Module)
    if draws_x0:
        check_callable(x0, "x0", "x0(key)")
    if draws_args:
        check_callable(args, "args", "args(key)")
    rows = None if draws_x0 else _num_states(x0)
    if args_per_example and not draws_args:
        rows = _num_conditions(args, rows)
    x, own_args = _first(x0, draws_x0), None
    real_dtype(x)  # refuses integers
    _check_real(x, "x0")
    varies = draws_args or args_per_example
    if varies:
        own_args = _first(args, draws_args)
        _check_real(own_args, "args")
    given = own_args if varies else args
    vector_field = _without_jit(vector_field)
    try:
        out = jax.eval_shape(lambda *at: vector_field(*at), _number(t0), x, given)
    except Exception as error:
        sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(args)}
        if not varies and sizes == {(rows,)}:
            error.add_note(
                "`args` was passed as it is. If it has one row for each initial state, "
                "use `args_per_example=True`."
            )
        raise
    check_like(out, x, "`vector_field`")
    size = sum(jnp.size(leaf) for leaf in jtu.tree_leaves(x))
    num_args = sum(jnp.size(leaf) for leaf in jtu.tree_leaves(own_args))

    def field(t: Any, vector: Any, args_vector: Any) -> Any:
        given = _unravel(args_vector, own_args) if varies else args
        out = vector_field(t, _unravel(vector, x), given)
        return ravel(out, "`vector_field`")[0].astype(vector.dtype)

    def draw(key: Any, num: int, held_out: bool) -> tuple[Rows, Rows | None]:
        x_key, args_key, row_key = jr.split(key, 3)
        index = None
        if rows is not None:
            fold = np.arange(rows) % 5 == 0
            own = np.flatnonzero(fold if held_out else ~fold)
            index = np.asarray(jr.permutation(row_key, own))[:num]
            num = len(index)
        drawn = _draw(x0, draws_x0, x_key, index, num)
        conditions = _draw(args, draws_args, args_key, index, num) if varies else None
        return drawn, conditions

    return Problem(t0, t1, x, own_args, size, num_args, field, rows, draw)


def _without_jit(vector_field: VectorField) -> VectorField:
    if isinstance(vector_field, type(jax.jit(lambda: None))):
        return inspect.unwrap(vector_field)
    return vector_field


def _check_real(tree: Any, name: str) -> None:
    dtypes = {jnp.result_type(leaf) for leaf in jtu.tree_leaves(tree)}
    complex_ones = [d for d in dtypes if jnp.issubdtype(d, jnp.complexfloating)]
    if complex_ones:
        raise TypeError(
            f"`{name}` must have real leaves; got {complex_ones[0].name}. Split each "
            "complex number into its real and its imaginary part, as "
            "`jnp.stack([z.real, z.imag])`, and join them inside of the vector field."
        )


def check_field(problem: Problem, x0: Rows, args: Rows | None) -> None:
    """**Raises:** `ValueError` if the vector field is not finite at some states."""
    rates = problem.rates(np.full(len(x0), problem.t0), x0, args)
    bad = np.flatnonzero(~np.isfinite(rates).all(1))
    if bad.size > 0:
        which = np.flatnonzero(~np.isfinite(rates[bad[0]]))
        raise ValueError(
            f"`vector_field` must be finite; it is not at {bad.size} of {len(x0)} "
            f"initial states. At the first of them, t = {problem.t0:g} and "
            f"x = {np.array2string(x0[bad[0]][:8])}, it concerns the entries "
            f"{which[:5].tolist()}."
        )


def _as_times(t0: Any, t1: Any) -> tuple[float, float]:
    for name, time in (("t0", t0), ("t1", t1)):
        check_instance(time, ArrayLike, name, "a number")
    t0, t1 = float(t0), float(t1)
    if not (np.isfinite([t0, t1]).all() and t0 < t1):
        raise ValueError(
            f"`t0` must be less than `t1`, and both finite; got {t0:g} and {t1:g}. To "
            "learn backward jumps as well, use `both_directions=True`."
        )
    check_resolved(t0, t1)
    return t0, t1


def check_resolved(t0: float, t1: float) -> None:
    """**Raises:** `ValueError` if single precision can hardly tell the times apart."""
    latest = max(abs(t0), abs(t1))
    if t1 - t0 < 1e3 * np.finfo(np.float32).eps * latest:
        raise ValueError(
            f"Times from {t0!r} to {t1!r} can hardly be told apart in single precision, "
            f"which a map is trained in. Measure time from the start, as `t0=0` and "
            f"`t1={t1 - t0:g}`, and add {t0!r} inside a vector field."
        )


def _num_states(x0: State) -> int:
    rows = num_rows(
        x0, "`x0` is a batch of initial states or a function of a key: leaves"
    )
    if rows < 32:
        raise ValueError(
            f"`x0` has {rows} initial states, which is too few to learn from: at least "
            "32 are needed, and thousands are better. Pass a function of a key that "
            "draws one, such as `lambda key: base * jax.random.uniform(key, base.shape)`."
        )
    return rows


def _num_conditions(args: Args, num_states: int | None) -> int:
    if args is None:
        raise ValueError(
            "`args_per_example=True` needs `args`, one row for each state; got `None`."
        )
    rows = num_rows(args, "`args` has one row for each initial state: its leaves")
    if num_states not in (None, rows):
        raise ValueError(
            f"`args` must have one row for each of the {num_states} initial states; got "
            f"{rows}."
        )
    return rows


def _first(values: Any, is_function: bool) -> Any:
    if not is_function:
        return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[0], values)
    key = jr.key(0)
    check_key(key)
    return jtu.tree_map(jnp.asarray, values(key))


def _draw(values: Any, is_function: bool, key: Any, index: Any, num: int) -> Rows:
    if is_function:
        values = jax.jit(jax.vmap(values))(jr.split(key, num))
        index = slice(None)
    leaves = [np.asarray(leaf, np.float64)[index] for leaf in jtu.tree_leaves(values)]
    return np.concatenate([leaf.reshape(num, -1) for leaf in leaves], axis=1)


def _unravel(rows: Any, like: State) -> State:
    """Splits the last axis of an array into leaves like those of one state."""
    leaves, structure = jtu.tree_flatten(like)
    sizes = [jnp.size(leaf) for leaf in leaves]
    ends = np.cumsum([0, *sizes])
    parts = [rows[..., low:high] for low, high in itertools.pairwise(ends)]
    shapes = [(*rows.shape[:-1], *jnp.shape(leaf)) for leaf in leaves]
    shaped = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return structure.unflatten(shaped)


def in_double(tree: Any) -> Any:
    """Arrays of float64; call it under `double_precision`."""
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def _number(t: float) -> Array:
    return jnp.asarray(t, jnp.result_type(float))


def as_flags(given: Any, size: int) -> Bool[np.ndarray, " size"]:
    """**Raises:** `ValueError` unless there is a flag for each entry, or one for all."""
    flags = np.asarray(given)
    if flags.dtype != bool or flags.shape not in ((), (size,)):
        raise ValueError(
            f"`is_positive` must be true or false for each of the {size} entries, or for "
            f"all; got {given!r}."
        )
    return np.broadcast_to(flags, (size,)).copy()
