"""Every objective on equal terms: one network, one budget, one set of seeds.

All objectives train the same network with the same optimiser on the same densities, and
each may spend the same number of network evaluations. A derivative along a direction
counts as one more evaluation, and so does the teacher, even an exact one. A method that
needs fewer evaluations per example gets more steps.

    python benchmarks/compare_objectives.py               # all, three seeds
    python benchmarks/compare_objectives.py --objectives LSD MeanFlow --data mixture
    python benchmarks/compare_objectives.py --vary        # what changes the ranking
    python benchmarks/compare_objectives.py --gradients   # Lagrangian or Eulerian?

Each finished run is a line of `runs.jsonl` under `--out`. When started again, the script
makes only the missing runs. It prints the table and saves it with its figure. See
`docs/objectives/comparison.md` for numbers, times and hardware.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import NullLocator
from methods import METHODS, Method
from tqdm import tqdm

import flowdiffrax as fd

JUMPS = (1, 2, 4, 8, 16)
METRICS = {"KL50": "KL divergence of 50 x 50 bins", "coupling": "error of the coupling"}
# A thousandth of the base remains in the data, which keeps velocities bounded at t = 1.
INTERPOLANT = fd.LinearInterpolant(sigma_min=1e-3)
# The paper's rows for the checkerboard: KL50 in 1, 2, 4, 8 and 16 jumps.
PAPER = {
    "LSD": (0.086, 0.077, 0.071, 0.070, 0.071),
    "ESD": (0.098, 0.092, 0.083, 0.082, 0.075),
    "PSD": (0.146, 0.089, 0.081, 0.072, 0.069),
    "PSD, uniform": (0.111, 0.107, 0.075, 0.073, 0.068),
}


# --- densities ------------------------------------------------------------------------


class Density(NamedTuple):
    """A density to learn: its samples, the exact velocity of its flow, and its values."""

    draw: object  # (key, n) -> points
    velocity: object  # (t, x, args) -> v
    base_std: float
    size: int
    density: object = None  # of points in the plane
    box: float = 1.0


def gaussian_mixture(weights, means, stds):
    """A mixture of round Gaussians in any dimension, and its exact flow."""
    weights, means, stds = np.asarray(weights), np.asarray(means), np.asarray(stds)
    size = means.shape[1]
    mean = weights @ means
    base_std = np.sqrt(weights @ (((means - mean) ** 2).mean(axis=1) + stds**2))

    def draw(key, n):
        part_key, point_key = jr.split(key)
        part = jr.choice(part_key, len(weights), (n,), p=jnp.asarray(weights))
        noise = jr.normal(point_key, (n, size))
        return jnp.asarray(means)[part] + jnp.asarray(stds)[part][:, None] * noise

    def density(x):
        squares = ((x[..., None, :] - means) ** 2).sum(axis=-1)
        bumps = np.exp(-squares / (2 * stds**2)) / (2 * np.pi * stds**2)
        return bumps @ weights

    velocity = fd.exact.GaussianMixtureVelocity(
        weights, means, stds**2, INTERPOLANT, base_std
    )
    box = float(np.abs(means).max() + 4 * stds.max())
    return Density(draw, velocity, float(base_std), size, density, box)


def checkerboard():
    base_std = 3**-0.5
    velocity = fd.exact.checkerboard_velocity(INTERPOLANT, base_std)
    density = fd.data.checkerboard_density
    return Density(fd.data.checkerboard, velocity, base_std, 2, density)


def mixture(size=2):
    """Five Gaussians of different weights and widths: smooth, without symmetry."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5, size)) * 1.2
    weights, stds = np.asarray([0.3, 0.25, 0.2, 0.15, 0.1]), rng.uniform(0.2, 0.5, 5)
    return gaussian_mixture(weights, means, stds)


def modes():
    """Eight narrow modes on a circle, far apart."""
    angles = np.arange(8) * np.pi / 4
    means = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return gaussian_mixture(np.full(8, 1 / 8), means, np.full(8, 0.04))


