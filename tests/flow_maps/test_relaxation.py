"""Maps in relaxation form, their network and units, and linear invariants."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowdiffrax as fd
from flowdiffrax._tree import Frozen
from flowdiffrax.testing import assert_identities

RATE = jnp.asarray([0.5, 40.0, 0.0])
PRODUCTION = jnp.asarray([1.0, 2.0, 0.0])


def linear_net(s, t, x, args):
    """What a network returns for constant production and loss."""
    return RATE, PRODUCTION / jnp.where(RATE == 0, 1, RATE)


def linear_field(t, x, args=None):
    return PRODUCTION - RATE * x


def rescaled(units, size, time):
    """The units of the same pool, in other units of states and of time."""
    scaled = lambda units: (units.floor, units.mean, units.duration, units.shortest)
    mean = jnp.where(units.is_positive, units.mean + jnp.log(size), size * units.mean)
    std = jnp.where(units.is_positive, units.std, size * units.std)
    new = (size * units.floor, mean, time * units.duration, time * units.shortest)
    units = eqx.tree_at(scaled, units, new)
    return eqx.tree_at(lambda units: units.std, units, std)


def pool(key=0, num=64):
    """Concentrations over five decades, and a temperature, at times of three."""
    ts = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 8)])
    size = np.asarray([1.0, 1e-5, 300.0])
    log = jr.normal(jr.key(key), (num, ts.size, 3))
    ys = size * np.exp(np.asarray(log) * [1.0, 2.0, 0.01])
    ys[..., 2] -= 300.0
    return ts, ys


def make(key=1, **settings):
    units = fd.nn.LogUnits.of(*pool())
    net = fd.nn.RelaxationMLP(units, 16, 2, key=jr.key(key), **settings)
    return fd.flow_maps.RelaxationFlowMap(net)


# --- the map --------------------------------------------------------------------------


def test_linear_production_and_loss_is_exact():
    flow_map = fd.flow_maps.RelaxationFlowMap(linear_net)
    x = jnp.asarray([3.0, 0.0, 7.0])
    every = ["starts_as_identity", "semigroup", "tangent", "lagrangian", "eulerian"]
    every += ["average_velocity"]
    assert_identities(flow_map, linear_field, 0.2, 0.5, 0.9, x, identities=every)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(linear_field), diffrax.Kvaerno5(), 0.2, 0.9, 1e-3, x,
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-12),
    )  # fmt: skip
    np.testing.assert_allclose(flow_map(0.2, 0.9, x), solution.ys[-1], rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@given(
    log_rate=st.floats(-30.0, 30.0),
    target=st.floats(0.0, 1e6, width=32),
    x=st.floats(0.0, 1e6, width=32),
    h=st.floats(0.0, 1e3, width=32),
)
def test_ends_are_between_start_and_target(dtype, log_rate, target, x, h):
    one = lambda number: jnp.full((1,), number, dtype)
    net = lambda s, t, x, args: (one(10.0**log_rate), one(target))
    flow_map = fd.flow_maps.RelaxationFlowMap(net)
    end = float(flow_map(0.0, jnp.asarray(h, dtype), one(x))[0])
    low, high = sorted([float(one(x)[0]), float(one(target)[0])])
    rounding = 4 * float(jnp.finfo(dtype).eps) * high
    assert max(0.0, low - rounding) <= end <= high + rounding
    if h == 0:
        assert end == float(one(x)[0])


def test_chord_and_its_derivatives_at_rest():
    flow_map = fd.flow_maps.RelaxationFlowMap(linear_net)
    x = jnp.asarray([3.0, 0.0, 7.0])
    exact = linear_field(0.0, x)
    np.testing.assert_allclose(flow_map.average_velocity(0.3, 0.3, x), exact)
    np.testing.assert_allclose(flow_map.velocity(0.3, x), exact)
    # The chord falls behind by half of the curvature.
    chord = lambda t: flow_map.average_velocity(0.3, t, x)
    slope = jax.jvp(chord, (jnp.asarray(0.3),), (jnp.asarray(1.0),))[1]
    np.testing.assert_allclose(slope, -RATE * exact / 2)


@pytest.mark.parametrize(
    "net, message",
    [
        (lambda s, t, x, args: (x[:1], x), "`RelaxationFlowMap.net` must return the sha"),
        (lambda s, t, x, args: (x, x[:1]), "`RelaxationFlowMap.net` must return the sha"),
    ],
)
def test_outputs_of_another_shape(net, message):
    with pytest.raises(ValueError, match=message):
        fd.flow_maps.RelaxationFlowMap(net)(0.0, 1.0, jnp.ones(3))


# --- the network and its units --------------------------------------------------------


def test_untrained_map_keeps_positive_states_positive():
    flow_map = make()
    _, ys = pool(key=5)
    x = jnp.asarray(ys[:, 0])
    weights = lambda flow_map: [flow_map.net.first.weight, flow_map.net.last.weight]
    larger = eqx.tree_at(weights, flow_map, replace_fn=lambda weight: 30 * weight)
    for one in (flow_map, larger):
        ends = jax.vmap(eqx.Partial(one, 0.0, 0.7))(x)
        assert jnp.all(ends[:, :2] >= 0) and jnp.all(jnp.isfinite(ends[:, :2]))
    # The temperature may have either sign.
    assert jnp.any(jax.vmap(lambda x: flow_map(0.0, 0.7, x))(x)[:, 2] < 0)


@pytest.mark.parametrize("size, time", [(1e3, 1.0), (1e-6, 1.0), (1.0, 1e8)])
def test_nothing_depends_on_the_units(size, time):
    flow_map = make()
    units = rescaled(flow_map.net.units, size, time)
    other = eqx.tree_at(lambda m: m.net.frozen_units, flow_map, Frozen(units))
    x = jnp.asarray([1.5, 2e-5, -3.0])
    for h in (1e-3, 0.2, 1.0):
        end = flow_map(0.0, h, x)
        np.testing.assert_allclose(other(0.0, time * h, size * x), size * end, rtol=1e-9)
    ts, ys = pool()
    made = fd.nn.LogUnits.of(time * ts, size * ys)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(units), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_units_of_a_pool():
    ts, ys = pool(num=2000)
    units = fd.nn.LogUnits.of(ts, ys)
    assert units.is_positive.tolist() == [True, True, False]
    np.testing.assert_allclose(units.mean[:2], np.log([1.0, 1e-5]), atol=0.1)
    np.testing.assert_allclose(units.std[:2], [1.0, 2.0], rtol=0.05)
    np.testing.assert_allclose(units.std[2], 3.0, rtol=0.05)
    assert units.duration == 1.0 and units.shortest == pytest.approx(1e-3)
    x = jnp.asarray([2.0, 3e-6, -1.0])
    np.testing.assert_allclose(units.undo_state(units.state(x)), x, rtol=1e-4)
    # One per cent more, and a third of a standard deviation.
    y = x * jnp.asarray([1.01, 1.0, 1.0]) + jnp.asarray([0.0, 0.0, 1.0])
    found = units.difference(y, x)
    np.testing.assert_allclose(found, [np.log(1.01), 0, 1 / 3], rtol=0.06, atol=1e-9)
    np.testing.assert_allclose(units.step(jnp.asarray(1.0)), [1.0, 1.0], atol=1e-9)
    assert float(units.step(jnp.asarray(0.0))[0]) == pytest.approx(-1.0, abs=1e-3)


def test_units_of_entries_that_are_zero_or_constant():
    ys = np.ones((5, 3, 3)) * [0.0, 2.0, -2.0]
    units = fd.nn.LogUnits.of(np.arange(3.0), ys)
    np.testing.assert_allclose(units.state(jnp.asarray([0.0, 2.0, -2.0])), 0, atol=1e-6)
    # Whatever a network makes of them, they stay where they are.
    end = units.undo_state(jnp.ones(3))
    np.testing.assert_allclose(end, [0.0, 2.0, -2.0], rtol=1e-5, atol=1e-30)
    # A parameter that never varies means little.
    of_args = fd.nn.LogUnits.of(np.arange(3.0), ys, args=np.ones((5, 1)) * 3.0).args
    np.testing.assert_allclose(of_args.state(jnp.asarray([3.3])), 0.1, rtol=1e-6)


@pytest.mark.parametrize("centre, size", [(1e4, 1.0), (-1e4, 1.0), (0.0, 1e-9)])
def test_single_precision_resolves_entries_that_vary_little(centre, size):
    ys = centre + size * np.linspace(-1, 1, 300).reshape(20, 5, 3)
    units = fd.nn.LogUnits.of(np.arange(5.0), ys)
    exact = np.stack([units.state(jnp.asarray(x)) for x in ys[:, 0]])
    units = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), units)
    x = jnp.asarray(ys[:, 0], jnp.float32)
    z = jax.vmap(units.state)(x)
    np.testing.assert_allclose(z, exact, atol=1e-2)
    ends = jax.vmap(units.undo_state)(z)
    np.testing.assert_allclose(ends, x, rtol=3e-7, atol=1e-6 * size)
    # Errors count as if the entry varied by a tenth of its size, at least.
    found = units.difference(x[-1], x[0])
    weight = jnp.where(units.is_positive, 0.1, 1.0)
    np.testing.assert_allclose(found, weight * (z[-1] - z[0]), rtol=1e-5)


def test_entries_that_should_be_positive():
    ts, ys = pool()
    with pytest.raises(ValueError, match=r"Entries \[2\] should be positive.*tighter"):
        fd.nn.LogUnits.of(ts, ys, np.asarray([True, True, True]))
    units = fd.nn.LogUnits.of(ts, ys, np.asarray([True, False, False]))
    assert units.is_positive.tolist() == [True, False, False]


def test_what_a_network_of_rates_refuses():
    flow_map = make(args_size=2)
    x = jnp.asarray([1.0, 1e-5, 0.0])
    for args in (None, jnp.ones(3), {"rate": 1.0}):
        with pytest.raises(ValueError, match=r"takes `args` of shape \(2,\)"):
            flow_map(0.0, 0.5, x, args)
    with pytest.raises(ValueError, match=r"one state, an array of shape \(3,\)"):
        flow_map(0.0, 0.5, jnp.ones(4), jnp.ones(2))
    with pytest.raises(ValueError, match="forward jumps only"):
        flow_map(0.5, 0.0, x, jnp.ones(2))
    # Times that are constants of a compiled function.
    times = jnp.asarray(0.0), jnp.asarray(0.5)
    jump = lambda x: flow_map(*times, x, jnp.ones(2))
    np.testing.assert_allclose(jax.jit(jump)(x), jump(x), rtol=1e-6)


def test_conditions_reach_the_network():
    flow_map = make(args_size=1)
    x = jnp.asarray([1.0, 1e-5, 0.0])
    ends = [flow_map(0.0, 0.5, x, args) for args in (0.0, 1.0)]
    assert jnp.all(ends[0] != ends[1])


# --- linear invariants ----------------------------------------------------------------

MATRIX = np.asarray([[2.0, 1.0, 0.0, 3.0], [0.0, 1.0, 1.0, 0.0]])


@given(seed=st.integers(0, 2**31), error=st.floats(0.0, 0.3))
def test_linear_invariants_are_restored(seed, error):
    keys = jr.split(jr.key(seed), 2)
    x = jnp.exp(3 * jr.normal(keys[0], (4,)))
    y = x * jnp.exp(error * jr.normal(keys[1], (4,)))
    found = fd.flow_maps.ConserveLinear(MATRIX, 12)(x, y)
    assert jnp.all(found > 0)
    scale = MATRIX @ (np.asarray(x) + np.asarray(y))
    assert np.all(np.abs(MATRIX @ np.asarray(found - x)) <= 1e-14 * scale)
    # The correction is a combination of the rows, in logarithms.
    powers = np.log(np.asarray(found / y))
    residual = powers - MATRIX.T @ np.linalg.lstsq(MATRIX.T, powers, rcond=None)[0]
    np.testing.assert_allclose(residual, 0, atol=1e-9)


def test_state_that_does_not_move_is_not_changed():
    x = jnp.asarray([0.1, 0.0, 0.7, 1e-12])
    conserve = fd.flow_maps.ConserveLinear(np.concatenate([MATRIX, MATRIX[:1]]))
    assert conserve.matrix.shape == (2, 4)
    assert jnp.all(conserve(x, x) == x)
    assert conserve(x, 1.1 * x)[1] == 0
    found = conserve(jnp.zeros(4), jnp.zeros(4))
    assert jnp.all(found == 0)


def test_invariants_are_found():
    # A + B <-> C and 2 C <-> D, with rates over many decades.
    stoichiometry = np.asarray([[-1.0, -1.0, 1.0, 0.0], [0.0, 0.0, -2.0, 1.0]])
    rng = np.random.default_rng(0)
    rates = (10.0 ** rng.uniform(-12, 3, (200, 2))) @ stoichiometry
    found = fd.flow_maps.find_linear_invariants(rates)
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found @ stoichiometry.T, 0, atol=1e-12)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-12)
    assert fd.flow_maps.find_linear_invariants(rng.normal(size=(50, 3))).shape == (0, 3)
    with pytest.raises(ValueError, match="must have more rows than the state has entr"):
        fd.flow_maps.find_linear_invariants(np.ones((2, 3)))


def test_bad_matrix():
    with pytest.raises(ValueError, match=r"must have shape \(invariants, size\)"):
        fd.flow_maps.ConserveLinear(np.ones(3))
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1; got 0"):
        fd.flow_maps.ConserveLinear(MATRIX, 0)
