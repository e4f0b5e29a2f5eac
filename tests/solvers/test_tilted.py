"""`sample_tilted` against tilted distributions that are known in closed form."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import RUN_TIME_ERROR, assert_close, gaussian_map, without_type_checks

import flowdiffrax as fd

LINEAR = fd.LinearInterpolant()


def tilted(*args, **settings):
    return eqx.filter_jit(fd.solvers.sample_tilted)(*args, **settings)


# Closed forms


def linear_tilt(weights, means, covs, slope):
    """The mixture tilted by the reward `slope @ x`, and the log-normaliser."""
    log_weights = np.log(weights) + means @ slope
    log_weights += np.einsum("i,kij,j->k", slope, covs, slope) / 2
    total = np.logaddexp.reduce(log_weights)
    return np.exp(log_weights - total), means + covs @ slope, covs, total


def posterior(weights, means, covs, matrix, y, std):
    """The mixture given y = matrix @ x + std * noise, and the log-evidence."""
    size, parts = len(y), []
    for weight, mean, cov in zip(weights, means, covs, strict=True):
        spread = matrix @ cov @ matrix.T + std**2 * np.eye(size)
        gain, miss = cov @ matrix.T @ np.linalg.inv(spread), y - matrix @ mean
        log_det = np.linalg.slogdet(2 * np.pi * spread)[1]
        log_weight = -(miss @ np.linalg.solve(spread, miss) + log_det) / 2
        part = mean + gain @ miss, cov - gain @ matrix @ cov
        parts.append((np.log(weight) + log_weight, *part))
    log_weights, means, covs = map(np.asarray, zip(*parts, strict=True))
    total = np.logaddexp.reduce(log_weights)
    return np.exp(log_weights - total), means, covs, total


def moments(weights, means, covs):
    mean = weights @ means
    spread = means - mean
    return mean, np.einsum(
        "k,kij->ij", weights, covs + spread[..., None] * spread[:, None]
    )


def log_likelihood(x, args):
    """Of y = matrix @ x + std * noise."""
    matrix, y, std = args
    error = (y - matrix @ x) / std
    constant = jnp.log(std) + np.log(2 * np.pi) / 2
    return -jnp.sum(error**2) / 2 - y.size * constant


def estimates(samples):
    """Mean, covariance and log-normaliser."""
    weights = np.asarray(jax.nn.softmax(samples.log_weights))
    x = np.asarray(samples.x)
    spread = x - weights @ x
    return weights @ x, (spread.T * weights) @ spread, float(samples.log_normaliser)


def repeat(run, number):
    """Mean and standard error of the estimates of independent runs."""
    found = [estimates(run(key)) for key in jr.split(jr.key(4), number)]
    for each in zip(*found, strict=True):
        each = np.asarray(each)
        yield each.mean(axis=0), each.std(axis=0, ddof=1) / np.sqrt(number)


def assert_within(found, truth, errors=5.0, slack=0.0):
    mean, error = found
    assert (np.abs(mean - truth) <= errors * error + slack).all(), (mean, truth, error)


# Gaussian data, where even the moves are exact: any interpolant, few jumps

MEAN, COV = np.asarray([0.7, 0.5]), np.asarray([[0.36, 0.1], [0.1, 0.2]])
MATRIX, Y, STD = jnp.asarray([[1.0, -0.6]]), jnp.asarray([1.1]), jnp.asarray(0.3)
MEASURED = MATRIX, Y, STD
INTERPOLANTS = {
    "linear": LINEAR,
    "trigonometric": fd.paths.TrigonometricInterpolant(),
    "vp": fd.paths.VariancePreservingInterpolant(),
    "ve": fd.paths.VarianceExplodingInterpolant(0.1, 5.0),
    "latent": fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent(0.5)),
    "Brownian": fd.LinearInterpolant(latent=fd.paths.BrownianLatent(0.5)),
}


def exact_map(interpolant=LINEAR, base_std=1.0):
    return fd.exact.GaussianFlowMap(
        interpolant, base_std=base_std, target_mean=MEAN, target_cov=COV
    )


def initial(interpolant, base_std, number, key):
    """Draws of I_0, which for diffusions is not quite the base."""
    keys = jr.split(key, 3)
    base = base_std * jr.normal(keys[0], (number, 2))
    data = jr.multivariate_normal(keys[1], MEAN, COV, (number,))
    alpha, beta, _ = interpolant.coefficients(0.0)
    return alpha * base + beta * data


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_gaussian_posterior(name):
    interpolant, base_std, number = INTERPOLANTS[name], 1.3, 512
    flow_map = exact_map(interpolant, base_std)

    def run(key):
        x0 = initial(interpolant, base_std, number, jr.fold_in(key, 1))
        return tilted(
            *(flow_map, interpolant, log_likelihood, x0, 6, MEASURED),
            key=jr.fold_in(key, 2),
            base_std=base_std,
        )

    mean, cov, log_normaliser = repeat(run, 16)
    truth = posterior([1.0], MEAN[None], COV[None], *map(np.asarray, MEASURED))
    assert_within(mean, truth[1][0])
    # The logarithm of a mean, and a covariance about a mean of its own.
    assert_within(log_normaliser, truth[3], slack=2e-3)
    assert_within(cov, truth[2][0], slack=2e-3)
    assert np.all(log_normaliser[1] < 0.03) and np.all(mean[1] < 0.02)


def test_normaliser_is_unbiased_at_two_jumps_and_samples_without_weights_are_not():
    truth = posterior([1.0], MEAN[None], COV[None], *map(np.asarray, MEASURED))
    found, unweighted = [], []
    for key in jr.split(jr.key(4), 64):
        x0 = jr.normal(jr.fold_in(key, 1), (64, 2))
        settings = {"key": jr.fold_in(key, 2), "resample_below": 0.0}
        problem = exact_map(), LINEAR, log_likelihood, x0, 2, MEASURED
        samples = tilted(*problem, **settings)
        found.append(np.exp(samples.log_normaliser - truth[3]))
        unweighted.append(samples.x.mean(axis=0))
    assert abs(np.mean(found) - 1) < 4 * np.std(found) / 8
    miss = np.mean(unweighted, axis=0) - truth[1][0]
    assert np.max(np.abs(miss) / (np.std(unweighted, axis=0) / 8)) > 20


@pytest.mark.parametrize("jumps", [1, 2, 5])
def test_without_noise_the_weight_is_the_reward(jumps):
    # The look-ahead is constant along the flow, so the rates of the log-weight add up.
    # From a true base, any noise would forget where a particle starts.
    interpolant = fd.paths.VariancePreservingInterpolant()
    flow_map, x0 = exact_map(interpolant), jr.normal(jr.key(3), (16, 2))
    settings = {"key": jr.key(7), "noise": 1e-30, "resample_below": 0.0}
    problem = flow_map, interpolant, log_likelihood, x0, jumps, MEASURED
    samples = tilted(*problem, **settings)
    x1 = jax.vmap(lambda x: flow_map(0.0, 1.0, x))(x0)
    assert_close(samples.x, x1)
    reward = jax.vmap(log_likelihood, (0, None))(x1, MEASURED)
    assert_close(samples.log_weights, reward)
    assert samples.effective_sizes.shape == (jumps,)
    assert_close(samples.acceptance, jnp.zeros(jumps - 1))


def test_log_weights_follow_their_rate():
    # In one dimension, data N(m, c^2), reward r(x) = -a (x - y)^2 / 2: the SDE of
    # docs/steering.md in the clock u = log(t / (1 - t)), where its noise is even.
    m, c, a, y, number = 0.5, 0.6, 3.0, 1.2, 4000
    rng, du = np.random.default_rng(0), 0.01
    x, log_weight = rng.standard_normal(number), np.zeros(number)
    for u in np.arange(-8, 8, du) + du / 2:
        t = 1 / (1 + np.exp(-u))
        dt, spread = t * (1 - t) * du, np.sqrt((1 - t) ** 2 + (c * t) ** 2)
        rate = (c**2 * t - (1 - t)) / spread**2
        ahead = m + c / spread * (x - t * m)
        slope = -a * (ahead - y) * c / spread
        log_weight += 2 * t * dt * -a * (ahead - y) ** 2 / 2
        drift = (m + rate * (x - t * m)) * dt
        drift += (1 - t) ** 2 * du * (-(x - t * m) / spread**2 + t**2 * slope)
        noise = (1 - t) * np.sqrt(2 * du) * rng.standard_normal(number)
        x = x + drift + noise
    flow_map = fd.exact.GaussianFlowMap(target_mean=m, target_std=c)
    u = jnp.linspace(-6, 6, 400)
    samples = tilted(
        *(flow_map, LINEAR, lambda x, args: -a * jnp.sum((x - y) ** 2) / 2),
        jr.normal(jr.key(3), (number, 1)),
        jnp.concatenate([jnp.zeros(1), jax.nn.sigmoid(u), jnp.ones(1)]),
        key=jr.key(7),
        resample_below=0.0,
    )
    own, x1 = np.asarray(samples.log_weights), np.asarray(samples.x[:, 0])
    error = np.sqrt(2 / number)
    assert abs(own.mean() - log_weight.mean()) < 4 * error * own.std()
    # Far below what the plain weights r(X_{0,1}(x_0)) have, 1.77.
    assert abs(own.std() / log_weight.std() - 1) < 5 * error
    assert own.std() < 1
    assert abs(x1.mean() - x.mean()) < 4 * error * x.std()
    assert np.min(samples.acceptance[1:]) > 0.9


# Mixtures


@functools.cache
def mixture(size):
    """Weights, means and covariances, and the flow map, by 18 evaluations."""
    rng = np.random.default_rng(size)
    weights, means = np.asarray([0.2, 0.3, 0.5]), rng.standard_normal((3, size))
    roots = rng.standard_normal((3, size, size)) / np.sqrt(size)
    covs = 0.15 * roots @ roots.swapaxes(1, 2) + 0.05 * np.eye(size)
    with jax.ensure_compile_time_eval():
        velocity = fd.exact.GaussianMixtureVelocity(weights, 1.2 * means, covs)
    flow_map = fd.ODEFlowMap(velocity, diffrax.Dopri5(), num_steps=3)
    return (weights, 1.2 * means, covs), flow_map


def run_mixture(reward, args, size, jumps, number):
    def run(key):
        x0 = jr.normal(jr.fold_in(key, 1), (number, size))
        return tilted(
            *(mixture(size)[1], LINEAR, reward, x0, jumps, args),
            key=jr.fold_in(key, 2),
        )

    return run


def component(x, weights, means, covs):
    """The probability of each component, given x."""
    pdf = jax.vmap(jax.scipy.stats.multivariate_normal.logpdf, (None, 0, 0))
    return jax.nn.softmax(jnp.log(weights) + pdf(x, means, covs))


def check_mixture(run, truth, number, slack):
    weights, means, covs, total = truth
    shares = []

    def run_and_count(key):
        samples = run(key)
        each = jax.vmap(component, (0, None, None, None))(
            samples.x, *map(jnp.asarray, (weights, means, covs))
        )
        shares.append(np.asarray(jax.nn.softmax(samples.log_weights) @ each))
        return samples

    mean, cov, log_normaliser = repeat(run_and_count, number)
    true_mean, true_cov = moments(weights, means, covs)
    assert_within(mean, true_mean, slack=slack)
    assert_within(cov, true_cov, slack=slack)
    assert_within(log_normaliser, total, slack=2 * slack)
    error = np.std(shares, axis=0, ddof=1) / np.sqrt(number)
    assert_within((np.mean(shares, axis=0), error), weights, slack=slack)
    assert log_normaliser[1] < 0.1 and np.max(error) < 0.04


def test_linear_reward_on_a_mixture():
    slope = np.asarray([1.0, -1.5])
    truth = linear_tilt(*mixture(2)[0], slope)
    reward = lambda x, slope: slope @ x
    run = run_mixture(reward, jnp.asarray(slope), 2, 5, 512)
    check_mixture(run, truth, 6, 0.01)


def test_inverse_problem_in_eight_dimensions():
    rng = np.random.default_rng(0)
    problem, _ = mixture(8)
    matrix = rng.standard_normal((3, 8)) / 2
    # Between two components, so that the posterior has more than one.
    y, std = matrix @ (problem[1][1] + problem[1][2]) / 2, 0.5
    truth = posterior(*problem, matrix, y, std)
    assert np.sort(truth[0])[-2] > 0.2
    measured = tuple(map(jnp.asarray, (matrix, y, std)))
    run = run_mixture(log_likelihood, measured, 8, 10, 256)
    check_mixture(run, truth, 6, 0.02)


# What is passed in and out


def test_zero_reward_is_plain_sampling():
    x0 = jr.normal(jr.key(3), (4000, 2))
    samples = tilted(
        exact_map(), LINEAR, lambda x, args: jnp.zeros(()), x0, 4, key=jr.key(7)
    )
    assert_close(samples.log_weights, jnp.zeros(4000))
    assert_close(samples.effective_sizes, jnp.full(4, 4000.0))
    mean, cov, log_normaliser = estimates(samples)
    assert abs(log_normaliser) < 1e-12
    assert np.max(np.abs(mean - MEAN)) < 4 * 0.6 / np.sqrt(4000)
    assert np.max(np.abs(cov - COV)) < 5 * 0.36 * np.sqrt(2 / 4000)


def test_samples_move():
    # Not along the flow from x0, although there is no reward.
    x0 = jr.normal(jr.key(3), (64, 2))
    samples = tilted(
        exact_map(), LINEAR, lambda x, args: jnp.zeros(()), x0, 8, key=jr.key(7)
    )
    along = jax.vmap(lambda x: exact_map()(0.0, 1.0, x))(x0)
    both = np.corrcoef(np.asarray(along[:, 0]), np.asarray(samples.x[:, 0]))
    assert abs(both[0, 1]) < 0.3


def test_structured_states_equal_arrays():
    flow_map = gaussian_map()
    x0 = jr.normal(jr.key(3), (8, 2))
    reward = lambda x, args: args * jnp.sum(x**2)

    class Pair(fd.AbstractFlowMap):
        time_range = (0.0, 1.0)

        def jump(self, s, t, x, args):
            y = flow_map(s, t, jnp.concatenate([x["a"], x["b"]]))
            return {"a": y[:1], "b": y[1:]}

    pair = {"a": x0[:, :1], "b": x0[:, 1:]}
    on_pair = lambda x, args: reward(jnp.concatenate([x["a"], x["b"]]), args)
    run = lambda flow_map, reward, x0: tilted(
        *(flow_map, LINEAR, reward, x0, 3, jnp.asarray(-0.3)),
        key=jr.key(7),
        base_std=1.3,
    )
    expected, found = run(flow_map, reward, x0), run(Pair(), on_pair, pair)
    assert_close(jnp.concatenate([found.x["a"], found.x["b"]], axis=1), expected.x)
    assert_close(found.log_weights, expected.log_weights)


def test_jit_and_vmap_change_nothing():
    x0 = jr.normal(jr.key(3), (8, 2))
    keys, offsets = jr.split(jr.key(4), 2), jnp.asarray([0.5, 1.5])
    reward = lambda x, y: -jnp.sum((x - y) ** 2)
    run = lambda key, y: fd.solvers.sample_tilted(
        gaussian_map(), LINEAR, reward, x0, 3, y, key=key
    )
    # The check takes keys in loops under `vmap` for a second use.
    with jax.debug_key_reuse(False):
        found = jax.jit(jax.vmap(run))(keys, offsets)
        for k in range(2):
            expected = run(keys[k], offsets[k])
            assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], found), expected)


def test_float32_stays():
    x0 = jr.normal(jr.key(3), (8, 2), jnp.float32)
    reward = lambda x, args: jnp.sum(x)
    samples = tilted(exact_map(), LINEAR, reward, x0, 3, key=jr.key(7))
    assert all(leaf.dtype == jnp.float32 for leaf in samples)
    assert np.isfinite(samples.log_weights).all()


def test_bfloat16_states_have_float32_weights():
    x0 = jr.normal(jr.key(3), (8, 2), jnp.bfloat16)
    reward = lambda x, args: jnp.sum(x)
    samples = tilted(exact_map(), LINEAR, reward, x0, 3, key=jr.key(7))
    assert samples.x.dtype == jnp.bfloat16
    assert samples.log_weights.dtype == jnp.float32


WRONG = {
    "reward of a batch": (
        {"reward": lambda x, args: x},
        ValueError,
        "`reward(x, args)` must be a scalar",
    ),
    "reward of one argument": (
        {"reward": lambda x: jnp.sum(x)},
        TypeError,
        "called as `reward(x, args)`",
    ),
    "complex reward": (
        {"reward": lambda x, args: jax.lax.complex(x[0], x[1])},
        TypeError,
        "must return a real floating-point number",
    ),
    "complex state": (
        {"x0": jnp.ones((4, 2), complex)},
        TypeError,
        "`sample_tilted` takes real arrays",
    ),
    "one state": ({"x0": jnp.ones(())}, ValueError, "one common leading axis"),
    "times backwards": (
        {"ts": jnp.asarray([1.0, 0.5, 0.0])},
        ValueError,
        "rise from 0 to 1",
    ),
    "times short": ({"ts": jnp.asarray([0.0, 0.5])}, ValueError, "rise from 0 to 1"),
    "tilt at the start": (
        {"tilt": lambda t: 1 - t},
        ValueError,
        "`tilt` must be 0 at t = 0 and 1 at t = 1; got 1 and 0",
    ),
    "no noise": ({"noise": 0.0}, ValueError, "`noise` must be positive"),
    "threshold": ({"resample_below": 2.0}, ValueError, "must be in [0, 1]"),
    "base without spread": ({"base_std": 0.0}, ValueError, "`base_std` must be positive"),
    "base of several spreads": ({"base_std": jnp.ones(2)}, ValueError, "a scalar"),
    "no interpolant": (
        {"interpolant": fd.LinearInterpolant},
        TypeError,
        "`interpolant` must be an instance of `AbstractInterpolant`",
    ),
    "tilt of several numbers": (
        {"tilt": lambda t: jnp.stack([t, t])},
        ValueError,
        "`tilt(t)` must be a scalar",
    ),
    "start that is not finite": (
        {"x0": jnp.full((4, 2), jnp.nan)},
        ValueError,
        "`x0` is not finite",
    ),
    "map without a velocity": (
        {"flow_map": lambda s, t, x, args: x},
        TypeError,
        "whose velocity gives the score",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    change, error, words = WRONG[name]
    settings = {
        "flow_map": gaussian_map(),
        "interpolant": LINEAR,
        "reward": lambda x, args: jnp.sum(x),
        "x0": jnp.ones((4, 2)),
        "ts": 2,
    }
    with without_type_checks(), pytest.raises(error) as caught:
        fd.solvers.sample_tilted(**(settings | change), key=jr.key(7))
    assert words in str(caught.value)


@eqx.filter_jit
def tilted_by_traced(ts, noise, end, share):
    return fd.solvers.sample_tilted(
        gaussian_map(),
        LINEAR,
        lambda x, args: jnp.sum(x),
        jr.normal(jr.key(8), (4, 2)),
        ts,
        key=jr.key(9),
        noise=noise,
        tilt=lambda t: end * t,
        resample_below=share,
    )


as_arrays = lambda settings: {k: jnp.asarray(v) for k, v in settings.items()}
TRACED = {"ts": [0.0, 0.4, 1.0], "noise": 1.0, "end": 1.0, "share": 0.5}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ts": [0.0, 0.0, 1.0]}, "must rise from 0 to 1"),
        ({"ts": [0.0, 1.1, 1.0]}, "must rise from 0 to 1"),
        ({"ts": [0.0, 0.4, 0.9]}, "must rise from 0 to 1"),
        ({"ts": [0.0, np.nan, 1.0]}, "must rise from 0 to 1"),
        ({"noise": 0.0}, "`noise` must be positive"),
        ({"noise": np.nan}, "`noise` must be positive"),
        ({"end": 0.5}, "`tilt` must be 0 at t = 0 and 1 at t = 1"),
        ({"share": 1.5}, "`resample_below` must be in"),
    ],
)
def test_traced_mistakes(change, message):
    with pytest.raises(RUN_TIME_ERROR, match=message):
        jax.block_until_ready(tilted_by_traced(**as_arrays(TRACED | change)))


def test_traced_settings_change_nothing():
    traced = tilted_by_traced(**as_arrays(TRACED))
    settings = {"noise": 1.0, "tilt": lambda t: t}
    x0, ts = jr.normal(jr.key(8), (4, 2)), jnp.asarray(TRACED["ts"])
    reward = lambda x, args: jnp.sum(x)
    known = fd.solvers.sample_tilted(
        gaussian_map(), LINEAR, reward, x0, ts, key=jr.key(9), **settings
    )
    assert_close(traced, known)


def test_traced_shares_at_the_ends_of_their_range():
    for share in (0.0, 1.0):
        samples = tilted_by_traced(**as_arrays(TRACED | {"share": share}))
        assert np.isfinite(samples.x).all()


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_reward_that_is_not_finite(value):
    reward = lambda x, args: jnp.where(x[0] > 0, x[1], value)
    x0 = jr.normal(jr.key(8), (20, 2))
    with pytest.raises(RUN_TIME_ERROR, match="`reward` was not finite"):
        jax.block_until_ready(
            tilted(gaussian_map(), LINEAR, reward, x0, 3, key=jr.key(9))
        )