def manifold():
    """A spiral of 60 narrow Gaussians: nearly a curve."""
    angles = np.linspace(0.6, 3.4 * np.pi, 60)
    means = 0.1 * angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return gaussian_mixture(np.full(60, 1 / 60), means, np.full(60, 0.03))


def tail():
    """Gaussians with the same centre and growing widths: a heavy tail."""
    stds = 0.3 * 2.0 ** np.arange(5)
    weights = np.asarray([0.5, 0.25, 0.15, 0.07, 0.03])
    return gaussian_mixture(weights, np.zeros((5, 2)), stds)


DATA = {
    "checkerboard": checkerboard,
    "mixture": mixture,
    "modes": modes,
    "manifold": manifold,
    "tail": tail,
    **{f"mixture-{size}d": functools.partial(mixture, size) for size in (8, 64)},
}


# --- objectives -----------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table: a method, with other settings or data than its own perhaps.

    `diagonal` is the share on the diagonal, if the objective cannot tell. `plug_in`
    learns from the plug-in velocity of each batch.
    """

    method: Method
    make: object = None  # () -> an objective or a mixture; by default that of the method
    diagonal: float | None = None
    plug_in: bool = False

    def objective(self):
        return (self.make or self.method.make)()


def tamed(objective):
    """Gives errors near the data less weight, since exact velocities are steep there."""
    return eqx.tree_at(lambda o: o.weight, objective, fd.weights.DataEndWeight(0.5))


def with_velocity(objective):
    """Distillation off and on the diagonal, with three rows to one."""
    both = (tamed(fd.objectives.VelocityDistillation()), objective)
    return fd.objectives.Mixture(both, (0.25, 0.75))


def of_images(objective, share, floor=1e-2):
    """The papers' times and weight for images, which rarely draw jumps from 0 to 1."""
    normal = fd.times.LogitNormal(0.4, 1.0)
    times = fd.times.DiagonalMixture(normal, share, fd.times.Diagonal(normal, start=True))
    return lambda: objective(times, fd.weights.PowerWeight(1.0, floor))


def soflow():
    """SoFlow's schedule, over the first 2,400 steps, as settings of AlphaFlow."""
    alpha = lambda step: 0.1 * 0.02 ** jnp.minimum(step / 2400, 1.0)
    return fd.objectives.Scheduled(
        lambda step: fd.objectives.AlphaFlow(mostly_diagonal(), alpha=alpha(step))
    )


def mostly_diagonal():
    return fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.75)


def distilled(name):
    """Distillation with velocities on the diagonal."""
    method = METHODS[name]
    weigh = tamed if name in ("LMD", "EMD") else lambda objective: objective
    return Row(method, lambda: with_velocity(weigh(method.make())), diagonal=0.25)


def plain(*names):
    """Rows with the methods' own settings."""
    return {name: Row(METHODS[name]) for name in names}


# A column of the figure each.
FAMILIES = {
    "from a teacher": {
        **{name: distilled(name) for name in ("LMD", "EMD", "PFMM")},
        **plain("AYF-LMD", "AYF-EMD", "CD", "sCD", "FreeFlow"),
    },
    "flow matching, Lagrangian": plain("FM", "FMM", "LSD", "TVM"),
    "Eulerian, consistency": plain("ESD", "EE", "naive Eulerian", "CT", "sCT"),
    "progressive": {
        **plain("PSD", "Shortcut", "SplitMeanFlow"),
        "PSD, uniform": Row(
            METHODS["PSD"],
            lambda: fd.objectives.ProgressiveSelfDistillation(split=None),
        ),
    },
    "mean flows": {
        **plain("MeanFlow", "improved MeanFlow", "AlphaFlow"),
        "MeanFlow, 3/4 diagonal": Row(
            METHODS["MeanFlow"], lambda: fd.objectives.MeanFlow(mostly_diagonal())
        ),
        "SoFlow": Row(METHODS["AlphaFlow"], soflow, diagonal=0.75),
    },
    "mean flows, for images": {
        f"{name}, images": Row(METHODS[name], of_images(METHODS[name].make, share, floor))
        for name, share, floor in (
            ("MeanFlow", 0.75, 1e-2),
            ("improved MeanFlow", 0.5, 1e-2),
            ("AlphaFlow", 0.25, 1e-3),
        )
    },
    "plug-in velocity": {
        f"{name}, plug-in": Row(METHODS[name], plug_in=True)
        for name in ("LSD", "MeanFlow", "CT")
    },
}
ROWS = {name: row for family in FAMILIES.values() for name, row in family.items()}


