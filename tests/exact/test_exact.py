"""Closed forms against ODE solvers, sampling, quadrature and conservation of mass."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, gaussian_map, linear_map, tight_solve
from scipy import stats

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
LATENT = fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent(0.5))

# --- Gaussians ----------------------------------------------------------------------


def regression_velocity(interpolant, t, x, mean, cov):
    """E[dI_t | I_t = x] by linear regression of one Gaussian vector on another.

    `mean` and `cov` are those of (x0, x1), each `(2,)` blocks of numbers per coordinate.
    """
    a = np.asarray(interpolant.coefficients(t), float)
    b = np.asarray(interpolant.rates(t), float)
    variances = np.asarray([*cov, np.ones_like(cov[0])])
    means = np.asarray([*mean, np.zeros_like(mean[0])])
    cross = np.einsum("i,i,i...->...", a, b, variances)
    own = np.einsum("i,i,i...->...", a, a, variances)
    return b @ means + cross / own * (np.asarray(x) - a @ means)


@pytest.mark.parametrize(
    "interpolant",
    [
        fd.LinearInterpolant(),
        LATENT,
        fd.paths.TrigonometricInterpolant(),
        fd.paths.VariancePreservingInterpolant(),
        fd.paths.VarianceExplodingInterpolant(0.1, 4.0),
    ],
)
@pytest.mark.parametrize("t", [0.1, 0.8])
def test_gaussian_velocity_is_a_regression(interpolant, t):
    expected = regression_velocity(
        interpolant,
        t,
        X,
        (np.asarray([0.1, -0.2]), np.asarray([0.7, 0.5])),
        (np.full(2, 1.69), np.asarray([0.36, 0.16])),
    )
    np.testing.assert_allclose(gaussian_map(interpolant).velocity(t, X), expected, 1e-10)


FULL = {
    "base_cov": [[2.0, 0.5], [0.5, 2.0]],
    "target_cov": [[0.5, -0.3], [-0.3, 0.5]],
    "target_mean": [1.0, -2.0],
}


@pytest.mark.parametrize("interpolant", [fd.LinearInterpolant(), LATENT])
def test_full_covariances_are_an_ode_solution(interpolant):
    flow_map = fd.exact.GaussianFlowMap(interpolant, **FULL)

    def velocity(t, x, args):
        # E[dI | I = x] in matrices, without an eigenbasis.
        (a, b, g), (da, db, dg) = interpolant.coefficients(t), interpolant.rates(t)
        c0, c1 = jnp.asarray(FULL["base_cov"]), jnp.asarray(FULL["target_cov"])
        own = a**2 * c0 + b**2 * c1 + g**2 * jnp.eye(2)
        cross = a * da * c0 + b * db * c1 + g * dg * jnp.eye(2)
        mean = jnp.asarray(FULL["target_mean"])
        return db * mean + cross @ jnp.linalg.solve(own, x - b * mean)

    assert_close(flow_map(0.1, 0.9, X), tight_solve(velocity, 0.1, 0.9, X).ys[0], 1e-9)


def test_one_full_covariance_beside_a_standard_deviation():
    flow_map = fd.exact.GaussianFlowMap(base_std=1.5, target_cov=FULL["target_cov"])
    jacobian = jax.jacfwd(lambda x: flow_map(0.0, 1.0, x))(X)
    # The push-forward of the base has the target's covariance.
    assert_close(jacobian @ (2.25 * jacobian.T), jnp.asarray(FULL["target_cov"]))


@pytest.mark.parametrize("t", [0.5, 1.0])
def test_push_forward_by_monte_carlo(t):
    # Mean and covariance of 2e5 pushed base draws are those of 2e5 interpolants.
    n = 200_000
    rng = np.random.default_rng(0)
    x0 = rng.multivariate_normal(np.zeros(2), FULL["base_cov"], n)
    other = rng.multivariate_normal(np.zeros(2), FULL["base_cov"], n)
    x1 = rng.multivariate_normal(FULL["target_mean"], FULL["target_cov"], n)
    flow_map = fd.exact.GaussianFlowMap(**FULL)
    made = np.asarray(jax.vmap(lambda x: flow_map(0.0, t, x))(jnp.asarray(x0)))
    drawn = (1 - t) * other + t * x1
    features = lambda y: np.stack([*y.T, *(y.T**2), y[:, 0] * y[:, 1]])
    difference = features(made).mean(axis=1) - features(drawn).mean(axis=1)
    error = np.sqrt((features(made).var(axis=1) + features(drawn).var(axis=1)) / n)
    assert (np.abs(difference) < 4 * error).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_settings_broadcast_to_the_state(shape):
    size = shape[-1:] if shape else ()
    flow_map = fd.exact.GaussianFlowMap(
        base_mean=jnp.full(size, 0.5), target_std=jnp.full(size, 2.0), target_mean=1.0
    )
    out = flow_map(0.0, 1.0, jnp.full(shape, 0.75))
    assert_close(out, jnp.full(shape, 1.5))


def test_gaussian_float32():
    out = gaussian_map()(0.1, 0.9, X.astype(jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, gaussian_map()(0.1, 0.9, X), rtol=1e-6)


# --- linear ODEs --------------------------------------------------------------------


@pytest.mark.parametrize("s, t", [(0.2, 3.1), (3.1, 0.2), (-1.0, 0.5)])
def test_linear_map_is_the_solution(s, t):
    field = lambda t, x, args: jnp.stack(
        [0.2 * x[0] - 1.1 * x[1] + 0.3, 0.7 * x[0] - 0.4 * x[1] - 0.1]
    )
    assert_close(linear_map()(s, t, X), tight_solve(field, s, t, X).ys[0], 1e-9)


# --- mixtures -----------------------------------------------------------------------

WEIGHTS = np.asarray([0.2, 0.5, 0.3])
MEANS = np.asarray([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]])
COVS = np.asarray(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.3]]]
)


def mixture(interpolant=fd.LinearInterpolant()):
    return fd.exact.GaussianMixtureVelocity(
        WEIGHTS, MEANS, COVS, interpolant, base_std=1.2
    )


@pytest.mark.parametrize(
    "interpolant", [fd.LinearInterpolant(), fd.paths.TrigonometricInterpolant(), LATENT]
)
@pytest.mark.parametrize("t", [0.25, 0.7])
def test_mixture_velocity_by_importance_sampling(interpolant, t):
    # E[dI | I = x] = E[dI w] / E[w]: draw x1 and z, solve I = x for x0, weigh by the
    # density of x0. 4e5 draws; the tolerance is 4 standard errors by the delta method.
    n, x = 400_000, np.asarray(X)
    rng = np.random.default_rng(3)
    k = rng.choice(3, size=n, p=WEIGHTS)
    x1 = MEANS[k] + np.einsum(
        "nij,nj->ni", np.linalg.cholesky(COVS)[k], rng.standard_normal((n, 2))
    )
    z = rng.standard_normal((n, 2))
    alpha, beta, gamma = (float(c) for c in interpolant.coefficients(t))
    d_alpha, d_beta, d_gamma = (float(c) for c in interpolant.rates(t))
    x0 = (x - beta * x1 - gamma * z) / alpha
    weight = np.exp(-0.5 * (x0**2).sum(axis=1) / 1.2**2)
    rate = d_alpha * x0 + d_beta * x1 + d_gamma * z
    mean = weight @ rate / weight.sum()
    error = np.sqrt(((weight[:, None] * (rate - mean)) ** 2).sum(axis=0)) / weight.sum()
    assert (error < 0.02).all()
    assert (np.abs(mixture(interpolant)(t, X) - mean) < 4 * error).all()


def mixture_density(interpolant, t, x):
    alpha, beta, gamma = interpolant.coefficients(t)
    spread = (alpha**2 * 1.44 + gamma**2) * np.eye(2)[None] + beta**2 * COVS
    each = [
        w * jax.scipy.stats.multivariate_normal.pdf(x, beta * m, c)
        for w, m, c in zip(WEIGHTS, jnp.asarray(MEANS), spread, strict=True)
    ]
    return sum(each)


@pytest.mark.parametrize("interpolant", [fd.LinearInterpolant(), LATENT])
def test_mixture_conserves_mass(interpolant):
    # The continuity equation, by central differences in time and space.
    t, h = 0.4, 1e-4
    velocity = mixture(interpolant)
    rho = lambda t, x: float(mixture_density(interpolant, t, x))
    flux = lambda x, i: rho(t, x) * float(velocity(t, x)[i])
    change = (rho(t + h, X) - rho(t - h, X)) / (2 * h)
    step = h * jnp.eye(2)
    outflow = sum(
        (flux(X + step[i], i) - flux(X - step[i], i)) / (2 * h) for i in range(2)
    )
    assert abs(change) > 1e-2
    np.testing.assert_allclose(change, -outflow, atol=1e-6)


def test_mixture_of_one_is_the_gaussian():
    velocity = fd.exact.GaussianMixtureVelocity([2.0], [[0.7, 0.5]], [0.36], base_std=1.3)
    flow_map = fd.exact.GaussianFlowMap(
        base_std=1.3, target_std=0.6, target_mean=jnp.asarray([0.7, 0.5])
    )
    assert_close(velocity(0.3, X), flow_map.velocity(0.3, X))


def test_mixture_float32_far_out():
    x = jnp.asarray([40.0, -30.0])
    single = mixture()(0.9, x.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, mixture()(0.9, x), rtol=1e-4)


# --- boxes --------------------------------------------------------------------------

LOWER = np.asarray([[-1.0, -0.5], [0.2, 0.0], [0.2, -0.5]])
UPPER = np.asarray([[-0.4, 0.5], [1.0, 0.3], [0.6, 0.5]])
BOX_WEIGHTS = np.asarray([0.2, 0.5, 0.3])
BOX_STD = 0.7


def boxes(interpolant=fd.LinearInterpolant()):
    return fd.exact.UniformBoxesVelocity(LOWER, UPPER, BOX_WEIGHTS, interpolant, BOX_STD)


def boxes_by_scipy(interpolant, t, x):
    """E[x0 | I_t = x] and E[x1 | I_t = x] from SciPy's truncated normal and its cdf."""
    alpha, beta, _ = (float(c) for c in interpolant.coefficients(t))
    scale = alpha * BOX_STD / beta
    a, b = (LOWER - x / beta) / scale, (UPPER - x / beta) / scale
    flip = a > 0  # the differences of upper tails, where those are the small ones
    low, high = np.where(flip, -b, a), np.where(flip, -a, b)
    log_mass = stats.norm.logcdf(high) + np.log1p(
        -np.exp(stats.norm.logcdf(low) - stats.norm.logcdf(high))
    )
    log_weight = np.log(BOX_WEIGHTS / np.prod(UPPER - LOWER, axis=1))
    log_weight = log_weight + log_mass.sum(axis=1)
    weight = np.exp(log_weight - log_weight.max())
    means = stats.truncnorm.mean(a, b, loc=x / beta, scale=scale)
    denoised = weight / weight.sum() @ means
    return (x - beta * denoised) / alpha, denoised


