"""Evaluates identities at given points, and collects the failures."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import ArrayLike, Real

from .._check import check_count
from .._derivative import Derivative
from .._time import time_dtype
from .._tree import num_rows
from .._types import Args, State, VectorField
from ..flow_maps._base import AbstractFlowMap
from ._adapt import adapt, is_opaque
from ._failure import Failure, Tolerance, tolerances
from ._identity import IDENTITIES, Jump, Settings, evaluate, evaluate_compiled

if TYPE_CHECKING:
    Times: TypeAlias = Any
else:
    # One time, or the times of a batch.
    Times: TypeAlias = Real[ArrayLike, "..."]


def broadcast(*times: Times) -> tuple:
    """Broadcasts times; `ValueError` unless their shapes are `()` and `(batch,)`."""
    shapes = {jnp.shape(time) for time in times} - {()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"Times must be scalars or of one shape (batch,); got {shapes}.")
    return tuple(np.broadcast_arrays(*map(np.asarray, times)))


def check_names(names: Sequence[str]) -> None:
    """Raises `ValueError` unless all names are those of identities."""
    unknown = sorted({*names} - {*IDENTITIES})
    if unknown or not names:
        raise ValueError(
            f"`identities` must be names among {', '.join(IDENTITIES)}; got {names}."
        )


class Prepared(NamedTuple):
    """Everything that is the same for all points."""

    compute: Callable
    flow_map: AbstractFlowMap
    vector_field: VectorField
    settings: Settings
    has_field: bool
    in_turn: bool


class Measured(NamedTuple):
    """An identity at the rows of a batch. A single jump is a batch of one row.

    `failure(row)` describes one row.
    """

    defect: np.ndarray
    allowed: np.ndarray
    failure: Callable[[int], Failure]

    @property
    def excess(self) -> np.ndarray:
        """By how much the defect is too large. Not finite is worse than anything."""
        is_finite = np.isfinite(self.defect) & np.isfinite(self.allowed)
        return np.where(is_finite, self.defect - self.allowed, np.inf)

    @property
    def ratio(self) -> np.ndarray:
        """The defect over what is allowed."""
        is_finite = np.isfinite(self.excess) & (self.allowed > 0)
        ratio = self.defect / np.where(is_finite, self.allowed, 1)
        return np.where(is_finite, ratio, np.where(self.excess > 0, np.inf, 0))

    @property
    def worst(self) -> int:
        """The row with the largest excess."""
        return int(np.argmax(self.excess))


def prepare(
    flow_map: Callable,
    vector_field: Callable | None,
    x: State,
    s: Times = 0.0,
    args: Args = None,
    jvp: Derivative | None = None,
    solver: Any = None,
    num_steps: int = 3,
    *,
    once: bool = True,
    shares_args: bool = False,
) -> Prepared:
    """Prepares a map, a vector field and settings for evaluation.

    **Arguments:** as for the assertions, with a state at which to try the callables, and

    - `once`: whether the result is used only once. Code that cannot be cached is then
      not compiled.
    - `shares_args`: whether all rows of a batch have the same `args`.
    """
    check_count(num_steps, 1, "num_steps")
    x = jtu.tree_map(jnp.asarray, x)
    if jnp.ndim(s) == 1:
        num_rows((x, _arrays(args)), "States and conditions of a batch")
        s, x, args = _row((jnp.asarray(s), x, args), 0)
    opaque = is_opaque(flow_map)
    has_field = vector_field is not None
    adapted = adapt(flow_map, vector_field, s, x, args, jvp)
    vectorise = once or adapted.vectorises(s, x, args)
    compute = evaluate if once and opaque else evaluate_compiled
    settings = Settings(adapted.jvp, solver, num_steps, vectorise, shares_args)
    in_turn = adapted.outside_jax or not vectorise
    return Prepared(compute, *adapted[:2], settings, has_field, in_turn)


def assess(
    prepared: Prepared,
    names: tuple[str, ...],
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args,
    rtol: Tolerance,
    atol: Tolerance,
) -> list[Failure]:
    """The failures at a point or a batch, each where it is worst."""
    found = measure(prepared, names, s, u, t, x, args, rtol, atol)
    return [
        measured.failure(measured.worst)
        for measured in found.values()
        if measured.excess.max() > 0
    ]


def measure(
    prepared: Prepared,
    names: tuple[str, ...],
    s: Times,
    u: Times,
    t: Times,
    x: State,
    args: Args,
    rtol: Tolerance,
    atol: Tolerance,
) -> dict[str, Measured]:
    """Evaluates identities at a point or a batch."""
    compute, flow_map, vector_field, settings, has_field, _ = prepared
    x = jtu.tree_map(jnp.asarray, x)
    s, u, t = (jnp.asarray(time, time_dtype(x)) for time in (s, u, t))
    is_batch = s.ndim == 1
    row_args = None if settings.shares_args else _arrays(args)
    if is_batch:
        num_rows((s, x, row_args), "Times, states and conditions of a batch")
    jump = Jump(flow_map, vector_field, s, u, t, x, args, settings)
    times = {"s": np.asarray(s), "u": np.asarray(u), "t": np.asarray(t)}

    def measured(name: str, residual: State, size: Any) -> Measured:
        relative, absolute = tolerances(name, x, settings.jvp, rtol, atol)
        allowed = absolute + relative * np.atleast_1d(np.asarray(size, float))
        if name == "positive_jacobian":
            allowed = np.zeros_like(allowed)
        entries, labels = _entries(residual, is_batch)
        defect = np.max(entries, axis=1, initial=0)

        def failure(row: int) -> Failure:
            at = row if is_batch else ()
            # The defect of a Jacobian is the magnitude of a negative determinant.
            sign = -1 if name == "positive_jacobian" else 1
            return Failure(
                identity=name,
                times={key: times[key][at] for key in IDENTITIES[name].times},
                x=_row(x, at),
                args=args if settings.shares_args else _row(args, at),
                defect=float(sign * defect[row]),
                tolerance=float(allowed[row]),
                entry=labels(int(np.argmax(np.nan_to_num(entries[row], nan=np.inf)))),
                row=row if is_batch else None,
                has_field=has_field,
            )

        return Measured(defect, allowed, failure)

    found = compute(names, jump).items()
    return {name: measured(name, *values) for name, values in found}


def _arrays(args: Args) -> Args:
    return eqx.filter(args, eqx.is_array)


def _row(tree: Any, at: int | tuple) -> Any:
    return jtu.tree_map(lambda leaf: leaf[at] if eqx.is_array(leaf) else leaf, tree)


def _entries(residual: State, batched: bool) -> tuple[np.ndarray, Callable]:
    """Magnitudes of shape (rows, entries), and a function that names an entry."""
    paths, leaves = [], []
    for path, leaf in jtu.tree_flatten_with_path(residual)[0]:
        leaf = leaf if batched else leaf[None]
        paths.append((jtu.keystr(path), leaf.shape[1:]))
        magnitude = np.abs(np.asarray(leaf)).astype(float)
        leaves.append(magnitude.reshape(len(magnitude), -1))

    def label(index: int) -> str:
        for path, shape in paths:
            size = int(np.prod(shape))
            if index < size:
                at = ", ".join(map(str, np.unravel_index(index, shape)))
                return f"{path}[{at}]" if at else path
            index -= size
        return ""

    return np.concatenate(leaves, axis=1), label


def jacobian_is_cheap(x: State) -> bool:
    """Whether a state is real, and small enough to compute the full Jacobian."""
    leaves = jtu.tree_leaves(x)
    is_real = all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)
    return is_real and sum(int(np.size(leaf)) for leaf in leaves) <= 64
