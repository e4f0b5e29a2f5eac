"""Steps of any method with a learned correction, and a few steps of Diffrax's solvers."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    assert_close,
    finite_difference,
    max_abs,
    nonlinear_field,
    without_type_checks,
)

import flowdiffrax as fd
from flowdiffrax.flow_maps import StepperFlowMap

X = jnp.asarray([0.8, -0.5])
PAIRS = [(0.15, 0.85), (0.9, 0.2)]
RATES = jnp.asarray([0.3, 6.0])


def zero_net(s, t, x, args):
    return jtu.tree_map(jnp.zeros_like, x)


def wavy_net(s, t, x, args):
    args = 0.0 if args is None else args
    return jtu.tree_map(lambda leaf: jnp.cos(3 * leaf + s - 2 * t + args), x)


class Exponential(eqx.Module):
    """Exponential Euler for x' = -rates x + sin(x) + args, of order one."""

    rates: jax.Array

    def __call__(self, s, t, x, args):
        h, args = t - s, 0.0 if args is None else args
        force = jnp.sin(x) + args
        return (
            jnp.exp(-h * self.rates) * x - jnp.expm1(-h * self.rates) / self.rates * force
        )


def stiff_field(t, x, args):
    args = 0.0 if args is None else args
    return -RATES * x + jnp.sin(x) + args


