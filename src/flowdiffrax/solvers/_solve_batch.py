import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real

from .._check import check_at_least, check_callable, check_positive
from .._time import time_dtype
from .._tree import all_finite, num_rows
from .._types import Args, State, TwoTimeMap, VectorField
from ..estimates._base import AbstractErrorEstimate, check_estimate
from ..estimates._picard import PicardDefect
from ..flow_maps._base import times_out_of_range
from ..flow_maps._inverse import check_composable
from ._hybrid import check_fallback, default_estimate, default_safety, is_implicit

# Of a sample of this many, so large a share must pass for the others to be tried.
_SAMPLE, _LEAST_SHARE = 32, 1 / 8


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
    estimate: AbstractErrorEstimate | None = None,
    safety: float | None = None,
    chunk_size: int = 128,
    max_steps: int = 4096,
) -> BatchSolution:
    """Solves many initial states, by jumps where they are good and classically elsewhere.

    For each interval of `ts`, the map jumps for all examples at once, and the vector
    field judges each jump as in [`flowdiffrax.HybridSolver`][]. The examples whose jumps
    are not good enough are gathered, and solved in chunks by the classical solver. So an
    easy example neither waits for hard ones nor pays for them, as it would under
    `jax.vmap`. A map that fails on most of a small sample is not tried on the rest.

    ```python
    solution = fd.solve_batch(
        flow_map, vector_field, jnp.linspace(0.0, 10.0, 3), x0, rtol=1e-3, atol=1e-6
    )
    solution.ys, solution.is_learned.mean()
    ```

    It works under `jax.jit`. For gradients, use a [`flowdiffrax.HybridSolver`][].

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
    - `estimate`, `safety`: as in [`flowdiffrax.HybridSolver`][]. `None` judges by
      [`flowdiffrax.estimates.PicardDefect`][] first, which is cheaper, and then by the
      hybrid's default where that does not pass.
    - `chunk_size`: the number of examples that are solved classically side by side, at
      least 1. Small chunks wait less for their slowest example.
    - `max_steps`: the largest number of classical steps in an interval.

    **Returns:** a [`flowdiffrax.solvers.BatchSolution`][].

    **Raises:** `ValueError` for fewer than two times, examples whose numbers differ, or
    settings out of their ranges; `TypeError` for what is not callable, or no solver.
    """
    check_composable(flow_map)
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_at_least(chunk_size, 1, "chunk_size")
    check_at_least(max_steps, 1, "max_steps")
    check_fallback(fallback)
    num = num_rows(x0, "`x0` is a batch of examples: its leaves")
    if args_per_example:
        num_rows((x0, args), "`x0` and `args` have a row for each example: their leaves")
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"`ts` must be at least two times; got shape {ts.shape}.")
    one = jtu.tree_map(lambda leaf: leaf[0], x0)
    ts = ts.astype(time_dtype(one))
    implicit = is_implicit(fallback)
    if estimate is None:
        estimate = default_estimate(one, implicit)
        # The cheap one first, for those that it passes.
        estimates = [estimate] if implicit else [PicardDefect(), estimate]
    else:
        check_estimate(estimate)
        estimates = [estimate]
    if safety is not None:
        check_positive(safety, "safety")

    def judge_by(estimate, s, t, x, args):
        _, y, error = estimate.correct(flow_map, vector_field, s, t, x, args)

        def scaled(e, x, y):
            return e / (atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(y))).astype(e.dtype)

        ratio = optx.rms_norm(jtu.tree_map(scaled, error, x, y))
        most = default_safety(estimate, implicit) if safety is None else safety
        # A NaN compares as false.
        is_good = (ratio < most) & all_finite(y)
        outside = times_out_of_range(flow_map, s, t)
        return y, is_good if outside is None else is_good & ~outside

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
        is_good = solution.result == diffrax.RESULTS.successful
        value = lambda leaf: jnp.where(is_good, leaf[0], jnp.nan)
        return jtu.tree_map(value, solution.ys), is_good

    def segment(x, interval):
        def on_rows(function):
            axes = 0, 0 if args_per_example else None
            batched = jax.vmap(lambda x, args: function(*interval, x, args), axes)
            args_of = lambda rows: _take(args, rows) if args_per_example else args
            return lambda rows: batched(_take(x, rows), args_of(rows))

        judges = [on_rows(functools.partial(judge_by, est)) for est in estimates]
        sample = jnp.arange(min(_SAMPLE, num)) * (num // min(_SAMPLE, num))
        is_useful = judges[-1](sample)[1].mean() >= _LEAST_SHARE
        y, is_learned = x, jnp.zeros(num, bool)
        for judge in judges:
            y, is_good = _redo(~is_learned & is_useful, y, judge, chunk_size)
            is_learned = jnp.where(is_useful, is_good, is_learned)
        y, is_good = _redo(~is_learned, y, on_rows(classical), chunk_size)
        return y, (y, is_learned, is_good)

    _, (ys, is_learned, is_good) = lax.scan(segment, x0, (ts[:-1], ts[1:]))
    joined = lambda first, rest: jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 1)
    ys = jtu.tree_map(joined, x0, ys)
    return BatchSolution(ts, ys, is_learned.T, is_good.all(0))


def _take(tree: PyTree, rows: Array) -> PyTree:
    return jtu.tree_map(lambda leaf: leaf[rows], tree)


def _redo(
    needs: Bool[Array, " examples"],
    ys: State,
    run: Callable[[Array], tuple[State, Array]],
    chunk_size: int,
) -> tuple[State, Bool[Array, " examples"]]:
    """Replaces the rows that need it by those that `run` returns for their indices.

    They are gathered in chunks, of which the others are skipped. Also returns whether
    rows are good: as `run` says, and those that did not need it.
    """
    num = len(needs)
    num_chunks = -(-num // chunk_size)
    # Those that need it come first. The last chunk is filled up.
    order = jnp.resize(jnp.argsort(~needs), (num_chunks * chunk_size,))
    is_needed = needs[order] & (jnp.arange(len(order)) < num)

    def chunk(given):
        rows, is_needed = given
        skip = lambda: (_take(ys, rows), jnp.ones(chunk_size, bool))
        return lax.cond(is_needed.any(), lambda: run(rows), skip)

    by_chunks = lambda leaf: leaf.reshape(num_chunks, chunk_size)
    new, is_good = lax.map(chunk, (by_chunks(order), by_chunks(is_needed)))
    # An index out of range is dropped.
    rows = jnp.where(is_needed, order, num)

    def put(leaf, new):
        return leaf.at[rows].set(new.reshape(-1, *leaf.shape[1:]), mode="drop")

    return jtu.tree_map(put, ys, new), put(jnp.ones(num, bool), is_good)
