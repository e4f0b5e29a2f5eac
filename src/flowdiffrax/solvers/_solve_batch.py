import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real

from .._check import (
    check_between,
    check_bools,
    check_callable,
    check_count,
    check_like,
    check_positive,
)
from .._time import time_dtype
from .._tree import is_concrete, num_rows
from .._types import Args, State, TwoTimeMap, VectorField
from ..estimates._krylov import Krylov, check_linear_solver
from ..estimates._quadrature import last
from ..flow_maps._base import times_out_of_range
from ..flow_maps._inverse import check_composable
from ._hybrid import can_correct, check_fallback, default_nodes, is_implicit
from ._predict import correct, error_ratio, is_fine, predict

# After so many examples, one in so many must have passed for others to be tried.
_SAMPLE, _SHARE = 16, 8


class BatchSolution(NamedTuple):
    """What [`flowdiffrax.solve_batch`][] returns.

    **Attributes:**

    - `ts`: the times.
    - `ys`: the states. Every leaf has the axes of examples and of times in front.
    - `is_learned`: whether each example made each jump by the map, of shape
      `(examples, times - 1)`.
    - `is_successful`: whether all classical solves of an example succeeded. States after
      one that failed are NaN.
    """

    ts: Real[Array, " times"]
    ys: State
    is_learned: Bool[Array, "examples jumps"]
    is_successful: Bool[Array, " examples"]


def solve_batch(
    flow_map: TwoTimeMap,
    vector_field: VectorField,
    ts: Real[ArrayLike, " times"],
    x0: State,
    args: Args = None,
    *,
    rtol: float,
    atol: float,
    args_per_example: bool = False,
    fallback: diffrax.AbstractSolver = diffrax.Tsit5(),
    num_nodes: int | None = None,
    safety: float = 0.3,
    linear_solver: Krylov | None = None,
    chunk_size: int = 128,
    max_steps: int = 4096,
) -> BatchSolution:
    """Solves many initial states, by jumps where they are good and classically elsewhere.

    For each interval of `ts`, the map jumps for all examples at once, and the vector
    field judges each jump as in [`flowdiffrax.HybridSolver`][]. The examples whose jumps
    are not good enough are gathered and corrected, and those that still are not are
    solved by the classical solver, both in chunks. So an easy example neither waits for
    hard ones nor pays for them, as it would under `jax.vmap`. A map that fails on most of
    the first chunks is not tried on the others.

    ```python
    ts = jnp.linspace(0.0, 10.0, 3)

    @jax.jit
    def solve(x0):
        return fd.solve_batch(flow_map, vector_field, ts, x0, rtol=1e-3, atol=1e-6)

    solve(x0).ys, solve(x0).is_learned.mean()
    ```

    Call it inside `jax.jit`: otherwise it is compiled at every call. For gradients, use
    a [`flowdiffrax.HybridSolver`][].

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `ts`: at least two times, rising or falling, from that of `x0`. Each interval is
      one jump.
    - `x0`: the initial states; every leaf with the examples as its leading axis.
    - `args`: passed to both, the same for all examples; or with a row for each example if
      `args_per_example`.
    - `rtol`, `atol`: the tolerances of the jumps and of the classical solver, positive.
    - `fallback`: a Diffrax solver for `diffrax.ODETerm` with an error estimate.
    - `num_nodes`, `safety`, `linear_solver`: as in [`flowdiffrax.HybridSolver`][].
    - `chunk_size`: the number of examples that are worked on side by side, at least 1.
      Small chunks wait less for their slowest example, and fit a processor's caches.
    - `max_steps`: the largest number of classical steps in an interval.

    **Returns:** a [`flowdiffrax.solvers.BatchSolution`][].

    **Raises:** `ValueError` for fewer than two times or some that are not finite,
    examples whose numbers differ, a vector field of another shape, or settings out of
    their ranges; `TypeError` for what is not callable, no solver, or states of
    integers or in half precision.
    """
    check_composable(flow_map)
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_count(chunk_size, 1, "chunk_size")
    check_count(max_steps, 1, "max_steps")
    check_fallback(fallback)
    check_linear_solver(linear_solver)
    check_bools(args_per_example=args_per_example)
    num = num_rows(x0, "`x0` is a batch of examples: its leaves")
    if args_per_example:
        num_rows((x0, args), "`x0` and `args` have a row for each example: their leaves")
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"`ts` must be at least two times; got shape {ts.shape}.")
    if is_concrete(ts) and not np.isfinite(ts).all():
        raise ValueError(f"`ts` must be finite; got {ts}.")
    first = lambda tree: jtu.tree_map(lambda leaf: jnp.asarray(leaf)[0], tree)
    one = first(x0)
    for leaf in jtu.tree_leaves(one):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact) or jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"`x0` must be of float32, float64 or their complex numbers; got "
                f"{leaf.dtype}. Convert it with `.astype(jnp.float32)`."
            )
    ts = ts.astype(time_dtype(one))
    rate = lambda x, args: vector_field(ts[0], x, args)
    slope = eqx.filter_eval_shape(rate, one, first(args) if args_per_example else args)
    check_like(slope, one, "`vector_field`")
    implicit = is_implicit(fallback)
    corrects = can_correct(one, implicit, linear_solver)
    nodes_of = default_nodes(one) if num_nodes is None else num_nodes
    check_count(nodes_of, 2, "num_nodes")
    check_between(safety, 0, 1, "safety", "(]")

    def ratio_from(x):
        how = rtol, atol, optx.rms_norm
        return lambda error, y: error_ratio(error, x, y, *how) / safety

    def predicted(s, t, x, args):
        norm = ratio_from(x)
        made = predict(flow_map, vector_field, s, t, x, args, nodes_of, norm, implicit)
        outside = times_out_of_range(flow_map, s, t)
        asked = True if outside is None else ~outside
        is_good = asked & is_fine(made.ratio, made.nodes.states) & (not implicit)
        is_close = asked & (made.is_close | implicit)
        return made.nodes, is_good, is_close & ~is_good & corrects

    def corrected(s, t, x, args, nodes):
        del s, t
        norm = ratio_from(x)
        wanted = jnp.asarray(True)
        states, error = correct(
            nodes, vector_field, args, norm, wanted, implicit, linear_solver
        )
        end = last(states)
        return end, is_fine(norm(error, end), states)

    def classical(s, t, x, args):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            fallback,
            s,
            t,
            None,
            x,
            args,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
            throw=False,
        )
        # Diffrax takes a time that is NaN for the end of the solve.
        is_good = (solution.result == diffrax.RESULTS.successful) & jnp.isfinite(t - s)
        value = lambda leaf: jnp.where(is_good, leaf[0], jnp.nan)
        return jtu.tree_map(value, solution.ys), is_good

    def segment(x, interval):
        def on_rows(function):
            """`function(s, t, x, args, ...)` of the rows whose indices are given."""
            own = 0 if args_per_example else None
            function = functools.partial(function, *interval)

            def run(rows, *more):
                given = _take(x, rows), _take(args, rows) if args_per_example else args
                return jax.vmap(function, (0, own, *(0 for _ in more)))(*given, *more)

            return run

        predicts, corrects_from, solves = map(on_rows, (predicted, corrected, classical))
        blank = jax.eval_shape(predicts, jnp.arange(num))
        blank = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
        nodes, is_good, is_close = _redo(
            jnp.ones(num, bool),
            blank,
            predicts,
            lambda made: made[1] | made[2],
            chunk_size,
        )
        found = jtu.tree_map(lambda leaf: leaf[:, -1], nodes.states), is_good
        if corrects:
            run = lambda rows: corrects_from(rows, _take(nodes, rows))
            found = _redo(is_close, found, run, lambda made: made[1], chunk_size)
        y, is_learned = found
        done = y, jnp.ones(num, bool)
        y, is_good = _redo(~is_learned, done, solves, None, chunk_size)
        return y, (y, is_learned, is_good)

    _, (ys, is_learned, is_good) = lax.scan(segment, x0, (ts[:-1], ts[1:]))
    joined = lambda first, rest: jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 1)
    ys = jtu.tree_map(joined, x0, ys)
    return BatchSolution(ts, ys, is_learned.T, is_good.all(0))