BASES = {
    "function": Exponential(RATES),
    "map": fd.ODEFlowMap(stiff_field, diffrax.Heun(), num_steps=2),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


@every_base
@pytest.mark.parametrize("s, t", PAIRS)
def test_untrained_is_the_step(base, s, t):
    flow_map = StepperFlowMap(base, zero_net)
    s, t = jnp.asarray(s), jnp.asarray(t)
    assert_close(flow_map(s, t, X, 0.4), base(s, t, X, 0.4), 0, 0)


@pytest.mark.parametrize(
    "name, order", [("function", 0), ("function", 1), ("function", 2), ("map", 1)]
)
@pytest.mark.parametrize("s, t", PAIRS)
def test_correction_of_an_order(name, order, s, t):
    base = BASES[name]
    flow_map = StepperFlowMap(base, wavy_net, order)
    s, t = jnp.asarray(s), jnp.asarray(t)
    correction = flow_map(s, t, X, 0.4) - base(s, t, X, 0.4)
    expected = (t - s) ** (order + 1) * wavy_net(s, t, X, 0.4)
    assert_close(correction, expected, 1e-12)
    assert_close(flow_map(s, s, X, 0.4), X, 0, 0)
    chord = flow_map.average_velocity(s, t, X, 0.4)
    assert_close(X + (t - s) * chord, flow_map(s, t, X, 0.4), 1e-13)


@every_base
@pytest.mark.parametrize("order", [0, 1, 2])
def test_velocity_is_the_derivative(base, order):
    flow_map, t = StepperFlowMap(base, wavy_net, order), jnp.asarray(0.3)
    end = lambda end: flow_map(t, end, X, 0.4)
    expected = finite_difference(end, t, jnp.ones_like(t), 1e-6)
    assert_close(flow_map.velocity(t, X, 0.4), expected, 1e-6)
    assert_close(flow_map.average_velocity(t, t, X, 0.4), expected, 1e-6)
    consistent = stiff_field(t, X, 0.4)
    if order == 0:
        consistent = consistent + wavy_net(t, t, X, 0.4)
    assert_close(flow_map.velocity(t, X, 0.4), consistent, 1e-12)


def test_derivative_of_the_chord_at_no_length():
    flow_map, t = StepperFlowMap(BASES["map"], wavy_net, 1), jnp.asarray(0.3)
    chord = lambda end: flow_map.average_velocity(t, end, X, 0.4)
    made = jax.jvp(chord, (t,), (jnp.ones_like(t),))[1]
    assert_close(made, finite_difference(chord, t, jnp.ones_like(t)), 1e-8)


def test_only_the_network_is_trained():
    net = fd.nn.MLP(2, 8, 2, key=jax.random.key(0))
    flow_map = StepperFlowMap(Exponential(RATES), net)
    params = eqx.filter(flow_map, eqx.is_inexact_array)
    assert len(jtu.tree_leaves(params)) == len(jtu.tree_leaves(net))
    loss = lambda flow_map: jnp.sum(flow_map(0.1, 0.6, X) ** 2)
    grads = eqx.filter_jit(eqx.filter_grad(loss))(flow_map)
    assert max_abs(grads.net.last.weight) > 1e-3


def test_pytrees_and_batches():
    base = lambda s, t, x, args: jtu.tree_map(lambda leaf: jnp.exp(s - t) * leaf, x)
    flow_map = StepperFlowMap(base, wavy_net)
    state = {"a": X, "b": jnp.asarray(0.3)}
    made = flow_map(0.2, 0.7, state)
    expected = jtu.tree_map(
        lambda y, n: np.exp(-0.5) * y + 0.5 * n, state, wavy_net(0.2, 0.7, state, None)
    )
    assert_close(made, expected, 1e-14)
    batch = jnp.stack([X, -X])
    many = jax.vmap(flow_map, (0, None, 0))(jnp.asarray([0.2, 0.7]), 0.7, batch)
    assert_close(many[0], flow_map(0.2, 0.7, X), 1e-14)
    assert_close(many[1], -X, 0, 0)


def test_a_network_on_a_grid_corrects_a_coarse_solve():
    heat = lambda t, u, args: (jnp.roll(u, 1, 0) - 2 * u + jnp.roll(u, -1, 0)) * 4.0
    coarse = fd.ODEFlowMap(heat, diffrax.Euler(), num_steps=3)

    def base(s, t, u, args):
        few = u[::2]
        return u + jnp.repeat(coarse(s, t, few, args) - few, 2, axis=0)

    net = fd.nn.FNO((12, 1), 4, 2, 1, key=jax.random.key(0))
    u = jnp.cos(jnp.arange(12.0) ** 2)[:, None]
    flow_map = StepperFlowMap(base, net)
    assert_close(flow_map(0.1, 0.1, u), u, 0, 0)
    assert_close(flow_map(0.1, 0.2, u), base(0.1, 0.2, u, None), 0, 0)
    expected = jnp.repeat(heat(0.1, u[::2], None), 2, axis=0)
    assert_close(flow_map.velocity(0.1, u), expected, 1e-12)


# --- a few steps of Diffrax's solvers ---------------------------------------------------


@pytest.mark.parametrize("s, t", PAIRS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_steps_of_a_solver(num_steps, s, t):
    flow_map = fd.ODEFlowMap(nonlinear_field, diffrax.Ralston(), num_steps=num_steps)
    term, solver, y = diffrax.ODETerm(nonlinear_field), diffrax.Ralston(), X
    ts = jnp.linspace(s, t, num_steps + 1)
    for begin, end in zip(ts, ts[1:], strict=False):
        carry = solver.init(term, begin, end, y, None)
        y = solver.step(term, begin, end, y, None, carry, False)[0]
    assert_close(flow_map(s, t, X), y, 1e-13)
    assert_close(flow_map(s, s, X), X, 0, 0)


def test_implicit_steps():
    finder = diffrax.VeryChord(rtol=1e-12, atol=1e-12)
    solver = diffrax.ImplicitEuler(root_finder=finder)
    decay = lambda t, x, args: -RATES * x
    flow_map = fd.ODEFlowMap(decay, solver, num_steps=4)
    assert_close(flow_map(0.2, 1.0, X), X / (1 + 0.2 * RATES) ** 4, 1e-10)


def test_many_steps_in_float32():
    # As many as were asked for: one more would be an error.
    x = X.astype(jnp.float32)
    flow_map = fd.ODEFlowMap(lambda t, x, args: x, diffrax.Euler(), num_steps=1000)
    made = flow_map(jnp.float32(0.3), jnp.float32(0.4), x)
    assert_close(made, x * jnp.float32(1.0001**1000), 1e-5, 1e-5)


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, error, match",
    [
        (lambda: StepperFlowMap(3, zero_net), TypeError, "`base` must be a callable"),
        (
            lambda: StepperFlowMap(lambda t, x, args: x, zero_net),
            TypeError,
            r"`base` is called as `base\(s, t, x, args\)`",
        ),
        (lambda: StepperFlowMap(zero_net, 3), TypeError, "`net` must be a callable"),
        (
            lambda: StepperFlowMap(zero_net, zero_net, -1),
            ValueError,
            "`order` must be at",
        ),
        (
            lambda: StepperFlowMap(zero_net, zero_net, 0.5),
            TypeError,
            "`order` must be an",
        ),
        (
            lambda: StepperFlowMap(lambda s, t, x, args: x[0], zero_net)(0.1, 0.2, X),
            ValueError,
            r"`StepperFlowMap.base` must return the shape of the state, \(2,\)",
        ),
        (
            lambda: StepperFlowMap(zero_net, lambda s, t, x, args: x[0])(0.1, 0.2, X),
            ValueError,
            r"`StepperFlowMap.net` must return the shape of the state, \(2,\)",
        ),
        (
            lambda: StepperFlowMap(zero_net, zero_net, time_range=(0, 1))(0.0, 2.0, X),
            ValueError,
            "leaves the time range",
        ),
        (
            lambda: fd.ODEFlowMap(nonlinear_field, num_steps=0),
            ValueError,
            "`num_steps` must be at least 1; got 0",
        ),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()
