import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Key

from .._check import check_bools, check_callable, check_count, check_instance
from .._tree import num_rows
from ..data import ConditionDropout, SplineBatches, StreamBatches, TrajectoryBatches
from ..flow_maps._base import AbstractFlowMap
from ..objectives._base import AbstractObjective
from ..objectives._batch import as_mixture
from ..objectives._mixture import Mixture
from ..objectives._roll_out import RollOutMatching
from ..objectives._scheduled import Scheduled
from ..objectives._trajectory import TrajectoryMatching
from ._parallel import DataParallel
from ._power_average import PowerAverage
from ._run import Run
from ._signals import StopRequests
from ._step import StepInfo, TrainState, at_step, make_step


class TrainingDiverged(RuntimeError):
    """Raised when too many training steps are not finite.

    **Attributes:**

    - `state`: the training state, with the weights of the last finite step.
    """

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


# Called at each report. It may return more numbers, which are added to the report.
_OnReport = Callable[[TrainState, dict[str, Any]], Any]


def fit(
    flow_map: AbstractFlowMap | TrainState,
    objective: AbstractObjective | Mixture | Scheduled,
    batches: Callable | StreamBatches,
    optim: optax.GradientTransformation,
    *,
    num_steps: int,
    teacher: Any = None,
    key: Key[Array, ""] | None = None,
    ema_decay: float | PowerAverage | Sequence[float | PowerAverage] = 0.999,
    teacher_decay: float | None = None,
    accumulate: int = 1,
    parallel: DataParallel | None = None,
    run: Run | None = None,
    report_every: int = 100,
    on_report: _OnReport | Sequence[_OnReport] = (),
    max_skipped: int = 100,
    progress: bool = True,
) -> TrainState:
    """Trains a flow map: a short loop around [`flowdiffrax.train.make_step`][].

    **Arguments:**

    - `flow_map`: the map to train; or the state of an earlier run with the same objective
      and optimiser, which then continues exactly where it stopped.
    - `objective`: the objective to minimise, a [`flowdiffrax.objectives.Mixture`][], or
      a [`flowdiffrax.objectives.Scheduled`][] objective.
    - `batches`: a function of a key that returns paths and conditions, for example
      [`flowdiffrax.data.InterpolantBatches`][]; or
      [`flowdiffrax.data.StreamBatches`][], which has one such function for each step.
    - `optim`: an Optax optimiser.
    - `num_steps`: the total number of steps, at least 1. If `flow_map` is a state, its
      earlier steps count: only the rest are made. If there are none left, the state is
      returned unchanged.
    - `teacher`: what the objective learns from, if anything; a tuple for a mixture whose
      objectives learn from different teachers.
    - `key`: the root key. It is needed unless `flow_map` is a state, which has its own.
    - `ema_decay`: the decay per step of the moving average, a
      [`flowdiffrax.train.PowerAverage`][], or several of them. The first is the one that
      `ema_map` returns.
    - `teacher_decay`: if given, the decay of a second average, which is the teacher.
    - `accumulate`: the number of batches per step. Their gradients are averaged.
    - `parallel`: the devices to train on, a [`flowdiffrax.train.DataParallel`][].
    - `run`: the folder of the run, a [`flowdiffrax.train.Run`][]. Calling `fit` again
      with the same arguments resumes from its newest checkpoint, whether `flow_map` is a
      map or a state. If `fit` runs in the main thread, SIGTERM and Ctrl-C finish the
      current step and report, save a checkpoint, and end the program; your own signal
      handlers do not see them. If an error is raised, for example in `on_report` or
      `batches`, the state of the last step is saved first, provided there is only one
      process. Without a run, that state is the exception's `.state`.
    - `report_every`: the number of steps between reports.
    - `on_report`: a function, or several, called with the state and a dictionary of
      numbers: `step`, `loss`, one entry for each objective, `grad_norm`, `skipped` (how
      many steps so far were not finite), `examples_per_second` since the last report,
      and `seconds` since this call began. If a function returns a dictionary, its entries
      are added to the report that the next functions and `run` see. The state is a copy,
      so it can be kept or saved. If a function has a method `wait`, it is called at the
      end.
    - `max_skipped`: how many steps of the run may be skipped because something was not
      finite. Beyond that, the run counts as diverged. It also counts as diverged if no
      step so far was finite, or if no step since the previous report was finite and
      there were several.
    - `progress`: whether to show a progress bar. It needs tqdm, from the `train` extra;
      without tqdm, no bar is shown.

    **Returns:** the final state; `state.ema_map` is the map to use. If some steps were
    skipped, a `RuntimeWarning` reports how many.

    **Raises:** `ValueError` if `num_steps` is below 1, there is no key or several, the
    checkpoints belong to another run, a function of `on_report` returns a name that the
    report already has, or the objective draws times that splines, or the trajectories of
    [`flowdiffrax.TrajectoryMatching`][] and [`flowdiffrax.objectives.RollOutMatching`][],
    do not cover; `TypeError` if `flow_map`, `objective`, `batches`, `optim`, `key`,
    `parallel`, `run` or a number of steps has the wrong type; `OSError` if a checkpoint
    cannot be written; and [`flowdiffrax.train.TrainingDiverged`][], with the last good
    state, if too many steps were skipped. If an objective never draws times in half of a
    spline, a `RuntimeWarning` reports it.
    """
    check_count(num_steps, 1, "num_steps")
    check_count(report_every, 1, "report_every")
    check_count(max_skipped, 0, "max_skipped")
    check_bools(progress=progress)
    what = "a flow map or a `TrainState`. Wrap a network as `FlowMap(net)`"
    check_instance(flow_map, AbstractFlowMap | TrainState, "flow_map", what)
    check_instance(run, Run | None, "run", "a `train.Run` or `None`")
    what = "a `train.DataParallel` or `None`"
    check_instance(parallel, DataParallel | None, "parallel", what)
    calls = tuple(on_report) if isinstance(on_report, Sequence) else (on_report,)
    for call in calls:
        check_callable(call, "on_report", "on_report(state, report)")
    if isinstance(flow_map, TrainState):
        # A copy, for the same reason as in `TrainState.create`.
        state = _copy(flow_map)
    elif key is None:
        raise ValueError("A run starts from a `key`, for example `jax.random.key(0)`.")
    else:
        state = TrainState.create(
            flow_map,
            optim,
            key=key,
            objective=objective,
            ema_decay=ema_decay,
            teacher_decay=teacher_decay,
        )
    _check_times(objective, batches, state)
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
    info: Any = None
    with StopRequests(run is not None) as requests, run or contextlib.nullcontext():
        if run is not None:
            state = run.resume(state)
        begun, skipped = int(state.step), int(state.skipped)
        reports = _Reports(state, report_every, max_skipped, accumulate)
        source = source_of(batches, begun, accumulate, parallel)
        report: dict[str, Any] = {}
        try:
            for index in (bar := _steps(begun, num_steps, progress)):
                if run is not None:
                    run.profile_at(index - begun, state)
                drawn = next(source)
                before = info and info.loss
                state, info = step(state, drawn, teacher)
                # Keep the host only one step ahead of the device. Otherwise a signal
                # would wait for all queued steps, and their batches would pile up.
                jax.block_until_ready(before)
                done, report = index + 1, {}
                # Reading a number waits for the device, so do it only in reports.
                if done % report_every == 0 or done == num_steps:
                    report = reports.make(state, info, drawn)
                    if hasattr(bar, "set_postfix"):
                        bar.set_postfix(_short(report, info))
                    try:
                        reports.check(state, report)
                        for call in calls:
                            _join(report, call(_copy(state), dict(report)))
                    finally:
                        if run is not None:
                            run.log(report)
                    if run is not None and (run.is_due(done) or done == num_steps):
                        run.save(state, report)
                    reports.start_clock()
                if requests.stops(done) and run is not None:
                    run.save(state, report)
                    run.close()
                    requests.stop()
            for call in calls:
                # What a function does in the background belongs to the run.
                if hasattr(call, "wait"):
                    call.wait()  # pyright: ignore
        except TrainingDiverged:
            raise
        except (Exception, KeyboardInterrupt) as error:
            # A second Ctrl-C means: stop at once, without saving.
            if not (isinstance(error, KeyboardInterrupt) and requests.received):
                _keep(state, begun, report, run, error)
            raise
    _warn_of_skipped(state, begun, skipped)
    return state


