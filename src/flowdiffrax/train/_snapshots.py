import json
import pathlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import safetensors

from .._check import check_instance
from .._io import StrPath, as_folder
from ..flow_maps._base import AbstractFlowMap
from ._checkpoint import load, save
from ._power_average import PowerAverage, combination
from ._reports import checked_every, gathered
from ._step import TrainState, decays_of, in_precision_of, precise

# Weights of an average that are this far from those wanted, relative to their norm,
# describe another average.
_TOLERANCE = 0.05


class Snapshots:
    """Writes snapshots of the power function averages during a run.

    As `on_report` of [`flowdiffrax.train.fit`][], it writes
    `<folder>/<step>.safetensors`, with all averages of the run that are a
    [`flowdiffrax.train.PowerAverage`][]. After training,
    [`flowdiffrax.train.power_average`][] builds an average of any width from the files:

    ```python
    decays = (0.9999, fd.train.PowerAverage(0.05), fd.train.PowerAverage(0.10))
    snapshots = fd.train.Snapshots("out/run/snapshots", decays, every=1000)
    state = fd.train.fit(..., ema_decay=decays, on_report=snapshots)
    averaged = fd.train.power_average("out/run/snapshots", state.flow_map, 0.07)
    ```

    A file appears whole or not at all. A run that resumes writes the files of the steps
    that it repeats again, with the same contents. Each file names the one before it, by
    its checksum, so that files of another run in the same folder are found when they are
    read. With several processes, the first one writes.

    **Arguments:**

    - `folder`: the folder to write to, created if missing.
    - `ema_decay`: the averages of the run, as given to [`flowdiffrax.train.fit`][].
    - `every`: act only on reports whose step it divides; 1 for all reports. Each file has
      the size of the weights times the number of power function averages, in float32.
      The paper keeps about 250 snapshots of a run.

    **Raises:** `ValueError` if no average is a [`flowdiffrax.train.PowerAverage`][], if
    `every` is below 1, or if `folder` is a file; `TypeError` if `folder` is no path. When
    called, `ValueError` if the state has other averages.
    """

    def __init__(
        self,
        folder: StrPath,
        ema_decay: float | PowerAverage | Sequence[float | PowerAverage],
        *,
        every: int = 1,
    ):
        self._folder = as_folder(folder)
        self._decays = decays_of(ema_decay)
        self._tracked = {
            index: decay
            for index, decay in enumerate(self._decays)
            if isinstance(decay, PowerAverage)
        }
        if len(self._tracked) == 0:
            raise ValueError(
                "Snapshots are of power function averages, and `ema_decay` has none: add "
                "`PowerAverage(0.05)` and `PowerAverage(0.10)`."
            )
        self._every = checked_every(every)
        self._reported = sys.maxsize
        self._previous: dict[str, Any] | None = None

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes a snapshot.

        **Arguments:**

        - `state`: the training state, whose averages are saved.
        - `report`: the numbers so far, including `step`.
        """
        step = int(report["step"])
        if state.ema_decay != self._decays:
            raise ValueError(
                f"The snapshots are of the averages {self._decays}, but the state has "
                f"{state.ema_decay}. Give both the same `ema_decay`."
            )
        is_writer = jax.process_index() == 0
        if is_writer and step <= self._reported:
            # A run begins or resumes here. It continues from the files of earlier steps,
            # and will write those of this step and later ones.
            earlier = [path for path in _by_step(self._folder) if _step_of(path) < step]
            self._previous = _reference(earlier[-1]) if earlier else None
        self._reported = step
        if step % self._every != 0:
            return
        averages = tuple(
            gathered(state, state.averages[index]) for index in self._tracked
        )
        config = {
            "sigma_rel": [average.sigma_rel for average in self._tracked.values()],
            "step": step,
            "count": step - int(report["skipped"]),
            # Snapshots of different runs must not be mixed.
            "key": gathered(state, state.key_data).tolist(),
            "previous": self._previous,
        }
        if is_writer:
            path = self._folder / f"{step}.safetensors"
            save(path, config, averages)
            self._previous = _reference(path)


def power_average(
    folder: StrPath, like: AbstractFlowMap, sigma_rel: float, *, step: int | None = None
) -> AbstractFlowMap:
    r"""Builds a power function average of any width from the snapshots of a run.

    The weights of the average over the steps of training are approximated by a
    combination of those of the snapshots, by least squares. The same combination of the
    snapshots is the average. One file is read at a time.

    **Arguments:**

    - `folder`: the folder that [`flowdiffrax.train.Snapshots`][] wrote.
    - `like`: a map of the same structure, such as `state.flow_map`.
    - `sigma_rel`: the relative width of the average; see
      [`flowdiffrax.train.PowerAverage`][].
    - `step`: the step of a snapshot. The average is the one that the run would have had
      there. `None` for the newest.

    **Returns:** a map like `like` with the averaged weights, in its precision.

    **Raises:** `FileNotFoundError` if there are no snapshots, or none of this step;
    `ValueError` if they are of different runs or another map, or if a file is damaged;
    `TypeError` if `folder` is no path or `like` no map.
    If the weights over the steps are more than 5 % off, for example because there are too
    few snapshots for so narrow an average, a `RuntimeWarning` reports it.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696), algorithm 3.
    """
    check_instance(like, AbstractFlowMap, "like", "a flow map")
    wanted = PowerAverage(sigma_rel)
    paths = _files(as_folder(folder), step)
    abouts = [_about(path) for path in paths]
    _check_one_run(paths, abouts)
    counts = [about["count"] for about in abouts for _ in about["sigma_rel"]]
    widths = [width for about in abouts for width in about["sigma_rel"]]
    exponents = [PowerAverage(width).exponent for width in widths]
    target = float(abouts[-1]["count"]), wanted.exponent
    factors, error = combination(np.array(counts, float), np.array(exponents), *target)
    if error > _TOLERANCE:
        warnings.warn(
            f"The {len(paths)} snapshots in {folder} reproduce the average with "
            f"`sigma_rel={sigma_rel}` with an error of {error:.0%} in its shares of the "
            "steps. Take more snapshots, or a width nearer to those that were tracked.",
            RuntimeWarning,
            stacklevel=2,
        )
    total: Any = None
    remaining = iter(factors.tolist())
    for path, about in zip(paths, abouts, strict=True):
        for average in _read(path, like, len(about["sigma_rel"])):
            total = _plus(total, next(remaining), average)
    averaged = jtu.tree_map(
        lambda leaf, own: leaf if eqx.is_inexact_array(own) else own, total, like
    )
    return in_precision_of(like, averaged)


def _files(folder: pathlib.Path, step: int | None) -> list[pathlib.Path]:
    """The snapshots up to a step, in order."""
    paths = _by_step(folder)
    if len(paths) == 0:
        raise FileNotFoundError(f"{folder} has no snapshots.")
    steps = [_step_of(path) for path in paths]
    if step not in (None, *steps):
        raise FileNotFoundError(
            f"{folder} has no snapshot of step {step}; there are {steps}."
        )
    return [path for path in paths if step is None or _step_of(path) <= step]


def _by_step(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = [path for path in folder.glob("*.safetensors") if path.stem.isdigit()]
    return sorted(paths, key=_step_of)


def _step_of(path: pathlib.Path) -> int:
    return int(path.stem)


def _reference(path: pathlib.Path) -> dict[str, Any]:
    """What the next snapshot says of this one."""
    return {"step": _step_of(path), "sha256": _about(path)["sha256"]}


def _check_one_run(paths: list[pathlib.Path], abouts: list[dict[str, Any]]) -> None:
    """**Raises:** `ValueError` if snapshots do not continue one another.

    Those that were deleted since may be missing, but not the first.
    """
    sums = {}
    for path, about in zip(paths, abouts, strict=True):
        previous = about["previous"]
        if previous is None:
            continues = not sums
        else:
            continues = (
                sums.get(previous["step"], previous["sha256"]) == previous["sha256"]
            )
        if not continues or about["key"] != abouts[0]["key"]:
            raise ValueError(
                f"{path} does not continue the snapshots before it: it is of another "
                "run, or of one that repeated earlier steps on another device. Give each "
                "run its own folder, or remove the files that do not belong to it."
            )
        sums[_step_of(path)] = about["sha256"]


def _about(path: pathlib.Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "numpy") as file:  # pyright: ignore
            header = json.loads(file.metadata()["flowdiffrax"])
        about = header["config"] | {"sha256": header["sha256"]}
        names = "sigma_rel", "count", "key", "previous", "sha256"
        return {name: about[name] for name in names}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a snapshot of averages: {error}.") from error


def _read(
    path: pathlib.Path, like: AbstractFlowMap, number: int
) -> tuple[AbstractFlowMap, ...]:
    make = lambda config: eqx.filter_eval_shape(lambda: (precise(like),) * number)
    _, averages = load(path, make)
    return averages


def _plus(total: Any, factor: float, average: AbstractFlowMap) -> Any:
    """Adds in float64: the factors have both signs and may be large."""

    def add(leaf, before=None):
        if not eqx.is_inexact_array(leaf):
            return None
        wide = np.complex128 if np.iscomplexobj(leaf) else np.float64
        more = factor * np.asarray(leaf).astype(wide)
        return more if before is None else before + more

    is_none = lambda leaf: leaf is None
    if total is None:
        return jtu.tree_map(add, average)
    return jtu.tree_map(add, average, total, is_leaf=is_none)
