"""The cost of an image model's step, by resolution, channels, batch and objective.

    python benchmarks/scaling.py              # twenty minutes on two CPU cores
    python benchmarks/scaling.py --quick      # three objectives, small images

One setting is varied at a time around a U-Net of 32 channels on 32x32x3 and a batch of
16. Seconds are the median over `--rounds` in which the step of every objective runs once,
in random order. Memory is the compiler's temporary memory, in addition to weights,
averages and optimiser. Tables, numbers and the figure are written under `--out`. Settings
that are already in `scaling.json` are not measured again.
"""

import argparse
import json
import pathlib
import random
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowdiffrax as fd

OBJECTIVES = {
    "flow matching": fd.FlowMatching(),
    "LMD": fd.LagrangianMapDistillation(),
    "LSD": fd.LagrangianSelfDistillation(),
    "PSD": fd.objectives.ProgressiveSelfDistillation(),
    "improved MeanFlow": fd.objectives.ImprovedMeanFlow(),
}
BASE = {"resolution": 32, "channels": 32, "batch": 16}
VARIED = {
    "resolution": (8, 16, 32, 64),
    "channels": (16, 32, 64),
    "batch": (4, 16, 64),
}
QUICK = {"resolution": (8, 16), "channels": (8, 16), "batch": (4, 8)}


def settings(varied):
    """All settings, each once, including the base."""
    found = []
    for name, values in varied.items():
        found += [{**BASE, name: value} for value in values]
    return [dict(items) for items in dict.fromkeys(tuple(s.items()) for s in found)]


def make_step(objective, setting):
    """A function that runs a compiled step, its temporary memory, and its FLOPs."""
    size = setting["resolution"]
    shape, coarsest = (size, size, 3), size // 4
    net = fd.nn.UNet(
        shape, setting["channels"], (1, 2, 2), 1, attention=(coarsest,), key=jr.key(0)
    )
    flow_map, optim = fd.FlowMap(net), optax.adam(1e-3)
    state = fd.train.TrainState.create(
        flow_map, optim, key=jr.key(1), objective=objective
    )
    images = np.random.default_rng(0).integers(0, 256, (256, *shape), np.uint8)
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), fd.images.DeviceImages(images), setting["batch"]
    )
    teacher = None
    if isinstance(objective, fd.LagrangianMapDistillation):
        teacher = jax.tree_util.tree_map(
            lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, flow_map
        ).velocity
    step = fd.train.make_step(objective, optim)
    arrays, rest = eqx.partition((state, batches, teacher), eqx.is_array)
    run = lambda arrays: eqx.filter(step(*eqx.combine(arrays, rest))[0], eqx.is_array)
    compiled = jax.jit(run).lower(arrays).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    flops = compiled.cost_analysis()["flops"] / 1e9
    return lambda: jax.block_until_ready(compiled(arrays)), memory, flops


def measure(setting, names, rounds):
    """A row for each objective. They run in turn, in random order."""
    steps, rows, seconds = [], [], []
    for name in names:
        step, memory, flops = make_step(OBJECTIVES[name], setting)
        step()
        steps.append(step)
        seconds.append([])
        rows.append({**setting, "objective": name, "memory": memory, "gflops": flops})
    for _ in range(rounds):
        for index in random.sample(range(len(rows)), len(rows)):
            start = time.perf_counter()
            steps[index]()
            seconds[index].append(time.perf_counter() - start)
    for row, all_ in zip(rows, seconds, strict=True):
        row["seconds"] = float(np.median(all_))
        print(row, flush=True)
    return rows


def table(rows, name, unit):
    """A table with a row for each setting and a column for each objective."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    lines = [f"\n{unit}\n", f"| | {' | '.join(objectives)} |"]
    lines.append("| --- " * (1 + len(objectives)) + "|")
    groups = {}
    for row in rows:
        what = f"{row['resolution']}x{row['resolution']}, {row['channels']} channels, "
        groups.setdefault(f"{what}batch {row['batch']}", []).append(row[name])
    for what, values in groups.items():
        lines.append(f"| {what} | {' | '.join(f'{value:.3g}' for value in values)} |")
    return "\n".join(lines)


def draw(rows, varied, path):
    """Plots seconds above and memory below, with a column for each varied setting."""
    _, axes = plt.subplots(
        2, len(varied), figsize=(11, 6), sharey="row", layout="constrained"
    )
    for column, (name, values) in enumerate(varied.items()):
        others = {key: value for key, value in BASE.items() if key != name}
        for objective in dict.fromkeys(row["objective"] for row in rows):
            mine = [
                row for row in rows
                if row["objective"] == objective
                and all(row[key] == value for key, value in others.items())
            ]  # fmt: skip
            mine.sort(key=lambda row: row[name])
            for axis, number in zip(axes[:, column], ("seconds", "memory"), strict=True):
                points = [(row[name], row[number]) for row in mine]
                axis.loglog(*zip(*points, strict=True), "o-", ms=4, label=objective)
        for axis in axes[:, column]:
            axis.set_xticks(values, values)
            axis.minorticks_off()
            axis.set_xlabel(name)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("temporary memory, MiB")
    axes[0, 0].legend(fontsize="small")
    plt.savefig(path, dpi=90)


def main(options):
    options.out.mkdir(parents=True, exist_ok=True)
    varied = QUICK if options.quick else VARIED
    if options.quick:
        BASE.update(resolution=8, channels=8, batch=4)
    names = list(OBJECTIVES)[:: 2 if options.quick else 1]
    found = options.out / "scaling.json"
    rows = json.loads(found.read_text()) if found.exists() else []
    for setting in settings(varied):
        found_here = {row["objective"] for row in rows if setting.items() <= row.items()}
        if not found_here >= {*names}:
            rows = [row for row in rows if not setting.items() <= row.items()]
            rows += measure(setting, names, options.rounds)
            found.write_text(json.dumps(rows, indent=1))
        jax.clear_caches()  # programs of this size can exhaust system limits
    asked = settings(varied)
    rows = [
        row for row in rows
        if row["objective"] in names and any(s.items() <= row.items() for s in asked)
    ]  # fmt: skip
    text = table(rows, "seconds", "Seconds a step")
    text += "\n" + table(rows, "memory", "Temporary memory, MiB")
    text += "\n" + table(rows, "gflops", "GFLOPs a step")
    print(text)
    (options.out / "scaling.md").write_text(text + "\n")
    draw(rows, varied, options.out / "scaling.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default="out/scaling")
    main(parser.parse_args())
