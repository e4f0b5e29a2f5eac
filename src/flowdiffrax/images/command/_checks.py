"""Checks of the options and their files, before anything takes time."""

from collections.abc import Mapping
from typing import Any

import jax

from ..._io import import_extra
from ...flow_maps._base import AbstractFlowMap
from ...train import fingerprint
from .._recipe import Recipe
from ..scores._frechet import FeatureStatistics
from ..sets._images import Images
from ._options import Options
from ._scores import features_of_file, random_features


def check(recipe: Recipe, options: Options) -> None:
    """Checks the options by themselves, before images are read or a map is trained."""
    import_extra("matplotlib", "command", "images.command.run")
    for name, values in {
        "steps": (recipe.num_steps,),
        "batch-size": (recipe.batch_size,),
        "accumulate": (options.accumulate,),
        "report-every": (options.report_every,),
        "save-every": (options.save_every,),
        "grid-every": (options.grid_every,),
        "jumps": options.jumps,
        "num-samples": (options.num_samples,),
        "sample-batch": (options.sample_batch,),
    }.items():
        if min(values, default=0) < 1:
            raise ValueError(f"--{name} must be at least 1; got {values}")
    part, rest = divmod(recipe.batch_size, options.accumulate)
    if rest != 0:
        raise ValueError(
            f"--accumulate must divide the batch of {recipe.batch_size}; got "
            f"{options.accumulate}"
        )
    if options.all_devices and part % jax.device_count() != 0:
        raise ValueError(
            f"--all-devices: {jax.device_count()} devices do not divide {part} images at "
            "a time; change --batch-size or --accumulate"
        )
    if recipe.teacher is not None and options.teacher is None and "train" in options.do:
        # The names of recipes start with the data set; those of presets do not.
        preset = recipe.teacher.removeprefix(f"{recipe.data}-")
        raise ValueError(
            f"The preset learns from a teacher: train `--preset {preset}` first, "
            "and give its folder as --teacher."
        )
    if options.guidance != 1.0 and recipe.num_classes is None:
        raise ValueError(
            f"--guidance needs a preset with classes; {recipe.name} has none"
        )
    if not all(0 <= time < 1 for time in options.restarts):
        raise ValueError(f"--restarts must lie in [0, 1); got {options.restarts}")
    if "scores" in options.do:
        _check_features(recipe, options)


def _check_features(recipe: Recipe, options: Options) -> None:
    """Checks that the files for scoring exist, are intact, and belong to one network."""
    if options.features == "classifier":
        features = None  # trained on the images
    elif options.features == "random":
        features = random_features(shape_of(recipe))
    else:
        features = features_of_file(options.features)
    if options.statistics is None:
        return
    known = FeatureStatistics.load(options.statistics).fingerprint
    if features is not None and known not in (None, features.fingerprint):
        raise ValueError(
            f"--statistics: {options.statistics} is of the features {known}, and "
            f"--features {options.features} are {features.fingerprint}; give both of one "
            "network"
        )


def check_images(recipe: Recipe, options: Options, images: Images) -> None:
    """Checks that the images fit the preset and the scores."""
    shape = shape_of(recipe)
    if shape != images.images.shape[1:]:
        raise ValueError(f"The preset is for images of {shape}; these are {images!r}")
    needs = recipe.num_classes
    if needs is not None and images.num_classes != needs:
        raise ValueError(f"The preset has {needs} classes; these are {images!r}")
    if "scores" in options.do and options.features == "classifier":
        if images.labels is None:
            raise ValueError(
                f"--features classifier needs labels, and {images!r} has none; take "
                "`random`"
            )


def check_finished(
    options: Options, config: Mapping[str, Any], teacher: AbstractFlowMap | None
) -> None:
    """Checks that a finished run is the one that the options name."""
    if config["preset"] != options.preset:
        raise ValueError(
            f"{options.folder} has a run of `--preset {config['preset']}`, not of "
            f"{options.preset}: give that one, or another folder as --out."
        )
    taught = config.get("teacher_weights")
    if None not in (taught, teacher) and taught != fingerprint(teacher):
        raise ValueError(
            f"--teacher: {options.teacher} did not teach the map in {options.folder}. "
            "Give the folder of its teacher, or none."
        )


def shape_of(recipe: Recipe) -> tuple[int, ...]:
    """The shape of an image of the recipe's network."""
    return tuple(recipe.architecture.keywords["shape"])  # pyright: ignore
