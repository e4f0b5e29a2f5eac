import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import safetensors

from .._check import check_instance
from .._io import StrPath
from ..flow_maps._base import AbstractFlowMap
from ._checkpoint import load, save
from ._power_average import PowerAverage, combination
from ._reports import check_folder, checked_every, gathered
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
    that it repeats again, with the same contents. With several processes, the first one
    writes.

    **Arguments:**

    - `folder`: the folder to write to, created if missing.
    - `ema_decay`: the averages of the run, as given to [`flowdiffrax.train.fit`][].
    - `every`: act only on reports whose step it divides; 1 for all reports. Each file has
      the size of the weights times the number of power function averages, in float32.
      The paper keeps about 250 snapshots of a run.

    **Raises:** `ValueError` if no average is a [`flowdiffrax.train.PowerAverage`][], if
    `every` is below 1, or if `folder` is a file. When called, `ValueError` if the state
    has another number of averages.
    """

    def __init__(
        self,
        folder: StrPath,
        ema_decay: float | PowerAverage | Sequence[float | PowerAverage],
        *,
        every: int = 1,
    ):
        self._folder = pathlib.Path(folder)
        check_folder(self._folder)
        decays = decays_of(ema_decay)
        self._number = len(decays)
        self._tracked = {
            index: decay
            for index, decay in enumerate(decays)
            if isinstance(decay, PowerAverage)
        }
        if len(self._tracked) == 0:
            raise ValueError(
                "Snapshots are of power function averages, and `ema_decay` has none: add "
                "`PowerAverage(0.05)` and `PowerAverage(0.10)`."
            )
        self._every = checked_every(every)

    def __call__(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes a snapshot.

        **Arguments:**

        - `state`: the training state, whose averages are saved.
        - `report`: the numbers so far, including `step`.
        """
        step = int(report["step"])
        if step % self._every != 0:
            return
        if len(state.averages) != self._number:
            raise ValueError(
                f"The snapshots are of {self._number} averages, but the state has "
                f"{len(state.averages)}. Give both the same `ema_decay`."
            )
        averages = tuple(
            gathered(state, state.averages[index]) for index in self._tracked
        )
        config = {
            "sigma_rel": [average.sigma_rel for average in self._tracked.values()],
            "step": step,
            "count": step - int(report["skipped"]),
            # Snapshots of different runs must not be mixed.
            "key": gathered(state, state.key_data).tolist(),
        }
        if jax.process_index() == 0:
            save(self._folder / f"{step}.safetensors", config, averages)


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
    `ValueError` if they are of different runs or another map, or if a file is damaged.
    If the weights over the steps are more than 5 % off, for example because there are too
    few snapshots for so narrow an average, a `RuntimeWarning` reports it.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696), algorithm 3.
    """
    check_instance(like, AbstractFlowMap, "like", "a flow map")
    wanted = PowerAverage(sigma_rel)
    paths = _files(pathlib.Path(folder), step)
    abouts = [_about(path) for path in paths]
    if any(about["key"] != abouts[-1]["key"] for about in abouts):
        raise ValueError(
            f"{folder} has snapshots of runs with different root keys. Give each run a "
            "folder of its own."
        )
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
    names = [path.stem for path in folder.glob("*.safetensors")]
    steps = sorted(int(name) for name in names if name.isdigit())
    if len(steps) == 0:
        raise FileNotFoundError(f"{folder} has no snapshots.")
    if step not in (None, *steps):
        raise FileNotFoundError(
            f"{folder} has no snapshot of step {step}; there are {steps}."
        )
    last = steps[-1] if step is None else step
    return [folder / f"{other}.safetensors" for other in steps if other <= last]


def _about(path: pathlib.Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "numpy") as file:  # pyright: ignore
            about = json.loads(file.metadata()["flowdiffrax"])["config"]
        return {name: about[name] for name in ("sigma_rel", "count", "key")}
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
