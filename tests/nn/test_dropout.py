"""Dropout: the layer, the image networks, and which rows of a batch have it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import OBJECTIVES, assert_close

import flowdiffrax as fd
from flowdiffrax.nn._dropout import Dropout
from flowdiffrax.objectives._batch import as_mixture, example_losses

SHAPE = (4, 4, 1)
NETWORKS = {
    "UNet": functools.partial(fd.nn.UNet, SHAPE, 8, (1,), 1),
    "MagnitudePreservingUNet": functools.partial(
        fd.nn.MagnitudePreservingUNet, SHAPE, 8, (1,), 1
    ),
    "DiT": functools.partial(fd.nn.DiT, SHAPE, 2, 8, 2),
}
S, T = jnp.asarray(0.2), jnp.asarray(0.7)
X = jr.normal(jr.key(1), SHAPE)


@functools.cache
def shaken(name, **settings):
    """A network whose weights are not zero."""
    make = functools.partial(NETWORKS[name], key=jr.key(0), **settings)
    net = eqx.filter_eval_shape(make)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda leaf: draw(leaf) if is_shape(leaf) else leaf, net)


@eqx.filter_jit
def value(net, key=None):
    net = net if key is None else fd.nn.with_dropout(net, key)
    return net(S, T, X)


# --- the layer ------------------------------------------------------------------------


def test_layer():
    x = jnp.ones((100, 100))
    y = Dropout(0.25, jr.key(0))(x)
    assert set(np.unique(y)) == {0, 1 / 0.75}
    deviation = (0.25 * 0.75 / x.size) ** 0.5
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 4 * deviation
    assert Dropout(0.25)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rate_outside(rate):
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\)"):
        fd.nn.UNet(SHAPE, 8, (1,), 1, dropout=rate, key=jr.key(0))


# --- networks -------------------------------------------------------------------------


SLOW = pytest.param("MagnitudePreservingUNet", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["UNet", SLOW, "DiT"])
def test_network(name):
    net, without = shaken(name, dropout=0.3), shaken(name)
    # Without a key, as in sampling, it is the network without dropout.
    np.testing.assert_array_equal(value(net), value(without))
    np.testing.assert_array_equal(value(without, jr.key(1)), value(without))
    np.testing.assert_array_equal(value(net, jr.key(1)), value(net, jr.key(1)))
    for other in (value(net), value(net, jr.key(2))):
        assert jnp.max(jnp.abs(value(net, jr.key(1)) - other)) > 1e-4


def test_derivative_is_of_one_function():
    net = fd.nn.with_dropout(shaken("DiT", dropout=0.3), jr.key(1))
    end = eqx.filter_jit(lambda t: net(S, t, X))
    _, slope = jax.jvp(end, (T,), (jnp.ones(()),))
    assert_close(slope, (end(T + 1e-5) - end(T - 1e-5)) / 2e-5, 1e-6)


@pytest.mark.slow
def test_recomputed_with_the_same_mask():
    loss = eqx.filter_jit(eqx.filter_grad(lambda net, key: jnp.sum(value(net, key) ** 2)))
    nets = (shaken("UNet", dropout=0.3, remat=remat) for remat in (False, True))
    grads = [jax.tree.leaves(loss(net, jr.key(1))) for net in nets]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, 1e-10)


# --- rows of a batch ------------------------------------------------------------------


class Noisy(eqx.Module):
    """A small network of any states, with dropout."""

    first: jax.Array
    last: jax.Array
    dropout: Dropout

    def __call__(self, s, t, x, args=None):
        h = jnp.tanh(jnp.concatenate([x, jnp.stack([s, t])]) @ self.first)
        return self.dropout(h) @ self.last


def noisy(rate=0.5):
    rng = np.random.default_rng(0)
    first, last = (
        jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 32), (32, 2))
    )
    return fd.FlowMap(Noisy(first, last, Dropout(rate)))


def losses(objective, flow_map, dropout, teacher=None, n=8):
    """By segment, for rows of the same two points."""
    points = jnp.broadcast_to(jnp.array([0.3, -0.2]), (n, 2))
    paths = eqx.filter_vmap(fd.LinearInterpolant())(points, -points)
    parts = example_losses(
        as_mixture(objective),
        flow_map,
        teacher,
        paths,
        None,
        key=jr.key(3),
        dropout=dropout,
    )
    return [(part.s, part.t, part.loss) for part in parts]


SELF_DISTILLATION = [
    fd.objectives.LagrangianSelfDistillation,
    fd.objectives.EulerianSelfDistillation,
    fd.objectives.ProgressiveSelfDistillation,
]


@pytest.mark.parametrize("kind", SELF_DISTILLATION)
def test_on_the_diagonal_only(kind):
    # Several evaluations are compared elsewhere, as in the paper.
    on, off = (losses(kind(), noisy(), dropout) for dropout in (True, False))
    assert jnp.all(on[0][2] != off[0][2])
    np.testing.assert_array_equal(on[1][2], off[1][2])


@pytest.mark.parametrize(
    "objective",
    [
        fd.objectives.MeanFlow(),
        fd.objectives.ContinuousConsistency(),
        fd.objectives.ConsistencyTraining(),
    ],
)
def test_everywhere(objective):
    on, off = (losses(objective, noisy(), dropout) for dropout in (True, False))
    for one, other in zip(on, off, strict=True):
        assert jnp.mean(one[2] != other[2]) > 0.5


def test_which_objectives_have_it_everywhere():
    kinds = [getattr(fd.objectives, name) for name in OBJECTIVES]
    everywhere = {kind.__name__ for kind in kinds if kind.has_dropout_off_diagonal}
    assert everywhere == {"ConsistencyTraining", "ContinuousConsistency", "MeanFlow"}


def test_a_mask_for_each_row_and_the_same_in_each_evaluation():
    same = fd.times.Diagonal(fd.times.UniformSquare(), start=True)
    objective = fd.objectives.FlowMatching(times=same)
    ((s, t, loss),) = losses(objective, noisy(), True)
    assert len(set(loss.tolist())) == 8
    # Target and prediction of a consistency model agree if the times do.
    for key in jr.split(jr.key(0), 3):
        flow_map = fd.nn.with_dropout(noisy(), key)
        x = jnp.array([0.1, 0.2])
        np.testing.assert_array_equal(flow_map(S, T, x), flow_map(S, T, x))


def test_teacher_has_none():
    objective, teacher = fd.objectives.VelocityDistillation(), noisy()
    plain = noisy(0.0)
    ((_, _, loss),) = losses(objective, plain, True, teacher.velocity)
    ((_, _, expected),) = losses(objective, plain, True, plain.velocity)
    np.testing.assert_array_equal(loss, expected)


def step_once(accumulate):
    data = jnp.linspace(-1, 1, 32).reshape(16, 2)
    fixed = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8 // accumulate)
    objective, optim = fd.objectives.LagrangianSelfDistillation(), optax.sgd(1e-2)
    state = fd.train.TrainState.create(noisy(), optim, key=jr.key(0))
    step = fd.train.make_step(objective, optim, accumulate=accumulate)
    state, info = step(state, fixed)
    return state


def test_training():
    state = step_once(1)
    # The state has no key, and the average that is sampled has no dropout.
    assert state.flow_map.net.dropout.key_data is None
    assert state.ema_map.net.dropout.key_data is None
    assert jnp.all(jnp.isfinite(state.flow_map.net.first))
    again = step_once(1)
    np.testing.assert_array_equal(again.flow_map.net.first, state.flow_map.net.first)
    assert jnp.all(jnp.isfinite(step_once(2).flow_map.net.first))


def test_measured_without_dropout():
    paths = eqx.filter_vmap(fd.LinearInterpolant())(jnp.eye(2), -jnp.eye(2))
    measure = lambda rate: fd.metrics.loss_by_times(
        fd.objectives.FlowMatching(), noisy(rate), None, paths, key=jr.key(0)
    )
    np.testing.assert_array_equal(measure(0.5).means, measure(0.0).means)
