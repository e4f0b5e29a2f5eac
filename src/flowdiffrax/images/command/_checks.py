"""Checks of the options and their files, before anything takes time."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..._io import import_extra
from ...flow_maps._base import AbstractFlowMap
from ...train import fingerprint
from ...train._json import differences
from .._recipe import Recipe
from ..scores._frechet import FeatureStatistics
from ..sets._images import Images
from ._data import training_header
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
        "keep": (options.keep,),
        "grid-every": (options.grid_every,),
        "score-every": (1 if options.score_every is None else options.score_every,),
        "score-samples": (options.score_samples,),
        "jumps": options.jumps,
        "num-samples": (options.num_samples,),
        "sample-batch": (options.sample_batch,),
    }.items():
        if min(values, default=0) < 1:
            raise ValueError(f"--{name} must be at least 1; got {values}")
    if options.score_every is not None and options.score_every % options.report_every:
        raise ValueError(
            f"--score-every must be a multiple of --report-every, {options.report_every};"
            f" got {options.score_every}"
        )
    if options.dry_run and "train" not in options.do:
        raise ValueError("--dry-run describes training, which --do leaves out")
    if "train" in options.do and (options.at_step, options.average) != (None, None):
        raise ValueError(
            "--at-step and --average are for a run that was trained before; leave "
            "`train` out of --do"
        )
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
    taught = recipe.teacher is None or options.teacher is not None or options.dry_run
    if not taught and "train" in options.do:
        # The names of recipes start with the data set; those of presets do not.
        preset = str(recipe.teacher).removeprefix(f"{recipe.data}-")
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
    if options.ode is not None and not options.ode > 0:
        raise ValueError(f"--ode must be a positive tolerance; got {options.ode}")
    if options.teacher is not None and recipe.teacher is None:
        raise ValueError(
            f"--teacher: {recipe.name} learns without a teacher; give an --objective or "
            "a preset that learns from one"
        )
    # Training would end in the first folder that cannot be made, after the images.
    there = next(
        path for path in (options.folder, *options.folder.parents) if path.exists()
    )
    if not there.is_dir():
        raise ValueError(f"--out: {there} is a file; give a folder")
    if needs_features(options):
        _check_features(recipe, options)


def needs_features(options: Options) -> bool:
    """Whether something is scored, during training or afterwards."""
    curves = options.score_every is not None and "train" in options.do
    return curves or "scores" in options.do


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


def check_data(recipe: Recipe, options: Options) -> int | None:
    """Checks what files of images say of themselves, before they are read.

    Returns the number of training images, if it is known.
    """
    path = options.data
    if path is None:
        return None
    if not path.exists():
        # The loader of a data set says where to get it, and is called in any other case.
        if options.dry_run or path.suffix in (".npz", ".npy"):
            raise FileNotFoundError(f"--data: {path} is not there")
        return None
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"--data: the folder {path} is empty")
    found = training_header(path)
    if found is None:
        return None
    header, number = found
    shape = list(header.shape[1:])
    if header.dtype != np.uint8:
        raise ValueError(f"--data: images must be uint8; {path} has {header.dtype}")
    # Grey images may lack the axis of channels.
    own = list(shape_of(recipe))
    if own not in (shape, [*shape, 1]):
        raise ValueError(
            f"--data: the preset is for images of {tuple(own)}; those in {path} are "
            f"{tuple(shape)}"
        )
    if recipe.num_classes is not None and not header.has_labels:
        raise ValueError(
            f"--data: the preset has {recipe.num_classes} classes, and {path} no labels"
        )
    return number


def check_same_run(options: Options, config: Mapping[str, Any]) -> None:
    """Checks that a folder that has a run already has this one, before images are read.

    The fingerprint of the images is compared later.
    """
    path = options.folder / "config.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        return  # `Run` says what is wrong.
    own = json.loads(json.dumps(config))
    found = {name: value for name, value in found.items() if name in own}
    if found != own:
        raise ValueError(
            f"--out: {options.folder} has a run with other options: "
            f"{differences(found, own)}. Use another folder, or the options of that run."
        )


def check_images(recipe: Recipe, options: Options, images: Images) -> None:
    """Checks that the images fit the preset and the scores."""
    shape = shape_of(recipe)
    if shape != images.images.shape[1:]:
        raise ValueError(f"The preset is for images of {shape}; these are {images!r}")
    needs = recipe.num_classes
    if needs is not None and images.num_classes != needs:
        raise ValueError(f"The preset has {needs} classes; these are {images!r}")
    if needs_features(options) and options.features == "classifier":
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