POINTS = [[0.3, 0.1], [-0.7, -0.2], [0.0, 0.9], [-1.6, -0.8], [1.1, 0.31]]


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
@pytest.mark.parametrize("t", [0.1, 0.4, 0.8, 0.95])
def test_boxes_against_scipy(name, t):
    interpolant = {
        "linear": fd.LinearInterpolant(),
        "trigonometric": fd.paths.TrigonometricInterpolant(),
    }[name]
    predict = jax.jit(lambda t, x: boxes(interpolant).predict(t, x))
    for x in POINTS:
        noise, denoised = predict(t, jnp.asarray(x))
        expected = boxes_by_scipy(interpolant, t, np.asarray(x))
        np.testing.assert_allclose(denoised, expected[1], atol=1e-7)
        np.testing.assert_allclose(noise, expected[0], atol=1e-6)


def interval_by_quadrature(t, x, low, high):
    """Mass and mean of the base given I_t = x, x1 uniform in an interval, log-safe.

    Composite Gauss-Legendre of the density itself, over what part of it matters.
    """
    a, b = sorted(((x - t * high) / (1 - t), (x - t * low) / (1 - t)))
    a, b, sign = (a, b, 1) if abs(a) < abs(b) else (-b, -a, -1)
    reach = 40 * BOX_STD
    if a < 0:
        peak, start, stop = 0.0, max(a, -reach), min(b, reach)
    else:
        peak, start, stop = a, a, min(b, a + reach * BOX_STD / max(a, BOX_STD))
    # Relative to the peak, so that no digits cancel.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(start - peak, stop - peak, 301)
    half = np.diff(edges)[:, None] / 2
    u = edges[:-1, None] + half * (1 + nodes)
    density = half * weights * np.exp(-u * (u + 2 * peak) / (2 * BOX_STD**2))
    mass, first = density.sum(), (u * density).sum()
    log_mass = np.log(mass) - peak**2 / (2 * BOX_STD**2)
    return log_mass, sign * (peak + first / mass)


