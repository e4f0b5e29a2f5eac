"""Flow maps of CIFAR-10: train, distil, sample, score.

    python examples/cifar10.py --preset smoke
    python examples/cifar10.py --preset teacher --data cifar-10-binary.tar.gz
    python examples/cifar10.py --preset lmd --data cifar-10-binary.tar.gz \\
        --teacher out/cifar10-teacher \\
        --features pt_inception-2015-12-05-6726825d.safetensors
    python examples/cifar10.py --preset lsd --data cifar-10-binary.tar.gz \\
        --precision bfloat16 --accumulate 4 --num-samples 50000

Presets are the papers' runs, listed with their costs in `docs/recipes.md`. `smoke` is a
small network that takes five minutes on a CPU; without `--data`, it trains on half of a
set of 180 emoji. Everything is saved in the folder of the run: checkpoints, numbers,
pictures of samples (`samples/`), the map (`map.safetensors`), samples by every sampler
(`samples.png`), their scores (`scores.jsonl`), and, except for `smoke`, images taken to
noise and back (`inversion.png`).
Start it again with the same options to continue. Give it the options of a finished run
with `--do scores` to score that run with other options. `convert_weights.py` converts the
published weights of the features.
"""

import dataclasses
import functools
import pathlib

import flowdiffrax as fd
from flowdiffrax.images import command

EMOJI = pathlib.Path(__file__).parents[1] / "tests/files/twemoji-180.npz"


def smoke():
    """Self-distillation of a small U-Net."""
    recipe = fd.images.recipe("cifar10-lsd")
    return dataclasses.replace(
        recipe,
        name="smoke",
        source="cifar10-lsd, made small",
        architecture=functools.partial(
            fd.nn.UNet, shape=(32, 32, 3), channels=32, multipliers=(1, 2, 2),
            num_blocks=1, attention=(8,), scale=0.7,
        ),
        objective=fd.LagrangianSelfDistillation(),
        optimiser=functools.partial(fd.images.adam_to_zero, 1e-3, num_steps=400),
        base_std=1.0,
        batch_size=16,
        num_steps=400,
        ema_decay=(0.99,),
        figures={},
        notes=("To see that everything runs. Its images are not good.",),
    )  # fmt: skip


def presets():
    """The papers' runs on this data set, named without the prefix, and `smoke`."""
    return {"smoke": smoke, **command.published("cifar10-")}


def load(options):
    """Images to train on, and others to compare with."""
    if options.data is None:
        images = fd.images.load_images(EMOJI)
        return images[::2], images[1::2]
    return command.load_split(
        options.data, fd.images.cifar10, checksums=options.checksums
    )


def main(line=None):
    """Does what the command line says; returns the scores."""
    short = dict(
        report_every=20, save_every=100, grid_every=100, jumps=(1, 2, 4), ode=None,
        num_samples=200, sample_batch=50, features="random",
        do=("train", "grid", "scores"),
    )  # fmt: skip
    options = command.parse(
        "cifar10", __doc__, presets(), "smoke", line, own={"smoke": short}
    )
    needed = not options.dry_run and options.preset != "smoke"
    if options.data is None and needed:
        raise SystemExit("--data is needed: the archive, or its folder; see docs/data.md")
    return command.run(options, presets(), lambda: load(options))


if __name__ == "__main__":
    main()
