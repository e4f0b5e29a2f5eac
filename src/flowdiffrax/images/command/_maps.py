"""The map of a run: before training, and from the folder of a finished run."""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr

from ..._io import StrPath
from ...flow_maps._base import AbstractFlowMap
from ...flow_maps._residual import FlowMap
from ...nn import two_times
from ...train import Run, TrainState, fingerprint, load
from ...train._step import decays_of
from .._recipe import Recipe
from .._score_curves import BEST, average_names
from ..sets._images import Images
from ._options import Options
from ._presets import Presets, recipe_of, with_options

FILE = "map.safetensors"

# The options that identify a run.
_NAMES = (
    "script", "preset", "objective", "both_directions", "accumulate", "channels",
    "num_blocks", "precision", "remat", "seed",
)  # fmt: skip


def load_map(
    folder: StrPath,
    presets: Presets,
    script: str | None = None,
    *,
    step: int | Literal["best"] | None = None,
    average: float | None = None,
) -> tuple[dict[str, Any], FlowMap]:
    """Reads a map of a run: the final one, that of a checkpoint, or the best.

    **Arguments:**

    - `folder`: the folder of the run.
    - `presets`: the script's presets, by name: recipes, or functions that return them.
    - `script`: the name of the script that the run must be of; `None` for any.
    - `step`: the step of a checkpoint; `"best"` for the best map by the scores during
      training; `None` for the final map, or for the newest checkpoint if `average` is
      given.
    - `average`: the decay or relative width of one of the run's averages; `None` for the
      first. The best map already is one of them.

    **Returns:** the configuration of the run, with the `step` and the `average` of the
    map, and the map.

    **Raises:** `FileNotFoundError` if the run is not finished or not there, or if it has
    no such checkpoint; `ValueError` if it is of another script or of a preset that is not
    in `presets`, if it has no such average, or if a file is damaged.
    """
    folder = pathlib.Path(folder)
    recipe_in = functools.partial(_recipe_in, presets=presets, script=script)
    if step != "best" and (step, average) != (None, None):
        return _of_checkpoint(folder, recipe_in, step, average)
    path = folder / (FILE if step is None else BEST)
    if not path.is_file():
        cure = "to its end first" if step is None else "with `--score-every` first"
        raise FileNotFoundError(
            f"{path} is not there: train that run {cure}, with its own preset."
        )
    config, flow_map = load(path, lambda config: _new_map(recipe_in(config, path)))
    if step == "best":
        best = config.pop("best")
        names = [best["average"]]
        own = {name: best[name] for name in ("step", "average")}
    else:
        names = average_names(decays_of(recipe_in(config, path).ema_decay))
        own = {"step": config["steps"], "average": names[0]}
    _check_average(average, names)
    return config | own, flow_map


def _of_checkpoint(
    folder: pathlib.Path,
    recipe_in: Callable[[dict[str, Any], pathlib.Path], Recipe],
    step: int | None,
    average: float | None,
) -> tuple[dict[str, Any], FlowMap]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {folder} has no run.")
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    recipe = recipe_in(config, path)
    run = Run(folder, config)

    def state():
        settings = {"objective": recipe.objective, "ema_decay": recipe.ema_decay}
        return TrainState.create(
            _new_map(recipe), recipe.optim(), key=jr.key(0), **settings
        )

    restored = run.restore(eqx.filter_eval_shape(state), step)
    names = average_names(restored.ema_decay)
    _check_average(average, names)
    name = names[0] if average is None else str(float(average))
    own = {"step": int(restored.step), "average": name}
    return config | own, restored.ema_maps[names.index(name)]


def _check_average(average: float | None, names: Sequence[str]) -> None:
    if average is not None and str(float(average)) not in names:
        raise ValueError(f"--average must be one of {', '.join(names)}; got {average}")


def _recipe_in(
    config: dict[str, Any], path: pathlib.Path, *, presets: Presets, script: str | None
) -> Recipe:
    """The recipe that a run was made with."""
    name, preset = config["script"], config["preset"]
    if script not in (None, name) or preset not in presets:
        raise ValueError(
            f"{path} is of the script {name}, preset {preset}: another script's. "
            "Give a run of this one."
        )
    names = {*_NAMES, "steps", "batch_size"} & config.keys()
    options = Options(**{name: config[name] for name in names})
    return with_options(recipe_of(presets, preset), options)


def _new_map(recipe: Recipe) -> FlowMap:
    return FlowMap(recipe.network(key=jr.key(0)), time_range=(0.0, 1.0))


def config_of(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The configuration that identifies a run, and from which its map is rebuilt."""
    config = {name: getattr(options, name) for name in _NAMES}
    return config | {"steps": recipe.num_steps, "batch_size": recipe.batch_size}


def training_images(images: Images) -> dict[str, str]:
    """The images, which must be the same when a run continues."""
    return {"training_images": fingerprint((images.images, images.labels))}


def teacher_weights(teacher: FlowMap | None) -> dict[str, str | None]:
    """The teacher, which must be the same when a run continues."""
    return {"teacher_weights": None if teacher is None else fingerprint(teacher)}


def teacher_of(recipe: Recipe, options: Options, presets: Presets) -> FlowMap | None:
    """The map of a finished run that this one learns from, or `None`."""
    if recipe.teacher is None or options.teacher is None:
        return None
    config, teacher = load_map(options.teacher, presets, options.script)
    theirs = recipe_of(presets, config["preset"])
    for name in ("num_classes", "base_std"):
        own, other = getattr(recipe, name), getattr(theirs, name)
        if own != other:
            raise ValueError(
                f"--teacher: {options.teacher} is of preset {theirs.name}, whose {name} "
                f"is {other}; {recipe.name} has {own}. Give a teacher of the same flow."
            )
    return teacher


def taught_by(recipe: Recipe, teacher: AbstractFlowMap | None) -> Any:
    """What the objective learns from: the teacher's velocity, or the map itself."""
    if teacher is None or is_taught_by_map(recipe):
        return teacher
    return teacher.velocity


def is_taught_by_map(recipe: Recipe) -> bool:
    return getattr(recipe.objective, "teacher_is_map", False)


def untrained(recipe: Recipe, options: Options, teacher: FlowMap | None) -> FlowMap:
    """The map before training: a new network, or one with the teacher's weights."""
    key = jr.key(options.seed)
    net = recipe.network(key=key)
    if recipe.starts_from_teacher and teacher is not None:
        weights, settings = eqx.partition(net, eqx.is_array)
        theirs = teacher.net
        grown = theirs if is_taught_by_map(recipe) else two_times(theirs, key=key)
        given = eqx.filter(grown, eqx.is_array)
        given, own = jax.tree.leaves(given), jax.tree.leaves(weights)
        if [leaf.shape for leaf in given] != [leaf.shape for leaf in own]:
            raise ValueError(
                f"--teacher: the network in {options.teacher} is of another size, and "
                "this one starts as it. Give both the same --channels and --num-blocks."
            )
        weights = jax.tree.unflatten(jax.tree.structure(weights), given)
        net = eqx.combine(weights, settings)
    return FlowMap(net, time_range=(0.0, 1.0))