def evaluations_per_example(row):
    """Evaluations per example: one on the diagonal, the method's number off it."""
    share = row.diagonal
    if share is None:
        share = row.objective().times.num_diagonal(10_000) / 10_000
    # On the diagonal, a teacher's velocity is one more.
    on_diagonal = 2 if row.method.teacher else 1
    return share * on_diagonal + (1 - share) * row.method.evaluations


# --- one run --------------------------------------------------------------------------


NETWORKS = ("fourier", "residual", "plain", "data")


class PlainMLP(eqx.Module):
    """Plain layers on raw inputs, without residual connections or waves."""

    mlp: eqx.nn.MLP
    scale: float = eqx.field(static=True)

    def __call__(self, s, t, x, args):
        inputs = jnp.concatenate([x / self.scale, jnp.stack([s, t])])
        return self.scale * self.mlp(inputs)


class DataPrediction(eqx.Module):
    """The average velocity towards a data point that a network predicts."""

    net: fd.nn.MLP
    floor: float = 0.05  # of the time that is left

    def __call__(self, s, t, x, args):
        return (self.net(s, t, x, args) - x) / jnp.maximum(1 - s, self.floor)


def make_map(network, density, width, key):
    if network == "plain":
        mlp = eqx.nn.MLP(density.size + 2, density.size, width, 4, jax.nn.gelu, key=key)
        net = PlainMLP(mlp, density.base_std)
    else:
        # Waves of the state help in the plane; in high dimension they only add cost.
        waves = () if network == "residual" else (0.5, 1.0, 2.0)
        net = fd.nn.MLP(
            density.size, width, 5, scale=density.base_std, frequencies=waves, key=key
        )
        net = DataPrediction(net) if network == "data" else net
    return fd.FlowMap(net, time_range=(0.0, 1.0))


def teachers_of(name, density):
    """The teacher of an objective."""
    if name == "PFMM":
        return density.velocity, None
    return density.velocity if ROWS[name].method.teacher else None


