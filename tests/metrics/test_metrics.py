"""Metrics, on samples whose score is known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian_map

import flowdiffrax as fd

DENSITY = fd.data.checkerboard_density


def uniform(x):
    """The density of the square [-1, 1]^2."""
    return np.full(x.shape[:-1], 0.25)


@pytest.mark.parametrize("bins, score, tol", [(50, 0.0656, 0.003), (48, 0.0088, 0.0006)])
def test_perfect_sampler(bins, score, tol):
    samples = np.asarray(fd.data.checkerboard(jr.key(0), 64_000))
    result = fd.metrics.histogram_kl(samples, DENSITY, bins=bins)
    assert abs(result.kl - score) < tol
    assert (result.empty_bins, result.outside) == (0, 0)


@pytest.mark.slow
def test_exact_velocity_by_heun():
    # What the exact flow of the board scores in 128 steps of Heun's method.
    std, ts = 3**-0.5, jnp.linspace(0, 1, 129)
    velocity = fd.exact.checkerboard_velocity(fd.LinearInterpolant(sigma_min=1e-3), std)

    def step(x, ends):
        s, t = ends
        slope = velocity(s, x, None)
        ahead = velocity(t, x + (t - s) * slope, None)
        return x + (t - s) * (slope + ahead) / 2, None

    run = jax.jit(jax.vmap(lambda x: jax.lax.scan(step, x, (ts[:-1], ts[1:]))[0]))
    samples = np.asarray(run(std * jr.normal(jr.key(0), (64_000, 2))))
    for bins, score in ((50, 0.069), (48, 0.014)):
        kl = fd.metrics.histogram_kl(samples, DENSITY, bins=bins).kl
        assert kl == pytest.approx(score, abs=0.003)


def test_known_divergence():
    # Two bins of four get all samples, in the ratio 3 to 1; half a sample in the others.
    corner = np.asarray([[-0.5, -0.5]] * 3 + [[0.5, 0.5]])
    result = fd.metrics.histogram_kl(corner, uniform, bins=2)
    expected = -np.mean(np.log(4 * np.asarray([3, 1, 0.5, 0.5]) / 4))
    np.testing.assert_allclose(result.kl, expected)
    assert result.empty_bins == 2


def test_axes_are_not_swapped():
    # A density that depends on the first coordinate only, and samples that follow it.
    density = lambda x: np.where(x[..., 0] < 0, 0.4, 0.1)
    rng = np.random.default_rng(0)
    samples = rng.uniform(-1, 1, (20_000, 2))
    left = rng.random(20_000) < 0.8
    samples[:, 0] = np.where(left, -1, 1) * np.abs(samples[:, 0])
    assert fd.metrics.histogram_kl(samples, density, bins=4).kl < 0.002
    assert fd.metrics.histogram_kl(samples[:, ::-1], density, bins=4).kl > 0.2


def test_mass_outside_is_reported_and_left_out():
    samples = np.random.default_rng(0).uniform(-1, 1, (10_000, 2))
    moved = np.concatenate([samples, np.full((2500, 2), 7.0)])
    inside = fd.metrics.histogram_kl(samples, uniform, bins=4)
    result = fd.metrics.histogram_kl(moved, uniform, bins=4)
    assert result.outside == pytest.approx(0.2)
    assert result.kl == pytest.approx(inside.kl)


def test_empty_bins_only_count_where_there_is_density():
    lower, upper = fd.data.checkerboard_boxes()
    samples = ((lower + upper) / 2)[:-1].repeat(100, axis=0)
    result = fd.metrics.histogram_kl(samples, DENSITY, bins=4)
    assert result.empty_bins == 1 and np.isfinite(result.kl)


def test_another_box():
    samples = np.random.default_rng(0).uniform(2, 4, (20_000, 2))
    result = fd.metrics.histogram_kl(samples, uniform, bins=4, low=2.0, high=4.0)
    assert result.outside == 0 and result.kl < 0.002


@pytest.mark.parametrize(
    "samples, settings, match",
    [
        (np.ones((4, 3)), {}, r"finite and \(samples, 2\)"),
        (np.asarray([[0.0, np.nan]]), {}, r"finite and \(samples, 2\)"),
        (np.full((3, 2), 9.0), {}, "No sample lies in"),
        (np.zeros((3, 2)), {"bins": 0}, "`bins` must be at least 1"),
    ],
)
def test_bad_samples(samples, settings, match):
    with pytest.raises(ValueError, match=match):
        fd.metrics.histogram_kl(samples, uniform, **{"bins": 4, **settings})


def test_rms_distance():
    x, y = np.zeros((2, 1, 2)), np.asarray([[[3.0, 4.0]], [[0.0, 0.0]]])
    assert fd.metrics.rms_distance(x, y) == pytest.approx(np.sqrt(12.5))


def test_rms_distance_of_other_shapes():
    with pytest.raises(ValueError, match="equal shapes"):
        fd.metrics.rms_distance(np.ones((2, 2)), np.ones((3, 2)))


def test_defects_of_an_exact_and_of_a_shifted_map():
    exact = gaussian_map()
    s, t = fd.times.UniformTriangle()(jr.key(0), 64)
    x_s = jr.normal(jr.key(1), (64, 2))
    x_t = jax.vmap(exact)(s, t, x_s)
    made = fd.metrics.defects(exact, exact.velocity, s, t, x_s, x_t)
    assert max(made) < 1e-10
    # A constant error of the average velocity is known in closed form.
    wrong = fd.FlowMap(lambda s, t, x, args: exact.average_velocity(s, t, x) + 0.3)
    made = fd.metrics.defects(wrong, exact.velocity, s, t, x_s, x_t)
    assert made.tangent == pytest.approx(0.3 * 2**0.5)
    x_back = jax.vmap(lambda s, t, x: wrong(t, s, wrong(s, t, x)))(s, t, x_s)
    assert made.inverse == pytest.approx(fd.metrics.rms_distance(x_back, x_s))


@pytest.mark.parametrize("times, states", [((0,), (0, 2)), ((3,), (2,)), ((3,), (4, 2))])
def test_defects_of_what_is_no_batch(times, states):
    exact, t, x = gaussian_map(), np.zeros(times), np.zeros(states)
    with pytest.raises(ValueError, match="one common leading axis that is not empty"):
        fd.metrics.defects(exact, exact.velocity, *map(jax.numpy.asarray, (t, t, x, x)))
