"""Learn the flow map of the checkerboard, and sample it with Diffrax in a few jumps.

A flow carries a Gaussian to the uniform density on the eight filled squares of a 4x4
board. The teacher is the exact velocity of that flow, or one learned from samples.
Diffrax integrates it, and a network learns the flow map from the trajectories and from
the teacher. `diffeqsolve` then runs the network in 1 to 16 jumps in place of Tsit5.

    python examples/checkerboard.py                        # exact teacher, Lagrangian
    python examples/checkerboard.py --teacher learned      # learns from samples only
    python examples/checkerboard.py --method progressive   # doubles its jumps in stages
    python examples/checkerboard.py --full                 # all of these, for longer
    python examples/checkerboard.py \\
        --checkpoint out/checkerboard/exact-lagrangian.safetensors

Each run prints a table and saves a figure, a checkpoint and the numbers under `--out`.
See the README for expected numbers, times and hardware.
"""

import argparse
import json
import pathlib
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowdiffrax as fd

BASE_STD = 3**-0.5  # that of the data, so that the flow does not have to rescale
# A thousandth of the base remains in the data, which keeps the velocity bounded at t = 1.
INTERPOLANT = fd.LinearInterpolant(sigma_min=1e-3)
# Trajectories are saved on sixteenths, and on a finer grid where the squares take shape.
GRID = np.asarray([*np.arange(16) / 16, 31 / 32, 63 / 64, 1.0])
JUMPS = (1, 2, 4, 8, 16)


def make_map(config):
    """The untrained map: the identity."""
    net = fd.nn.MLP(2, scale=BASE_STD, **config["net"], key=jr.key(config["seed"]))
    return fd.FlowMap(net, time_range=(0.0, 1.0))