@functools.cache
def training(name, data, budget, batch_size):
    """The number of steps in the budget, and the step, compiled once for all seeds."""
    row, density = ROWS[name], DATA[data]()
    steps = round(budget / evaluations_per_example(row))
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, max(steps // 30, 1), steps)
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    # Use averaged teachers where the papers do.
    decay = {"Shortcut": 0.999, "TVM": 0.99}.get(name)
    objective = row.objective()
    step = fd.train.make_step(objective, optim, teacher_decay=decay)
    create = functools.partial(
        fd.train.TrainState.create,
        optim=optim,
        objective=objective,
        teacher_decay=decay,
    )
    batches = fd.data.InterpolantBatches(
        INTERPOLANT,
        density.draw,
        batch_size,
        base=fd.data.GaussianBase(density.base_std),
        plug_in=row.plug_in,
    )
    teacher = teachers_of(name, density)
    return steps, create, lambda state: step(state, batches, teacher)


def train(name, data, options, seed):
    """The averaged map after training, and the seconds per step."""
    steps, create, step = training(name, data, options["budget"], options["batch_size"])
    map_key, train_key = jr.split(jr.key(seed))
    flow_map = make_map(options["network"], DATA[data](), options["width"], map_key)
    state, _ = step(create(flow_map, key=train_key))
    jax.block_until_ready(state.step)
    start = time.perf_counter()
    for _ in tqdm(range(1, steps), desc=f"{name}, {data}, seed {seed}", mininterval=2):
        state, info = step(state)
    if not bool(info.is_finite):
        print(f"{name} is not finite in the end; {int(state.skipped)} steps were skipped")
    return state.ema_map, (time.perf_counter() - start) / (steps - 1)


@functools.cache
def memory(name, data, network, width, batch_size):
    """Temporary memory of the gradient of a step, in MB."""
    density = DATA[data]()
    flow_map = make_map(network, density, width, jr.key(0))
    x0 = jnp.zeros((batch_size, density.size))
    paths = jax.vmap(INTERPOLANT)(x0, x0)
    teacher = teachers_of(name, density)

    objective = ROWS[name].objective()
    if isinstance(objective, fd.objectives.Scheduled):
        objective = objective.at(jnp.asarray(0))

    def loss(flow_map, paths, key):
        return fd.objectives.batch_loss(objective, flow_map, teacher, paths, key=key)[0]

    lowered = eqx.filter_jit(eqx.filter_grad(loss)).lower(flow_map, paths, jr.key(0))
    return lowered.compile().compiled.memory_analysis().temp_size_in_bytes / 1e6


@functools.cache
def reference(data, num_samples):
    """Starting points, and exact trajectories from the first few thousand."""
    density = DATA[data]()
    x0 = density.base_std * jr.normal(jr.key(123), (num_samples, density.size))
    # One more time close to 1, where exact velocities are steepest.
    ts = jnp.asarray([*np.arange(16) / 16, 0.96, 1.0])
    return x0, ts, fd.solve_trajectories(density.velocity, x0[:4000], ts)


@eqx.filter_jit
def sample(flow_map, x0, jumps):
    return jax.vmap(lambda x: fd.sample(flow_map, x, jumps))(x0)


class Euler(eqx.Module):
    """Steps of Euler's method on the diagonal of a map."""

    flow_map: fd.FlowMap

    def __call__(self, s, t, x, args):
        return self.flow_map.velocity(s, x, args)


def evaluate(name, data, flow_map, num_samples):
    """All numbers of one run, by name."""
    density, is_single = DATA[data](), ROWS[name].method.is_single
    x0, ts, ys = reference(data, num_samples)
    if name == "FM":
        flow_map = fd.FlowMap(Euler(flow_map))  # not trained off the diagonal
    numbers = {}
    for jumps in JUMPS[:1] if is_single else JUMPS:
        x1 = np.asarray(sample(flow_map, x0, jumps))
        finite = np.isfinite(x1).all(axis=1)
        numbers[f"coupling {jumps}"] = fd.metrics.rms_distance(x1[: len(ys)], ys[:, -1])
        for bins in (50, 48) if density.size == 2 else ():
            numbers[f"KL{bins} {jumps}"] = fd.metrics.histogram_kl(
                x1[finite], density.density, bins=bins, low=-density.box, high=density.box
            ).kl
    # Jumps between saved times, from the exact state. For methods that learn single
    # jumps, only the jumps that they learn.
    rng = np.random.default_rng(0)
    i, j = np.sort(rng.choice(len(ts) - 1, (len(ys), 2)), axis=1).T
    if is_single:
        i, j = (0 * i, j) if name == "FreeFlow" else (i, 0 * j + len(ts) - 2)
    rows = np.arange(len(ys))
    defects = fd.metrics.defects(
        flow_map, density.velocity, ts[i], ts[j], ys[rows, i], ys[rows, j]
    )
    return numbers | defects._asdict()


# --- all runs -------------------------------------------------------------------------


def run_all(names, data_names, networks, options, out):
    """Makes every run that is not yet in the file, and returns the lines of all runs."""
    path = out / "runs.jsonl"
    path.touch()
    # If a run was killed while writing, its last line is incomplete: make it again.
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    os.truncate(path, end)
    lines = [json.loads(line) for line in content[:end].splitlines()]
    wanted = [
        {"objective": name, "data": data, "seed": seed, "network": network, **options}
        for data in data_names
        for network in networks
        for name in names
        for seed in range(options["seeds"])
    ]
    for settings in wanted:
        settings.pop("seeds")
    done = {json.dumps(line["settings"], sort_keys=True) for line in lines}
    missing = [s for s in wanted if json.dumps(s, sort_keys=True) not in done]
    for count, settings in enumerate(missing):
        name, data = settings["objective"], settings["data"]
        print(f"run {count + 1} of {len(missing)}")
        start = time.perf_counter()
        flow_map, seconds = train(name, data, settings, settings["seed"])
        numbers = evaluate(name, data, flow_map, settings["num_samples"])
        numbers |= {
            "seconds a step": seconds,
            "minutes": (time.perf_counter() - start) / 60,
        }
        numbers["MB"] = memory(
            name, data, settings["network"], settings["width"], settings["batch_size"]
        )
        lines.append({"settings": settings, "numbers": numbers})
        # Use one write, so that a killed run leaves whole lines.
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    keys = {json.dumps(s, sort_keys=True) for s in wanted}
    return [x for x in lines if json.dumps(x["settings"], sort_keys=True) in keys]


def spread(lines, key):
    """Mean and half the range over seeds, as text."""
    values = [line["numbers"][key] for line in lines if key in line["numbers"]]
    if not values:
        return "-"
    digits = ".3f" if np.mean(values) < 10 else ".1f"
    return f"{np.mean(values):{digits}} ± {np.ptp(values) / 2:{digits}}"


def table(lines, columns, rows="objective"):
    """A Markdown table with a line for each objective, or each value of `rows`."""
    groups = {}
    for line in lines:
        groups.setdefault(line["settings"][rows], []).append(line)
    text = [f"| {rows} | " + " | ".join(columns) + " |"]
    text.append("| --- " * (len(columns) + 1) + "|")
    for name, group in groups.items():
        cells = [spread(group, column) for column in columns]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(lines, data_names, out):
    """Tables of quality, of defects and of cost for each density."""
    text = []
    for data in data_names:
        here = [line for line in lines if line["settings"]["data"] == data]
        for metric in ("KL50", "KL48", "coupling"):
            columns = [f"{metric} {jumps}" for jumps in JUMPS]
            if any(columns[0] in line["numbers"] for line in here):
                text.append(f"\n{data}: {metric} by number of jumps\n")
                text.append(table(here, columns))
        if data == "checkerboard":
            text.append("\nThe paper's own (arXiv:2505.18825, table 1)\n")
            columns = [f"KL50 {jumps}" for jumps in JUMPS]
            text += [f"| objective | {' | '.join(columns)} |", "| --- " * 6 + "|"]
            text += [
                f"| {name} | {' | '.join(f'{kl:.3f}' for kl in row)} |"
                for name, row in PAPER.items()
            ]
        text.append(f"\n{data}: defects and cost\n")
        columns = [*fd.metrics.Defects._fields, "seconds a step", "MB"]
        text.append(table(here, columns))
    text = "\n".join(text)
    print(text)
    (out / "tables.md").write_text(text + "\n")


def draw(lines, data_names, out):
    """Plots the KL on the checkerboard and other coupling errors by number of jumps.

    There is a panel for each family, with all others in grey behind it. The best three of
    a density have colours in all of its panels.
    """
    names = list(dict.fromkeys(line["settings"]["objective"] for line in lines))
    families = {
        family: shown
        for family, members in FAMILIES.items()
        if (shown := [name for name in members if name in names])
    }
    num_columns = min(len(families), 4)
    num_rows = -(-len(families) // num_columns)
    size = 2.5 * num_columns, (2.1 * num_rows + 0.3) * len(data_names)
    figure = plt.figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(data_names), squeeze=False)[:, 0]
    for part, data in zip(parts, data_names, strict=True):
        metric = "KL50" if data == "checkerboard" else "coupling"
        part.suptitle(f"{data}: {METRICS[metric]}", fontsize=11)
        panels = part.subplots(
            num_rows, num_columns, sharex=True, sharey=True, squeeze=False
        )
        curves = {name: curve(lines, name, data, metric) for name in names}
        mean = lambda name, curves=curves: np.log(curves[name][1]).mean()
        whole = [name for name in names if len(curves[name][0]) == len(JUMPS)]
        best = sorted(whole, key=mean)[:3]
        colours = dict(zip(best, ("C0", "C1", "C2"), strict=False))
        for axis in panels.ravel()[len(families) :]:
            axis.remove()
        for axis, (family, shown) in zip(panels.flat, families.items(), strict=False):
            for name in names:
                axis.loglog(*curves[name], color="0.88", linewidth=0.8, zorder=1)
            for name in colours:
                axis.loglog(*curves[name], color=colours[name], linewidth=0.8, zorder=2)
            for name in shown:
                style = {"color": colours.get(name, "0.35"), "zorder": 3}
                axis.loglog(*curves[name], "o-", markersize=3, linewidth=1.5, **style)
            axis.set_xticks(JUMPS, JUMPS)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlim(0.85, 500)
            axis.tick_params(which="both", labelsize=7)
            axis.set_title(family, fontsize=9)
            axis.set_xlabel("jumps", fontsize=8, loc="left")
            label_ends(axis, {name: curves[name] for name in shown}, colours)
    figure.savefig(out / "objectives.png", dpi=130)
    plt.close(figure)


def label_ends(axis, curves, colours):
    """Writes each name at the end of its curve, moved where two would overlap."""
    low, high = np.log(axis.get_ylim())
    height = 0.075 * (high - low)
    names = sorted(curves, key=lambda name: curves[name][1][-1])
    places = [np.log(curves[name][1][-1]) for name in names]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + height)
    places[-1:] = [min(place, high - height / 2) for place in places[-1:]]
    for index in reversed(range(len(places) - 1)):
        places[index] = min(places[index], places[index + 1] - height)
    for name, place in zip(names, places, strict=True):
        jumps, values = curves[name]
        place = {"xytext": (1.25 * jumps[-1], np.exp(place)), "va": "center"}
        text = name.replace("improved MeanFlow", "iMeanFlow").split(", images")[0]
        colour = colours.get(name, "0.2")
        axis.annotate(
            text, (jumps[-1], values[-1]), fontsize=7, color=colour, zorder=4, **place
        )


