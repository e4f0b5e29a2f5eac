"""Small image models on a CPU: a teacher and four ways to a flow map, at equal cost.

    python benchmarks/images.py --data digits
    python benchmarks/images.py --data fashion-mnist --folder DIR

Each method trains the same U-Net, from the same seed, for as many steps as fit into the
FLOPs of `--budget` steps of the teacher's flow matching. FLOPs are those that the
compiler reports for the step. The distillation needs its teacher's training in addition.
Then 2,000 images are drawn in 1, 2, 4 and 8 jumps and scored. The scores are the Fréchet
distance in the features of a classifier trained on the same images (a proxy, not the
FID), the kernel distance, the sliced Wasserstein distance of pixels, the rms distance to
the samples of Tsit5 from the same noise with the teacher's velocity, and the share of
samples that lie nearer to a training image than held-out images do.

Trained maps are kept in `--out`, and not trained again. The script also writes the
tables, with the mean over seeds and half their range, all numbers, and the figure with
samples there.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

import equinox as eqx
import jax
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

import flowdiffrax as fd
from flowdiffrax.images.command import siblings
from flowdiffrax.images.command._samplers import by_jumps, by_tsit5, draw_all, noise
from flowdiffrax.images.command._scores import rms

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import digits  # noqa: E402

JUMPS = (1, 2, 4, 8)
METHODS = ("lmd", "lsd", "psd", "improved-meanflow")
NUMBERS = {
    "frechet": "Fréchet, proxy",
    "kernel": "kernel distance",
    "sliced": "sliced Wasserstein",
    "coupling": "to the teacher's Tsit5, rms",
}


def fashion():
    """As for the digits, but at 28x28, with one more resolution and half the channels."""
    return dataclasses.replace(
        digits.self_distilled(),
        data="fashion_mnist",
        batch_size=32,
        architecture=functools.partial(
            fd.nn.UNet, shape=(28, 28, 1), channels=16, multipliers=(1, 2, 2),
            num_blocks=1, num_classes=10, scale=0.7,
        ),
    )  # fmt: skip


def load(options):
    """Returns presets, training images, and held-out images."""
    if options.data == "digits":
        lsd, (train, test) = digits.self_distilled(), digits.load()
    else:
        read = functools.partial(fd.images.fashion_mnist, options.folder)
        lsd, train, test = fashion(), read("train"), read("test")
    return {"lsd": lsd, **siblings(lsd)}, train, test


# --- training -------------------------------------------------------------------------


def map_path(options, method, seed):
    return options.out / f"{method}-{seed}.safetensors"


def load_map(options, presets, method, seed):
    """The configuration of a run, and its averaged map."""

    def make(config):
        del config
        return fd.FlowMap(presets[method].network(key=jr.key(0)), time_range=(0.0, 1.0))

    return fd.train.load(map_path(options, method, seed), make)


def flops_of(recipe, images, teacher):
    """The FLOPs of one compiled step."""
    optim, decay = recipe.optim(), recipe.ema_decay
    step = fd.train.make_step(recipe.objective, optim, ema_decay=decay)
    state = fd.train.TrainState.create(
        fd.FlowMap(recipe.network(key=jr.key(0)), time_range=(0.0, 1.0)),
        optim,
        key=jr.key(0),
        objective=recipe.objective,
        ema_decay=decay,
    )
    inputs = state, recipe.batches(images), teacher
    arrays, rest = eqx.partition(inputs, eqx.is_array)
    run = lambda arrays: eqx.filter(step(*eqx.combine(arrays, rest)), eqx.is_array)
    return jax.jit(run).lower(arrays).compile().cost_analysis()["flops"]


def train(options, presets, images, method, seed):
    """Trains one method for its share of the budget, and writes the map."""
    recipe, key = presets[method], jr.key(seed)
    net, teacher = recipe.network(key=key), None
    if recipe.teacher is not None:
        _, velocity = load_map(options, presets, recipe.teacher, seed)
        teacher, net = velocity.velocity, fd.nn.two_times(velocity.net, key=key)
    flops = flops_of(recipe, images, teacher)
    steps = options.budget
    if method != "teacher":
        config, _ = load_map(options, presets, "teacher", seed)
        steps = round(options.budget * config["flops"] / flops)
    print(f"{method}, seed {seed}: {steps} steps of {flops / 1e9:.2f} GFLOPs")
    state = fd.train.fit(
        fd.FlowMap(net, time_range=(0.0, 1.0)),
        recipe.objective,
        recipe.batches(images),
        recipe.optimiser(num_steps=steps),
        num_steps=steps,
        teacher=teacher,
        ema_decay=recipe.ema_decay,
        key=jr.fold_in(key, 1),
        report_every=50,
    )
    config = {"steps": steps, "flops": flops, "budget": options.budget}
    fd.train.save(map_path(options, method, seed), config, state.ema_map)


# --- scores ---------------------------------------------------------------------------


def measure(options, presets, images, held_out, features, reference, seed):
    """Scores of every method by number of jumps, and the first samples."""
    inputs = noise(presets["lsd"], options.num_samples, images, seed)
    _, teacher = load_map(options, presets, "teacher", seed)
    samplers = {("teacher", "Tsit5"): by_tsit5(teacher.velocity, 1e-3)}
    for method in options.methods:
        config, flow_map = load_map(options, presets, method, seed)
        for jumps in JUMPS:
            samplers[method, jumps] = by_jumps(flow_map, jumps)
    rows, pictures, exact = [], {}, None
    for (method, jumps), draw in samplers.items():
        samples, calls, seconds = draw_all(draw, *inputs, 250)
        exact = samples if exact is None else exact
        scores = fd.images.score_images(samples, reference, features, seed=seed)
        near = fd.images.nearest_neighbours(samples, images.images, held_out.images)
        config, _ = load_map(options, presets, method, seed)
        rows.append(
            {
                "method": method,
                "jumps": jumps,
                "seed": seed,
                "steps": config["steps"],
                "evaluations": calls,
                "seconds": seconds,
                "near": near.share,
                "coupling": rms(samples, exact),
                **scores.as_dict(),
            }
        )
        pictures[method, jumps] = samples[:20]
        print(f"{method}, {jumps}, seed {seed}: {scores}", flush=True)
    return rows, pictures


def by_seed(rows, name):
    """The mean and half the range over seeds, by method and number of jumps."""
    found = {}
    for row in rows:
        found.setdefault((row["method"], row["jumps"]), []).append(row[name])
    return {key: (np.mean(all_), np.ptp(all_) / 2) for key, all_ in found.items()}


def report(rows, floor):
    """The tables, in Markdown."""
    text = []
    for name, title in NUMBERS.items():
        found = by_seed(rows, name)
        form = lambda key, found=found: "{:.3g} ± {:.2g}".format(*found[key])
        text.append(f"\n{title}\n\n| | steps | 1 jump | 2 | 4 | 8 |")
        text.append("| --- | --- | --- | --- | --- | --- |")
        for method in dict.fromkeys(row["method"] for row in rows):
            steps = next(row["steps"] for row in rows if row["method"] == method)
            cells = [form((method, n)) for n in JUMPS if (method, n) in found]
            cells = cells or [form((method, "Tsit5")) + " by Tsit5", "", "", ""]
            text.append(f"| {method} | {steps} | {' | '.join(cells)} |")
        if name in floor:
            text.append(f"\nHeld-out images: {floor[name]:.3g}")
    seconds = by_seed(rows, "seconds")
    near = by_seed(rows, "near")
    text.append("\n| | evaluations | seconds for 1,000 | near the training set |")
    text.append("| --- | --- | --- | --- |")
    for key in seconds:
        calls = by_seed(rows, "evaluations")[key][0]
        text.append(
            f"| {key[0]}, {key[1]} | {calls:.0f} | {seconds[key][0]:.2f} | "
            f"{near[key][0]:.3f} |"
        )
    return "\n".join(text)


def draw(rows, pictures, floor, path):
    """Plots distances against the number of jumps, and samples of the first seed."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.6))
    for axes, (name, title) in zip(top.subplots(1, 4), NUMBERS.items(), strict=True):
        found = by_seed(rows, name)
        for method in dict.fromkeys(key[0] for key in found if key[1] != "Tsit5"):
            means, spreads = zip(*(found[method, n] for n in JUMPS), strict=True)
            axes.errorbar(JUMPS, means, spreads, marker="o", markersize=4, label=method)
        if name != "coupling":
            axes.axhline(found["teacher", "Tsit5"][0], color="k", ls="--",
                         label="teacher, Tsit5")  # fmt: skip
        if name in floor:
            axes.axhline(floor[name], color="0.6", ls=":", label="held-out images")
        axes.set(xscale="log", title=title, xlabel="jumps")
        if name != "kernel":  # an unbiased estimate, which may be negative
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xticks(JUMPS, JUMPS)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.figure.axes[0].legend(fontsize="x-small")
    shown = {key: images for key, images in pictures.items() if key[1] in ("Tsit5", 1, 4)}
    axes = bottom.subplots()
    labels = [f"{method}, {jumps}" for method, jumps in shown]
    fd.images.image_grid(axes, np.stack(list(shown.values())), row_labels=labels)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(options):
    options.out = options.out or pathlib.Path(f"out/images-{options.data}")
    options.out.mkdir(parents=True, exist_ok=True)
    presets, images, held_out = load(options)
    for seed in range(options.seeds):
        for method in ("teacher", *options.methods):
            if not map_path(options, method, seed).is_file():
                train(options, presets, images, method, seed)
    if options.only_train:
        return
    features = fd.images.fit_classifier(images.images, images.labels, key=jr.key(0))
    reference = fd.images.ImageReference.of(features, images)
    held_out = held_out[: options.num_samples]
    floor = fd.images.score_images(held_out.images, reference, features, seed=0)
    floor = floor.as_dict()
    rows, pictures = [], {}
    for seed in range(options.seeds):
        more, drawn = measure(
            options, presets, images, held_out, features, reference, seed
        )
        rows += more
        pictures = pictures or drawn
    text = report(rows, floor)
    print(text)
    (options.out / "images.md").write_text(text + "\n")
    (options.out / "images.json").write_text(json.dumps([floor, *rows], indent=1))
    draw(rows, pictures, floor, options.out / "images.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--folder", type=pathlib.Path, help="folder of Fashion-MNIST")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budget", type=int, default=1500, help="steps of the teacher")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--only-train", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    main(parser.parse_args())
