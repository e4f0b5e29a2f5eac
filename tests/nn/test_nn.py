"""Networks: at the start, under differentiation, and with wrong inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_close, finite_difference, max_abs

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5, 0.1])
S, T = jnp.asarray(0.2), jnp.asarray(0.9)


def network(**kwargs):
    return fd.nn.MLP(3, 8, 3, **{"key": jr.key(0), **kwargs})


def shaken(net, seed=1):
    """The network with a random last layer."""
    weight = 0.3 * jr.normal(jr.key(seed), net.last.weight.shape)
    return eqx.tree_at(lambda net: net.last.weight, net, weight)


@pytest.mark.parametrize("args_size", [0, 2])
def test_starts_as_the_identity(args_size):
    flow_map = fd.FlowMap(network(args_size=args_size))
    assert_close(flow_map(0.1, 0.9, X, jnp.ones(args_size)), X, 0, 0)


@pytest.mark.parametrize("index", range(3))
def test_forward_mode(index):
    net = shaken(network())
    inputs = (S, T, X)
    direction = [jnp.zeros_like(value) for value in inputs]
    direction[index] = jnp.ones_like(inputs[index])
    value = lambda inputs: net(*inputs, None)
    expected = finite_difference(value, inputs, tuple(direction))
    assert max_abs(expected) > 1e-3
    made = jax.jvp(value, (inputs,), (tuple(direction),))[1]
    assert_close(made, expected, 1e-8, 1e-7)


@pytest.mark.parametrize("objective", [fd.FlowMatching(), fd.LagrangianMapDistillation()])
def test_every_weight_learns(objective):
    flow_map = fd.FlowMap(shaken(network(args_size=2)))
    path = fd.LinearInterpolant()(X, -X)
    teacher = lambda t, x, args: jnp.sin(x) + t
    loss = lambda flow_map: objective(flow_map, teacher, path, S, T, jnp.ones(2))
    grads = eqx.filter_grad(loss)(flow_map)
    for leaf in jtu.tree_leaves(grads):
        assert max_abs(leaf) > 0


@pytest.mark.parametrize("waves", [(), (1.0, 2.0)])
def test_both_times_matter(waves):
    # Each by itself, and in its own way, with the waves of them and without.
    net = shaken(network(time_frequencies=waves))
    base, later = net(S, T, X, None), 0.3
    for other in (net(S + later, T, X, None), net(S, T + later, X, None)):
        assert max_abs(other - base) > 1e-3
    assert max_abs(net(T, S, X, None) - base) > 1e-3


def test_args_matter():
    net = shaken(network(args_size=2))
    assert max_abs(net(S, T, X, jnp.ones(2)) - net(S, T, X, jnp.zeros(2))) > 1e-3


def test_scale_is_the_unit_of_inputs_and_outputs():
    plain, scaled = shaken(network()), shaken(network(scale=5.0))
    assert_close(scaled(S, T, 5 * X, None), 5 * plain(S, T, X, None))


@pytest.mark.parametrize("depth", [1, 4])
def test_depth_and_width(depth):
    net = fd.nn.MLP(3, 7, depth, key=jr.key(0))
    assert len(net.hidden) == depth - 1
    assert net.last.weight.shape == (3, 7)


def test_float32():
    cast = lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf
    net = jtu.tree_map(cast, shaken(network()))
    made = fd.FlowMap(net)(0.2, 0.9, X.astype(jnp.float32))
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, fd.FlowMap(shaken(network()))(0.2, 0.9, X), 1e-5)


def test_layers_differ():
    net = network()
    assert max_abs(net.hidden[0].weight - net.hidden[1].weight) > 0


@pytest.mark.parametrize("number", [0.7, jnp.asarray(0.7), np.float32(0.7)])
def test_args_that_are_a_number(number):
    net = shaken(network(args_size=1))
    expected = net(S, T, X, jnp.asarray([number], X.dtype))
    assert_close(net(S, T, X, number), expected, 0, 0)
    assert max_abs(expected - net(S, T, X, 0.3)) > 1e-4


def test_args_that_are_a_list_of_traced_numbers():
    net = shaken(network(args_size=2))
    jitted = jax.jit(lambda a, b: net(S, T, X, [a, b]))
    assert_close(jitted(0.7, 0.2), net(S, T, X, jnp.asarray([0.7, 0.2])), 1e-12)


def call(x=X, args=None):
    return network(args_size=2)(S, T, x, args)


ARGS = r"`args` of shape \(2,\); got .*`nn.Ravelled\(net\)`"


@pytest.mark.parametrize(
    "act, match",
    [
        (lambda: call(jnp.ones(2)), r"one state, an array of shape \(3,\).*`jax.vmap`"),
        (lambda: call(args=None), ARGS),
        (lambda: call(args=jnp.ones((1, 2))), ARGS),
        (lambda: call(args={"a": jnp.ones(1), "b": 1.0}), ARGS),
        (lambda: call(args=(jnp.ones(1), jnp.ones(2))), ARGS),
        (lambda: call(args=jr.key(0)), ARGS),
        (lambda: fd.nn.MLP(2, 0, 1, key=jr.key(0)), "`width` must be at least 1"),
        (lambda: fd.nn.MLP(2, 8, 0, key=jr.key(0)), "`depth` must be at least 1"),
    ],
)
def test_refusals(act, match):
    with pytest.raises(ValueError, match=match):
        act()
