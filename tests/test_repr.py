"""What objects look like when they are printed."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flowdiffrax as fd

NET = fd.nn.MLP(2, 8, 2, key=jr.key(0))
MAP = fd.FlowMap(NET, time_range=(0.0, 1.0))
UNET = fd.nn.UNet((8, 8, 1), 8, (1, 2), 1, num_classes=10, key=jr.key(0))


def num_parameters(tree):
    return sum(np.size(leaf) for leaf in jtu.tree_leaves(tree) if eqx.is_array(leaf))


def test_network():
    assert repr(NET) == "MLP(2, width=8, depth=2; 258 parameters)"
    assert num_parameters(NET) == 258  # 20 inputs, two layers of 8, 2 outputs
    number = f"{num_parameters(UNET):,}"
    assert repr(UNET) == f"UNet((8, 8, 1), num_classes=10; {number} parameters)"


def test_network_within_what_it_is_in():
    assert f"net={NET!r}" in repr(MAP)
    solver = fd.FlowMapSolver(MAP)
    assert "width=8" in repr(solver) and repr(solver).count("\n") < 8


def test_training_state():
    state = fd.train.TrainState.create(MAP, optax.adam(1e-3), key=jr.key(0))
    text = " ".join(repr(state).split())
    assert text.startswith("TrainState( step=0, skipped=0, flow_map=FlowMap(")
    assert len(text) < 150


def test_without_values():
    # Of shapes alone, within `jit`, and with the weights taken out.
    shapes = eqx.filter_eval_shape(lambda: fd.nn.MLP(2, 8, 2, key=jr.key(0)))
    assert repr(shapes) == repr(NET)
    texts = []
    eqx.filter_jit(lambda state: texts.append(repr(state)))(
        fd.train.TrainState.create(MAP, optax.sgd(1e-3), key=jr.key(0))
    )
    assert "258 parameters" in texts[0]
    assert "0 parameters" in repr(jtu.tree_map(lambda leaf: None, NET))


@pytest.mark.parametrize(
    "thing",
    [
        fd.LagrangianMapDistillation(),
        fd.objectives.ImprovedMeanFlow(),
        fd.exact.GaussianFlowMap(target_std=0.5),
        fd.LinearInterpolant(),
        fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.5),
        fd.velocities.ClassifierFreeGuidance(10, 2.0),
        fd.HybridSolver(MAP),
        fd.ODEFlowMap(lambda t, x, args: -x),
        fd.data.InterpolantBatches(fd.LinearInterpolant(), jnp.ones((5, 2)), 3),
        fd.images.digits(),
        fd.images.recipe("cifar10-lsd"),
        fd.train.DataParallel(),
        fd.images.RandomFeatures((8, 8, 1), key=jr.key(0)),
        fd.nn.DiT((8, 8, 1), 2, 16, 2, num_heads=2, key=jr.key(0)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_is_short(thing):
    text = repr(thing)
    assert type(thing).__name__.lower() in text.lower()
    assert len(text) < 200 and " object at 0x" not in text
