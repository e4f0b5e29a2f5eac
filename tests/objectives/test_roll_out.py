"""Roll-outs in training: the times they visit, their gradients, noise and penalties.

The equation itself is in `test_conformance.py`.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import assert_close, linear_map, mlp_map, without_type_checks
from scipy import stats

import flowdiffrax as fd

RollOutMatching = fd.objectives.RollOutMatching
PLAIN = {"weight": fd.weights.NoWeight()}
TS = jnp.asarray([0.0, 0.1, 0.3, 0.4, 0.8, 1.0])
X0 = jnp.asarray([[0.8, -0.5], [0.1, 1.2], [-0.7, 0.3]])
STILL = fd.FlowMap(lambda s, t, x, args: 0 * x)


@functools.cache
def exact_paths():
    """Trajectories of the linear map's ODE, by Diffrax."""
    field = linear_map().velocity
    ys = fd.solve_trajectories(field, X0, TS, rtol=1e-12, atol=1e-12)
    return fd.paths.TrajectoryPath(jnp.broadcast_to(TS, (3, 6)), ys)


@eqx.filter_jit
def losses(objective, flow_map, paths, s, t, args=None, seed=0):
    """Of each path; the seed is traced."""
    one = lambda path, key: objective(flow_map, None, path, s, t, args, key=key)
    return eqx.filter_vmap(one)(paths, jr.split(jr.key(seed), paths.ts.shape[0]))


@pytest.mark.parametrize("s, t", [(0.0, 1.0), (0.8, 0.1), (0.4, 0.4)])
def test_zero_at_the_truth_alone(s, t):
    objective = RollOutMatching(3)
    s, t = jnp.asarray(s), jnp.asarray(t)
    assert np.all(losses(objective, linear_map(), exact_paths(), s, t) < 1e-10)
    if s != t:
        assert np.all(losses(objective, STILL, exact_paths(), s, t) > 1e-3)


# --- the times it visits --------------------------------------------------------------

# States that are the numbers of their times: a map that stands still has as its errors
# the numbers of the times that are visited.
NUMBERS = fd.paths.TrajectoryPath(
    jnp.broadcast_to(TS, (2000, 6)), jnp.broadcast_to(jnp.arange(6.0), (2000, 6))
)


def sums_of_squares(num_jumps, s, t):
    objective = RollOutMatching(num_jumps, **PLAIN)
    made = losses(objective, STILL, NUMBERS, jnp.asarray(s), jnp.asarray(t))
    return np.asarray(num_jumps * made).round(9)


def test_consecutive_times_if_there_are_no_others():
    assert (sums_of_squares(5, 0.0, 1.0) == 1 + 4 + 9 + 16 + 25).all()
    assert (sums_of_squares(3, 0.8, 0.1) == 1 + 4 + 9).all()  # from 4 to 3, 2, 1


def test_one_time_between_is_any_with_equal_chance():
    found, counts = np.unique(sums_of_squares(2, 0.0, 1.0) - 25, return_counts=True)
    assert found.tolist() == [1, 4, 9, 16]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_two_times_between_are_different():
    found, counts = np.unique(sums_of_squares(3, 0.0, 1.0) - 25, return_counts=True)
    pairs = sorted(a**2 + b**2 for a in range(1, 5) for b in range(1, a))
    assert found.tolist() == pairs
    assert stats.chisquare(counts).pvalue > 1e-4


def test_jumps_without_a_time_have_length_zero():
    # From 0 to 2 there is one time between: 0, 1, 2, 2, 2.
    assert (sums_of_squares(4, 0.0, 0.3) == 1 + 4 + 4 + 4).all()
    assert (sums_of_squares(4, 0.3, 0.3) == 0).all()


def test_times_are_rounded_to_saved_times():
    assert (sums_of_squares(1, 0.04, 0.87) == 16).all()
    assert np.isnan(sums_of_squares(1, 0.04, 1.01)).all()
    assert np.isnan(sums_of_squares(1, -0.01, 1.0)).all()


