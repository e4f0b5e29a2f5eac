"""Learn to draw handwritten digits in one to four jumps, without a teacher.

A small U-Net learns the flow map from noise to the 1797 images of 8x8 that come with the
package, by self-distillation; `diffeqsolve` then runs it in the place of Tsit5.

    python examples/digits.py                # five minutes on two CPU cores
    python examples/digits.py --steps 100    # to see it run

The run keeps its checkpoints, its numbers and a picture of samples now and then in
`--out`. Stop it when you like: the same command goes on where it was. At the end, the ten
digits stand in `digits.png`, drawn in 1, 2 and 4 jumps and by Tsit5, all from the same
noise; the table says how far each is from Tsit5, and at how many evaluations.
"""

import argparse
import pathlib

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax

import flowdiffrax as fd

JUMPS = (1, 2, 4)
NO_LABEL = 10


def learn(run, config, on_report):
    """The state at the end of the run, from wherever it was."""
    net = fd.nn.UNet(
        (8, 8, 1), config["channels"], (1, 2), 1, num_classes=10, scale=0.7,
        key=jr.key(config["seed"]),
    )  # fmt: skip
    source = fd.data.DeviceImages(fd.data.digits())
    interpolant = fd.LinearInterpolant()
    batches = fd.data.InterpolantBatches(interpolant, source, config["batch_size"])
    return fd.train.fit(
        fd.FlowMap(net),
        fd.LagrangianSelfDistillation(),
        # Some examples lose their label, so that the map knows digits in general too.
        fd.data.ConditionDropout(batches, null=NO_LABEL),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(optax.cosine_decay_schedule(1e-3, config["steps"])),
        ),
        num_steps=config["steps"],
        key=jr.key(config["seed"] + 1),
        run=run,
        report_every=config["report_every"],
        on_report=on_report,
    )


def solve(solver, controller, term, x0, labels):
    """Images of the labels, and the number of steps for each."""

    @jax.jit
    @jax.vmap
    def draw(x, label):
        return diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, None, x, label, stepsize_controller=controller
        )

    solution = draw(x0, labels)
    return solution.ys[:, -1], float(solution.stats["num_steps"].mean())


def main(
    *,
    steps=1000,
    channels=32,
    batch_size=128,
    report_every=50,
    grid_every=200,
    seed=0,
    out="out/digits",
):
    """Trains or goes on, then draws and compares; returns the rows of the table."""
    out = pathlib.Path(out)
    config = {
        "steps": steps, "channels": channels, "batch_size": batch_size,
        "report_every": report_every, "seed": seed,
    }  # fmt: skip
    run = fd.train.Run(out, config, save_every=2 * report_every)
    x0, labels = jr.normal(jr.key(seed + 2), (10, 8, 8, 1)), jnp.arange(10)
    samples = out / "samples"
    grids = fd.train.SampleGrids(samples, x0, labels, num_jumps=JUMPS, every=grid_every)
    flow_map = learn(run, config, grids).ema_map
    fd.train.save(out / "digits.fdx", config, flow_map)

    # The diagonal of the map is the velocity that it learned besides.
    term = diffrax.ODETerm(flow_map.velocity)
    tight = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    drawn = {"Tsit5": solve(diffrax.Tsit5(), tight, term, x0, labels)}
    truth, num_steps = drawn["Tsit5"]
    rows = [("Tsit5", 6 * num_steps, 0.0)]
    for jumps in JUMPS:
        times = diffrax.StepTo(jnp.linspace(0.0, 1.0, jumps + 1))
        name = f"{jumps} jump{'s' * (jumps > 1)}"
        solver = fd.FlowMapSolver(flow_map)
        drawn[name] = solve(solver, times, term, x0, labels)
        error = jnp.sqrt(jnp.mean((drawn[name][0] - truth) ** 2))
        rows.append((name, jumps, float(error)))
    print("| | evaluations | rms distance to Tsit5 |\n| --- | --- | --- |")
    for name, evaluations, error in rows:
        print(f"| {name} | {evaluations:.0f} | {error:.3f} |")
    _, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    pictures = jnp.stack([images for images, _ in drawn.values()])
    fd.plot.image_grid(axes, pictures, row_labels=[*drawn])
    plt.savefig(out / "digits.png", dpi=120)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in main.__kwdefaults__.items():
        name = "--" + name.replace("_", "-")
        parser.add_argument(name, type=type(default), default=default)
    main(**vars(parser.parse_args()))