def curve(lines, name, data, metric):
    """The numbers of jumps, and the mean over seeds at each of them."""
    wanted = {"objective": name, "data": data}
    group = [
        line["numbers"] for line in lines if wanted.items() <= line["settings"].items()
    ]
    jumps = [n for n in JUMPS if group and f"{metric} {n}" in group[0]]
    return jumps, [np.mean([g[f"{metric} {n}"] for g in group]) for n in jumps]


# --- why Lagrangian distillation trains faster ----------------------------------------


def gradient_statistics(name, data, flow_map, options, key, num_batches=32):
    """The norm of the mean gradient, and the noise of a batch divided by that norm."""
    density = DATA[data]()
    teacher = teachers_of(name, density)
    objective = ROWS[name].objective()
    if isinstance(objective, fd.objectives.Mixture):
        objective = objective.objectives[1]  # the diagonal is the same for both
    batches = fd.data.InterpolantBatches(
        INTERPOLANT,
        density.draw,
        options["batch_size"],
        base=fd.data.GaussianBase(density.base_std),
    )

    @eqx.filter_jit
    def gradient(flow_map, key):
        batch_key, loss_key = jr.split(key)
        paths, _ = batches(batch_key)
        loss = lambda m: fd.objectives.batch_loss(
            objective, m, teacher, paths, key=loss_key
        )[0]
        leaves = jax.tree_util.tree_leaves(eqx.filter_grad(loss)(flow_map))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    each = jnp.stack([gradient(flow_map, k) for k in jr.split(key, num_batches)])
    mean = each.mean(axis=0)
    noise = jnp.sum(each.var(axis=0, ddof=1))
    # Noise makes the mean of finitely many batches longer than the true mean.
    norm = jnp.sqrt(jnp.maximum(jnp.sum(mean**2) - noise / num_batches, 0))
    return float(norm), float(jnp.sqrt(noise) / jnp.maximum(norm, 1e-12))


