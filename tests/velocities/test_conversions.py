"""Velocity, score, noise and denoiser: round trips and conditional expectations."""

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
import numpy as np
import pytest
from helpers import assert_close

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
T = 0.35
SCHEDULES = {
    "linear": fd.LinearInterpolant(),
    "sigma": fd.LinearInterpolant(sigma_min=0.2),
    "trigonometric": fd.paths.TrigonometricInterpolant(),
    "vp": fd.paths.VariancePreservingInterpolant(),
    "ve": fd.paths.VarianceExplodingInterpolant(0.1, 5.0),
}
PREDICTIONS = ["noise", "denoiser", "score"]


def convert(value, interpolant, t, x, source="velocity", target="velocity"):
    settings = {"source": source, "target": target, "base_std": 1.4}
    return fd.velocities.convert(value, interpolant, t, x, **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_round_trip(schedule, kind):
    if kind != "denoiser" and schedule == "ve":
        pytest.skip("tested against the closed form")
    velocity = jnp.asarray([0.3, 2.0])
    at = SCHEDULES[schedule], T, X
    made = convert(convert(velocity, *at, target=kind), *at, source=kind)
    assert_close(made, velocity, 1e-9, 1e-9)


# Data uniform on four points, base normal: posteriors are sums of four terms.
POINTS = np.asarray([[1.0, 0.2], [-0.5, 0.7], [0.3, -1.0], [2.0, 0.4]])
BASE_STD = 1.4


def posterior(interpolant, t, x):
    """Weights of the points, and the base draw that each one needs, given I_t = x."""
    alpha, beta, _ = (float(c) for c in interpolant.coefficients(t))
    noise = (np.asarray(x) - beta * POINTS) / alpha
    log_weight = -0.5 * (noise**2).sum(axis=1) / BASE_STD**2
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum(), noise


def expectations(interpolant, t, x):
    weight, noise = posterior(interpolant, t, x)
    # The velocity from paths, by finite differences of each conditional path.
    points = jnp.asarray(POINTS)
    path = jax.vmap(lambda x0, x1: interpolant(x0, x1).evaluate(t + 1e-6))
    back = jax.vmap(lambda x0, x1: interpolant(x0, x1).evaluate(t - 1e-6))
    rate = (path(jnp.asarray(noise), points) - back(jnp.asarray(noise), points)) / 2e-6
    return {
        "noise": weight @ noise,
        "denoiser": weight @ POINTS,
        "velocity": weight @ np.asarray(rate),
    }


def log_density(interpolant, t, x):
    alpha, beta, _ = interpolant.coefficients(t)
    each = jax.vmap(
        lambda m: jnp.sum(jstats.norm.logpdf(x, beta * m, alpha * BASE_STD)),
    )
    return jax.nn.logsumexp(each(jnp.asarray(POINTS)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["noise", "denoiser"])
def test_conditional_expectations(schedule, kind):
    interpolant = SCHEDULES[schedule]
    expected = expectations(interpolant, T, X)
    velocity = jnp.asarray(expected["velocity"])
    made = convert(velocity, interpolant, T, X, target=kind)
    np.testing.assert_allclose(made, expected[kind], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_is_the_gradient_of_the_log_density(schedule):
    interpolant = SCHEDULES[schedule]
    velocity = jnp.asarray(expectations(interpolant, T, X)["velocity"])
    made = convert(velocity, interpolant, T, X, target="score")
    expected = jax.grad(lambda x: log_density(interpolant, T, x))(X)
    np.testing.assert_allclose(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_denoiser_by_monte_carlo():
    # E[x1 | I_t = x] of 4e6 draws, those within 0.05 of x, in standard errors.
    interpolant = fd.paths.TrigonometricInterpolant()
    rng = np.random.default_rng(0)
    x1 = POINTS[rng.integers(4, size=4_000_000)]
    x0 = BASE_STD * rng.standard_normal(x1.shape)
    alpha, beta, _ = (float(c) for c in interpolant.coefficients(T))
    near = np.abs(alpha * x0 + beta * x1 - np.asarray(X)).max(axis=1) < 0.05
    mean, error = x1[near].mean(axis=0), x1[near].std(axis=0) / np.sqrt(near.sum())
    velocity = jnp.asarray(expectations(interpolant, T, X)["velocity"])
    made = convert(velocity, interpolant, T, X, target="denoiser")
    assert (np.abs(made - mean) < 4 * error).all()


WRAPPERS = {
    "noise": lambda interpolant: fd.velocities.PredictedVelocity(
        lambda t, x, args: jnp.asarray(expectations(interpolant, t, x)["noise"]) * args,
        interpolant,
        "noise",
    ),
    "denoiser": lambda interpolant: fd.velocities.PredictedVelocity(
        lambda t, x, args: (
            jnp.asarray(expectations(interpolant, t, x)["denoiser"]) * args
        ),
        interpolant,
        fd.velocities.Prediction.DENOISER,
    ),
    "score": lambda interpolant: fd.velocities.PredictedVelocity(
        lambda t, x, args: jax.grad(lambda x: log_density(interpolant, t, x))(x) * args,
        interpolant,
        "score",
        base_std=BASE_STD,
    ),
}


@pytest.mark.parametrize("schedule", ["linear", "vp", "trigonometric"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers(schedule, kind):
    interpolant = SCHEDULES[schedule]
    made = WRAPPERS[kind](interpolant)(T, X, 1.0)
    expected = expectations(interpolant, T, X)["velocity"]
    np.testing.assert_allclose(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_pass_args(kind):
    teacher = WRAPPERS[kind](fd.LinearInterpolant())
    assert not np.allclose(teacher(T, X, 1.0), teacher(T, X, 2.0))


@pytest.mark.parametrize("margin", [1e-3, 0.1])
def test_wrappers_stay_within_their_margin(margin):
    # Beyond it, predictor and weights are those at the margin: here the predictor tells
    # the time it is asked at.
    told = lambda t, x, args: jnp.full_like(x, t)
    linear, near = fd.LinearInterpolant(), jnp.asarray(margin / 2)
    settings = {} if margin == 1e-3 else {"margin": margin}
    noise = fd.velocities.PredictedVelocity(told, linear, "noise", **settings)(near, X)
    assert_close(noise, (X - margin) / margin)
    score = fd.velocities.PredictedVelocity(
        told, linear, "score", base_std=2.0, **settings
    )(near, X)
    assert_close(score, (X + 4 * (1 - margin) * margin) / margin)
    denoiser = fd.velocities.PredictedVelocity(told, linear, "denoiser", **settings)(
        1 - near, X
    )
    assert_close(denoiser, (1 - margin - X) / margin)


def test_wrapper_is_a_teacher_of_the_gaussian_map():
    flow_map = fd.exact.GaussianFlowMap(target_std=0.5)
    # The posterior mean of a Gaussian, by regression of x1 on x.
    denoiser = lambda t, x, args: t * 0.25 / ((1 - t) ** 2 + 0.25 * t**2) * x
    teacher = fd.velocities.PredictedVelocity(
        denoiser, fd.LinearInterpolant(), "denoiser"
    )
    assert_close(fd.lagrangian_residual(flow_map, teacher, 0.2, 0.9, X), 0 * X)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_pytrees_keep_dtypes(kind):
    x = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float64)}
    at = fd.LinearInterpolant(), T, x
    made = convert(convert(x, *at, target=kind), *at, source=kind)
    assert_close(made, x, 1e-5)
    assert made["a"].dtype == jnp.float32


def test_a_score_at_the_data_end_is_one_of_the_noise():
    # Infinite times zero, where the score would be divided by alpha.
    score = jnp.asarray([0.3, -2.0])
    noise = convert(score, fd.LinearInterpolant(), 1.0, X, source="score", target="noise")
    assert_close(noise, 0 * X)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_any_prediction_from_any_other(source, target):
    interpolant = SCHEDULES["vp"]
    known = expectations(interpolant, T, X)
    known["score"] = jax.grad(lambda x: log_density(interpolant, T, x))(X)
    made = convert(jnp.asarray(known[source]), interpolant, T, X, source, target)
    np.testing.assert_allclose(made, known[target], rtol=1e-5)


SINE = fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent())


@pytest.mark.parametrize(
    "interpolant, kinds, match",
    [
        (SINE, {"source": "noise"}, "without latent"),
        (SINE, {"source": "score", "target": "denoiser"}, "without latent"),
        (fd.LinearInterpolant(), {"source": "epsilon"}, "`source` must be a `Pre"),
    ],
)
def test_refusals(interpolant, kinds, match):
    with pytest.raises(ValueError, match=match):
        fd.velocities.convert(X, interpolant, T, X, **kinds)