def _keep(
    state: TrainState,
    begun: int,
    report: dict[str, Any],
    run: Run | None,
    error: BaseException,
) -> None:
    """Saves the state that an error would lose, or attaches it to the error."""
    # With several processes, the others may carry on, and a checkpoint waits for all.
    if jax.process_count() > 1:
        return
    try:
        # If the error came from within the step, the state's memory is gone.
        step = int(jax.block_until_ready(state.step))
        jax.block_until_ready(eqx.filter(state, eqx.is_array))
        if step == begun:
            return
        if run is None:
            if not hasattr(error, "state"):
                error.state = state  # pyright: ignore
                error.add_note(f"The state of step {step} is this exception's `.state`.")
            return
        # An entry returned by a function may itself have caused the error.
        own = report if report.get("step") == step else {}
        run.save(state, {name: own[name] for name in own if _is_plain(own[name])})
        run.wait()
        error.add_note(
            f"The state of step {step} is saved in {run.folder}: the same call resumes "
            "from there."
        )
    # The first error is more informative than any failure to save.
    except Exception as another:
        error.add_note(f"The last state could not be saved: {another}")


def _is_plain(value: Any) -> bool:
    return isinstance(value, float | int)


def _warn_of_skipped(state: TrainState, begun: int, skipped_before: int) -> None:
    skipped = int(state.skipped) - skipped_before
    if skipped > 0:
        warnings.warn(
            f"{skipped} of {int(state.step) - begun} steps were skipped, because the "
            "loss, gradient or new weights were not finite. The map has learned nothing "
            "from them. Look for rows of data that are not finite, or times at which the "
            "loss is not finite; see `TrainingDiverged` and `max_skipped`.",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_times(objective: Any, batches: Any, state: TrainState) -> None:
    """**Raises:** `ValueError` if trajectories do not cover the times that are drawn.

    Trajectories and splines are NaN outside their own times, which would make the loss
    NaN.
    """
    batches = batches.batches if isinstance(batches, ConditionDropout) else batches
    if isinstance(batches, SplineBatches):
        _check_times_of_spline(objective, batches.spline, state)
    if not isinstance(batches, TrajectoryBatches):
        return
    low = float(batches.ts[..., 0].max())
    high = float(batches.ts[..., -1].min())
    slack = 1e-6 * max(abs(low), abs(high))
    for one in as_mixture(at_step(objective, state.step)).objectives:
        if not isinstance(one, TrajectoryMatching | RollOutMatching) or one.positions:
            continue
        name = type(one).__name__
        drawn = jax.numpy.stack(one.times(jax.random.key(0), 1024))
        first, last = float(drawn.min()), float(drawn.max())
        if first < low - slack or last > high + slack:
            raise ValueError(
                f"`{name}` draws times from {first:.3g} to {last:.3g}, but "
                f"trajectories cover only [{low:.3g}, {high:.3g}]. If each has its own "
                f"times, use `{name}(positions=True)`; if they share them, "
                "`GridTimes(ts)` or `OnInterval(times, low, high)`."
            )


def _check_times_of_spline(objective: Any, spline: Any, state: TrainState) -> None:
    """**Raises:** `ValueError` if times outside the spline are drawn.

    It warns if half of the spline is never drawn, as when its times are days and the
    objective still draws from [0, 1].
    """
    low, high = spline.ts[0], spline.ts[-1]
    slack = 1e-6 * max(abs(low), abs(high))
    for one in as_mixture(at_step(objective, state.step)).objectives:
        drawn = jax.numpy.stack(one.times(jax.random.key(0), 1024))
        first, last = float(drawn.min()), float(drawn.max())
        message = (
            f"`{type(one).__name__}` draws times from {first:.3g} to {last:.3g}, but the "
            f"spline covers [{low:.3g}, {high:.3g}]. Use `times=OnInterval(times, "
            f"{low:.3g}, {high:.3g})`, or normalise: see `data.SplineBatches`."
        )
        if first < low - slack or last > high + slack:
            raise ValueError(message)
        if last - first < 0.5 * (high - low):
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def _join(report: dict[str, Any], more: Any) -> None:
    """Adds the return value of a function to the report, if it is a dictionary."""
    if isinstance(more, Mapping):
        taken = sorted(report.keys() & more.keys())
        if taken:
            raise ValueError(f"`on_report` returned {taken}, which a report has already.")
        report |= more


def source_of(
    batches: Callable | StreamBatches,
    step: int = 0,
    accumulate: int = 1,
    parallel: DataParallel | None = None,
) -> Iterator[Any]:
    """The function, or tuple of functions, that each step draws batches from."""
    if isinstance(batches, StreamBatches):
        place = jax.device_put if parallel is None else parallel.gather_rows
        return batches.each_step(step, accumulate, place)
    return itertools.repeat(batches)


class _Reports:
    """Makes reports, and ends a run that has diverged."""

    def __init__(
        self, state: TrainState, report_every: int, max_skipped: int, accumulate: int
    ):
        self._report_every = report_every
        self._max_skipped = max_skipped
        self._accumulate = accumulate
        self._num_examples: int | None = None
        self._last = int(state.step), int(state.skipped)
        self._begun = time.perf_counter()
        self.start_clock()

    def start_clock(self) -> None:
        """Starts to time the steps of the next report."""
        self._clock = time.perf_counter()

    def make(self, state: TrainState, info: StepInfo, drawn: Any) -> dict[str, Any]:
        report = {"step": int(state.step), "loss": float(info.loss)}
        report |= {name: float(value) for name, value in info.terms.items()}
        report |= {"grad_norm": float(info.grad_norm), "skipped": int(state.skipped)}
        now = time.perf_counter()
        if self._num_examples is None:
            one = drawn[0] if isinstance(drawn, tuple) else drawn
            key = jax.eval_shape(jax.random.key, 0)
            shapes = eqx.filter_eval_shape(one, key)
            is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
            only_arrays = eqx.filter(shapes, is_shape)
            self._num_examples = num_rows(only_arrays, "A batch") * self._accumulate
        num_examples = (report["step"] - self._last[0]) * self._num_examples
        report["examples_per_second"] = num_examples / (now - self._clock)
        return report | {"seconds": now - self._begun}

    def check(self, state: TrainState, report: dict[str, Any]) -> None:
        """**Raises:** `TrainingDiverged` if too many steps were skipped."""
        counts = report["step"], report["skipped"]
        steps, skipped = (a - b for a, b in zip(counts, self._last, strict=True))
        self._last = counts
        # The outcome must not depend on where a run was stopped and resumed.
        no_good_step = counts[0] == counts[1]
        no_good_report = skipped == steps == self._report_every > 1
        if no_good_step or no_good_report or counts[1] > self._max_skipped:
            raise TrainingDiverged(
                f"The loss, gradient or new weights were not finite in {skipped} of the "
                f"last {steps} steps. At step {report['step']} the loss is "
                f"{report['loss']} and the gradient norm {report['grad_norm']}; the last "
                "good weights are in `.state`. Lower the learning rate, clip gradients "
                "with `optax.clip_by_global_norm`, or avoid times at which a teacher is "
                "singular.",
                state,
            )


def _short(report: dict[str, Any], info: StepInfo) -> dict[str, str]:
    """The numbers for the progress bar. A single term equals the loss: omit it."""
    terms = info.terms if len(info.terms) > 1 else ()
    names = ["loss", *terms, "grad_norm", "examples_per_second"]
    names += ["skipped"] if report["skipped"] > 0 else []
    return {
        name.replace("examples_per_second", "examples/s"): f"{report[name]:.3g}"
        for name in names
    }


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
