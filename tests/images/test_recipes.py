"""Recipes of papers: they train, have the papers' numbers, and lower for CUDA at size.

All of each is pinned in `data/recipes.txt`. After a change, look at the difference:

    python tests/images/test_recipes.py > tests/files/recipes.txt
"""

import dataclasses
import importlib.util
import math
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_close, max_abs, without_type_checks

import flowdiffrax as fd
from flowdiffrax.images import _optim
from flowdiffrax.nn._magnitude import ForcedLinear

NAMES = fd.images.recipes()
# Their networks have a `dtype`.
IMAGES = [name for name in NAMES if name != "checkerboard-lsd"]


# --- training -------------------------------------------------------------------------


def toy(name, seed=0, **settings):
    recipe = fd.images.recipe(name)
    if recipe.data == "checkerboard":
        return fd.FlowMap(recipe.network(width=8, depth=2, key=jr.key(seed)))
    small = {"shape": (4, 4, 3), "channels": 8, "multipliers": (1,), "num_blocks": 1}
    net = recipe.network(attention=(), key=jr.key(seed), **small, **settings)
    return fd.FlowMap(net)


def toy_data(recipe):
    if recipe.data == "checkerboard":
        return fd.data.checkerboard
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 4, 4, 3), np.uint8)
    return fd.images.Images(images, rng.integers(0, 10, 16), num_classes=1000)


# All of them every night, and three in CI too.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_trains(name):
    recipe = fd.images.recipe(name)
    flow_map, teacher = toy(name), None
    if recipe.teacher is not None:
        # A teacher that has learned something: its output has a gain other than zero.
        teacher = toy(recipe.teacher, 1)
        teacher = eqx.tree_at(lambda x: x.net.last_gain, teacher, jnp.ones(()))
        flow_map, teacher = taught(name, teacher)
    state = fd.train.fit(
        flow_map,
        recipe.objective,
        recipe.batches(toy_data(recipe), 8),
        recipe.optim(),
        num_steps=3,
        teacher=teacher,
        ema_decay=recipe.ema_decay,
        key=jr.key(3),
        progress=False,
    )
    assert int(state.skipped) == 0
    assert len(state.ema_maps) == len(recipe.ema_decay)
    weights, start = (
        jtu.tree_leaves(eqx.filter(tree, eqx.is_array))
        for tree in (state.flow_map, flow_map)
    )
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in weights)
    assert max(max_abs(a - b) for a, b in zip(weights, start, strict=True)) > 1e-8
    # Weights that count by their directions keep their length.
    normalised = fd.nn.normalise_weights(state.flow_map)
    assert_close(
        eqx.filter(normalised, eqx.is_array),
        eqx.filter(state.flow_map, eqx.is_array),
        1e-6,
    )


def taught(name, teacher):
    """The map that starts from the teacher, and what it learns from."""
    if name in ("cifar10-pfmm", "imagenet32-pfmm"):
        return teacher, teacher
    return fd.nn.two_times(teacher, key=jr.key(2)), teacher.velocity


@pytest.mark.parametrize("name", NAMES)
def test_teacher(name):
    recipe = fd.images.recipe(name)
    if recipe.teacher is None:
        assert not recipe.starts_from_teacher
        return
    teacher = fd.images.recipe(recipe.teacher)
    same = ("data", "num_classes", "flip", "interpolant", "base_std")
    assert all(getattr(recipe, field) == getattr(teacher, field) for field in same)
    make = lambda name: eqx.filter_eval_shape(toy, name)
    student = lambda teacher: taught(name, teacher)[0]
    grown = eqx.filter_eval_shape(student, make(recipe.teacher))
    assert jtu.tree_structure(grown) == jtu.tree_structure(make(name))


# --- batches --------------------------------------------------------------------------


def test_batches():
    recipe = fd.images.recipe("cifar10-lsd")
    batches = recipe.batches(toy_data(recipe), 512)
    # As in the authors' code, which does not mirror images.
    assert not batches.data.flip and batches.batch_size == 512
    paths, args = batches(jr.key(0))
    assert args is None
    x0 = eqx.filter_vmap(lambda path: path.evaluate(jnp.zeros(())))(paths)
    assert abs(float(jnp.std(x0)) - recipe.base_std) < 0.01
    assert recipe.batches(toy_data(recipe)).batch_size == 512


def test_batches_of_mean_flow_are_augmented():
    recipe = fd.images.recipe("cifar10-meanflow")
    aug = recipe.augmentation
    # In the order of EDM: mirrored, zoom, stretch and move.
    assert (aug.rate, aug.size) == (0.12, 6) and not (aug.flip or aug.rotate or aug.shift)
    batches = recipe.batches(toy_data(recipe), 16)
    assert batches.data.flip
    _, args = eqx.filter_jit(batches)(jr.key(0))
    assert args.condition is None and args.labels.shape == (16, 6)


def test_dropout():
    rates = {
        name: fd.images.recipe(name).architecture.keywords.get("dropout")
        for name in NAMES
    }
    assert rates.pop("checkerboard-lsd") is None and rates.pop("cifar10-sct") == 0.2
    for name, rate in rates.items():
        assert rate == (0.2 if "meanflow" in name else 0.13), name


