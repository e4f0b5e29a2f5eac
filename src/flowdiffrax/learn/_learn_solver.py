import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import diffrax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._check import check_bools, check_instance, check_key, check_positive
from .._types import Args, State, VectorField
from ._advise import warnings_of
from ._build import Parts, build
from ._folder import Folder, as_config
from ._learned import LearnedSolver, evaluate
from ._plan import Plan, make_plan
from ._pool import PoolMaker
from ._probe import EXACT_RTOL, Facts, probe
from ._problem import Problem, check_field, make_problem
from ._teacher import cheaper_teacher
from ._training import Trained, steps_of_parts_until, train_map
from ._validation import Validation

# Shares of the time: until trajectories are solved, if there are enough or if there are
# few, and for what follows the training.
_POOL_SHARES, _LAST_SHARE = (0.35, 0.5), 0.12
# Fresh trajectories: how many, the fewest, and the share of the time for them.
NUM_VALIDATION, _FEWEST_FRESH, _FRESH_SHARE = 256, 64, 0.1
# What a map reaches in a few minutes, about.
_USUAL_ERROR = 1e-2


def learn_solver(
    vector_field: VectorField,
    x0: State | Callable[[Any], State],
    t0: float,
    t1: float,
    args: Args | Callable[[Any], Args] = None,
    *,
    args_per_example: bool = False,
    minutes: float = 3.0,
    key: Key[Array, ""] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    ts: Any = None,
    form: str | None = None,
    is_positive: Any = None,
    invariants: Any = None,
    width: int | None = None,
    depth: int | None = None,
    pool_size: int | None = None,
    batch_size: int | None = None,
    num_steps: int | None = None,
    both_directions: bool = False,
    run: str | os.PathLike | None = None,
    progress: bool = True,
) -> LearnedSolver:
    """Learns a flow map of an ODE, from the vector field to a validated solver.

    It solves some initial states, and chooses from the solutions the teacher, the times,
    the form of the map and its network. It then solves as many as time allows, trains
    the map on these trajectories, and compares it with fresh ones, whose tolerance is ten
    times tighter at least. Everything is float64 but for the training, whatever JAX is
    set to, and states may be in any units.

    ```python
    learned = fd.learn_solver(vector_field, lambda key: ..., t0=0.0, t1=10.0, minutes=3)
    print(learned.report("report.png"))
    solver = fd.FlowMapSolver(learned.flow_map)
    ```

    Choices are printed, and each can be given instead. The result has the objects that
    were used. Ctrl-C during the training returns the best map so far, and during the
    comparison the map without it.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt` for one state.
    - `x0`: initial states, with a leading axis of at least 32, of which a fifth is held
      out for the validation; or a function of a random key that draws one. The map is
      good for states like these, and for those that their trajectories pass through.
    - `t0`, `t1`: the time interval, `t0 < t1`.
    - `args`: passed to the vector field, the same for all; or a function of a key that
      draws one.
    - `args_per_example`: whether `args` has one row for each row of `x0` instead.
    - `minutes`: the time for everything, positive.
    - `key`: a random key; `None` uses `jax.random.key(0)`.
    - `solver`: the Diffrax solver whose trajectories are learned. `None` takes the faster
      of Tsit5 and Kvaerno5 (with `optimistix.Chord` as its root finder), at rtol 1e-5; or
      where too few trajectories could be solved so, the faster of these and Kvaerno3 at
      rtol 1e-3, if that is exact enough.
    - `ts`: the times to save trajectories at, from `t0` to `t1`. `None` takes 33 uniform
      times, or for stiff problems 41 of which the gaps grow in proportion.
    - `form`: `"relaxation"` or `"residual"`, see [`flowdiffrax.learn.Plan`][].
    - `is_positive`: which entries of the state stay positive, as one vector; `None` finds
      this from the vector field. Positive entries are learned by their relative errors.
    - `invariants`: linear combinations of the entries that are conserved, of shape
      `(invariants, size)`; `None` finds them from the vector field. For none, pass
      `numpy.zeros((0, size))`. Those that change along solutions are refused.
    - `width`, `depth`: the width and the number of hidden layers of the network.
    - `pool_size`: the number of trajectories to learn from.
    - `batch_size`, `num_steps`: of the training.
    - `both_directions`: whether to learn backward jumps as well. Backwards, a system that
      forgets its initial state is ill-posed: see [`flowdiffrax.advise`][].
    - `run`: a folder, in which the trajectories and the training are kept. The same call
      resumes there.
    - `progress`: whether to print choices and progress, to standard error.

    **Returns:** a [`flowdiffrax.learn.LearnedSolver`][].

    **Raises:** `ValueError` for times that do not rise, initial states that are not
    finite or too few, a vector field with values that are not finite or unlike the state,
    a teacher that fails on most initial states, too little time to train, or settings
    that do not fit together; `TypeError` for states that are not real arrays, or
    functions with other arguments.
    """
    begin = time.perf_counter()
    check_positive(minutes, "minutes")
    check_bools(both_directions=both_directions, progress=progress)
    check_instance(solver, diffrax.AbstractSolver | None, "solver", "a Diffrax solver")
    key = jr.key(0) if key is None else key
    check_key(key)
    say = Progress(begin, 60 * minutes, progress)
    problem = make_problem(vector_field, x0, t0, t1, args, args_per_example)
    keys = jr.split(key, 6)
    given = dict(ts=ts, form=form, invariants=invariants, width=width, depth=depth)
    given |= dict(pool_size=pool_size, batch_size=batch_size, num_steps=num_steps)
    given |= dict(both_directions=both_directions)
    folder = None
    if run is not None:
        choices = as_config(is_positive=is_positive, solver=solver, **given)
        folder = Folder(run, {**_identify(problem, keys[0], minutes), **choices})
    kept = folder and folder.kept()
    if kept is None:
        say("looking at a few solutions")
        exact = facts = probe(problem, keys[1], is_positive, solver)
        for_pool = begin + _POOL_SHARES[0] * 60 * minutes - time.perf_counter()
        most = min(problem.num_rows or sys.maxsize, pool_size or sys.maxsize)
        facts = cheaper_teacher(problem, facts, most, for_pool, solver is not None)
        plan = make_plan(problem, facts, minutes, given)
        say(f"chosen:\n{plan}")
        for text in warnings_of(facts, _USUAL_ERROR, both_directions):
            say(f"warning: {text}")
        # A teacher cannot vouch for itself, so these are more exact than it is.
        make = PoolMaker(problem, plan, exact.solves, EXACT_RTOL, facts.ranges, say)
        fresh = make(keys[2], _num_fresh(exact, minutes), held_out=True)
        make = PoolMaker(problem, plan, facts.solves, facts.rtol, facts.ranges, say)
        ends = [begin + share * 60 * minutes for share in _POOL_SHARES]
        kept = plan, make(keys[3], plan.pool_size, ends=(ends[0], ends[1])), fresh
        if folder:
            folder.keep(*kept)
    else:
        say(f"chosen before:\n{kept[0]}")
    plan, pool, fresh = kept
    parts = build(plan, pool, keys[4])
    validation = Validation(problem, plan, fresh)
    plan, trained = train_in_time(plan, parts, validation, keys[5], folder, say)
    say("comparing with the teacher")
    numbers = len(pool.ys), pool.num_dropped
    learned = evaluate(problem, plan, validation, trained, numbers, say)
    problem.give_back()
    say("done")
    return learned


