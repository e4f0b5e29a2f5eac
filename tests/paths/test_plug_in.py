"""The plug-in velocity: against NumPy, its mean and variance, and every objective."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import OBJECTIVES, assert_close, mlp_map
from scipy.special import softmax

import flowdiffrax as fd
from flowdiffrax.paths._plug_in import plug_in_paths

LATENT = fd.paths.SineSquaredLatent(0.4)
INTERPOLANTS = {
    "linear": fd.LinearInterpolant(),
    "sigma_min": fd.LinearInterpolant(sigma_min=0.1),
    "trigonometric": fd.paths.TrigonometricInterpolant(),
    "vp": fd.paths.VariancePreservingInterpolant(),
    "ve": fd.paths.VarianceExplodingInterpolant(),
    "latent": fd.LinearInterpolant(latent=LATENT),
    "trigonometric latent": fd.paths.TrigonometricInterpolant(latent=LATENT),
}
MIXTURE = fd.exact.GaussianMixtureVelocity(
    [0.6, 0.4], [[1.0, 0.3], [-0.8, 0.5]], [0.09, 0.25]
)


def draw_mixture(key, n):
    part_key, point_key = jr.split(key)
    part = jr.bernoulli(part_key, 0.4, (n,)).astype(int)
    means = jnp.asarray([[1.0, 0.3], [-0.8, 0.5]])
    stds = jnp.asarray([0.3, 0.5])
    return means[part] + stds[part][:, None] * jr.normal(point_key, (n, 2))


def batch_of(data, size, seed=0, **settings):
    interpolant = settings.pop("interpolant", INTERPOLANTS["linear"])
    batches = fd.data.InterpolantBatches(
        interpolant, data, size, plug_in=True, **settings
    )
    return eqx.filter_jit(batches)(jr.key(seed))


def each(method, paths, t):
    """A method of every path of a batch at its own time, mapped as a loss maps it."""
    axes = eqx.tree_at(
        lambda p: p.points,
        jax.tree_util.tree_map(lambda leaf: 0 if eqx.is_array(leaf) else None, paths),
        None,
        is_leaf=lambda node: node is None,
    )
    one = lambda path, t: getattr(path, method)(t)
    return eqx.filter_jit(eqx.filter_vmap(one, in_axes=(axes, 0)))(paths, t)


def exact(x, t, points, interpolant, mean, std):
    """The velocity at `x` of a flow from a Gaussian to a finite set, in NumPy."""
    alpha, beta, gamma = (float(c) for c in interpolant.coefficients(t))
    d_alpha, d_beta, d_gamma = (float(c) for c in interpolant.rates(t))
    variance = alpha**2 * std**2 + gamma**2
    offsets = x - alpha * mean - beta * points
    weights = softmax(-np.sum(offsets**2, axis=1) / (2 * variance))
    growth = (alpha * d_alpha * std**2 + gamma * d_gamma) / variance
    return weights @ (d_alpha * mean + d_beta * points + growth * offsets)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_it_is_the_exact_velocity_of_the_batch(name):
    interpolant, mean = INTERPOLANTS[name], np.asarray([0.4, -0.2])
    base = fd.data.GaussianBase(0.7, mean)
    paths, _ = batch_of(draw_mixture, 30, interpolant=interpolant, base=base)
    ts = jnp.linspace(0.02, 0.98, 30)
    states, rates = each("evaluate", paths, ts), each("derivative", paths, ts)
    points = np.asarray(paths.path.x1)
    expected = [
        exact(x, t, points, interpolant, mean, 0.7)
        for x, t in zip(np.asarray(states), np.asarray(ts), strict=True)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_mean_path_passes_through_the_state(name):
    paths, _ = batch_of(draw_mixture, 20, interpolant=INTERPOLANTS[name])
    ts = jnp.linspace(0.02, 0.98, 20)
    through = each("through", paths, ts)
    states = eqx.filter_vmap(lambda path, t: path.evaluate(t))(through, ts)
    assert_close(states, each("evaluate", paths, ts), 1e-9, 1e-9)


def test_only_equal_conditions_count():
    data, labels = jr.normal(jr.key(1), (50, 2)), jnp.arange(50) % 3
    paths, args = batch_of(data, 24, args=labels)
    ts = jnp.full(24, 0.4)
    states, rates = each("evaluate", paths, ts), each("derivative", paths, ts)
    for index in range(24):
        own = np.asarray(paths.path.x1[args == args[index]])
        expected = exact(
            np.asarray(states[index]), 0.4, own, INTERPOLANTS["linear"], 0.0, 1.0
        )
        np.testing.assert_allclose(rates[index], expected, rtol=1e-9)


def test_conditions_that_all_differ_leave_the_rate_of_the_pair():
    data = jr.normal(jr.key(1), (50, 2))
    paths, _ = batch_of(data, 8, args=jr.normal(jr.key(2), (50, 1)))
    own = paths.path.x1 - paths.path.x0
    repeated = (paths.path.x1[:, None] == paths.path.x1[None]).all(-1).sum(1) > 1
    assert not repeated.any()
    assert_close(each("derivative", paths, jnp.linspace(0.0, 0.9, 8)), own, 1e-9)


def test_states_of_several_leaves():
    flat, _ = batch_of(jr.normal(jr.key(1), (40, 3)), 16)
    split = lambda x: {"a": x[..., 0], "b": x[..., 1:].reshape(*x.shape[:-1], 2, 1)}
    tree = eqx.tree_at(
        lambda p: (p.path.x0, p.path.x1, p.mean, p.points.tree),
        flat,
        replace_fn=split,
    )
    ts = jnp.linspace(0.0, 0.9, 16)
    assert_close(each("derivative", tree, ts), split(each("derivative", flat, ts)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_it_is_finite_at_both_ends(name, dtype):
    labels = jnp.arange(20) % 2
    paths, _ = batch_of(
        jr.normal(jr.key(0), (20, 2), dtype),
        16,
        args=labels,
        interpolant=INTERPOLANTS[name],
    )
    for t in (0.0, 1e-30, 1 - 1e-7, 1.0):
        rates = each("derivative", paths, jnp.full(16, t, dtype))
        assert rates.dtype == dtype and jnp.all(jnp.isfinite(rates))


def test_it_is_precise_in_float32_near_the_data():
    shift = 20.0  # standard deviations from the origin
    paths, _ = batch_of(draw_mixture, 64)
    moved = eqx.tree_at(
        lambda p: (p.path.x1, p.points.tree), paths, replace_fn=lambda x: x + shift
    )
    low = jax.tree_util.tree_map(
        lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, moved
    )
    ts = jnp.linspace(0.1, 0.99, 64)
    expected = each("derivative", moved, ts)
    rates = each("derivative", low, ts.astype(jnp.float32))
    assert_close(rates.astype(float), expected, 2e-3, 2e-3)


# --- mean and variance ----------------------------------------------------------------

ATOMS = np.asarray([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.2], [0.4, 0.9]])
STATE, TIME = np.asarray([0.2, 0.1]), 0.6


def rates_through_a_state(size, num_batches):
    """The rates at one state of many pairs, and the plug-in velocities of their batches.

    Data points are drawn from `ATOMS`; that of the first pair given its state. Also
    returns the estimates that leave this pair out, and the exact velocity.
    """
    rng, left = np.random.default_rng(0), 1 - TIME
    posterior = softmax(-np.sum((STATE - TIME * ATOMS) ** 2, axis=1) / (2 * left**2))
    points = ATOMS[rng.choice(4, (num_batches, size))]
    points[:, 0] = ATOMS[rng.choice(4, num_batches, p=posterior)]
    x0 = (STATE - TIME * points) / left

    def plug_in(x0, x1, first):
        paths = jax.vmap(fd.LinearInterpolant())(x0, x1)
        batch = plug_in_paths(paths, None, jnp.zeros_like(x1), 1.0)
        row = lambda leaf: leaf[first]
        own = jax.tree_util.tree_map(row, (batch.path, batch.mean, batch.std))
        distances = batch.squared_distances[first]
        return fd.paths.PlugInPath(*own, distances, batch.points).derivative(TIME)

    velocities = jax.jit(jax.vmap(plug_in, (0, 0, None)))(x0, points, 0)
    # All pairs of a batch are given the same state, so that any of them stands for it.
    left_out = jax.jit(jax.vmap(plug_in, (0, 0, None)))(x0[:, 1:], points[:, 1:], 0)
    exact = posterior @ ((ATOMS - STATE) / left)
    return (points - x0)[:, 0], np.asarray(velocities), np.asarray(left_out), exact


def standard_errors(samples, mean):
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return np.max(np.abs(samples.mean(axis=0) - mean) / error)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_it_is_unbiased_at_any_batch_size_with_less_variance(size):
    rates, velocities, left_out, exact = rates_through_a_state(size, 40_000)
    assert standard_errors(rates, exact) < 4
    assert standard_errors(velocities, exact) < 4
    assert np.all(velocities.var(axis=0) < rates.var(axis=0))
    # Without the pair's own data point it would be biased.
    assert standard_errors(left_out, exact) > 10


def test_its_variance_falls_with_the_batch():
    variances = [
        rates_through_a_state(size, 10_000)[1].var(axis=0).sum() for size in (4, 16, 64)
    ]
    assert variances[1] < variances[0] / 2 and variances[2] < variances[1] / 3


def test_batches_of_a_mixture_have_its_velocity_on_average():
    # Over states and batches: the error of the velocity has no correlation with anything.
    error, features = [], []
    for seed in range(20):
        paths, _ = batch_of(draw_mixture, 256, seed)
        ts = jr.uniform(jr.key(seed), (256,), maxval=0.9)
        states = each("evaluate", paths, ts)
        exact = jax.vmap(MIXTURE)(ts, states)
        error.append(each("derivative", paths, ts) - exact)
        features.append(jnp.stack([jnp.ones_like(ts), states[:, 0], exact[:, 0]], 1))
    products = jnp.mean(
        jnp.stack(error)[..., :, None] * jnp.stack(features)[..., None, :], axis=1
    )
    # Rows of a batch share its points, so only batches are independent.
    assert standard_errors(np.asarray(products).reshape(20, -1), 0.0) < 4
    assert jnp.sqrt(jnp.mean(jnp.stack(error) ** 2)) < 0.3


# --- objectives -----------------------------------------------------------------------

# The gradients of the others are not linear in the rate, or use no rate at all.
LINEAR = (
    "FlowMatching",
    "FlowMapMatching",
    "LagrangianSelfDistillation",
    "EulerianSelfDistillation",
    "ProgressiveSelfDistillation",
    "Shortcut",
    "TerminalVelocityMatching",
    "StopGradientEulerian",
    "MeanFlow",
    "ImprovedMeanFlow",
    "ContinuousConsistency",
)


def gradients(objective, flow_map, plug_in, num_batches, size=16):
    """The gradients of a loss over batches, along a few directions of the weights."""
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(sigma_min=0.1), draw_mixture, size, plug_in=plug_in
    )

    @eqx.filter_jit
    def gradient(flow_map, key):
        batch_key, loss_key = jr.split(key)
        paths, _ = batches(batch_key)
        loss = lambda m: fd.objectives.batch_loss(
            objective, m, None, paths, key=loss_key
        )[0]
        leaves = jax.tree_util.tree_leaves(eqx.filter_grad(loss)(flow_map))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    keys = jr.split(jr.key(3), num_batches)
    each = np.asarray(jax.lax.map(lambda key: gradient(flow_map, key), keys))
    rng = np.random.default_rng(1)
    return each @ rng.standard_normal((each.shape[1], 8)) / np.sqrt(each.shape[1])


QUICK = ("FlowMatching", "MeanFlow")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in LINEAR],
)
def test_mean_gradients_are_the_same(name):
    objective, flow_map = getattr(fd.objectives, name)(), mlp_map(1)
    own = gradients(objective, flow_map, False, 1500)
    plug_in = gradients(objective, flow_map, True, 1500)
    # The same keys draw the same pairs and times: their difference is what changed.
    assert standard_errors(plug_in - own, 0.0) < 4.5
    assert np.mean(plug_in.var(axis=0)) < np.mean(own.var(axis=0))


FROM_DATA = {name for name, taught in OBJECTIVES.items() if taught is None}


# These use the states of a path, but no rate.
SOLVED = {"TrajectoryMatching", "RollOutMatching", "CycleConsistency"}


@pytest.mark.parametrize("name", sorted(FROM_DATA - SOLVED))
def test_every_objective_that_learns_from_data_uses_it(name):
    objective = getattr(fd.objectives, name)()
    losses = []
    for plug_in in (False, True):
        batches = fd.data.InterpolantBatches(
            fd.LinearInterpolant(), draw_mixture, 32, plug_in=plug_in
        )
        losses.append(
            fd.objectives.batch_loss(
                objective, mlp_map(1), None, batches(jr.key(0))[0], key=jr.key(1)
            )[0]
        )
    assert np.isfinite(losses[1]) and losses[1] != losses[0]


def test_consistency_training_approaches_a_step_of_the_teacher():
    """On large batches, it is consistency distillation with a step of Euler's method."""
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), draw_mixture, 2048, plug_in=True
    )
    paths, _ = eqx.filter_jit(batches)(jr.key(0))
    weight, times = fd.weights.NoWeight(), fd.times.KarrasNeighbours(11)
    training = fd.objectives.ConsistencyTraining(times, weight)
    distillation = fd.objectives.ConsistencyDistillation(
        times, weight, solver=diffrax.Euler()
    )
    loss = lambda objective, teacher, paths: fd.objectives.batch_loss(
        objective, mlp_map(1), teacher, paths, key=jr.key(1)
    )[0]
    expected = loss(distillation, MIXTURE, paths.path)
    np.testing.assert_allclose(loss(training, None, paths), expected, rtol=0.05)
    assert loss(training, None, paths.path) > 1.2 * expected


