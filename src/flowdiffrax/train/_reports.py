import io
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Key, PyTree

from .._custom_types import Args, State
from .._files import write_whole
from .._flow_map import AbstractFlowMap
from .._misc import check_callable, num_rows
from .._objective import AbstractObjective, Mixture, Scheduled
from .._objective.batch import ExampleLosses
from .._sample import sample
from ..data._files import StrPath, import_extra
from ..metrics._loss import bin_losses, check_bins, weighted_losses
from ..plot import image_grid
from ..plot._panels import join_tiles, tile_images
from ._step import TrainState, at_step, draw, filled, learned_of, with_learned


class SampleGrids:
    """Pictures of samples during a run, and how good they are in few jumps and in many.

    As `on_report` of [`flowdiffrax.train.fit`][], it samples `state.ema_map` from the
    same starting points each time, and writes `samples-<step>.png` with one row of
    images for each number of jumps. A file appears whole or not at all. Of several
    processes all sample and the first one writes.

    **Arguments:**

    - `folder`: where to write, made if missing; `None` for no pictures.
    - `x0`: starting points with a leading batch axis.
    - `args`: conditions with the same leading axis, or `None`.
    - `num_jumps`: the numbers of jumps. Each is compiled once.
    - `time_range`: where the jumps start and end, in either order; `None` for the map's
      `time_range`, which is [0, 1] if it declares none.
    - `distance`: a function of a batch of samples, as NumPy arrays, that returns a
      number, for example their distance from data. Its values join the report as
      `distance_1`, `distance_2` and so on, by the number of jumps.
    - `to_images`: what makes images of samples, as for
      [`flowdiffrax.plot.image_grid`][]: a decoder of latents, for example. `None` for
      samples that are images.
    - `num_columns`: how many of the samples are drawn.
    - `batch_size`: how many are sampled at a time; `None` for all.
    - `every`: only at reports of a step that it divides; 1 for all.

    **Raises:** `ValueError` for starting points without a common batch axis or that are
    no images, a number of jumps below 1 or given twice, a folder that is a file, a batch
    size that does not divide the starting points, and other numbers that are too small;
    `ImportError` for pictures without Matplotlib, from the `plot` extra. In use,
    `ValueError` for a distance that is no number, or `to_images` that makes no images.
    """

    def __init__(
        self,
        folder: StrPath | None,
        x0: State,
        args: Args = None,
        *,
        num_jumps: Sequence[int] = (1, 2, 4),
        time_range: tuple[float, float] | None = None,
        distance: Callable[[State], Any] | None = None,
        to_images: Callable[[State], Any] | None = None,
        num_columns: int = 16,
        batch_size: int | None = None,
        every: int = 1,
    ):
        x0 = jtu.tree_map(jnp.asarray, x0)
        # Only JAX's arrays have their rows mapped; numbers are for all of them.
        convert = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        args = jtu.tree_map(convert, args)
        only_arrays = eqx.filter((x0, args), eqx.is_array)
        self._size = num_rows(only_arrays, "`x0` and `args`")
        self._inputs = x0, args
        self._num_jumps = tuple(num_jumps)
        if min(self._num_jumps, default=0) < 1 or len({*num_jumps}) < len(num_jumps):
            raise ValueError(
                "`num_jumps` must be different numbers of jumps, each at least 1; got "
                f"{num_jumps}."
            )
        if num_columns < 1:
            raise ValueError(f"`num_columns` must be at least 1; got {num_columns}.")
        batch_size = self._size if batch_size is None else batch_size
        if batch_size < 1 or self._size % batch_size != 0:
            raise ValueError(
                f"`batch_size` must divide the {self._size} starting points; got "
                f"{batch_size}."
            )
        if time_range is not None and time_range[0] == time_range[1]:
            raise ValueError(f"`time_range` must have two times; got {time_range}.")
        if distance is not None:
            check_callable(distance, "distance", "distance(samples)")
        self._folder = None if folder is None else pathlib.Path(folder)
        if self._folder is not None:
            _check_folder(self._folder)
            import_extra("matplotlib", "plot", "SampleGrids")
            if to_images is None:
                _check_images(x0)
        self._time_range = time_range
        self._distance = distance
        self._to_images = (lambda samples: samples) if to_images is None else to_images
        self._num_columns = num_columns
        self._batch_size = batch_size
        self._every = _checked_every(every)

    def __call__(
        self, state: TrainState, report: Mapping[str, Any]
    ) -> dict[str, float] | None:
        """Samples, draws and measures.

        **Arguments:**

        - `state`: the state, whose `ema_map` is sampled.
        - `report`: the numbers so far, among them `step`.

        **Returns:** the distances; `None` for a report that is left out.
        """
        if report["step"] % self._every != 0:
            return None
        # On a single device these stay where they are after the first time.
        self._inputs = _beside(state, self._inputs)
        samples = {number: self._samples(state, number) for number in self._num_jumps}
        if self._folder is not None:
            self._draw(samples, int(report["step"]))
        if self._distance is None:
            return {}
        return {
            f"distance_{number}": _as_number(self._distance(batch))
            for number, batch in samples.items()
        }

    def _samples(self, state: TrainState, number: int) -> PyTree[np.ndarray]:
        starts = range(0, self._size, self._batch_size)
        batches = [
            _gathered(state, _sample(state.ema_map, rows, number, self._time_range))
            for rows in (_rows(self._inputs, i, i + self._batch_size) for i in starts)
        ]
        return jtu.tree_map(lambda *leaves: np.concatenate(leaves), *batches)

    def _draw(self, samples: Mapping[int, PyTree[np.ndarray]], step: int) -> None:
        columns = min(self._num_columns, self._size)
        # Of several processes all decode, in case that takes them all.
        rows = [
            np.asarray(self._to_images(_rows(batch, 0, columns)))
            for batch in samples.values()
        ]
        if any(row.ndim != 4 for row in rows):
            raise ValueError(
                "`to_images` must return images of shape (images, height, width, "
                f"channels); got {rows[0].shape}."
            )
        if jax.process_index() == 0:
            labels = [f"{n} jump" if n == 1 else f"{n} jumps" for n in samples]
            assert self._folder is not None
            write_whole(self._folder / f"samples-{step}.png", _picture(rows, labels))


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
        self._every = _checked_every(every)

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
        self._inputs = _beside(state, self._inputs)
        root_key = jr.wrap_key_data(self._key_data, impl=self._key_impl)
        keys = _beside(state, jr.split(root_key, self._num_batches))
        draws = [_gathered(state, _losses(self._inputs, state, key)) for key in keys]
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
        _check_folder(pathlib.Path(folder))
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


