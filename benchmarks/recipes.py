"""The cost of the training runs of `images.recipes()`, from one step compiled on a CPU.

    python benchmarks/recipes.py                        # all; a minute or two for each
    python benchmarks/recipes.py --recipes cifar10-lsd --out out/benchmarks

Each step is the one that `train.fit` runs, at the paper's size and batch: draw, loss,
gradient, optimiser and averages. It is traced from shapes alone, so that no memory is
allocated for weights or images. It is compiled for the CPU, and never run.

FLOPs are those of the cost analysis of the compiled step. They are compared with a count,
as in `objectives.py`: a trained evaluation of the network is 3, its trained derivative 3
more, and one that is held fixed is 1, times the products and convolutions of one forward
evaluation. XLA does not count products with the zeros around an image, which are 4% of a
convolution at 32x32 and 16% at 8x8, and it counts elementwise work. The script fails if
the two differ by more than 20%, unless `--remat` computes more on purpose.

Memory is the CPU compiler's plan for the step in float32: weights, averages, optimiser,
images and temporary arrays. A GPU's compiler makes another plan, so this is not a
measurement for GPUs.

GPU-hours are FLOPs times steps, divided by the peak rate of one H100 SXM for dense
products times an assumed utilisation. They are only as good as this assumption.
"""

import argparse
import json
import os
import pathlib
import platform
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

import flowdiffrax as fd
from flowdiffrax.images.command._flops import count_products

# Dense FLOP/s of one H100 SXM, from its data sheet.
PEAKS = {"bfloat16": 989e12, "TF32": 494e12}
NUM_IMAGES = {"cifar10": 50_000, "imagenet32": 1_281_167}
LIMIT = 0.2
# Counts off the diagonal; see `rows` in `objectives.py`. On it, all are flow matching: 3.
COUNTS = {
    "FlowMatching": 3,
    "LagrangianMapDistillation": 7,
    "EulerianMapDistillation": 7,
    "FlowMapMatching": 9,
    "ProgressiveFlowMapMatching": 7,
    "LagrangianSelfDistillation": 7,
    "ProgressiveSelfDistillation": 5,
    "MeanFlow": 4,
    "ImprovedMeanFlow": 5,
    "AlignYourFlowEMD": 5,
    "ContinuousConsistency": 4,
}
# The code does not have to be fast. With these, it compiles in less than half the time.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def data_of(recipe, images, labels):
    if recipe.data == "checkerboard":
        return fd.data.checkerboard
    labels = None if recipe.num_classes is None else labels
    return fd.images.DeviceImages(
        images, labels, flip=recipe.flip, augmentation=recipe.augmentation
    )


