import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from .._check import check_bools, check_count, check_key, check_positive
from ..train import fingerprint
from ._build import build
from ._folder import Folder, as_config
from ._learn_solver import NUM_VALIDATION, Progress, train_in_time
from ._learned import LearnedSolver, evaluate
from ._observed import Observed, observe
from ._plan import NETWORKS, Plan, check_choices, check_conserved
from ._problem import Domain, as_flags, check_resolved
from ._smooth import smooth
from ._streamed import Data, File, is_file
from ._validation import Validation

_NUM_TIMES = 33
# With fewer observed states, a larger network would only learn them by heart.
_MANY_STATES = 100_000


def learn_from_data(
    ts: ArrayLike | Sequence[ArrayLike],
    ys: ArrayLike | Sequence[ArrayLike] | Callable[[np.ndarray], ArrayLike],
    args: ArrayLike | None = None,
    *,
    mask: ArrayLike | Sequence[ArrayLike] | None = None,
    noise: ArrayLike | None = None,
    is_autonomous: bool = True,
    minutes: float = 3.0,
    key: Key[Array, ""] | None = None,
    form: str | None = None,
    is_positive: Any = None,
    invariants: Any = None,
    width: int | None = None,
    depth: int | None = None,
    batch_size: int | None = None,
    num_steps: int | None = None,
    size: int | None = None,
    run: str | os.PathLike | None = None,
    progress: bool = True,
) -> LearnedSolver:
    """Learns a flow map from observed trajectories alone, without a vector field.

    Trajectories may have different lengths and irregular times, and states may be
    observed in part. A map jumps from a state that is known in full, so the earlier state
    of a pair is one that was observed in full. Its later state may be observed in part.

    ```python
    learned = fd.learn.learn_from_data(ts, ys, args, noise=0.05, minutes=3)
    print(learned.report("report.png"))
    ```

    A fifth of the trajectories is held out. The reported errors are those of a jump from
    the first to the last observed state of these, and of 2 and 4 jumps.

    !!! info "Noise"

        With `noise`, the loss is the likelihood of the later states, and errors smaller
        than the noise hardly count. Errors of the earlier states are another matter: a
        map that was fitted to them would be too flat. They are therefore replaced by
        smoothing splines of their trajectories, whose smoothness is found from the data.
        This needs trajectories with several times for each feature of the solution.

    !!! info "More than fits into memory"

        Of a memory map, such as that of [`flowdiffrax.data.load_trajectories`][], or of a
        function of row numbers, only a few trajectories are read in each step, by
        [`flowdiffrax.data.StreamBatches`][], which needs grain. Some 4,000 of them show
        the units and what else is chosen; a fifth of these is held out. Files below 256
        MB are read at once.

    **Arguments:**

    - `ts`: the times, of shape `(times,)` or `(trajectories, times)`, or a list of
      arrays, one for each trajectory. They rise within each trajectory.
    - `ys`: the states, which are vectors, of shape `(trajectories, times, size)`, or a
      list of arrays of shape `(times, size)`. NaN is not observed. They may also be a
      memory map, or a function that takes an array of row numbers and returns the states
      of these trajectories: see below.
    - `args`: the parameters, one row for each trajectory, or `None`.
    - `mask`: true where `ys` is observed, in the same shape; `None` if NaN tells.
    - `noise`: the standard deviation of the errors of observation, one number or one for
      each entry; `None` if states are exact.
    - `is_autonomous`: whether the system depends on differences of times only.
    - `minutes`, `key`, `width`, `depth`, `batch_size`, `num_steps`, `run`, `progress`: as
      in [`flowdiffrax.learn_solver`][].
    - `size`: the number of trajectories if `ys` is a function, and otherwise `None`.
    - `form`: `"relaxation"` or `"residual"`, see [`flowdiffrax.learn.Plan`][].
    - `is_positive`: which entries of the state stay positive, as one vector; `None` for
      those that are never negative, up to four times the noise.
    - `invariants`: linear combinations of the entries that are conserved, of shape
      `(invariants, size)`; `None` for none. Those that clearly change are refused.

    **Returns:** a [`flowdiffrax.learn.LearnedSolver`][] without classical solves.
    Trajectories that had to be dropped are counted in `num_dropped`: those with fewer
    than two times, no state in full before the last, or `args` that are not finite.

    **Raises:** `ValueError` for shapes that do not match, times that do not rise or are
    not finite, infinite states, fewer than ten trajectories that can be used, or settings
    that do not fit together; `TypeError` for values that are not real numbers.
    """
    begin = time.perf_counter()
    check_positive(minutes, "minutes")
    check_bools(is_autonomous=is_autonomous, progress=progress)
    key = jr.key(0) if key is None else key
    check_key(key)
    say = Progress(begin, 60 * minutes, progress)
    split_key, net_key, fit_key = jr.split(key, 3)
    data, one_args = _open(ts, ys, args, mask, size, split_key)
    observed = data.shown
    noise = _as_noise(noise, observed.ys.shape[2])
    print_of_data = fingerprint((observed.ts, observed.ys, observed.args, data.size))
    if is_autonomous:
        data = data.change(_from_zero)
    else:
        check_resolved(float(np.nanmin(observed.ts)), float(np.nanmax(observed.ts)))
    observed = data.shown
    say(_describe(observed, data.size))
    domain = _domain(observed, one_args)
    given = dict(form=form, is_positive=is_positive, invariants=invariants, width=width)
    given |= dict(depth=depth, batch_size=batch_size, num_steps=num_steps)
    plan = _make_plan(domain, observed, data.size, noise, is_autonomous, minutes, given)
    say(f"chosen:\n{plan}")
    if noise is not None:
        data = data.change(functools.partial(_smoothed, noise=noise, plan=plan))
        moved = (data.shown.starts - observed.ys) / noise
        moved = np.sqrt(np.nanmean(moved**2))
        say(f"smoothing moved the states by {moved:.2f} times the noise")
    folder = None
    if run is not None:
        stated = as_config(noise=noise, minutes=minutes, **given)
        stated |= {"data": print_of_data, "is_autonomous": is_autonomous}
        folder = Folder(run, stated)
    data = data.split(split_key)
    assert data.fresh is not None
    pool = data.shown.as_pool(plan.ts, plan.is_positive)
    parts = build(plan, pool, net_key, data.streamed or data.shown)
    fresh = data.fresh.take(slice(NUM_VALIDATION))
    validation = Validation(domain, plan, fresh.from_first_start())
    plan, trained = train_in_time(plan, parts, validation, fit_key, folder, say)
    numbers = data.size, observed.num_dropped
    learned = evaluate(
        domain, plan, validation, trained, numbers, say, num_jumps=(1, 2, 4)
    )
    say("done")
    return learned