def _checked_every(every: int) -> int:
    if every < 1:
        raise ValueError(f"`every` must be at least 1; got {every}.")
    return every


@eqx.filter_jit
def _sample(
    flow_map: AbstractFlowMap,
    rows: tuple[State, Args],
    num_jumps: int,
    time_range: tuple[float, float] | None,
) -> State:
    ts = num_jumps if time_range is None else np.linspace(*time_range, num_jumps + 1)
    axes = eqx.if_array(0)
    one = lambda x0, args: sample(flow_map, x0, ts, args)
    return eqx.filter_vmap(one, in_axes=(axes, axes))(*rows)


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


def _beside(state: TrainState, tree: PyTree) -> PyTree:
    """Puts a copy of all arrays on each device of the state."""
    sharding = state.step.sharding

    def put(leaf):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # `device_put` reaches no devices of other processes, a program does.
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)

    return jtu.tree_map(lambda leaf: put(leaf) if eqx.is_array(leaf) else leaf, tree)


def _gathered(state: TrainState, tree: PyTree) -> PyTree[np.ndarray]:
    """The arrays as a whole, though the state may lie in parts on many devices."""
    return jtu.tree_map(np.asarray, _beside(state, tree))


def _rows(tree: PyTree, start: int, stop: int) -> PyTree:
    cut = lambda leaf: leaf[start:stop] if np.ndim(leaf) > 0 else leaf
    return jtu.tree_map(cut, tree)


def _single_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in report.items()
        if name != "step" and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    kinds = numbers.Real, np.ndarray, jax.Array
    return isinstance(value, kinds) and getattr(value, "ndim", 0) == 0


def _as_number(value: Any) -> float:
    if not _is_number(value):
        raise ValueError(
            "`distance` must return one number for a batch of samples; got "
            f"{type(value).__name__} of shape {np.shape(value)}."
        )
    return float(value)


def _check_folder(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder; {folder} is a file.")


def _check_images(x0: State) -> None:
    shapes = [leaf.shape for leaf in jtu.tree_leaves(x0)]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] not in (1, 3):
        raise ValueError(
            "Pictures need images: `x0` of shape (images, height, width, channels), with "
            f"1 or 3 channels; got {shapes}. For other states give `to_images`, or "
            "`folder=None` for distances alone."
        )


def _picture(rows: Sequence[np.ndarray], labels: Sequence[str]) -> bytes:
    """A PNG, with a whole number of its pixels for each of an image's."""
    # Not of `pyplot`, which keeps figures and may open windows.
    figures = import_extra("matplotlib.figure", "plot", "SampleGrids")
    images = tile_images(np.stack(rows))
    height, width = join_tiles(images).shape[:2]
    # So many that labels have room beside their rows, and letters nine pixels each.
    zoom = max(1, round(64 / images.shape[2]))
    margin, dpi = 12 + 9 * max(map(len, labels)), 100
    size = (margin + zoom * width) / dpi, zoom * height / dpi
    figure = figures.Figure(figsize=size, dpi=dpi)
    left = margin / dpi / size[0]
    image_grid(figure.add_axes((left, 0, 1 - left, 1)), images, row_labels=labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