# --- training, and refusals -----------------------------------------------------------


def test_training_with_parts_of_a_batch():
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), draw_mixture, 16, plug_in=True
    )
    optim = optax.adam(1e-3)
    mixture = fd.objectives.Mixture((fd.objectives.MeanFlow(), fd.FlowMatching()), (3, 1))
    step = fd.train.make_step(mixture, optim, accumulate=3)
    state = fd.train.TrainState.create(mlp_map(1), optim, key=jr.key(0))
    state, info = step(state, batches)
    assert bool(info.is_finite) and int(state.step) == 1


def test_conditions_may_be_dropped_afterwards():
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(),
        jr.normal(jr.key(0), (50, 2)),
        32,
        args=jax.nn.one_hot(jnp.arange(50) % 2, 2),
        plug_in=True,
    )
    dropped = fd.data.ConditionDropout(batches, jnp.zeros(2), rate=0.5)
    paths, args = dropped(jr.key(1))
    loss, _ = fd.objectives.batch_loss(
        fd.FlowMatching(), mlp_map(1), None, paths, args, key=jr.key(2)
    )
    assert np.isfinite(loss)


class Reversed(fd.paths.AbstractCoupling):
    def __call__(self, key, x0, x1, args=None):
        return x0[::-1]


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"coupling": Reversed()}, "needs independent pairs.*Reversed"),
        ({"base": lambda key, x1: x1}, "GaussianBase"),
    ],
)
def test_pairs_and_bases_that_it_cannot_serve(settings, match):
    with pytest.raises(ValueError, match=match):
        fd.data.InterpolantBatches(
            fd.LinearInterpolant(), draw_mixture, 8, plug_in=True, **settings
        )


def test_complex_data():
    data = jnp.ones((9, 2), complex)
    with pytest.raises(TypeError, match="takes real data"):
        batch_of(data, 8)


def test_mapping_over_the_points_of_the_batch():
    paths, _ = batch_of(draw_mixture, 8)
    with pytest.raises(ValueError, match="batch_loss"):
        eqx.filter_vmap(lambda path: path.derivative(0.5))(paths)


def test_increments_are_those_of_the_pair():
    paths, _ = batch_of(draw_mixture, 6)
    whole = eqx.filter_vmap(lambda path: path.evaluate(0.2, 0.7))(paths)
    ends = [each("evaluate", paths, jnp.full(6, t)) for t in (0.2, 0.7)]
    assert_close(whole, ends[1] - ends[0], 1e-12)
    assert np.abs(whole).max() > 0.1