def _open(ts: Any, ys: Any, args: Any, mask: Any, size: Any, key: Any) -> tuple:
    """All trajectories, or what a file shows of them; and one `args`."""
    if is_file(ys):
        if mask is not None:
            raise ValueError("Set what a file lacks to NaN, instead of passing a `mask`.")
        file = File.open(ts, ys, args, size)
        if not file.is_small:
            return file.split(np.random.default_rng(int(jr.bits(key))))
        ts, ys, args = file.rows(np.arange(file.size))
    elif size is not None:
        raise ValueError("`size` is for a function of row numbers; `ys` is an array.")
    observed, one_args = observe(ts, ys, args, mask)
    return Data(observed), one_args


def _from_zero(observed: Observed) -> Observed:
    return dataclasses.replace(observed, ts=observed.ts - observed.ts[:, :1])


def _smoothed(observed: Observed, *, noise: Any, plan: Plan) -> Observed:
    """With starts on smoothing splines."""
    starts = smooth(observed.ts, observed.ys, noise)
    starts = np.where(np.isnan(observed.ys), np.nan, starts)
    starts = np.where(plan.is_positive, np.maximum(starts, 0), starts)
    return dataclasses.replace(observed, starts=starts)


def _as_noise(noise: Any, size: int) -> Float[np.ndarray, " size"] | None:
    if noise is None:
        return None
    noise = np.asarray(noise, np.float64)
    if noise.shape not in ((), (size,)):
        raise ValueError(
            f"`noise` must be one number, or one for each of the {size} entries; got "
            f"shape {noise.shape}."
        )
    check_positive(noise, "noise")
    return np.broadcast_to(noise, (size,)).copy()


