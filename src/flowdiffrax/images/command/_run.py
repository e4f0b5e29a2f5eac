"""The whole command: checks, training, samples, scores."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from ...train import Run, save
from .._recipe import Recipe
from ..sets._images import Images
from ._checks import (
    check,
    check_data,
    check_finished,
    check_images,
    check_same_run,
)
from ._dry_run import dry_run
from ._maps import (
    FILE,
    config_of,
    load_map,
    teacher_of,
    teacher_weights,
    training_images,
    untrained,
)
from ._options import Options
from ._pictures import grid, inversion
from ._presets import Presets, recipe_of, with_options
from ._scores import Scorer, score, table
from ._train import train


def run(
    options: Options,
    presets: Presets,
    load: Callable[[], tuple[Images, Images]],
    *,
    teach: str | None = None,
) -> list[dict[str, Any]]:
    """Does what the options ask for: trains, draws samples, scores them, inverts them.

    All files are written to `options.folder`. A run that was stopped continues from its
    newest checkpoint. Mistakes in the options, the files or the images end the program
    with one line, before anything takes time. With `--dry-run`, it only checks and prints
    the run, and what a step costs.

    **Arguments:**

    - `options`: the options, from [`flowdiffrax.images.command.parse`][].
    - `presets`: the presets by name: recipes, or functions that return them. Use a
      function for a recipe that has arrays, such as a learned weight: with
      `--distributed`, the processes must join before JAX starts. The network's `shape`
      must be a keyword of `recipe.architecture`. If `num_steps` is a keyword of
      `recipe.optimiser`, `--steps` changes it too.
    - `load`: a function that returns the images to train on, and others to compare with.
      It is called after all checks of the options.
    - `teach`: the preset of the teacher. If the run needs a teacher and the options name
      none, this one is trained first, in the folder `teacher` of the run. `None` to
      require `--teacher`.

    **Returns:** the scores, a row for each sampler and one for the held-out images; empty
    if there is nothing to score.

    **Raises:** `SystemExit`, with the mistake in one line.
    """
    with _in_one_line():
        _join(options)
        recipe = with_options(recipe_of(presets, options.preset), options)
    untaught = recipe.teacher is not None and options.teacher is None
    if teach is not None and untaught and not options.dry_run:
        options = _taught(recipe, options, presets, load, teach)
    with _in_one_line():
        check(recipe, options)
        num_images = check_data(recipe, options)
        teacher = teacher_of(recipe, options, presets)
        if "train" in options.do:
            config = config_of(recipe, options)
            check_same_run(options, config | teacher_weights(teacher))
            if options.dry_run:
                print(recipe, dry_run(recipe, options, teacher, num_images), sep="\n")
                return []
            flow_map = untrained(recipe, options, teacher)
        else:
            config, flow_map = load_map(
                options.folder, presets, options.script,
                step=options.at_step, average=options.average,
            )  # fmt: skip
            check_finished(options, config, teacher)
        images, held_out = load()
        check_images(recipe, options, images)
        folder = None
        if "train" in options.do:
            config |= training_images(images) | teacher_weights(teacher)
            folder = Run(
                options.folder, config, save_every=options.save_every, newest=options.keep
            )
    print(recipe, f"Images\n  {images!r}\n  {held_out!r}, held out\n", sep="\n")
    scorer = Scorer(options, images, held_out)
    if folder is not None:
        state = train(recipe, options, flow_map, teacher, images, scorer, folder)
        if jax.process_index() == 0:
            save(options.folder / FILE, config, state.ema_map)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the map is written")
        config, flow_map = load_map(options.folder, presets, options.script)
    if jax.process_index() > 0:
        return []
    if "grid" in options.do:
        grid(recipe, options, flow_map, teacher, images)
    rows = []
    if "scores" in options.do:
        rows = score(recipe, options, config, flow_map, teacher, scorer)
        print(table(rows))
    if "inversion" in options.do:
        inversion(recipe, options, flow_map, held_out)
    print(f"All of it is in {options.folder}")
    return rows


def _taught(
    recipe: Recipe,
    options: Options,
    presets: Presets,
    load: Callable[[], tuple[Images, Images]],
    teach: str,
) -> Options:
    """Trains a teacher in the run's own folder; returns options that name it."""
    own = options.folder / "teacher"
    taught = dataclasses.replace(options, teacher=own)
    if "train" not in options.do:
        return taught if (own / FILE).is_file() else options
    with _in_one_line():
        check(recipe, taught)
    # Use the same options, and save in the folder that they name.
    changes = dict(preset=teach, objective=None, both_directions=False)
    train_it = dict(teacher=None, out=own, do=("train",), score_every=None)
    run(dataclasses.replace(options, **changes, **train_it), presets, load)
    return taught


@contextlib.contextmanager
def _in_one_line():
    """On an error, ends the program with its message and no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        # The loaders name their argument. Name the option here instead.
        message = str(error).replace("`checksums=False`", "`--no-checksums`")
        raise SystemExit(" ".join(message.split())) from error


def _join(options: Options) -> None:
    """Joins the other processes, if there are any. Call it before JAX starts."""
    if not options.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            options.coordinator, options.num_processes, options.process_id
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: {error} Outside SLURM, Open MPI and TPUs, give "
            "--coordinator, --num-processes and --process-id."
        ) from error
