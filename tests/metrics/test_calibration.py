"""Calibration: the exact posterior passes, and wrong ones are noticed."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

import flowdiffrax as fd
from flowdiffrax.metrics._calibration import _uniform_p_value

NUM, NOISE = 300, 0.5
# Mostly the sum is observed, so that the posterior is correlated.
MATRIX = np.asarray([[3.0, 3.0], [0.2, -0.1]])


def simulations(num):
    rng = np.random.default_rng(0)
    thetas = rng.normal(size=(num, 2))
    return thetas, thetas @ MATRIX.T + NOISE * rng.normal(size=(num, 2))


THETAS, XS = simulations(NUM)
COVARIANCE = np.linalg.inv(np.eye(2) + MATRIX.T @ MATRIX / NOISE**2)
ROOT = np.linalg.cholesky(COVARIANCE)


def posterior(*, width=1.0, shift=0.0, correlated=True):
    """The exact posterior, or one that is wrong in a known way."""
    root = ROOT if correlated else np.diag(np.sqrt(np.diag(COVARIANCE)))

    rng = np.random.default_rng(2)

    def draw(key, x, num_samples):
        mean = COVARIANCE @ MATRIX.T @ x / NOISE**2
        noise = rng.normal(size=(num_samples, 2))
        return mean + shift * np.sqrt(np.diag(COVARIANCE)) + width * noise @ root.T

    return draw


def check(**settings):
    return fd.metrics.calibrate(
        posterior(**settings), THETAS, XS, key=jr.key(0), num_samples=100
    )


EXACT = check()


def test_the_exact_posterior_passes():
    assert EXACT.is_calibrated and str(EXACT).count("calibrated") == 2
    assert EXACT.p_values.min() > 0.05 and EXACT.tarp_p_value > 0.05
    for level in (0.5, 0.9):
        error = 4 * np.sqrt(level * (1 - level) / NUM)
        assert abs(EXACT.coverage(level) - level) < error
    assert EXACT.ranks.shape == (NUM, 2) and EXACT.num_samples == 100
    assert EXACT.predicted is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"width": 0.6}, "too narrow"),
        ({"width": 1.6}, "too wide"),
        ({"shift": 0.5}, "too high"),
        ({"shift": -0.5}, "too low"),
    ],
)
def test_wrong_posteriors_are_noticed(settings, words):
    result = check(**settings)
    assert not result.is_calibrated
    assert [line.count(words) for line in str(result).splitlines()[1:3]] == [1, 1]


def test_coverage_sees_what_ranks_cannot():
    result = fd.metrics.calibrate(
        posterior(correlated=False), *simulations(1500), key=jr.key(0), num_samples=50
    )
    assert result.p_values.min() > 0.05 > 0.01 / 3 > result.tarp_p_value


def test_coverage_is_that_of_balls():
    # Half as wide: 90 % regions cover much less, by counting.
    result = check(width=0.5)
    assert result.coverage(0.9) < 0.8 < EXACT.coverage(0.9)


def test_predictions():
    def simulate(thetas):
        return thetas @ MATRIX.T + NOISE * np.random.default_rng(1).normal(size=(100, 2))

    right, wrong = (
        fd.metrics.calibrate(
            posterior(shift=shift),
            THETAS,
            XS,
            key=jr.key(0),
            num_samples=100,
            simulate=simulate,
        )
        for shift in (0.0, 5.0)
    )
    assert right.predicted is not None and wrong.predicted is not None
    assert right.predicted.min() >= 0.88 > 0.5 > wrong.predicted.min()
    assert f"at least {right.predicted.min():.1%}" in str(right)


@pytest.mark.parametrize("power", [0.7, 1.0, 1.4])
def test_p_values_are_those_of_scipy(power):
    u = np.random.default_rng(3).uniform(size=400) ** power
    expected = scipy.stats.kstest(u, "uniform").pvalue
    np.testing.assert_allclose(_uniform_p_value(u), expected, rtol=0.05, atol=1e-6)


def test_sets_of_any_size():
    xs = [np.ones((1 + k % 3, 1)) for k in range(NUM)]
    seen = []
    draw = lambda key, x, num: seen.append(len(x)) or jnp.ones((num, 2))
    fd.metrics.calibrate(draw, THETAS, xs, key=jr.key(0), num_samples=2)
    assert seen[:4] == [1, 2, 3, 1]


def test_bad_input():
    run = lambda draw, thetas, xs: fd.metrics.calibrate(draw, thetas, xs, key=jr.key(0))
    with pytest.raises(ValueError, match="At least 20 simulations are needed"):
        run(posterior(), THETAS[:5], XS[:5])
    with pytest.raises(ValueError, match="and 299 entries"):
        run(posterior(), THETAS, XS[:299])
    with pytest.raises(ValueError, match=r"of shape \(200, 2\); got shape \(200, 3\)"):
        run(lambda key, x, num: np.ones((num, 3)), THETAS, XS)
    with pytest.raises(ValueError, match="200 with NaN"):
        run(lambda key, x, num: np.full((num, 2), np.nan), THETAS, XS)


def test_picture():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    fd.plot.calibration(axes, check(width=0.6), ["rate", "size"])
    *lines, _ = axes.lines
    assert [line.get_label() for line in lines] == ["rate", "size", "coverage (TARP)"]
    for line in lines[:2]:
        level, share = np.asarray(line.get_xydata()).T
        # Too narrow: too many ranks below low levels, and too few below high ones.
        assert share[level == 0.1] > 0.05 and share[level == 0.9] < -0.05
    fd.plot.calibration(axes, EXACT)
    assert "parameter 1" in [text.get_text() for text in axes.get_legend().get_texts()]
    # The band is that of Kolmogorov and Smirnov at 1 %.
    inside = axes.patches[0].get_window_extent().transformed(axes.transData.inverted())
    limit = scipy.stats.kstwobign.isf(0.01) / np.sqrt(NUM)
    np.testing.assert_allclose([inside.y0, inside.y1], [-limit, limit], rtol=1e-3)
