from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._check import check_callable
from .._io import StrPath, as_folder, import_extra, write_whole
from .._tree import num_rows
from .._types import Args, State
from ..train import TrainState
from ..train._reports import checked_every, is_number, rows_of
from ._grid import picture
from ._sampling import in_blocks, in_jumps


class SampleGrids:
    """Draws samples during a run, and measures how good they are by number of jumps.

    As `on_report` of [`flowdiffrax.train.fit`][], it samples `state.ema_map` from the
    same starting points each time, and writes `samples-<step>.png` with one row of
    images for each number of jumps. A file appears whole or not at all. With several
    processes, all of them sample and the first one writes.

    **Arguments:**

    - `folder`: the folder to write to, created if missing; `None` for no pictures.
    - `x0`: starting points with a leading batch axis.
    - `args`: conditions with the same leading axis, or `None`.
    - `num_jumps`: the numbers of jumps. One jump is compiled for all of them.
    - `time_range`: where the jumps start and end, in either order. `None` for the map's
      `time_range`, or for [0, 1] if it declares none.
    - `distance`: a function that maps a batch of samples, as NumPy arrays, to a number,
      for example their distance from data. Its values are added to the report as
      `distance_1`, `distance_2` and so on, by number of jumps.
    - `to_images`: a function that converts samples to images for
      [`flowdiffrax.images.image_grid`][], for example a decoder of latents. `None` if the
      samples are images.
    - `num_columns`: the number of samples to draw.
    - `batch_size`: the number of samples to compute at a time; `None` for all.
    - `every`: act only on reports whose step it divides; 1 for all reports.

    **Raises:** `ValueError` if the starting points have no common batch axis or are not
    images, if a number of jumps is below 1 or given twice, if `folder` is a file, if
    `batch_size` does not divide the number of starting points, or if another number is
    too small; `ImportError` if pictures are wanted but Matplotlib, from the `plot` extra,
    is missing. When called, `ValueError` if `distance` does not return a number or
    `to_images` does not return images.
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
        # Only JAX arrays are mapped over rows; all rows share a plain number.
        convert = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        args = jtu.tree_map(convert, args)
        only_arrays = eqx.filter((x0, args), eqx.is_array)
        self._size = num_rows(only_arrays, "`x0` and `args`")
        self._inputs = x0, args
        self._num_jumps = tuple(num_jumps)
        if min(self._num_jumps, default=0) < 1 or len({*num_jumps}) < len(num_jumps):
            raise ValueError(
                "`num_jumps` must hold different numbers of jumps, each at least 1; got "
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
            raise ValueError(
                f"`time_range` must be two different times; got {time_range}."
            )
        if distance is not None:
            check_callable(distance, "distance", "distance(samples)")
        self._folder = None if folder is None else as_folder(folder)
        if self._folder is not None:
            import_extra("matplotlib", "plot", "SampleGrids")
            if to_images is None:
                _check_images(x0)
        self._time_range = time_range
        self._distance = distance
        self._to_images = (lambda samples: samples) if to_images is None else to_images
        self._num_columns = num_columns
        self._batch_size = batch_size
        self._every = checked_every(every)

    def __call__(
        self, state: TrainState, report: Mapping[str, Any]
    ) -> dict[str, float] | None:
        """Samples the map, draws the samples and measures them.

        **Arguments:**

        - `state`: the training state, whose `ema_map` is sampled.
        - `report`: the numbers so far, including `step`.

        **Returns:** the distances, or `None` if this report is skipped.
        """
        if report["step"] % self._every != 0:
            return None
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
        flow_map, sharding = state.ema_map, state.step.sharding
        times = self._time_range or getattr(flow_map, "time_range", None) or (0.0, 1.0)
        draw = lambda x0, args: in_jumps(flow_map, number, x0, args, times)
        blocks = in_blocks(draw, self._inputs, self._size, self._batch_size, sharding)
        return jtu.tree_map(lambda *leaves: np.concatenate(leaves), *blocks)

    def _draw(self, samples: Mapping[int, PyTree[np.ndarray]], step: int) -> None:
        columns = min(self._num_columns, self._size)
        # All processes decode, in case decoding needs all of them.
        rows = [
            np.asarray(self._to_images(rows_of(batch, 0, columns)))
            for batch in samples.values()
        ]
        if rows[0].ndim != 4:
            raise ValueError(
                "`to_images` must return images of shape (images, height, width, "
                f"channels); got {rows[0].shape}."
            )
        if jax.process_index() == 0:
            labels = [f"{n} jump" if n == 1 else f"{n} jumps" for n in samples]
            assert self._folder is not None
            write_whole(self._folder / f"samples-{step}.png", picture(rows, labels))


def _as_number(value: Any) -> float:
    if not is_number(value):
        raise ValueError(
            "`distance` must return one number for a batch of samples; got "
            f"{type(value).__name__} of shape {np.shape(value)}."
        )
    return float(value)


def _check_images(x0: State) -> None:
    shapes = [leaf.shape for leaf in jtu.tree_leaves(x0)]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] not in (1, 3):
        raise ValueError(
            "Pictures need images: `x0` must have shape (images, height, width, "
            f"channels), with 1 or 3 channels; got {shapes}. For other states, pass "
            "`to_images`, or `folder=None` to compute distances only."
        )