def test_batches_of_classes():
    recipe = fd.images.recipe("imagenet32-class-lmd")
    _, labels = recipe.batches(toy_data(recipe), 1000)(jr.key(0))
    # One in ten, within four standard errors.
    assert abs(float(jnp.mean(labels == 1000)) - 0.1) < 0.04
    assert int(jnp.min(labels)) >= 0 and int(jnp.sort(labels)[800]) < 10


def test_data_without_labels():
    recipe = fd.images.recipe("imagenet32-class-lmd")
    images = fd.images.Images(toy_data(recipe).images)
    with pytest.raises(
        ValueError, match="'imagenet32-class-lmd' needs labels, but images"
    ):
        recipe.batches(images)
    with (
        without_type_checks(),
        pytest.raises(TypeError, match="`data` must be a callable"),
    ):
        recipe.batches(images.images)


# --- the papers' numbers --------------------------------------------------------------


# In arXiv:2505.18825, 54.67 million on CIFAR-10, and in its code 1,054,210 on the board.
# The network of py-meanflow has 55,932,419.
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("cifar10-lsd", 54.67),
        ("cifar10-psd-u", 54.67),
        ("cifar10-sct", 54.67),
        ("cifar10-meanflow", 55.93),
        ("cifar10-meanflow-v1", 55.93),
        ("checkerboard-lsd", 1.05421),
    ],
)
def test_size_of_network(name, parameters):
    net = eqx.filter_eval_shape(fd.images.recipe(name).network, key=jr.key(0))
    count = sum(leaf.size for leaf in jtu.tree_leaves(net) if hasattr(leaf, "size"))
    assert round(count / 1e6, 2 if parameters > 10 else 6) == parameters


@pytest.mark.parametrize(
    "step, rate",
    [(0, 0.01), (35_000, 0.01), (140_000, 0.005), (315_000, 0.01 / 3)],
)
def test_square_root_decay(step, rate):
    optimiser = fd.images.recipe("cifar10-lsd").optimiser
    schedule = _optim._square_root_decay(
        *optimiser.args, optimiser.keywords["constant_steps"]
    )
    assert_close(schedule(jnp.asarray(step)), jnp.asarray(rate), 1e-12)


@pytest.mark.parametrize("size, made", [(0.5, 0.005), (1.0, 0.01), (50.0, 0.01)])
def test_clipping(size, made):
    # The first steps of RAdam are along the gradient, clipped to length 1.
    weights = {"w": jnp.zeros(2)}
    optim = fd.images.decayed_radam(0.01)
    gradient = {"w": size * jnp.asarray([0.6, -0.8])}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optim.update(gradient, optim.init(weights), weights)
    assert_close(updates["w"], made * jnp.asarray([-0.6, 0.8]), 1e-9)


def test_an_update_keeps_the_length_of_rows():
    layer = ForcedLinear(3, 2, key=jr.key(0))
    layer = jtu.tree_map(lambda w: w.astype(float), fd.nn.normalise_weights(layer))
    optim = fd.images.decayed_radam(0.1)
    gradient = jtu.tree_map(lambda w: jr.normal(jr.key(1), w.shape), layer)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optim.update(gradient, optim.init(layer), layer)
    moved = eqx.apply_updates(layer, updates)
    for old, new in zip(jtu.tree_leaves(layer), jtu.tree_leaves(moved), strict=True):
        lengths = [np.linalg.norm(leaf, axis=0) for leaf in (old, new)]
        np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-6)
        assert np.abs(new - old).max() > 1e-3


