"""The map of a run: before training, and from the folder of a finished run."""

import dataclasses
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.random as jr

from ..._io import StrPath
from ...flow_maps._base import AbstractFlowMap
from ...flow_maps._residual import FlowMap
from ...nn import two_times
from ...train import fingerprint, load
from .._recipe import Recipe
from ..sets._images import Images
from ._options import Options
from ._presets import Presets, recipe_of, with_options

FILE = "map.safetensors"


def load_map(
    folder: StrPath, presets: Presets, script: str | None = None, *, file: str = FILE
) -> tuple[dict[str, Any], FlowMap]:
    """Reads the map of a finished run, or the best map so far.

    **Arguments:**

    - `folder`: the folder of the run.
    - `presets`: the script's presets, by name: recipes, or functions that return them.
    - `script`: the name of the script that the run must be of; `None` for any.
    - `file`: `"map.safetensors"`, the map at the end of the run, or `"best.safetensors"`,
      the best map by the scores during training.

    **Returns:** the configuration of the run, and its averaged map. The configuration of
    the best map has `best`, with its step, average and score.

    **Raises:** `FileNotFoundError` if the run is not finished or not there; `ValueError`
    if it is of another script or of a preset that is not in `presets`, or if the file is
    damaged.
    """
    path = pathlib.Path(folder, file)
    if not path.is_file():
        cure = "to its end first" if file == FILE else "with `--score-every` first"
        raise FileNotFoundError(
            f"{path} is not there: train that run {cure}, with its own preset."
        )

    def make(config):
        name, preset = config["script"], config["preset"]
        if script not in (None, name) or preset not in presets:
            raise ValueError(
                f"{path} is of the script {name}, preset {preset}: another script's. "
                "Give a run of this one."
            )
        known = {field.name for field in dataclasses.fields(Options)} & config.keys()
        options = Options(**{name: config[name] for name in known})
        recipe = with_options(recipe_of(presets, preset), options)
        return FlowMap(recipe.network(key=jr.key(0)), time_range=(0.0, 1.0))

    return load(path, make)


def config_of(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The configuration that identifies a run, and from which its map is rebuilt."""
    names = ("script", "preset", "objective", "both_directions", "accumulate", "channels")
    names += ("num_blocks", "precision", "remat", "seed")
    config = {name: getattr(options, name) for name in names}
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
