"""Training with the recipe that the options name."""

import dataclasses
from typing import Any

import jax.random as jr

from ...data import StreamBatches
from ...flow_maps._base import AbstractFlowMap
from ...train import DataParallel, Run, TrainState, fit
from .._device import DeviceImages
from .._recipe import Recipe
from .._sample_grids import SampleGrids
from .._score_curves import ScoreCurves
from ..sets._images import Images
from ._maps import taught_by
from ._options import Options
from ._samplers import noise
from ._scores import Scorer


def train(
    recipe: Recipe,
    options: Options,
    flow_map: AbstractFlowMap,
    teacher: AbstractFlowMap | None,
    images: Images,
    scorer: Scorer,
    run: Run,
) -> TrainState:
    """Trains, or continues training; does nothing if the run is finished."""
    x0, labels = noise(recipe, 16, images, options.seed)
    calls: list[Any] = [
        SampleGrids(
            options.folder / "samples", x0, labels, num_jumps=options.jumps,
            every=options.grid_every,
        )
    ]  # fmt: skip
    every = options.score_every
    # The features may take minutes. Without a step to score, they are not needed.
    if every and (run.newest_step or 0) // every < recipe.num_steps // every:
        x0, labels = noise(recipe, options.score_samples, images, options.seed)
        curves = ScoreCurves(
            options.folder, x0, labels, reference=scorer.reference,
            features=scorer.features, held_out=scorer.held_out(options.score_samples),
            seed=options.seed, num_jumps=options.jumps, batch_size=options.sample_batch,
            every=every, config=run.config,
        )  # fmt: skip
        calls.append(curves)
    return fit(
        flow_map,
        recipe.objective,
        batches_of(recipe, options, images),
        recipe.optim(),
        num_steps=recipe.num_steps,
        teacher=taught_by(recipe, teacher),
        ema_decay=recipe.ema_decay,
        accumulate=options.accumulate,
        parallel=DataParallel() if options.all_devices else None,
        run=run,
        report_every=options.report_every,
        on_report=calls,
        key=jr.fold_in(jr.key(options.seed), 1),
    )


def batches_of(recipe: Recipe, options: Options, images: Images) -> Any:
    """Batches of images on the device, or read ahead on the host."""
    size = recipe.batch_size // options.accumulate
    if not options.stream:
        return recipe.batches(images, size)
    if recipe.num_classes is None:
        images = dataclasses.replace(images, labels=None)

    def make(batch):
        on_device = DeviceImages(
            *batch, flip=recipe.flip, augmentation=recipe.augmentation, draw=False
        )
        return recipe.batches(on_device, size)

    return StreamBatches(images, size, make)