def test_positions_in_times_of_their_own():
    # x' = -(1 + 2t) x, each trajectory over an interval of its own.
    exact = lambda s, t, x, args: jnp.exp(s + s**2 - t - t**2) * x
    ts = jnp.asarray([[0.0, 1e-3, 1e-2, 0.1], [1.0, 1.5, 1.75, 2.0]])
    ys = jnp.asarray([3.0, -2.0])[:, None, None] * jnp.exp(-ts - ts**2)[..., None]
    paths = fd.paths.TrajectoryPath(ts, ys)
    objective = RollOutMatching(3, positions=True)
    ends = jnp.asarray(0.0), jnp.asarray(1.0)
    assert np.all(losses(objective, exact, paths, *ends) < 1e-20)
    # The mean over the jumps, as the mean velocity since the first time.
    still = losses(objective, STILL, paths, *ends)
    rates = (ys[:, 1:, 0] - ys[:, :1, 0]) / (ts[:, 1:] - ts[:, :1])
    assert_close(still, np.mean(rates**2, axis=1), 1e-10, 1e-10)


def test_windows_of_a_grid():
    s, t = fd.times.Neighbours(TS, distance=2)(jr.key(0), 500)
    pairs = {(float(a), float(b)) for a, b in zip(s, t, strict=True)}
    assert pairs == {(0.0, 0.3), (0.1, 0.4), (0.3, 0.8), (0.4, 1.0)}


# --- gradients ------------------------------------------------------------------------


def gradient(**settings):
    objective = RollOutMatching(4, **settings)
    ends = jnp.asarray(0.0), jnp.asarray(1.0)
    args = jnp.asarray([0.3, -0.2])
    mean = lambda flow_map: losses(objective, flow_map, exact_paths(), *ends, args).mean()
    return jtu.tree_leaves(eqx.filter_grad(mean)(mlp_map()))


def test_recomputing_and_unrolling_change_no_gradient():
    expected = gradient()
    assert max(np.abs(leaf).max() for leaf in expected) > 1e-2
    assert_close(gradient(remat=True, unroll=True), expected, 1e-12, 1e-12)


def test_memory_of_recomputed_jumps():
    # What is kept for the reverse pass of one wide jump after another.
    net = fd.nn.MLP(2, 256, 3, key=jr.key(0))
    ends = jnp.asarray(0.0), jnp.asarray(1.0)

    def size(remat):
        objective = RollOutMatching(4, remat=remat)
        mean = lambda net: losses(objective, fd.FlowMap(net), exact_paths(), *ends).mean()
        params, rest = eqx.partition(net, eqx.is_inexact_array)
        run = lambda params: mean(eqx.combine(params, rest))
        _, back = jax.vjp(run, params)
        return sum(leaf.size for leaf in jtu.tree_leaves(back) if eqx.is_array(leaf))

    assert size(True) < 0.9 * size(False)


# --- noise and penalties --------------------------------------------------------------


def test_noise_has_its_variance_and_is_carried_on():
    zeros = {"a": jnp.zeros((4000, 6, 3)), "b": jnp.zeros((4000, 6))}
    paths = fd.paths.TrajectoryPath(jnp.broadcast_to(TS, (4000, 6)), zeros)
    still = fd.FlowMap(lambda s, t, x, args: jtu.tree_map(jnp.zeros_like, x))
    ends = jnp.asarray(0.0), jnp.asarray(1.0)
    made = losses(RollOutMatching(3, noise=0.2, **PLAIN), still, paths, *ends)
    # Chi-squared of four entries: mean 4, variance 8; four standard errors.
    assert abs(np.mean(made) / 0.04 - 4) < 4 * (8 / 4000) ** 0.5
    assert abs(np.var(made) / 0.04**2 - 8) < 1.5