@functools.cache
def interval_predict(low, high):
    velocity = fd.exact.UniformBoxesVelocity([[low]], [[high]], base_std=BOX_STD)
    return jax.jit(lambda t, x: velocity.predict(t, x))


@pytest.mark.parametrize("t", [1e-6, 0.02, 0.3, 0.7, 0.98, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("x", [-20.0, -0.3, 0.05, 0.5, 0.77, 1.3])
def test_interval_against_quadrature(t, x):
    low, high = 0.2, 0.9
    noise, denoised = interval_predict(low, high)(t, jnp.asarray([x]))
    _, expected = interval_by_quadrature(t, x, low, high)
    np.testing.assert_allclose(noise[0], expected, rtol=1e-9, atol=1e-10)
    # The prediction of the data, from the same line x = (1 - t) x0 + t x1.
    assert abs((1 - t) * noise[0] + t * denoised[0] - x) < 1e-9
    assert low <= denoised[0] <= high


@pytest.mark.parametrize("t", [0.3, 0.9, 1 - 1e-3])
def test_two_intervals_are_weighed_by_quadrature(t):
    low, high = np.asarray([-0.9, 0.1]), np.asarray([-0.2, 0.3])
    velocity = fd.exact.UniformBoxesVelocity(
        low[:, None], high[:, None], [0.3, 0.7], base_std=BOX_STD
    )
    x = -0.05
    parts = [interval_by_quadrature(t, x, a, b) for a, b in zip(low, high, strict=True)]
    log_mass, mean = np.asarray(parts).T
    weight = np.exp(log_mass - log_mass.max()) * np.asarray([0.3, 0.7]) / (high - low)
    noise, _ = velocity.predict(t, jnp.asarray([x]))
    np.testing.assert_allclose(noise[0], weight @ mean / weight.sum(), rtol=1e-8)


TIMES = jnp.asarray([0.0, 1e-6, 0.01, 0.5, 0.9, 0.999, 1 - 1e-6])
GRID = jnp.asarray([[x, y] for x in (-1.7, -0.5, 0.03, 0.5, 0.98) for y in (-0.9, 0.26)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_checkerboard_and_its_gradients_are_finite(dtype):
    velocity = fd.exact.checkerboard_velocity()
    times = jnp.append(TIMES, 1.0).astype(dtype)
    value = lambda t, x: (velocity(t, x), jax.jacfwd(velocity, (0, 1))(t, x))
    over = jax.vmap(jax.vmap(value, (None, 0)), (0, None))
    for leaf in jax.tree_util.tree_leaves(jax.jit(over)(times, GRID.astype(dtype))):
        # At the data end and off the support the field itself has no bound.
        assert np.isfinite(leaf[:-1]).all()
        assert not np.isnan(leaf).any()
        assert leaf.dtype == dtype


def test_checkerboard_reverse_mode_is_finite():
    velocity = fd.exact.checkerboard_velocity()
    total = lambda t, x: jnp.sum(velocity(t, x))
    over = jax.vmap(jax.vmap(jax.grad(total, (0, 1)), (None, 0)), (0, None))
    for leaf in jax.jit(over)(TIMES, GRID):
        assert np.isfinite(leaf).all()


def test_checkerboard_jacobian():
    velocity = fd.exact.checkerboard_velocity()
    everywhere = jax.jit(jax.vmap(velocity, (None, 0)))
    made = jax.jit(jax.vmap(jax.jacfwd(velocity, 1), (None, 0)))
    for t in (0.05, 0.6, 0.97):
        for axis in range(2):
            step = 1e-6 * jnp.eye(2)[axis][None]
            change = everywhere(t, GRID + step) - everywhere(t, GRID - step)
            assert_close(made(t, GRID)[..., axis], change / 2e-6, 1e-5, 1e-5)


def test_checkerboard_float32_agrees():
    velocity = fd.exact.checkerboard_velocity()
    over = jax.jit(jax.vmap(jax.vmap(velocity, (None, 0)), (0, None)))
    times = jnp.asarray([0.01, 0.3, 0.5, 0.9, 0.99])
    double = np.asarray(over(times, GRID))
    single = np.asarray(over(times.astype(jnp.float32), GRID.astype(jnp.float32)))
    # Relative to 1/(1 - t), in which the rounding of x and of t is magnified.
    error = np.abs(single - double) * (1 - np.asarray(times))[:, None, None]
    assert error.max() < 2e-5


def test_velocity_at_time_zero_is_the_mean_minus_the_state():
    velocity = fd.exact.checkerboard_velocity()
    assert_close(velocity(0.0, X), -X, 1e-12)


def test_checkerboard_of_other_settings():
    lower, upper = fd.data.checkerboard_boxes(2)
    assert lower.tolist() == [[-1, -1], [0, 0]] and upper.tolist() == [[0, 0], [1, 1]]
    path = fd.paths.TrigonometricInterpolant()
    expected = fd.exact.UniformBoxesVelocity(lower, upper, None, path, 0.7)
    made = fd.exact.checkerboard_velocity(path, 0.7, 2)
    assert eqx.tree_equal(made, expected)


def test_velocity_at_time_one_inside_is_the_state():
    # Inside a box the base draw is symmetric around zero at the end: b_1(x) = x.
    x = jnp.asarray([-0.8, 0.3])
    assert fd.data.checkerboard_density(np.asarray(x)) > 0
    assert_close(fd.exact.checkerboard_velocity()(1.0, x), x, 1e-12)


def test_outside_points_to_the_nearest_box():
    t, x = 1 - 1e-6, jnp.asarray([1.4, 0.75])
    velocity = fd.exact.checkerboard_velocity()(t, x)
    assert_close((1 - t) * velocity, jnp.asarray([-0.4, 0.0]), 1e-4)


@pytest.mark.slow
def test_samples_land_on_filled_squares():
    # 4000 base draws, integrated to t = 1 - 1e-3: half the blur is 1e-3 of a standard
    # deviation of the base, so that all but a few lie within four of it.
    velocity = fd.exact.checkerboard_velocity()
    flow_map = fd.ODEFlowMap(velocity, rtol=1e-4, atol=1e-4)
    x0 = np.random.default_rng(0).standard_normal((4000, 2))
    x0 = jnp.asarray(x0, jnp.float32)
    y = np.asarray(jax.jit(jax.vmap(lambda x: flow_map(0.0, 0.999, x)))(x0), float)
    lower, upper = fd.data.checkerboard_boxes()
    gap = np.maximum(np.maximum(lower - y[:, None], y[:, None] - upper), 0).max(axis=-1)
    assert (gap.min(axis=1) < 4e-3).mean() > 0.99
    # Every square gets its eighth: a chi-squared test at one in ten thousand.
    counts = np.bincount(gap.argmin(axis=1), minlength=8)
    assert stats.chisquare(counts).pvalue > 1e-4


# --- refusals ---------------------------------------------------------------------------

Mixture, Boxes = fd.exact.GaussianMixtureVelocity, fd.exact.UniformBoxesVelocity
REFUSALS = {
    "covariances that do not commute": (
        lambda: fd.exact.GaussianFlowMap(
            base_cov=[[2, 0], [0, 1]], target_cov=FULL["base_cov"]
        ),
        "commute",
    ),
    "covariance with a negative eigenvalue": (
        lambda: fd.exact.GaussianFlowMap(target_cov=[[1.0, 2.0], [2.0, 1.0]]),
        "semi-definite",
    ),
    "covariance that is not symmetric": (
        lambda: fd.exact.GaussianFlowMap(target_cov=[[1.0, 0.5], [0.0, 1.0]]),
        "symmetric",
    ),
    "matrix that is not square": (
        lambda: fd.exact.LinearFlowMap([[1.0, 2.0]]),
        "must be square",
    ),
    "weight of zero": (
        lambda: Mixture([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0]),
        "2 positive weights",
    ),
    "one weight of two": (
        lambda: Mixture([1.0], [[0.0], [1.0]], [1.0, 1.0]),
        "2 positive weights",
    ),
    "covariances of more components": (
        lambda: Mixture([1.0], [[0.0]], [1.0, 1.0]),
        r"must be \(1, 1, 1\) or \(1,\)",
    ),
    "covariance of one triangle": (
        lambda: Mixture([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.5, 1.0]]]),
        "`covariances` must be symmetric",
    ),
    "means of one axis": (
        lambda: Mixture([1.0], [0.0], [1.0]),
        r"must have shape \(components, d\); got \(1,\)",
    ),
    "base of the mixture without spread": (
        lambda: Mixture([1.0], [[0.0]], [1.0], base_std=0.0),
        "`base_std` must be positive",
    ),
    "base of the boxes with a negative spread": (
        lambda: Boxes([[0.0]], [[1.0]], base_std=-1.0),
        "`base_std` must be positive",
    ),
    "component with a negative variance": (
        lambda: Mixture([1.0], [[0.0]], [-1.0]),
        "semi-definite",
    ),
    "empty box": (lambda: Boxes([[0.0]], [[0.0]]), "lower < upper"),
    "corners without boxes": (lambda: Boxes([0.0], [1.0]), "lower < upper"),
    "corners of other shapes": (lambda: Boxes([[0.0]], [[1.0, 1.0]]), "lower < upper"),
    "box of weight zero": (lambda: Boxes([[0.0]], [[1.0]], [0.0]), "1 positive weights"),
    "weights of more boxes": (
        lambda: Boxes([[0.0]], [[1.0]], [1.0, 1.0]),
        "1 positive weights",
    ),
    "latent": (lambda: Boxes([[0.0]], [[1.0]], None, LATENT), "a latent"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, match = REFUSALS[name]
    with pytest.raises(ValueError, match=match):
        make()