def make_optim(num_steps, muon_rate=0.02, adam_rate=2e-3):
    """Muon for the square matrices, Adam for the rest; warm-up and cosine decay."""

    def schedule(rate):
        return optax.warmup_cosine_decay_schedule(0, rate, num_steps // 30, num_steps)

    def label(weights):
        labels = jax.tree_util.tree_map(lambda _: "adam", weights)
        hidden = lambda flow_map: [layer.weight for layer in flow_map.net.hidden]
        return eqx.tree_at(hidden, labels, replace_fn=lambda _: "muon")

    return optax.multi_transform(
        {
            "muon": optax.contrib.muon(schedule(muon_rate)),
            "adam": optax.adam(schedule(adam_rate), b2=0.99),
        },
        label,
    )


def learn_teacher(config, steps, key, path):
    """Learns a velocity by flow matching, from samples only. Saves it for other runs."""
    wanted = {"net": config["net"], "seed": config["seed"], "steps": steps}
    if path.exists():
        found, flow_map = fd.train.load(path, make_map)
        if found == wanted:
            return flow_map.velocity
    batches = fd.data.InterpolantBatches(
        INTERPOLANT,
        fd.data.checkerboard,
        batch_size=config["batch_size"],
        base=fd.data.GaussianBase(BASE_STD),
    )
    flow_map = fd.train.fit(
        make_map(config),
        fd.FlowMatching(),
        batches,
        make_optim(steps),
        num_steps=steps,
        key=key,
    ).ema_map
    fd.train.save(path, wanted, flow_map)
    return flow_map.velocity


def solve_pool(config, teacher, key):
    """Trajectories of the teacher, integrated by Diffrax."""
    x0 = BASE_STD * jr.normal(key, (config["pool"], 2))
    ys = fd.solve_trajectories(teacher, x0, GRID, rtol=1e-4, atol=1e-4)
    return fd.data.TrajectoryBatches(GRID, ys, config["batch_size"])


def distil_lagrangian(config, teacher, steps, key):
    """Lagrangian distillation together with exact trajectories."""
    pool_key, fit_key = jr.split(key)
    batches = solve_pool(config, teacher, pool_key)
    # Jumps from the base and into the data matter most: one jump is both.
    grid = fd.times.GridTimes(GRID)
    distributions = (
        grid,
        fd.times.StartAt(grid, 0.0),
        fd.times.EndAt(grid, 1.0),
        fd.times.EndAt(fd.times.StartAt(grid)),
    )
    times = fd.times.MixedTimes(distributions, (0.24, 0.16, 0.36, 0.24))
    matching = fd.TrajectoryMatching(times, fd.weights.InverseGap(1.0))
    lagrangian = fd.LagrangianMapDistillation(
        fd.times.UniformTriangle(), fd.weights.DataEndWeight(0.5)
    )
    objective = fd.objectives.Mixture(
        (matching, lagrangian),
        shares=(0.75, 0.25),
        weights=(1.0, 0.05),
    )
    optim = make_optim(steps)
    state = fd.train.fit(
        make_map(config),
        objective,
        batches,
        optim,
        num_steps=steps,
        teacher=teacher,
        key=fit_key,
    )
    return state.ema_map


def distil_progressive(config, teacher, steps, key):
    """Progressive distillation: short jumps first, then twice as long in each stage.

    There are five stages of a quarter of the steps each. The last one repeats the longest
    jumps.
    """
    pool_key, *stage_keys = jr.split(key, 6)
    batches = solve_pool(config, teacher, pool_key)
    objective = fd.LagrangianMapDistillation(
        fd.times.DiagonalMixture(fd.times.UniformTriangle(max_gap=1 / 8), 0.25),
        fd.weights.DataEndWeight(0.5),
    )
    flow_map, longest = make_map(config), 1 / 8
    for stage_key in stage_keys:
        flow_map = fd.train.fit(
            flow_map,
            objective,
            batches,
            make_optim(steps // 4),
            num_steps=steps // 4,
            teacher=teacher,
            key=stage_key,
        ).ema_map
        longest = 2 * longest
        teacher = flow_map
        objective = fd.objectives.ProgressiveFlowMapMatching(
            times=fd.times.UniformTriangle(max_gap=min(longest, 1)),
            weight=fd.weights.InverseGap(1.0),
        )
    return flow_map


def run_solver(solver, controller, dt0, teacher, x0):
    """End points of a batch, evaluations per sample, and seconds for the batch."""

    @eqx.filter_jit
    def solve(solver, controller, teacher, x0):
        def one(x):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(teacher),
                solver,
                t0=0.0,
                t1=1.0,
                dt0=dt0,
                y0=x,
                stepsize_controller=controller,
                max_steps=1000,
                throw=False,
            )

        solution = jax.vmap(one)(x0)
        return solution.ys[:, 0], solution.stats["num_steps"]

    compiled = solve.lower(solver, controller, teacher, x0).compile()
    start = time.perf_counter()
    x1, steps = jax.block_until_ready(compiled(solver, controller, teacher, x0))
    seconds = time.perf_counter() - start
    per_step = {"FlowMapSolver": 1, "Heun": 2, "Tsit5": 6}[type(solver).__name__]
    return np.asarray(x1), float(steps.mean()) * per_step, seconds


def evaluate(flow_map, teacher, num_samples, seed):
    """A row of numbers for each method, and its samples."""
    x0 = BASE_STD * jr.normal(jr.fold_in(jr.key(seed), 1), (num_samples, 2))
    even = lambda steps: (diffrax.StepTo(jnp.linspace(0.0, 1.0, steps + 1)), None)
    adaptive = diffrax.PIDController(rtol=1e-5, atol=1e-5), 0.01
    results = {"Tsit5": run_solver(diffrax.Tsit5(), *adaptive, teacher, x0)}
    for steps in (8, 32):
        result = run_solver(diffrax.Heun(), *even(steps), teacher, x0)
        results[f"Heun, {steps} steps"] = result
    for jumps in JUMPS:
        # The one line that changes: a learned solver in place of Tsit5.
        result = run_solver(fd.FlowMapSolver(flow_map), *even(jumps), teacher, x0)
        results[f"flow map, {jumps} jump{'s' * (jumps > 1)}"] = result
    truth = results["Tsit5"][0]
    rows = []
    for name, (x1, evaluations, seconds) in results.items():
        finite = np.isfinite(x1).all(axis=1)
        kl = {
            bins: fd.metrics.histogram_kl(
                x1[finite], fd.data.checkerboard_density, bins=bins
            )
            for bins in (50, 48)
        }
        row = {"method": name, "evaluations": round(evaluations, 1)}
        row |= {"KL50": kl[50].kl, "KL48": kl[48].kl, "empty bins": kl[50].empty_bins}
        inside = finite.mean() * (1 - kl[50].outside)
        row |= {"outside %": 100 * float(1 - inside), "seconds": seconds}
        row["coupling error"] = fd.metrics.rms_distance(x1[finite], truth[finite])
        rows.append(row)
    return rows, {name: x1 for name, (x1, *_) in results.items()}, x0


def table(rows):
    """The rows as a Markdown table."""
    form = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[form(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(path, flow_map, teacher, rows, samples, x0):
    """Plots densities, trajectories, and work against precision, in one figure."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), layout="constrained")
    names = ["Tsit5", *(f"flow map, {n} jump{'s' * (n > 1)}" for n in JUMPS)]
    for axis, name in zip(axes.flat, names, strict=False):
        # All share one colour scale, up to twice the density of the filled squares.
        fd.plot.density(axis, samples[name], low=-1.1, high=1.1, peak=1.0)
        axis.set_title(name, fontsize="medium")
    ts = jnp.linspace(0.0, 1.0, 65)
    ys = fd.solve_trajectories(teacher, x0[:60], ts)
    fd.plot.trajectories(axes.flat[6], ys, color="C0", alpha=0.4, linewidth=3)
    # The map from the base to any time is one evaluation.
    to = jax.vmap(lambda t, x: flow_map(0.0, t, x), in_axes=(0, None))
    ys = jax.vmap(lambda x: to(ts, x))(x0[:60])
    fd.plot.trajectories(axes.flat[6], ys, color="C3", linewidth=0.7)
    axes.flat[6].set_title("Tsit5 (blue), one jump to each time (red)", fontsize="medium")
    curves = {}
    for row in rows:
        curves.setdefault(row["method"].split(",")[0], []).append(
            (row["evaluations"], row["KL50"])
        )
    fd.plot.work_precision(
        axes.flat[7], curves, xlabel="evaluations a sample", ylabel="KL50", floor=0.0656
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    *,
    teacher="exact",
    method="lagrangian",
    steps=3500,
    teacher_steps=3000,
    pool=131_072,
    num_samples=64_000,
    seed=0,
    out="out/checkerboard",
    checkpoint=None,
):
    """Trains, or loads a checkpoint, and evaluates. Returns the rows of the table."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # Waves of one, a half and a quarter of the board's width.
    frequencies = [BASE_STD * k for k in (1, 2, 4)]
    net = {"width": 192, "depth": 6, "frequencies": frequencies}
    config = {"teacher": teacher, "method": method, "seed": seed, "net": net}
    config |= {"steps": steps, "teacher_steps": teacher_steps}
    config |= {"batch_size": 4096, "pool": pool}
    flow_map = None
    if checkpoint is not None:
        config, flow_map = fd.train.load(checkpoint, make_map)
    name = f"{config['teacher']}-{config['method']}" + "-again" * bool(checkpoint)
    if flow_map is None:
        print(f"Training {name}: {pool:,} trajectories, {steps:,} steps ...", flush=True)
    started = time.perf_counter()
    teacher_key, fit_key = jr.split(jr.key(config["seed"]))
    velocity = fd.exact.checkerboard_velocity(INTERPOLANT, BASE_STD)
    if config["teacher"] == "learned":
        path = out / "learned-teacher.safetensors"
        velocity = learn_teacher(config, config["teacher_steps"], teacher_key, path)
    if flow_map is None:
        methods = {"lagrangian": distil_lagrangian, "progressive": distil_progressive}
        flow_map = methods[method](config, velocity, steps, fit_key)
        fd.train.save(out / f"{name}.safetensors", config, flow_map)
    minutes = (time.perf_counter() - started) / 60
    print(f"Drawing {num_samples:,} samples with each solver ...", flush=True)
    rows, samples, x0 = evaluate(flow_map, velocity, num_samples, config["seed"])
    print(f"\n{name}, {config['steps']} steps, {minutes:.1f} minutes of training\n")
    print(table(rows), "\n")
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    draw(out / f"{name}.png", flow_map, velocity, rows, samples, x0)
    print(f"The figure is {out / name}.png; numbers and checkpoint are next to it.")
    return rows


def full(**options):
    """Every teacher with every method, for longer."""
    options = {"steps": 6000, "teacher_steps": 5000} | options
    for teacher in ("exact", "learned"):
        for method in ("lagrangian", "progressive"):
            main(**options | {"teacher": teacher, "method": method})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", choices=("exact", "learned"))
    parser.add_argument("--method", choices=("lagrangian", "progressive"))
    parser.add_argument("--steps", type=int, help="default 3500, or 6000 with --full")
    parser.add_argument("--teacher-steps", type=int, help="default 3000; --full: 5000")
    parser.add_argument("--num-samples", type=int, help="default 64000")
    parser.add_argument("--pool", type=int, help="trajectories; default 131072")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--out", help="folder; default out/checkerboard")
    parser.add_argument("--checkpoint", help="sample from this file, do not train")
    parser.add_argument(
        "--full", action="store_true", help="all teachers and methods, longer"
    )
    options = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    full(**options) if options.pop("full") else main(**options)