def test_penalty_of_quantities():
    energy = lambda x, args: {"energy": args * jnp.sum(x**2), "first": x[:1]}
    settings = {"quantities": energy, "quantity_weight": 3.0, **PLAIN}
    ends = jnp.asarray(0.0), jnp.asarray(0.3)
    args = jnp.asarray(0.7)
    paths = exact_paths()
    made = losses(RollOutMatching(2, **settings), STILL, paths, *ends, args)
    without = losses(RollOutMatching(2, **PLAIN), STILL, paths, *ends, args)
    xs = np.asarray(paths.ys)[:, :3]
    squares = 0.7 * np.sum(xs**2, axis=2)
    expected = (squares[:, 1:] - squares[:, :1]) ** 2
    expected += (xs[:, 1:, 0] - xs[:, :1, 0]) ** 2
    assert_close(made - without, 3 * expected.mean(axis=1), 1e-12, 1e-10)


def test_penalty_of_a_spectrum_trains():
    # A wave that moves: its spectrum does not change, and that of a decaying map does.
    x = jnp.arange(16) / 16
    waves = jnp.stack([jnp.sin(2 * jnp.pi * (x - t)) for t in TS])[None, :, :, None]
    paths = fd.paths.TrajectoryPath(TS[None], waves)
    spectrum = lambda x, args: fd.metrics.energy_spectrum(x)
    objective = RollOutMatching(
        5, difference=lambda x, y: (), quantities=spectrum, **PLAIN
    )
    ends = jnp.asarray(0.0), jnp.asarray(1.0)
    assert np.all(losses(objective, STILL, paths, *ends) < 1e-20)
    halved = lambda s, t, x, args: x * 2 ** -(t - s)
    # Energies are 1/4 and less by four to the power of the time.
    expected = np.mean((0.25 * (1 - 4.0 ** -np.asarray(TS[1:]))) ** 2)
    made = losses(objective, halved, paths, *ends)
    assert_close(made, np.asarray([expected]), 1e-12, 1e-10)


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"num_jumps": 0}, ValueError, "`num_jumps` must be at least 1"),
        ({"num_jumps": 2.5}, TypeError, "`num_jumps` must be an integer"),
        ({"noise": -0.1}, ValueError, "`noise` must be at least 0"),
        ({"quantity_weight": -1.0}, ValueError, "`quantity_weight` must be at least 0"),
        ({"quantities": lambda x: x}, TypeError, r"`quantities\(x, args\)`"),
        ({"difference": 3}, TypeError, r"`difference` must be a callable"),
    ],
)
def test_bad_settings(settings, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        RollOutMatching(**settings)


def test_more_jumps_than_saved_times():
    with pytest.raises(ValueError, match="6 jumps visit 7 saved times, but .* have 6"):
        losses(RollOutMatching(6), STILL, exact_paths(), 0.0, 1.0)


def test_path_that_is_no_trajectory():
    path = fd.LinearInterpolant()(X0[0], X0[1])
    with pytest.raises(TypeError, match="`RollOutMatching` learns from trajectories"):
        RollOutMatching()(STILL, None, path, 0.0, 1.0, key=jr.key(0))


def test_times_that_are_not_covered_are_said_before_training():
    paths = exact_paths()
    batches = fd.data.TrajectoryBatches(10 * TS + 2, paths.ys, 2)
    net = fd.nn.MLP(2, 8, 1, key=jr.key(0))
    with pytest.raises(ValueError, match=r"`RollOutMatching` draws times from .*cover"):
        fd.train.fit(
            fd.FlowMap(net),
            RollOutMatching(),
            batches,
            optax.sgd(0.1),
            num_steps=1,
            key=jr.key(0),
            progress=False,
        )


@pytest.mark.parametrize("distance", [0, 6])
def test_windows_that_do_not_fit(distance):
    with pytest.raises(ValueError, match="`distance` must be|no two that are 6 steps"):
        fd.times.Neighbours(TS, distance=distance)
