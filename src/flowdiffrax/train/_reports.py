import math
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key, PyTree

from .._check import check_callable, check_count
from .._io import StrPath, as_folder, import_extra
from ..metrics._loss import bin_losses, weighted_losses
from ..objectives._base import AbstractObjective
from ..objectives._batch import ExampleLosses
from ..objectives._mixture import Mixture
from ..objectives._scheduled import Scheduled
from ._step import (
    TrainState,
    at_step,
    check_objective,
    draw,
    filled,
    learned_of,
    with_learned,
)


class LossByTimes:
    """Reports the loss during a run, by the start and end times of the jumps.

    Used as `on_report` of [`flowdiffrax.train.fit`][], it adds `loss_by_times` to the
    report: the result of [`flowdiffrax.metrics.loss_by_times`][] for `state.ema_map`, on
    the same draws each time. Rows are start times and columns end times. An entry is
    `None` if no times were drawn there, or if the loss is not finite.

    **Arguments:**

    - `objective`: the objective of the run, or another one. A
      [`flowdiffrax.objectives.Scheduled`][] one is evaluated at the step of the report.
      Learned weights are those of the run.
    - `batches`: as for [`flowdiffrax.train.make_step`][], from the training data or from
      held-out data.
    - `teacher`: what the objective learns from. If it is missing and the run has an
      average of the map as its teacher, that average is used.
    - `key`: a random key for the batches and their times.
    - `num_batches`: how many batches to average over, at least 1.
    - `num_bins`: the number of bins per axis, at least 1.
    - `time_range`: as for [`flowdiffrax.metrics.loss_by_times`][].
    - `every`: measure only if it divides the step of the report; 1 for every report.

    **Raises:** `ValueError` for numbers that are too small; `TypeError` if `objective` is
    not an objective or `batches` is not callable. When called, `ValueError` for times
    outside the interval, or if the objective and the run have different numbers of
    learned weights.
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
        check_objective(objective)
        check_callable(batches, "batches", "batches(key)")
        check_count(num_bins, 1, "num_bins")
        check_count(num_batches, 1, "num_batches")
        self._inputs = objective, batches, teacher
        self._key_data, self._key_impl = jr.key_data(key), jr.key_impl(key)
        self._num_batches = num_batches
        self._num_bins = num_bins
        self._time_range = time_range
        self._every = checked_every(every)

    def __call__(
        self, state: TrainState, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Measures the loss at a report.

        **Arguments:**

        - `state`: the training state. Its `ema_map` is evaluated.
        - `report`: the numbers so far, including `step`.

        **Returns:** the bins, or `None` if `every` skips this report.
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

    Only single numbers are written, within a few seconds. With several processes, only
    the first one writes. Needs tensorboardX: `pip install "flowdiffrax[tensorboard]"`. A
    run that resumes in the same folder continues its curves; steps that it repeats
    appear twice.

    **Arguments:**

    - `folder`: the folder to write to, created if missing.

    **Attributes:**

    - `writer`: the `tensorboardX.SummaryWriter`, for anything else you want to log;
      `None` in every process but the first.

    **Raises:** `ImportError` if tensorboardX is not installed; `ValueError` if `folder`
    is a file.
    """

    def __init__(self, folder: StrPath):
        tensorboard = import_extra("tensorboardX", "tensorboard", "TensorBoard")
        folder = as_folder(folder)
        self.writer = None
        if jax.process_index() == 0:
            # By default its thread writes every two minutes, which a killed run would
            # lose. Its `flush` does not wait for the thread.
            self.writer = tensorboard.SummaryWriter(os.fspath(folder), flush_secs=5)

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes the numbers of a report.

        **Arguments:**

        - `state`: the training state. It is not used.
        - `report`: the numbers, including `step`.
        """
        del state
        if self.writer is not None:
            for name, value in _single_numbers(report).items():
                self.writer.add_scalar(name, value, int(report["step"]))


class WeightsAndBiases:
    """Logs the numbers of a report to Weights & Biases, as `on_report` of `fit`.

    Only single numbers are logged. With several processes, only the first one logs. Needs
    wandb: `pip install "flowdiffrax[wandb]"`. `mode="offline"` needs no account and no
    network.

    **Arguments:**

    - `init_kwargs`: keyword arguments for `wandb.init`, such as `project`, `name`,
      `config` and `mode`. To continue a run, pass its `id` and `resume="allow"`.

    **Attributes:**

    - `run`: the run returned by `wandb.init`, for anything else you want to log; `None`
      in every process but the first. Its `finish` is called when Python exits, unless
      you call it earlier.

    **Raises:** `ImportError` if wandb is not installed.
    """

    def __init__(self, **init_kwargs: Any):
        wandb = import_extra("wandb", "wandb", "WeightsAndBiases")
        self.run = wandb.init(**init_kwargs) if jax.process_index() == 0 else None

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Logs the numbers of a report.

        **Arguments:**

        - `state`: the training state. It is not used.
        - `report`: the numbers, including `step`.
        """
        del state
        if self.run is not None:
            numbers = _single_numbers(report)
            self.run.log(numbers, step=int(report["step"]), commit=True)


def checked_every(every: int) -> int:
    check_count(every, 1, "every")
    return every


@eqx.filter_jit
def _losses(inputs: Any, state: TrainState, key: Key[Array, ""]) -> ExampleLosses:
    objective, batches, teacher = inputs
    objective = at_step(objective, state.step)
    own, of_run = len(learned_of(objective)), len(state.learned)
    if own > 0:
        if own != of_run:
            raise ValueError(
                f"The objective has {own} learned weights, but the run has {of_run}."
            )
        objective = with_learned(objective, state.learned)
    batch_key, loss_key = jr.split(key)
    paths, args = draw(batches, batch_key)
    teacher = filled(teacher, state.teacher_map)
    return weighted_losses(objective, state.ema_map, teacher, paths, args, loss_key)


def beside(state: TrainState, tree: PyTree) -> PyTree:
    """Places a copy of all arrays on each device of the state."""
    return placed(tree, state.step.sharding)


def placed(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    """Places a copy of all arrays on each device of a sharding."""

    def put(leaf):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # `device_put` cannot reach the devices of other processes. A program can.
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)

    return jtu.tree_map(lambda leaf: put(leaf) if eqx.is_array(leaf) else leaf, tree)


def gathered(state: TrainState, tree: PyTree) -> PyTree[np.ndarray]:
    """Gathers all arrays whole, even if the state is sharded over many devices."""
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
