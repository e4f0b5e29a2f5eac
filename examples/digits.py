"""Learn to draw handwritten digits in one to four jumps, on a CPU, without a download.

    python examples/digits.py                      # under ten minutes on two CPU cores
    python examples/digits.py --steps 100          # to see it run
    python examples/digits.py --preset teacher     # a velocity alone, by flow matching
    python examples/digits.py --preset lsd         # without a teacher

A small U-Net learns the flow map from noise to 1,347 of the 1,797 images of 8x8 that
come with the package; the others are held out. `lmd` trains a teacher by flow matching,
unless `--teacher` names one, and distils it. At the end the digits are drawn by
`diffeqsolve` with `FlowMapSolver` in place of Tsit5, and then scored. The scores are the
Fréchet distance in the features of a small classifier (a proxy, not the FID), compared
with samples of Tsit5 and with held-out images, evaluations and seconds, and how many
samples lie nearer to the training images than held-out images do. You can stop it at any
time: the same command continues where it was.
"""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import flowdiffrax as fd
from flowdiffrax.images import command

STEPS, BATCH_SIZE = 1500, 128
# For a teacher and its student, which share ten minutes.
TEACHER_STEPS, DISTILLATION_STEPS, SMALL_BATCH = 1600, 1400, 64


def self_distilled():
    """The preset without a teacher; the others are variants of it."""
    return fd.images.Recipe(
        name="lsd",
        source="ours, for two CPU cores",
        data="digits",
        num_classes=10,
        label_dropout=0.1,
        base_std=1.0,
        architecture=functools.partial(
            fd.nn.UNet, shape=(8, 8, 1), channels=32, multipliers=(1, 2), num_blocks=1,
            num_classes=10, scale=0.7,
        ),
        precision="float32",
        objective=fd.LagrangianSelfDistillation(),
        optimiser=functools.partial(fd.images.adam_to_zero, 1e-3, num_steps=STEPS),
        batch_size=BATCH_SIZE,
        num_steps=STEPS,
        ema_decay=(0.998, 0.9),
        metric="none",
    )  # fmt: skip


def presets():
    """A teacher, distillation, and three kinds of self-distillation, for one network."""
    lsd = self_distilled()
    found = {"lsd": lsd, **command.siblings(lsd)}
    for name, steps in {"teacher": TEACHER_STEPS, "lmd": DISTILLATION_STEPS}.items():
        optimiser = functools.partial(lsd.optimiser, num_steps=steps)
        found[name] = dataclasses.replace(
            found[name], num_steps=steps, optimiser=optimiser, batch_size=SMALL_BATCH
        )
    return found


def load():
    """Three quarters of the images to train on, and the rest, in a fixed random order."""
    images = fd.images.digits()
    order = np.random.default_rng(0).permutation(len(images))
    cut = 3 * len(images) // 4
    return images[order[:cut]], images[order[cut:]]


def by_diffrax(flow_map, number=10):
    """Prints the largest difference between `diffeqsolve` and jumps, over all digits."""
    x0, labels = jr.normal(jr.key(1), (number, 8, 8, 1)), jnp.arange(number)
    term, solver = diffrax.ODETerm(flow_map.velocity), fd.FlowMapSolver(flow_map)
    for jumps in (1, 2, 4):
        times = diffrax.StepTo(jnp.linspace(0.0, 1.0, jumps + 1))

        @jax.jit
        @jax.vmap
        def both(x, label, jumps=jumps, times=times):
            solution = diffrax.diffeqsolve(
                term, solver, 0.0, 1.0, None, x, label, stepsize_controller=times
            )
            return solution.ys[-1], fd.sample(flow_map, x, jumps, label)

        by_solver, by_jumps = both(x0, labels)
        difference = jnp.abs(by_solver - by_jumps).max()
        print(f"FlowMapSolver in {jumps}: equal to the jumps to {difference:.1e}")


def main(line=None):
    """Does what the command line says; returns the scores."""
    options = command.parse(
        "digits", __doc__, presets(), "lmd", line, num_samples=2000, jumps=(1, 2, 4),
        report_every=50, save_every=200, grid_every=200, score_every=200,
        score_samples=500,
    )  # fmt: skip
    if options.data is not None:
        raise SystemExit("--data: the digits come with the package, and nothing is read")
    rows = command.run(options, presets(), load, teach="teacher")
    drawn = "grid" in options.do and not options.dry_run
    if drawn and jax.process_index() == 0:
        _, flow_map = command.load_map(
            options.folder, presets(), step=options.at_step, average=options.average
        )
        by_diffrax(flow_map)
    return rows


if __name__ == "__main__":
    main()
