import concurrent.futures
import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, UInt8

from .._check import check_count, check_counts, check_instance
from .._io import StrPath, as_folder, import_extra, write_whole
from .._tree import num_rows
from .._types import Args, State
from ..flow_maps._base import AbstractFlowMap
from ..train import PowerAverage, TrainState, fingerprint, save
from ..train._checkpoint import saved_config
from ..train._reports import checked_every, placed
from ._device import to_uint8
from ._sampling import in_blocks, in_jumps
from ._scores_file import (
    COMPARABLE,
    append_score,
    is_comparable,
    last_attempt,
    read_scores,
    score_picture,
)
from .scores._features import AbstractFeatures
from .scores._frechet import FeatureStatistics, frechet_distance
from .scores._scores import ImageReference, score_images
from .sets._images import Images

BEST = "best.safetensors"


class ScoreCurves:
    """Scores every average of a run while it trains, and keeps the best map.

    As `on_report` of [`flowdiffrax.train.fit`][], it samples each average in each number
    of jumps, from the same starting points each time. An average is named by its decay,
    or by its relative width. The folder gets:

    - `scores.jsonl`: a line for each average and number of jumps, with the scores and
      what they depend on. Lines are only added. A run that resumes and repeats a step
      adds its lines again, with the next `attempt`;
      [`flowdiffrax.images.read_scores`][] returns the last of them.
    - `scores.png`: the Fréchet distances by step.
    - `best.safetensors`: the average with the smallest Fréchet distance in the fewest
      jumps so far. Its configuration is `config`, with its line of scores as `best`. The
      file appears whole or not at all, and a run that resumes keeps it.

    It adds the Fréchet distances to the report: `frechet_1`, `frechet_2` and so on for
    the first average, by number of jumps; `frechet_1_0.9999` for another one, by its
    name; and `scored_step`, their step. An error is reported as a warning and as
    `scoring_error`, and training goes on.

    If training uses one of several local devices, the scores are computed on another one,
    in the background. The next report after that has them. When the next scores are due
    and at the end of `fit`, it waits for those in progress. Otherwise, training waits
    while the scores are computed. With several processes, all of them sample and the
    first one scores.

    !!! warning

        The smallest of many noisy distances is partly small by luck. Score the best map
        again, from other starting points, before you report it.

    **Arguments:**

    - `folder`: the folder to write to, usually that of the run; created if missing.
    - `x0`: starting points with a leading batch axis.
    - `args`: conditions with the same leading axis, or `None`.
    - `reference`: the images to compare with, an
      [`flowdiffrax.images.ImageReference`][]; or their
      [`flowdiffrax.images.FeatureStatistics`][], for the Fréchet distance alone, which
      takes less time.
    - `features`: the network whose features are compared.
    - `seed`: the seed of the starting points, which is recorded.
    - `held_out`: images that are not in the reference, for the floor: preferably as many
      as there are starting points. `None` for no floor.
    - `num_jumps`: the numbers of jumps.
    - `time_range`: where the jumps start and end. `None` for the map's `time_range`, or
      for [0, 1] if it declares none.
    - `batch_size`: the number of samples to compute at a time; `None` for all.
    - `every`: act only on reports whose step it divides; 1 for all reports.
    - `config`: stored in each line and with the best map, as in
      [`flowdiffrax.train.save`][]. For example, what is needed to rebuild the map.

    **Raises:** `TypeError` if `folder`, `reference` or `features` has the wrong type;
    `ValueError` if the starting points have no common batch axis, if numbers are too
    small or given twice, if `folder` is a file, if the reference is of other features, or
    if `best.safetensors` is damaged; `ImportError` if Matplotlib, from the `plot` extra,
    is missing. When called, `ValueError` if two averages have the same number.
    """

    def __init__(
        self,
        folder: StrPath,
        x0: State,
        args: Args = None,
        *,
        reference: ImageReference | FeatureStatistics,
        features: AbstractFeatures,
        seed: int,
        held_out: Images | UInt8[np.ndarray | Array, "_ height width channels"] | None = (
            None
        ),
        num_jumps: Sequence[int] = (1, 2, 4),
        time_range: tuple[float, float] | None = None,
        batch_size: int | None = None,
        every: int = 1,
        config: Mapping[str, Any] | None = None,
    ):
        kinds = ImageReference | FeatureStatistics
        what = "an `ImageReference` or `FeatureStatistics`"
        check_instance(reference, kinds, "reference", what)
        check_instance(features, AbstractFeatures, "features")
        self._folder = as_folder(folder)
        import_extra("matplotlib", "plot", "ScoreCurves")
        # On the host: only a block of them at a time is on a device.
        self._inputs = jtu.tree_map(np.asarray, (x0, args))
        self._size = num_rows(self._inputs, "`x0` and `args`")
        self._starts = fingerprint(self._inputs)
        check_counts(tuple(num_jumps), 1, "num_jumps")
        self._num_jumps = tuple(sorted({*num_jumps}))
        if len(self._num_jumps) < len(num_jumps):
            raise ValueError(f"`num_jumps` must differ; got {num_jumps}.")
        check_count(batch_size, 1, "batch_size", or_none=True)
        self._batch_size = self._size if batch_size is None else batch_size
        self._time_range = time_range
        self._every = checked_every(every)
        self._config = dict(config or {})
        self._reference, self._features, self._seed = reference, features, seed
        with_images = isinstance(reference, ImageReference)
        statistics = reference.statistics if with_images else reference
        self._floor = dict(floor=None, num_held_out=None)
        if held_out is not None:
            kept = FeatureStatistics.of(features, held_out, source="held out")
            floor = frechet_distance(kept, statistics)
            self._floor = dict(floor=floor, num_held_out=len(held_out))
        elif statistics.fingerprint not in (None, features.fingerprint):
            raise ValueError(
                f"`reference` is of the features {statistics.fingerprint}; `features` "
                f"are {features.fingerprint}. Compute both with one network."
            )
        self._attempt = 1 + last_attempt(self._folder)
        self._best: dict[str, Any] | None = None
        if (self._folder / BEST).is_file():
            self._best = saved_config(self._folder / BEST).get("best")
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future | None = None
        self._found: dict[str, Any] = {}

    def __call__(
        self, state: TrainState, report: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Scores the averages, or begins to in the background.

        **Arguments:**

        - `state`: the training state, whose `ema_maps` are sampled.
        - `report`: the numbers so far, including `step`.

        **Returns:** the distances that were found since the last call, if there are any.
        """
        step, names = int(report["step"]), average_names(state.ema_decay)
        if step % self._every == 0:
            self.wait()
            device = spare_device(state)
            maps = dict(zip(names, state.ema_maps, strict=True))
            if device is None:
                self._take(self._score(step, maps, state.step.sharding))
            else:
                here = jax.sharding.SingleDeviceSharding(device)
                maps = {name: placed(one, here) for name, one in maps.items()}
                self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(1)
                self._pending = self._pool.submit(self._score_on, device, step, maps)
        elif self._pending is not None and self._pending.done():
            self.wait()
        found, self._found = self._found, {}
        return found or None

    def wait(self) -> None:
        """Waits for the scores that are computed in the background.

        [`flowdiffrax.train.fit`][] calls it at the end.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._take(pending.result())

    def _take(self, found: dict[str, Any]) -> None:
        self._found = found
        if "scoring_error" in found:
            warnings.warn(
                f"The scores of step {found['scored_step']} are not complete: "
                f"{found['scoring_error']} Training goes on.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _score_on(
        self, device: Any, step: int, maps: Mapping[str, AbstractFlowMap]
    ) -> dict[str, Any]:
        # For what is not placed, such as the images and the features' weights.
        with jax.default_device(device):
            return self._score(step, maps, jax.sharding.SingleDeviceSharding(device))

    def _score(
        self,
        step: int,
        maps: Mapping[str, AbstractFlowMap],
        sharding: jax.sharding.Sharding,
    ) -> dict[str, Any]:
        """Samples in all processes, and scores in the first one."""
        whole = {
            name: jtu.tree_map(_as_numpy, placed(one, sharding))
            for name, one in maps.items()
        }
        first, *_ = maps
        found: dict[str, Any] = {"scored_step": step}
        lines, errors = [], []
        for number, name in itertools.product(self._num_jumps, maps):
            try:
                images = self._samples(maps[name], number, sharding)
                if jax.process_index() != 0:
                    continue
                about = {
                    "step": step,
                    "average": name,
                    "weights": fingerprint(whole[name]),
                }
                line = about | self._scored(number, images)
                append_score(self._folder, line)
            except Exception as error:
                where = f"average {name} in {_jumps(number)}"
                errors.append(f"{where}: {type(error).__name__}: {error}")
                continue
            lines.append(line)
            suffix = "" if name == first else f"_{name}"
            found[f"frechet_{number}{suffix}"] = line["frechet"]
        if jax.process_index() != 0:
            return found
        try:
            self._keep_best(lines, whole)
            if lines:
                rows = [row for row in read_scores(self._folder) if "attempt" in row]
                write_whole(self._folder / "scores.png", score_picture(rows))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        if errors:
            found["scoring_error"] = " ".join("; ".join(errors).split())
        return found

    def _samples(
        self, flow_map: AbstractFlowMap, number: int, sharding: jax.sharding.Sharding
    ) -> np.ndarray:
        times = self._time_range or getattr(flow_map, "time_range", None) or (0.0, 1.0)
        draw = lambda x0, args: in_jumps(flow_map, number, x0, args, times)
        blocks = in_blocks(draw, self._inputs, self._size, self._batch_size, sharding)
        return np.concatenate([np.asarray(to_uint8(block)) for block in blocks])

    def _scored(self, number: int, images: np.ndarray) -> dict[str, Any]:
        scores = score_images(images, self._reference, self._features, seed=self._seed)
        scores = dataclasses.replace(scores, **self._floor)
        return {
            "sampler": _jumps(number),
            "jumps": number,
            "attempt": self._attempt,
            **scores.as_dict(),
            "starts": self._starts,
            "config": self._config,
        }

    def _keep_best(
        self, lines: Sequence[Mapping[str, Any]], maps: Mapping[str, AbstractFlowMap]
    ) -> None:
        fewest = [line for line in lines if line["jumps"] == self._num_jumps[0]]
        if not fewest:
            return
        found = min(fewest, key=lambda line: line["frechet"])
        best = self._best
        if best is not None and is_comparable(best, found):
            if best["jumps"] == found["jumps"] and best["frechet"] <= found["frechet"]:
                return
        names = ("step", "average", "sampler", "jumps", "attempt", "weights", "frechet")
        names += ("frechet_name", "floor", *COMPARABLE)
        about = {name: found[name] for name in names}
        config = {**self._config, "best": about}
        save(self._folder / BEST, config, maps[found["average"]])
        self._best = about


def average_names(decays: Sequence[float | PowerAverage]) -> tuple[str, ...]:
    """The names of the averages: their decays, or relative widths.

    **Raises:** `ValueError` if two averages have the same name.
    """
    names = tuple(
        str(decay.sigma_rel if isinstance(decay, PowerAverage) else decay)
        for decay in decays
    )
    if len({*names}) < len(names):
        raise ValueError(
            f"Averages must differ in their numbers to be told apart; got {names}."
        )
    return names


def spare_device(state: TrainState) -> Any:
    """A local device that training does not use, if it uses only one of several."""
    used = state.step.sharding.device_set
    if jax.process_count() > 1 or len(used) > 1:
        return None
    return next((one for one in jax.local_devices() if one not in used), None)


def _jumps(number: int) -> str:
    return f"{number} jump{'s' * (number > 1)}"


def _as_numpy(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf
