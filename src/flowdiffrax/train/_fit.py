import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Key

from .._flow_map import AbstractFlowMap
from .._objective import AbstractObjective, Mixture, Scheduled
from ._parallel import DataParallel
from ._step import StepInfo, TrainState, make_step


class TrainingDiverged(RuntimeError):
    """Loss or gradient stopped being finite.

    **Attributes:**

    - `state`: the state with the last good weights.
    """

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


def fit(
    flow_map: AbstractFlowMap | TrainState,
    objective: AbstractObjective | Mixture | Scheduled,
    batches: Callable,
    optim: optax.GradientTransformation,
    *,
    num_steps: int,
    teacher: Any = None,
    key: Key[Array, ""] | None = None,
    ema_decay: float | Sequence[float] = 0.999,
    teacher_decay: float | None = None,
    accumulate: int = 1,
    parallel: DataParallel | None = None,
    report_every: int = 100,
    on_report: Callable[[TrainState, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains a flow map: a short loop around [`flowdiffrax.train.make_step`][].

    **Arguments:**

    - `flow_map`: the map to train, or the state of an earlier run of the same objective
      and optimiser, to continue exactly where it stopped.
    - `objective`: what to minimise, a [`flowdiffrax.Mixture`][], or an objective that is
      [`flowdiffrax.Scheduled`][].
    - `batches`: a function of a key that returns paths and conditions, for example
      [`flowdiffrax.data.InterpolantBatches`][].
    - `optim`: an Optax optimiser.
    - `num_steps`: the number of steps the run has when it ends, at least 1. A state
      that has made some of them makes only the rest.
    - `teacher`: what the objective learns from, if anything; a tuple for a mixture whose
      objectives learn from different teachers.
    - `key`: the root key; needed unless a state is continued, which has its own.
    - `ema_decay`: decay of the moving average a step, or several decays.
    - `teacher_decay`: if given, the decay of a second average, which is the teacher.
    - `accumulate`: batches a step, whose gradients are averaged.
    - `parallel`: the devices to train on, [`flowdiffrax.train.DataParallel`][].
    - `report_every`: how many steps lie between reports.
    - `on_report`: called with the state and a dictionary of numbers: `step`, `loss`,
      one entry for each objective, `grad_norm`, `skipped` (how many steps so far were
      not finite) and `seconds` since the start. Save checkpoints here, or keep the
      state: it is a copy, and a run that is interrupted goes on from it.
    - `progress`: whether to show a bar. It needs tqdm, from the `train` extra, and is
      left out without it.

    **Returns:** the final state; `state.ema_map` is the map to use.

    **Raises:** `ValueError` for a number of steps below 1 or a missing key, `TypeError`
    for what is no flow map, and
    [`flowdiffrax.train.TrainingDiverged`][] if the loss or its gradient stops being
    finite, with the last good state.
    """
    if num_steps < 1 or report_every < 1:
        raise ValueError(
            "`num_steps` and `report_every` must be at least 1; got "
            f"{num_steps} and {report_every}."
        )
    if not isinstance(flow_map, AbstractFlowMap | TrainState):
        raise TypeError(
            "`fit` trains a flow map or continues a `TrainState`; got "
            f"{type(flow_map).__name__}. Wrap a network as `FlowMap(net)`."
        )
    if isinstance(flow_map, TrainState):
        # A copy, for the same reason as in `TrainState.create`.
        state = _copy(flow_map)
    elif key is None:
        raise ValueError(
            "`key` is needed to start a run, for example `jax.random.key(0)`."
        )
    else:
        state = TrainState.create(
            flow_map,
            optim,
            key=key,
            objective=objective,
            ema_decay=ema_decay,
            teacher_decay=teacher_decay,
        )
    if parallel is not None:
        state = parallel.place(state)
        batches, teacher = parallel.replicate((batches, teacher))
    step = make_step(
        objective,
        optim,
        ema_decay=ema_decay,
        teacher_decay=teacher_decay,
        accumulate=accumulate,
        parallel=parallel,
    )
    start = time.perf_counter()
    bar = _steps(int(state.step), num_steps, progress)
    for index in bar:
        state, info = step(state, batches, teacher)
        # Reading a number waits for the device, so only reports do.
        if (index + 1) % report_every == 0 or index + 1 == num_steps:
            report = _report(state, info, time.perf_counter() - start)
            if not bool(info.is_finite):
                raise TrainingDiverged(
                    f"The loss or its gradient is not finite at step {index + 1}: loss "
                    f"{report['loss']}, gradient norm {report['grad_norm']}. The weights "
                    "of the last good step are in `.state`. Lower the learning rate, "
                    "clip gradients with `optax.clip_by_global_norm`, weigh down "
                    "times at which the teacher is singular, or draw no times beyond "
                    "those of the trajectories.",
                    state,
                )
            if hasattr(bar, "set_postfix"):
                bar.set_postfix(loss=f"{report['loss']:.4g}")
            if on_report is not None:
                on_report(_copy(state), report)
    return state


def _copy(state: TrainState) -> TrainState:
    # The next step reuses the state's memory.
    copy = lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf
    return jax.tree_util.tree_map(copy, state)


def _steps(first: int, last: int, progress: bool) -> Any:
    steps = range(first, last)
    if not progress:
        return steps
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, initial=first, total=last, unit="step", mininterval=1.0)


def _report(state: TrainState, info: StepInfo, seconds: float) -> dict[str, float]:
    numbers = {"step": int(state.step), "loss": float(info.loss)}
    numbers |= {name: float(value) for name, value in info.terms.items()}
    numbers |= {"grad_norm": float(info.grad_norm), "skipped": int(state.skipped)}
    return numbers | {"seconds": seconds}
