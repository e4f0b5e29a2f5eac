import math
import numbers
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key, PyTree

from .._check import check_callable
from .._io import StrPath, import_extra
from ..metrics._loss import bin_losses, check_bins, weighted_losses
from ..objectives._base import AbstractObjective
from ..objectives._batch import ExampleLosses
from ..objectives._mixture import Mixture
from ..objectives._scheduled import Scheduled
from ._step import TrainState, at_step, draw, filled, learned_of, with_learned


class LossByTimes:
    """The loss during a run, by the start and the end of the jumps.

    As `on_report` of [`flowdiffrax.train.fit`][], it adds `loss_by_times` to the report:
    what [`flowdiffrax.metrics.loss_by_times`][] finds for `state.ema_map`, on the same
    draws each time. Rows are start times, columns end times; `None` stands where no
    times were drawn, or the loss is not finite.

    **Arguments:**

    - `objective`: that of the run or another one; a schedule is taken at the step of
      the report, and learned weights are those of the run.
    - `batches`: as for [`flowdiffrax.train.make_step`][], of the same data or of data
      held out.
    - `teacher`: what the objective learns from; where it is missing, the average that is
      the run's teacher, if there is one.
    - `key`: a random key for the batches and their times.
    - `num_batches`: how many batches to average over, at least 1.
    - `num_bins`: bins a side, at least 1.
    - `time_range`: as for [`flowdiffrax.metrics.loss_by_times`][].
    - `every`: only at reports of a step that it divides; 1 for all.

    **Raises:** `ValueError` for numbers that are too small or an empty interval,
    `TypeError` for what is no objective or no batches; in use, `ValueError` for times
    outside the interval, or an objective with other learned weights than the run's.
    """

    def __init__(
        self,
        objective: AbstractObjective | Mixture | Scheduled,
        batches: Callable,
        teacher: Any = None,
        *,
        key: Key[Array, ""],
        num_batches: int = 8,
        num_bins: int = 8,
        time_range: tuple[float, float] | None = None,
        every: int = 1,
    ):
        if not isinstance(objective, AbstractObjective | Mixture | Scheduled):
            raise TypeError(
                "`objective` must be an instance such as `FlowMatching()`; got "
                f"{objective!r}."
            )
        check_callable(batches, "batches", "batches(key)")
        check_bins(num_bins, time_range)
        if num_batches < 1:
            raise ValueError(f"`num_batches` must be at least 1; got {num_batches}.")
        self._inputs = objective, batches, teacher
        self._key_data, self._key_impl = jr.key_data(key), jr.key_impl(key)
        self._num_batches = num_batches
        self._num_bins = num_bins
        self._time_range = time_range
        self._every = checked_every(every)

    def __call__(
        self, state: TrainState, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Measures.

        **Arguments:**

        - `state`: the state, whose `ema_map` is looked at.
        - `report`: the numbers so far, among them `step`.

        **Returns:** the bins; `None` for a report that is left out.
        """
        if report["step"] % self._every != 0:
            return None
        self._inputs = beside(state, self._inputs)
        root_key = jr.wrap_key_data(self._key_data, impl=self._key_impl)
        keys = beside(state, jr.split(root_key, self._num_batches))
        draws = [gathered(state, _losses(self._inputs, state, key)) for key in keys]
        losses = jtu.tree_map(lambda *leaves: np.concatenate(leaves), *draws)
        bins = bin_losses(losses, state.ema_map, self._num_bins, self._time_range)
        plain = lambda value: value if math.isfinite(value) else None
        return {"loss_by_times": [list(map(plain, row)) for row in bins.means.tolist()]}


class TensorBoard:
    """Writes the numbers of a report for TensorBoard, as `on_report` of `fit`.

    What is no single number is left out. Of several processes the first one writes,
    within a few seconds. Needs tensorboardX: `pip install "flowdiffrax[tensorboard]"`. A
    run that goes on in the same folder goes on with its curves; steps that it makes again
    are there twice.

    **Arguments:**

    - `folder`: where to write, made if missing.

    **Attributes:**

    - `writer`: the `tensorboardX.SummaryWriter`, for whatever else you would log;
      `None` in other processes than the first.

    **Raises:** `ImportError` without tensorboardX; `ValueError` for a folder that is a
    file.
    """

    def __init__(self, folder: StrPath):
        tensorboard = import_extra("tensorboardX", "tensorboard", "TensorBoard")
        check_folder(pathlib.Path(folder))
        self.writer = None
        if jax.process_index() == 0:
            # Its thread writes every two minutes by default, and a killed run loses them;
            # its `flush` does not wait for the thread.
            self.writer = tensorboard.SummaryWriter(os.fspath(folder), flush_secs=5)

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes.

        **Arguments:**

        - `state`: the state, which it does not need.
        - `report`: the numbers, among them `step`.
        """
        del state
        if self.writer is not None:
            for name, value in _single_numbers(report).items():
                self.writer.add_scalar(name, value, int(report["step"]))


class WeightsAndBiases:
    """Logs the numbers of a report to Weights & Biases, as `on_report` of `fit`.

    What is no single number is left out. Of several processes the first one logs. Needs
    wandb: `pip install "flowdiffrax[wandb]"`. `mode="offline"` needs no account and no
    network.

    **Arguments:**

    - `init_kwargs`: passed on to `wandb.init`: `project`, `name`, `config`, `mode`; and
      for a run that is continued, its `id` and `resume="allow"`.

    **Attributes:**

    - `run`: what `wandb.init` returned, for whatever else you would log; `None` in other
      processes than the first. Its `finish` is called when Python ends, if not before.

    **Raises:** `ImportError` without wandb.
    """

    def __init__(self, **init_kwargs: Any):
        wandb = import_extra("wandb", "wandb", "WeightsAndBiases")
        self.run = wandb.init(**init_kwargs) if jax.process_index() == 0 else None

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Logs.

        **Arguments:**

        - `state`: the state, which it does not need.
        - `report`: the numbers, among them `step`.
        """
        del state
        if self.run is not None:
            numbers = _single_numbers(report)
            self.run.log(numbers, step=int(report["step"]), commit=True)


def checked_every(every: int) -> int:
    if every < 1:
        raise ValueError(f"`every` must be at least 1; got {every}.")
    return every


@eqx.filter_jit
def _losses(inputs: Any, state: TrainState, key: Key[Array, ""]) -> ExampleLosses:
    objective, batches, teacher = inputs
    objective = at_step(objective, state.step)
    own, of_run = len(learned_of(objective)), len(state.learned)
    if own > 0:
        if own != of_run:
            raise ValueError(
                f"The objective has {own} learned weights and that of the run {of_run}."
            )
        objective = with_learned(objective, state.learned)
    batch_key, loss_key = jr.split(key)
    paths, args = draw(batches, batch_key)
    teacher = filled(teacher, state.teacher_map)
    return weighted_losses(objective, state.ema_map, teacher, paths, args, loss_key)


def beside(state: TrainState, tree: PyTree) -> PyTree:
    """Puts a copy of all arrays on each device of the state."""
    sharding = state.step.sharding

    def put(leaf):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # `device_put` reaches no devices of other processes, a program does.
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)

    return jtu.tree_map(lambda leaf: put(leaf) if eqx.is_array(leaf) else leaf, tree)


def gathered(state: TrainState, tree: PyTree) -> PyTree[np.ndarray]:
    """The arrays as a whole, though the state may lie in parts on many devices."""
    return jtu.tree_map(np.asarray, beside(state, tree))


def rows_of(tree: PyTree, start: int, stop: int) -> PyTree:
    cut = lambda leaf: leaf[start:stop] if np.ndim(leaf) > 0 else leaf
    return jtu.tree_map(cut, tree)


def _single_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in report.items()
        if name != "step" and is_number(value)
    }


def is_number(value: Any) -> bool:
    kinds = numbers.Real, np.ndarray, jax.Array
    return isinstance(value, kinds) and getattr(value, "ndim", 0) == 0


def check_folder(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder; {folder} is a file.")
