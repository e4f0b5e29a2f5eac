"""What a run would need: its step, traced from shapes, lowered and compiled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from ...flow_maps._residual import FlowMap
from ...train import DataParallel, TrainState, make_step
from .._device import DeviceImages
from .._recipe import Recipe
from ._checks import shape_of
from ._flops import count_products
from ._maps import taught_by, untrained
from ._options import Options

# On a CPU, only the plan is wanted. With these, compiling takes less than half the time.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def dry_run(
    recipe: Recipe, options: Options, teacher: FlowMap | None, num_images: int | None
) -> str:
    """Describes the cost of a step, after lowering it for the platform of the options.

    No weights or images are allocated, and nothing is run. With several devices, the step
    is divided among them, and memory is that of one device.

    **Arguments:**

    - `recipe`, `options`, `teacher`: the run. If it needs a teacher and has none yet, a
      network of the same size takes its place.
    - `num_images`: the number of training images, if it is known without reading them.
    """
    backend = jax.default_backend()
    platform = backend if options.platform is None else options.platform
    kept = recipe.batch_size if num_images is None or options.stream else num_images
    parallel = DataParallel() if options.all_devices else None
    inputs = _inputs(recipe, options, teacher, kept)
    if parallel is not None:
        everywhere = parallel.replicate(jnp.zeros(())).sharding
        on_all = lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=everywhere
        )
        put = lambda leaf: on_all(leaf) if _is_shape(leaf) else leaf
        inputs = jtu.tree_map(put, inputs)
    traced = _traced(recipe, options, inputs, parallel)
    traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
    compiler_options = _QUICK if backend == "cpu" else None
    compiled = traced.lower().compile(compiler_options=compiler_options)
    weights = eqx.filter(inputs[0].flow_map, _is_shape)
    number = sum(leaf.size for leaf in jtu.tree_leaves(weights))
    flops = count_products(traced.jaxpr)
    memory = compiled.memory_analysis()
    total = flops * recipe.num_steps
    number_of = len(parallel.devices or ()) if parallel else 1
    devices = "one device" if number_of == 1 else f"divided among {number_of} devices"
    lines = [
        ("network", f"{number:,} parameters"),
        ("step", f"lowers for {platform}, {devices}"),
        ("operations", f"{flops:.3g} a step, {total:.3g} in {recipe.num_steps:,} steps"),
        ("kept", f"{_gib(memory.argument_size_in_bytes)} with {kept:,} images"),
        ("temporary", f"{_gib(memory.temp_size_in_bytes)}, planned for {backend}"),
    ]
    text = "\n".join(f"  {name:<20} {value}" for name, value in lines)
    return f"Dry run: nothing is trained or written\n{text}\n"


def _inputs(
    recipe: Recipe, options: Options, teacher: FlowMap | None, num_images: int
) -> Any:
    """The state, the batches and the teacher of a run, as shapes."""

    def make(key, images, labels, teacher):
        flow_map = untrained(recipe, options, teacher)
        if recipe.teacher is not None and teacher is None:
            # One of the same network, in place of the teacher that is not there yet.
            teacher = flow_map
        state = TrainState.create(
            flow_map,
            recipe.optim(),
            key=key,
            objective=recipe.objective,
            ema_decay=recipe.ema_decay,
        )
        on_device = DeviceImages(
            images, labels, flip=recipe.flip, augmentation=recipe.augmentation
        )
        batches = recipe.batches(on_device, recipe.batch_size // options.accumulate)
        return state, batches, taught_by(recipe, teacher)

    shape = (num_images, *shape_of(recipe))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    labels = jax.ShapeDtypeStruct((num_images,), jnp.int32)
    labels = None if recipe.num_classes is None else labels
    return eqx.filter_eval_shape(make, jr.key(0), images, labels, teacher)


def _traced(
    recipe: Recipe, options: Options, inputs: Any, parallel: DataParallel | None
) -> Any:
    """The step that `fit` runs, which reuses the state's memory."""
    step = make_step(
        recipe.objective,
        recipe.optim(),
        ema_decay=recipe.ema_decay,
        accumulate=options.accumulate,
        parallel=parallel,
    )
    (state, *others), static = eqx.partition(inputs, _is_shape)
    run = lambda state, others: eqx.filter(
        step(*eqx.combine((state, *others), static)), eqx.is_array
    )
    return jax.jit(run, donate_argnums=0).trace(state, others)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