def test_warm_up():
    recipe = fd.images.recipe("cifar10-meanflow")
    assert recipe.num_steps == 16_000 * (50_000 // 1024)
    optim = recipe.optim()
    weights = jnp.zeros(())
    opt_state = optim.init(weights)
    for step in range(4):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optim.update(jnp.ones(()), opt_state, weights)
        # Along a constant gradient, Adam moves by the rate: 6e-4 after 200 epochs.
        assert_close(updates, jnp.asarray(-6e-4 * step / (200 * 48)), 1e-12, 1e-3)


@pytest.mark.parametrize(
    "name, steps, scales",
    [
        ("cifar10-align-your-flow", (0, 5_000, 9_900, 40_000), (0, 0.5, 0.99, 0.99)),
        ("cifar10-sct", (0, 2_500, 10_000, 40_000), (0, 0.25, 1, 1)),
    ],
)
def test_tangent_warm_up(name, steps, scales):
    objective = fd.images.recipe(name).objective
    for step, scale in zip(steps, scales, strict=True):
        made = objective.at(jnp.asarray(step)).tangent_scale
        assert_close(made, jnp.asarray(float(scale)), 1e-12)


def test_times_of_mean_flow():
    times = fd.images.recipe("cifar10-meanflow").objective.times
    # Three quarters off the diagonal; on the paper's clock, both medians are
    # sigmoid(-2) = 0.1192, and 0.5 is one standard deviation above.
    assert times.num_diagonal(1024) == 256
    high = (1 + math.erf(1 / math.sqrt(2))) / 2
    s, t = times.times.from_uniform(*jnp.asarray([[0.5, 1 - high], [0.5, 0.5]]))
    assert_close(1 - s, jnp.asarray([0.119202922, 0.5]), 1e-8)
    assert_close(1 - t, jnp.asarray([0.119202922, 0.119202922]), 1e-8)


def test_times_of_the_second_setting():
    times = fd.images.recipe("cifar10-meanflow-v1").objective.times
    assert times.num_diagonal(1024) == 256
    # On the paper's clock, the medians are sigmoid(-0.6) and sigmoid(-4).
    s, t = times.times.from_uniform(*jnp.asarray([[0.5, 0.5], [0.5, 1e-9]]))
    assert_close(1 - s, jnp.asarray([0.354343694, 0.354343694]), 1e-8)
    # The second end would come before the start.
    assert_close(1 - t, jnp.asarray([0.0179862100, 0.354343694]), 1e-8)
    s, t = times.diagonal.from_uniform(*jnp.asarray([[0.5], [0.9]]))
    assert_close(1 - s, jnp.asarray([0.354343694]), 1e-8)
    assert_close(s, t, 0)


def test_noise_of_consistency_training():
    recipe = fd.images.recipe("cifar10-sct")
    times = recipe.objective.at(jnp.asarray(0)).times
    high = (1 + math.erf(1 / math.sqrt(2))) / 2
    s, t = times.from_uniform(*jnp.asarray([[0.5, high], [0.5, 0.5]]))
    # exp(-1), and exp(-1 - 1.4) one standard deviation below.
    noise = recipe.base_std * (1 - s) / s
    assert_close(noise, jnp.asarray([0.367879441, 0.090717953]), 1e-8)
    assert_close(t, jnp.ones(2), 0)


def test_shares_of_self_distillation():
    for name in ("cifar10-lsd", "cifar10-psd-m", "cifar10-psd-u"):
        recipe = fd.images.recipe(name)
        assert recipe.objective.times.num_diagonal(recipe.batch_size) == 384
    assert fd.images.recipe("cifar10-psd-u").objective.split is None


# --- lowering -------------------------------------------------------------------------


def benchmark():
    """`benchmarks/recipes.py`, which makes whole steps of shapes alone."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "recipes.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_lowering(name, dtype):
    settings = {} if dtype is None else {"dtype": dtype}
    # JAX 0.7 has it there only, and later versions warn of it.
    here = jax if hasattr(jax, "enable_x64") else jax.experimental
    # Without what tests switch on: float64 and strict promotion.
    with here.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        recipe, costs = fd.images.recipe(name), benchmark()
        inputs = costs.inputs_of(recipe, recipe.batch_size, settings)
        text = costs.lowered(recipe, inputs, lowering_platforms=("cuda",)).as_text()
    assert "custom_call" not in text and "f64" not in text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_cuda(name):
    text = check_lowering(name, None)
    assert "bf16" not in text
    batch = fd.images.recipe(name).batch_size
    # Batches of whole images, or of the share of them off the diagonal.
    product = "dot_general" if name == "checkerboard-lsd" else "convolution"
    assert text.count(f"stablehlo.{product}") >= 10
    assert f"<{batch}x" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_lowers_for_cuda_in_bfloat16(name):
    text = check_lowering(name, jnp.bfloat16)
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    low = [line for line in lines if "xbf16" in line]
    # The last convolution keeps float32, and so do its derivatives.
    assert len(lines) >= 10 and len(low) > 0.9 * len(lines)


# --- names ----------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(ValueError, match="did you mean 'cifar10-lsd'.*imagenet32-lmd"):
        fd.images.recipe("cifar-lsd")


@pytest.mark.parametrize("name", NAMES)
def test_printed_in_full(name):
    recipe = fd.images.recipe(name)
    assert recipe.name == name and name in repr(recipe)
    text = str(recipe)
    assert max(map(len, text.splitlines())) <= 90
    for field in dataclasses.fields(recipe):
        assert f"\n  {field.name} " in text
    # Settings at their defaults too.
    for setting in ("sigma_min=0.0", "weight=", "learning_rate=", "batch_size"):
        assert setting in text


def test_another_recipe():
    recipe = dataclasses.replace(fd.images.recipe("cifar10-lsd"), batch_size=64)
    assert recipe.batch_size == 64 and "64" in str(recipe)


def test_bad_decay():
    with pytest.raises(ValueError, match="`constant_steps` must be positive; got 0"):
        fd.images.decayed_radam(1e-2, constant_steps=0)


def described():
    text = "\n\n".join(str(fd.images.recipe(name)) for name in NAMES)
    return text.replace("float64", "float32")


def test_recipes_are_those_of_the_table():
    table = pathlib.Path(__file__).parents[1] / "files" / "recipes.txt"
    assert described() == table.read_text().rstrip("\n")


if __name__ == "__main__":
    print(described())