def inputs_of(recipe, batch, settings):
    """The state, batches and teacher of a run, as shapes."""

    def make(key, images, labels):
        net_key, state_key, teacher_key = jr.split(key, 3)
        state = fd.train.TrainState.create(
            fd.FlowMap(recipe.network(key=net_key, **settings)),
            recipe.optim(),
            key=state_key,
            objective=recipe.objective,
            ema_decay=recipe.ema_decay,
        )
        teacher = None
        if recipe.teacher is not None:
            net = fd.images.recipe(recipe.teacher).network(key=teacher_key, **settings)
            teacher = fd.FlowMap(net)
            if not getattr(recipe.objective, "teacher_is_map", False):
                teacher = teacher.velocity
        return state, recipe.batches(data_of(recipe, images, labels), batch), teacher

    number = NUM_IMAGES.get(recipe.data, 1)
    images = jax.ShapeDtypeStruct((number, 32, 32, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((number,), jnp.int32)
    return eqx.filter_eval_shape(make, jr.key(0), images, labels)


def lowered(recipe, inputs, **options):
    """The step that `fit` runs, which reuses the state's memory."""
    step = fd.train.make_step(
        recipe.objective, recipe.optim(), ema_decay=recipe.ema_decay
    )
    (state, *others), static = eqx.partition(inputs, is_shape)
    run = lambda state, others: eqx.filter(
        step(*eqx.combine((state, *others), static)), eqx.is_array
    )
    return jax.jit(run, donate_argnums=0).trace(state, others).lower(**options)


def counted(recipe, flow_map, batch):
    """FLOPs of a step counted by hand, as a multiple of one forward evaluation."""
    objective = recipe.objective
    if isinstance(objective, fd.objectives.Scheduled):
        objective = objective.at(jnp.zeros((), int))
    share = objective.times.num_diagonal(batch) / batch
    evaluations = 3 * share + COUNTS[type(objective).__name__] * (1 - share)
    shape = (2,) if recipe.data == "checkerboard" else (32, 32, 3)
    label = None if recipe.num_classes is None else jnp.zeros((), int)
    weights, static = eqx.partition(flow_map, is_shape)
    forward = lambda weights, t, x: eqx.combine(weights, static).average_velocity(
        t, t, x, label
    )
    time, state = (jax.ShapeDtypeStruct(size, jnp.float32) for size in ((), shape))
    jaxpr = jax.make_jaxpr(forward)(weights, time, state).jaxpr
    return evaluations, evaluations * batch * count_products(jaxpr)


def measure(name, options):
    recipe = fd.images.recipe(name)
    rows = recipe.batch_size if options.batch is None else options.batch
    inputs = inputs_of(recipe, rows, {"remat": True} if options.remat else {})
    flow_map = inputs[0].flow_map
    start = time.perf_counter()
    compiled = lowered(recipe, inputs).compile(compiler_options=OPTIONS)
    seconds = time.perf_counter() - start
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    evaluations, count = counted(recipe, flow_map, rows)
    flops = analysis["flops"] * recipe.batch_size / rows
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    kept -= memory.alias_size_in_bytes
    hours = {
        kind: flops * recipe.num_steps / (peak * options.utilisation) / 3600
        for kind, peak in PEAKS.items()
    }
    return {
        "recipe": name,
        "parameters": sum(
            leaf.size for leaf in jtu.tree_leaves(flow_map) if is_shape(leaf)
        ),
        "batch": recipe.batch_size,
        "compiled_batch": rows,
        "steps": recipe.num_steps,
        "flops": flops,
        "evaluations": evaluations,
        "over_count": analysis["flops"] / count,
        "kept_bytes": kept,
        "temporary_bytes": memory.temp_size_in_bytes,
        "gpu_hours": hours,
        "compile_seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = fd.images.recipes()
    parser.add_argument("--recipes", nargs="+", choices=names, default=names)
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument(
        "--batch", type=int, help="compile for fewer rows, and scale the FLOPs"
    )
    parser.add_argument(
        "--remat", action="store_true", help="recompute blocks in the reverse pass"
    )
    parser.add_argument("--out", help="a folder for recipes.json")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"{jax.default_backend()}, jax {jax.__version__}. GPU-hours of one H100 SXM at "
        f"{options.utilisation:.0%} of {PEAKS['bfloat16'] / 1e12:.0f} TFLOP/s in "
        f"bfloat16, and of {PEAKS['TF32'] / 1e12:.0f} in TF32.\n"
    )
    print(
        "| recipe | parameters | batch | steps | TFLOPs a step | over the count | "
        "state and data, GiB | temporary, GiB | H100-hours, bfloat16 | TF32 |"
    )
    print("| --- " * 10 + "|")
    results = []
    for name in options.recipes:
        row = measure(name, options)
        sizes = (row[key] / 2**30 for key in ("kept_bytes", "temporary_bytes"))
        print(
            f"| `{name}` | {row['parameters'] / 1e6:.2f} M | {row['batch']:,} | "
            f"{row['steps']:,} | {row['flops'] / 1e12:.2f} | {row['over_count']:.2f} | ",
            end="",
        )
        print(" | ".join(f"{size:.1f}" for size in sizes), end=" | ")
        hours = row["gpu_hours"].values()
        print(" | ".join(f"{hour:.3g}" for hour in hours), "|", flush=True)
        results.append(row)
    if options.out is not None:
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipes.json").write_text(json.dumps(results, indent=1))
    worst = max(results, key=lambda row: abs(row["over_count"] - 1))
    print(f"\nFurthest from the count: {worst['over_count']:.3f}, {worst['recipe']}.")
    if abs(worst["over_count"] - 1) > LIMIT and not options.remat:
        raise SystemExit("The cost analysis and the count do not agree.")


if __name__ == "__main__":
    main()
