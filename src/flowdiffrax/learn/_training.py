import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ..train import Run, TrainState, fit, make_step, muon_and_adam
from ..train._fit import source_of
from ._build import Parts
from ._plan import Plan
from ._validation import Validation

_FEWEST_STEPS = 100


def steps_until(
    end: float,
    step: Callable,
    state: Any,
    batches: Iterator[Any],
    teacher: Any,
    cure: str,
) -> int:
    """How many training steps can be made until then. Each draws from the next batches.

    **Raises:** `ValueError` with a `cure` if these are too few.
    """
    begin = time.perf_counter()
    state, info = step(state, next(batches), teacher)
    jax.block_until_ready(info.loss)
    compiling = time.perf_counter() - begin
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 1.0:
        state, info = step(state, next(batches), teacher)
        jax.block_until_ready(info.loss)
        count += 1
    now = time.perf_counter()
    # The training compiles once more.
    num_steps = int((end - now - compiling) / ((now - begin) / count))
    if num_steps < _FEWEST_STEPS:
        raise ValueError(
            f"There is no time left to train: {max(end - now, 0):.0f} s for steps of "
            f"{1e3 * (now - begin) / count:.0f} ms, after {compiling:.0f} s to compile. "
            f"Raise `minutes`, or lower {cure}."
        )
    return num_steps


def steps_of_parts_until(end: float, parts: Parts, key: Any) -> int:
    optim = muon_and_adam(parts.flow_map, 1000)
    state = TrainState.create(parts.flow_map, optim, key=key, objective=parts.objective)
    step = make_step(parts.objective, optim)
    cure = "`pool_size`, `width` or `batch_size`"
    batches = source_of(parts.batches)
    return steps_until(end, step, state, batches, None, cure)


@dataclasses.dataclass
class Trained:
    """The best map of a training, in the user's units, and how it got there."""

    flow_map: Any
    parts: Parts
    optim: Any
    state: TrainState
    history: tuple[dict[str, float], ...]


def train_map(
    plan: Plan,
    parts: Parts,
    validation: Validation,
    key: Any,
    run: Run | None,
    say: Callable[[str], None],
) -> Trained:
    """Trains, and keeps the map with the least error on fresh trajectories."""
    num_steps = plan.num_steps or _FEWEST_STEPS
    optim = muon_and_adam(parts.flow_map, num_steps)
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"error": np.inf}

    def report(state: TrainState, numbers: dict[str, Any]) -> dict[str, float]:
        flow_map = parts.finish(state.ema_map)
        shares = 0.25, 0.5, 0.75, 1.0
        errors = np.concatenate(
            [validation.errors(flow_map, share=share)[0] for share in shares]
        )
        median, most = np.quantile(errors, (0.5, 0.9))
        # Large errors are cut off: how large they are says little.
        error = float(np.minimum(errors, 1).mean())
        if error < best["error"]:
            best.update(error=error, flow_map=flow_map, state=state)
        row = {"error": error, "median": float(median), "most": float(most)}
        history.append({name: numbers[name] for name in ("step", "loss")} | row)
        say(
            f"step {numbers['step']:,} of {num_steps:,}, loss {numbers['loss']:.3g}, "
            f"error {median:.2%} (median), {most:.2%} (90 %)"
        )
        return row

    try:
        state = fit(
            parts.flow_map,
            parts.objective,
            parts.batches,
            optim,
            num_steps=num_steps,
            key=key,
            # Averages the last twentieth.
            ema_decay=min(0.9995, 1 - 20 / max(num_steps, 40)),
            run=run,
            report_every=max(num_steps // 20, 1),
            on_report=report,
            progress=False,
        )
    except KeyboardInterrupt:
        if "flow_map" not in best:
            raise
        say("stopped; this is the best map so far")
    else:
        if "flow_map" not in best:
            # A run that had ended already reports nothing.
            best.update(flow_map=parts.finish(state.ema_map), state=state)
    if run is not None:
        names = "step", "loss", "error", "median", "most"
        history = [{name: row[name] for name in names} for row in run.metrics()]
    return Trained(best["flow_map"], parts, optim, best["state"], tuple(history))