def _take(tree: PyTree, rows: Array) -> PyTree:
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[rows], tree)


def _redo(
    needs: Bool[Array, " examples"],
    values: PyTree,
    run: Callable[[Array], PyTree],
    passes: Callable[[Any], Any] | None,
    chunk_size: int,
) -> PyTree:
    """Replaces the rows that need it by those that `run` returns for their indices.

    They are gathered in chunks, of which the others are skipped; and so are those that
    follow as soon as hardly any of the rows so far have passed.
    """
    num = len(needs)
    chunk_size = min(chunk_size, num)
    num_chunks = -(-num // chunk_size)
    # The first rows are a sample of the batch, whatever its order.
    mixed = jnp.asarray(np.argsort(np.arange(num) * (5**0.5 - 1) / 2 % 1))
    # Those that need it come first. The last chunk is filled up.
    order = mixed[jnp.resize(jnp.argsort(~needs[mixed]), (num_chunks * chunk_size,))]
    is_needed = needs[order] & (jnp.arange(len(order)) < num)

    def chunk(counts, given):
        rows, is_needed = given
        tried, passed = counts
        goes_on = (tried < _SAMPLE) | (_SHARE * passed >= tried)
        is_run = goes_on & is_needed.any()
        made = lax.cond(is_run, lambda: run(rows), lambda: _take(values, rows))
        if passes is not None:
            count = lambda rows: jnp.sum(rows & is_needed & is_run, dtype=jnp.int32)
            counts = tried + count(is_needed), passed + count(passes(made))
        return counts, made

    by_chunks = lambda leaf: leaf.reshape(num_chunks, chunk_size)
    chunks = by_chunks(order), by_chunks(is_needed)
    zero = jnp.zeros((), jnp.int32)
    _, new = lax.scan(chunk, (zero, zero), chunks)
    # An index out of range is dropped.
    rows = jnp.where(is_needed, order, num)

    def put(leaf, new):
        return leaf.at[rows].set(new.reshape(-1, *leaf.shape[1:]), mode="drop")

    return jtu.tree_map(put, values, new)
