"""The U-Net of DDPM++: against the authors' code, and its filters against SciPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close
from scipy import signal

import flowdiffrax as fd
from flowdiffrax.nn import _layers as layers

SMALL = functools.partial(
    fd.nn.DDPMUNet, (8, 8, 2), 8, (1, 2), 1, attention=(4,), key=jr.key(0)
)


def drawn(**settings):
    """A network with weights from NumPy in the order of its leaves; the generator."""
    rng = np.random.default_rng(0)
    net = eqx.filter_eval_shape(functools.partial(SMALL, **settings))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape))
    return jax.tree.map(lambda leaf: draw(leaf) if is_shape(leaf) else leaf, net), rng


def test_against_the_code_of_mean_flow():
    net, rng = drawn()
    x, vector = rng.standard_normal((8, 8, 2)), rng.standard_normal(32)
    y = eqx.filter_jit(net.normalised)(jnp.asarray(x), jnp.asarray(vector))
    # From `SongUNet` of py-meanflow with these weights, in float64, the softmax in
    # float32; `vector` is the output of its embedding.
    expected = [
        [-1.16105225, 0.1008241, -0.42146297],
        [-0.1026559, -1.21079643, -0.36531592],
    ]
    assert_close(y[::4, ::3, 0], np.array(expected), 1e-7)


def test_size_is_that_of_mean_flow():
    make = lambda: fd.nn.DDPMUNet(
        (32, 32, 3), 128, (2, 2, 2), 4, attention=(16,), augment_size=6, key=jr.key(0)
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(eqx.filter_eval_shape(make))]
    assert sum(sizes) == 55_932_419


def test_starts_as_the_identity():
    net = fd.nn.DDPMUNet((4, 4, 1), 8, (1,), 1, key=jr.key(0))
    x = jr.normal(jr.key(1), (4, 4, 1))
    assert_close(eqx.filter_jit(fd.FlowMap(net))(0.1, 0.8, x), x, 0, 0)


def test_filters():
    x = np.random.default_rng(0).standard_normal((6, 4, 2))
    taps = np.array([1, 3, 3, 1]) / 8
    halved, doubled = x, x
    for axis in (0, 1):
        whole = signal.upfirdn(taps, halved, axis=axis)
        halved = np.take(whole, 2 + 2 * np.arange(halved.shape[axis] // 2), axis)
        whole = signal.upfirdn(2 * taps, doubled, up=2, axis=axis)
        doubled = np.take(whole, 1 + np.arange(2 * doubled.shape[axis]), axis)
    assert_close(layers.smooth_halve(jnp.asarray(x)), halved, 1e-12)
    assert_close(layers.smooth_double(jnp.asarray(x)), doubled, 1e-12)


@pytest.mark.slow
def test_forward_mode_and_every_weight():
    net, _ = drawn()
    x = jr.normal(jr.key(1), (8, 8, 2))
    end = eqx.filter_jit(lambda net, t: net(0.2, t, x))
    time = jnp.asarray(0.7)
    _, slope = jax.jvp(functools.partial(end, net), (time,), (jnp.ones(()),))
    difference = (end(net, time + 1e-5) - end(net, time - 1e-5)) / 2e-5
    assert_close(slope, difference, 1e-6)
    grads = eqx.filter_grad(lambda net: jnp.sum(end(net, time) ** 2))(net)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_bfloat16():
    (net, _), (low, _) = drawn(), drawn(dtype=jnp.bfloat16)
    x = jr.normal(jr.key(1), (8, 8, 2), jnp.float32)
    value = eqx.filter_jit(lambda net: net(0.2, 0.7, x))
    assert value(low).dtype == jnp.float32
    error = jnp.max(jnp.abs(value(low) - value(net)))
    assert 1e-6 < float(error) < 0.1