def _num_fresh(exact: Facts, minutes: float) -> int:
    """How many fresh trajectories there is time for."""
    # An order of 5 needs that many more steps.
    each = exact.solve_seconds * (exact.rtol / EXACT_RTOL) ** 0.2
    num = int(_FRESH_SHARE * 60 * minutes / each)
    return min(max(num, _FEWEST_FRESH), NUM_VALIDATION)


def _identify(problem: Problem, key: Any, minutes: float) -> dict[str, Any]:
    """Numbers by which a problem can be told from another."""
    x0, args = problem.draw(key, 32)
    check_field(problem, x0, args)
    ts = np.linspace(problem.t0, problem.t1, len(x0))
    rates = problem.rates(ts, x0, args)

    def size(rows: Any) -> list:
        """Of what is above zero, and of what is below, so that signs count."""
        parts = np.maximum([rows, -rows], 0)
        return np.sqrt(np.mean(parts**2, axis=1)).tolist()

    shown = {"t0": problem.t0, "t1": problem.t1, "minutes": minutes}
    shown |= {"states": size(x0), "rates": size(rates)}
    return shown | {"args": None if args is None else size(args)}


def train_in_time(
    plan: Plan,
    parts: Parts,
    validation: Validation,
    key: Any,
    folder: Folder | None,
    say: "Progress",
) -> tuple[Plan, Trained]:
    """Trains as many steps as are given, or as time allows."""
    num_steps = plan.num_steps or (folder and folder.num_steps())
    if num_steps is None:
        end = say.begin + (1 - _LAST_SHARE) * say.seconds
        num_steps = steps_of_parts_until(end, parts, jr.clone(key))
    if folder:
        folder.keep_num_steps(num_steps)
    plan = dataclasses.replace(plan, num_steps=num_steps)
    training = folder and folder.training()
    return plan, train_map(plan, parts, validation, key, training, say)


class Progress:
    """Prints lines with the time so far."""

    def __init__(self, begin: float, seconds: float, active: bool):
        self.begin, self.seconds, self._active = begin, seconds, active

    def __call__(self, line: str) -> None:
        if self._active:
            now = _clock(time.perf_counter() - self.begin)
            line = f"[{now} of {_clock(self.seconds)}] {line}"
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