def _describe(observed: Observed, size: int) -> str:
    lengths = observed.lengths
    seen = np.isfinite(observed.ys[np.isfinite(observed.ts)]).mean()
    text = (
        f"{len(lengths):,} trajectories with {lengths.min()} to {lengths.max()} times, "
        f"{seen:.0%} of their entries observed"
    )
    if observed.num_dropped > 0:
        text += f"; dropped {observed.num_dropped} that cannot be used"
    if size != len(lengths):
        text += f", of {size:,} that are read in turn"
    return text


def _domain(observed: Observed, one_args: np.ndarray | None) -> Domain:
    ends = float(np.nanmin(observed.ts)), float(np.nanmax(observed.ts))
    example = lambda row: None if row is None else jnp.asarray(row, float)
    x, args = example(observed.starts[0, 0]), example(one_args)
    args_size = 0 if observed.args is None else observed.args.shape[1]
    return Domain(*ends, x, args, observed.ys.shape[2], args_size)


def _make_plan(
    domain: Domain,
    observed: Observed,
    size: int,
    noise: Float[np.ndarray, " size"] | None,
    is_autonomous: bool,
    minutes: float,
    given: dict[str, Any],
) -> Plan:
    """Chooses everything that is not given."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("width", "depth", "batch_size", "num_steps"):
        if name in given:
            check_count(given[name], 1, name)
    num_states = int(np.isfinite(observed.ys).all(2).sum() * size / len(observed.ys))
    level = 3 if domain.size > 64 else 2 if num_states > _MANY_STATES else 1
    width, depth = NETWORKS[level]
    states = f"{domain.size} entries, {num_states:,} states observed in full"
    choices = {
        "form": ("relaxation", "forward jumps, also over many time scales"),
        "is_positive": (_never_negative(observed, noise), "never negative"),
        "invariants": (np.zeros((0, domain.size)), "none are given"),
        "width": (width, states),
        "depth": (depth, states),
        "batch_size": (512, ""),
        "num_steps": (None, f"{minutes:g} minutes for everything"),
    }
    chosen = {name: given.get(name, value) for name, (value, _) in choices.items()}
    reasons = {
        name: "given" if name in given else reason
        for name, (_, reason) in choices.items()
    }
    reasons |= {"network": reasons["width"], "is_autonomous": "given", "noise": "given"}
    pool = "a fifth of them is held out"
    if size != len(observed.ys):
        pool = "read in turn; others are held out"
    ts, reasons["times"] = _times(observed)
    chosen["is_positive"] = _positive(chosen["is_positive"], observed, noise)
    check_choices(domain, chosen | {"both_directions": False, "ts": ts})
    chosen["invariants"] = np.asarray(chosen["invariants"], np.float64)
    # Noise alone changes them too.
    check_conserved(chosen["invariants"], observed.ys, 0.2 if noise is None else 0.5)
    return Plan(
        **chosen,
        ts=ts,
        solver=None,
        is_stiff=False,
        rtol=None,
        is_autonomous=is_autonomous,
        pool_size=size,
        both_directions=False,
        args_size=domain.args_size,
        is_vector=domain.is_vector,
        minutes=minutes,
        reasons=reasons | {"pool_size": pool},
        noise=noise,
    )


def _times(observed: Observed) -> tuple[Float[np.ndarray, " times"], str]:
    """All times if trajectories share a few, or else some that are as dense."""
    own = np.unique(observed.ts[np.isfinite(observed.ts)])
    if len(own) <= 2 * _NUM_TIMES:
        return own, "as observed"
    return np.quantile(own, np.linspace(0, 1, _NUM_TIMES)), "as dense as observed"


def _never_negative(observed: Observed, noise: Any) -> Bool[np.ndarray, " size"]:
    least = np.nanmin(observed.ys, (0, 1))
    return least >= (0 if noise is None else -4 * noise)


def _positive(given: Any, observed: Observed, noise: Any) -> Bool[np.ndarray, " size"]:
    """**Raises:** `ValueError` for entries that should be positive, and are negative."""
    size = observed.ys.shape[2]
    given = as_flags(given, size)
    wrong = np.flatnonzero(given & ~_never_negative(observed, noise))
    if wrong.size > 0:
        raise ValueError(
            f"Entries {wrong[:5].tolist()} should be positive, but observations reach "
            f"{np.nanmin(observed.ys, (0, 1))[wrong[:5]].tolist()}. Leave them out of "
            "`is_positive`, or state the `noise` of the observations."
        )
    return given