def compare_gradients(pair, data, options, out):
    """Compares Lagrangian and Eulerian gradients at the same maps, along runs of both."""
    lines = []
    for trained_by, share, seed in itertools.product(
        pair, (0.02, 0.1, 0.3, 1.0), range(options["seeds"])
    ):
        part = {**options, "budget": options["budget"] * share}
        flow_map, _ = train(trained_by, data, part, seed)
        row = f"{trained_by}, {share:.0%}"
        numbers = {"coupling 1": evaluate(trained_by, data, flow_map, 4000)["coupling 1"]}
        for name in pair:
            norm, noise = gradient_statistics(name, data, flow_map, options, jr.key(9))
            numbers |= {f"norm of {name}": norm, f"noise / norm of {name}": noise}
        lines.append({"settings": {"trained by, share": row}, "numbers": numbers})
    text = table(lines, list(lines[0]["numbers"]), rows="trained by, share")
    print(text)
    (out / f"gradients-{'-'.join(pair)}-{data}.md").write_text(text + "\n")
    return lines


def main(
    *,
    objectives=tuple(ROWS),
    data=("checkerboard", "mixture"),
    networks=("fourier",),
    budget=20_000,
    batch_size=1024,
    width=128,
    seeds=3,
    num_samples=64_000,
    gradients=False,
    vary=False,
    out="out/objectives",
):
    """Makes missing runs, prints the tables, saves the figure. Returns all numbers."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    options = {"budget": budget, "batch_size": batch_size, "width": width}
    if gradients:
        options |= {"network": networks[0], "seeds": seeds}
        return [
            compare_gradients(pair, name, options, out)
            for name in data
            for pair in (("LMD", "EMD"), ("LSD", "ESD"))
        ]
    options |= {"num_samples": num_samples, "seeds": seeds}
    if vary:
        objectives = (
            "LSD", "ESD", "PSD", "improved MeanFlow", "LMD", "EMD"
        )  # fmt: skip
        data = ("modes", "manifold", "tail", "mixture", "mixture-8d", "mixture-64d")
        lines = run_all(objectives, data, ("fourier",), options, out)
        lines += run_all(objectives, ("mixture",), ("residual", "plain"), options, out)
        for network in ("residual", "plain"):
            here = [line for line in lines if line["settings"]["network"] == network]
            print(f"\n{network} network, mixture\n")
            print(table(here, [f"coupling {jumps}" for jumps in JUMPS]))
        lines = [x for x in lines if x["settings"]["network"] == "fourier"]
    else:
        lines = run_all(objectives, data, networks, options, out)
    report(lines, data, out)
    draw(lines, data, out)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", choices=ROWS, metavar="NAME")
    parser.add_argument("--data", nargs="+", choices=DATA)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--budget", type=int, help="evaluations per row; default 20000")
    parser.add_argument("--batch-size", type=int, help="default 1024")
    parser.add_argument("--width", type=int, help="of the network; default 128")
    parser.add_argument("--seeds", type=int, help="number of seeds; default 3")
    parser.add_argument("--num-samples", type=int, help="default 64000")
    parser.add_argument("--gradients", action="store_true", default=None)
    parser.add_argument("--vary", action="store_true", default=None)
    parser.add_argument("--out", help="folder; default out/objectives")
    main(**{k: v for k, v in vars(parser.parse_args()).items() if v is not None})
