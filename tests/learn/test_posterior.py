"""From simulations to a posterior, by flow matching and distillation."""

import contextlib
import io

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from helpers import assert_close

import flowdiffrax as fd
from flowdiffrax.learn import LearnedPosterior, PosteriorUnits, learn_posterior
from flowdiffrax.learn._learn_posterior import _batches
from flowdiffrax.learn._posterior_units import find_units
from flowdiffrax.learn._simulations import read_simulations

# A quick training, so that only compilation takes time.
QUICK = dict(minutes=10, num_steps=40, width=16, depth=1, progress=False)
MIXING = np.asarray([[1.0, 0.5], [-0.3, 2.0]])
NOISE = 0.4


def linear_problem(num, seed=0):
    """A Gaussian prior and an observation that is linear, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    thetas = rng.normal(size=(num, 2)) * [1.0, 3.0] + [5.0, 0.0]
    return thetas, thetas @ MIXING.T + NOISE * rng.normal(size=(num, 2))


def exact_posterior(x):
    prior = np.diag([1.0, 1 / 9])
    covariance = np.linalg.inv(prior + MIXING.T @ MIXING / NOISE**2)
    mean = covariance @ (prior @ [5.0, 0.0] + MIXING.T @ x / NOISE**2)
    return scipy.stats.multivariate_normal(mean, covariance)


def sets(num=200, seed=0):
    """Means of 1 to 6 draws, within known bounds."""
    rng = np.random.default_rng(seed)
    thetas = rng.uniform(-1.0, 1.0, (num, 1))
    counts = rng.integers(1, 7, num)
    return thetas, [
        theta + 0.5 * rng.normal(size=(count, 1))
        for theta, count in zip(thetas, counts, strict=True)
    ]


def units_of(thetas, xs, mask=None, bounds=None):
    simulations = read_simulations(thetas, xs, mask)
    return find_units(simulations, simulations, bounds)


@pytest.fixture(scope="module")
def linear_and_text():
    thetas, xs = linear_problem(2000)
    xs[:7] = np.nan
    with contextlib.redirect_stderr(io.StringIO()) as text:
        return learn_posterior(thetas, xs, **QUICK | {"progress": True}), text


@pytest.fixture(scope="module")
def linear(linear_and_text):
    return linear_and_text[0]


@pytest.fixture(scope="module")
def of_sets():
    return learn_posterior(*sets(), bounds=(-1.0, 1.0), **QUICK)


# --- what comes out -------------------------------------------------------------------


@pytest.mark.parametrize("num_jumps", [1, 4])
def test_samples_of_a_linear_problem(linear, num_jumps):
    # The regression leaves nothing to learn, so that a short training must not spoil it.
    x = jnp.asarray([4.0, 1.0])
    exact = exact_posterior(np.asarray(x))
    thetas = np.asarray(linear.sample(jr.key(1), x, 4000, num_jumps))
    scale = np.sqrt(np.diag(exact.cov))
    np.testing.assert_allclose(thetas.mean(0), exact.mean, atol=0.15 * scale.max())
    np.testing.assert_allclose(np.cov(thetas.T), exact.cov, atol=0.2 * scale.max() ** 2)


def test_log_density_of_a_linear_problem(linear):
    x = np.asarray([4.0, 1.0])
    exact = exact_posterior(x)
    thetas = exact.rvs(50, random_state=np.random.default_rng(0))
    values = linear.log_prob(thetas, x)
    assert values.shape == (50,)
    assert abs(np.mean(np.asarray(values) - exact.logpdf(thetas))) < 0.1
    np.testing.assert_allclose(linear.log_prob(thetas[0], x), values[0], rtol=1e-4)
    means = [mean for mean, share in linear.held_out.values() if share < 0.05]
    assert len(means) == 3 and np.ptp(means) < 0.05


@pytest.mark.slow
def test_density_integrates_to_one_within_bounds(of_sets):
    edges = np.linspace(-1.0, 1.0, 2001)
    middles = (edges[1:] + edges[:-1])[:, None] / 2
    x = np.asarray([[0.9], [1.1], [0.7]])
    density = np.exp(np.asarray(of_sets.log_prob(middles, x, 2)))
    assert abs(density.mean() * 2 - 1) < 0.01
    # The samples are those of the density.
    thetas = np.asarray(of_sets.sample(jr.key(0), x, 4000, 2))
    assert (np.abs(thetas) <= 1).all()
    cumulative = np.interp(thetas[:, 0], edges[1:], np.cumsum(density) * 1e-3)
    assert scipy.stats.kstest(cumulative, "uniform").pvalue > 1e-3
    assert np.isneginf(of_sets.log_prob(jnp.asarray([1.5]), x))


@pytest.mark.slow
def test_sets_of_any_order_and_padding(of_sets):
    x = np.asarray([[0.3], [-0.2], [0.5]])
    draw = lambda x, mask=None: of_sets.sample(jr.key(0), x, 5, mask=mask)
    np.testing.assert_allclose(draw(x), draw(x[::-1]), rtol=1e-4)
    padded = np.concatenate([x, [[np.nan]]])
    mask = np.asarray([True, True, True, False])
    np.testing.assert_allclose(draw(x), draw(padded, mask), rtol=1e-4)
    assert np.abs(draw(x) - draw(x[:1])).max() > 1e-3


def save_and_load(learned, x, path):
    learned.save(path)
    again = LearnedPosterior.load(path)
    draw = lambda posterior: posterior.sample(jr.key(0), x, 3)
    np.testing.assert_array_equal(draw(again), draw(learned))
    assert str(again) == str(learned) and again.network == learned.network
    assert again.history == learned.history


def test_save_and_load(linear, tmp_path):
    path = tmp_path / "posterior.safetensors"
    save_and_load(linear, jnp.asarray([4.0, 1.0]), path)
    fd.train.save(path, {}, jnp.zeros(1))
    with pytest.raises(ValueError, match="not one of a learned posterior"):
        LearnedPosterior.load(path)


@pytest.mark.slow
def test_save_and_load_of_sets(of_sets, tmp_path):
    save_and_load(of_sets, jnp.ones((2, 1)), tmp_path / "posterior.safetensors")


def test_report_and_progress(linear_and_text):
    posterior, text = linear_and_text[0], linear_and_text[1].getvalue()
    assert posterior.num_dropped == 7 and posterior.num_simulations == 1993
    assert "1,993 simulations, observations are vectors of 2; dropped 7" in text
    assert "width 16, depth 1" in text and str(posterior) in text
    stages = [row["stage"] for row in posterior.history]
    assert stages == ["FlowMatching"] * 3 + ["LagrangianMapDistillation"]


@pytest.mark.slow
def test_stops_where_the_loss_rises():
    # With so few simulations, a network learns them by heart.
    thetas, xs = linear_problem(60)
    settings = QUICK | {"num_steps": 1000, "width": 64, "depth": 3}
    rows = learn_posterior(thetas, xs, **settings).history
    steps = [row["step"] for row in rows if row["stage"] == "FlowMatching"]
    assert steps[-1] < 3000


# --- units ----------------------------------------------------------------------------

BOUNDS = np.asarray([-np.inf, 0.0, -np.inf, -1.0]), np.asarray([np.inf, np.inf, 2.0, 3.0])


def bounded_problem(num=400):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(num, 4))
    thetas = np.stack(
        [
            normal[:, 0] * 10,
            np.exp(normal[:, 1]),
            2 - np.exp(normal[:, 2]),
            rng.uniform(-1.0, 3.0, num),
        ],
        axis=1,
    )
    return thetas, thetas[:, :2] + rng.normal(size=(num, 2))


def test_units_of_bounded_parameters():
    thetas, xs = bounded_problem()
    units = units_of(thetas, xs, bounds=BOUNDS)
    to_state = jax.jit(jax.vmap(units.to_state))
    z, log_rates = to_state(thetas, xs)
    assert_close(jax.jit(jax.vmap(units.to_theta))(z, xs), thetas, rtol=1e-8)
    state = lambda theta, x: units.to_state(theta, x)[0]
    jacobians = jax.jit(jax.vmap(jax.jacfwd(state)))(thetas[:5], xs[:5])
    assert_close(log_rates[:5], np.linalg.slogdet(jacobians)[1])
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(4), atol=0.02)
    outside = np.repeat(thetas[:1], 4, axis=0)
    outside[np.arange(4), [1, 2, 3, 3]] = [-0.1, 2.1, 3.1, -1.1]
    # A simulation may lie on the bound itself.
    on_bounds = np.asarray([[0.0, 0.0, 2.0, 3.0]])
    rows = np.concatenate([outside, on_bounds, thetas[5:]])
    z, log_rates = to_state(rows, xs)
    assert np.isneginf(log_rates[:4]).all() and np.isfinite(z[4]).all()


def test_states_that_are_learned():
    thetas, xs = linear_problem(300)
    simulations = read_simulations(thetas, xs, None)
    units = units_of(thetas, xs)
    batches = _batches(units, simulations, 300, draw=False)
    # What a linear regression explains is not left in them.
    design = np.concatenate([np.ones((300, 1)), xs], axis=1)
    fitted = design @ np.linalg.lstsq(design, thetas, rcond=None)[0]
    expected = np.linalg.solve(np.asarray(units.cholesky), (thetas - fitted).T).T
    np.testing.assert_allclose(batches.data, expected, atol=1e-3)
    np.testing.assert_allclose(
        batches.args, (xs - xs.mean(0)) / xs.std(0), rtol=1e-4, atol=1e-5
    )


def test_units_hold_a_tenth_out():
    thetas, xs = sets()
    padded = np.zeros((200, 6, 1))
    for row, each in zip(padded, xs, strict=True):
        row[: len(each)] = each
    mask = np.arange(6) < np.asarray([[len(each)] for each in xs])
    units = PosteriorUnits.of(thetas, padded, mask, (-1.0, 1.0))
    given = read_simulations(thetas, xs, None)
    again = find_units(given.take(slice(20, None)), given.take(slice(20)), (-1.0, 1.0))
    assert_close(units, again)
    assert units.row_counts == (1, 6) and float(units.high[0]) == 1.0


def test_noise_is_not_regressed_on():
    # With more entries than simulations, the least error in sample is zero.
    rng = np.random.default_rng(0)
    thetas, xs = rng.normal(size=(120, 1)), rng.normal(size=(120, 90))
    both = read_simulations(thetas, xs, None)
    units = find_units(both.take(slice(90)), both.take(slice(90, 120)), None)
    assert np.abs(np.asarray(units.coefficients)[1:]).max() < 0.2


# --- bad input ------------------------------------------------------------------------


def test_unusual_observations_are_warned_about(linear):
    with pytest.warns(UserWarning, match="none of these was further than"):
        linear.sample(jr.key(0), jnp.asarray([100.0, -100.0]), 2)
    # Each entry is usual, but not both together.
    thetas, xs = linear_problem(500)
    xs[:, 1] = xs[:, 0] + 0.01 * xs[:, 1]
    units, x = units_of(thetas, xs), np.asarray([3.0, 6.0])
    assert float(units.distance(x)) > 2 * float(units.x_limit)
    assert float(units.distance(xs[3])) <= float(units.x_limit)


@pytest.mark.slow
def test_unusual_sets(of_sets):
    with pytest.warns(UserWarning, match="has 9 rows, and the simulated ones had from 1"):
        of_sets.log_prob(jnp.zeros(1), jnp.zeros((9, 1)))
    with pytest.raises(ValueError, match=r"of shape \(rows, 1\); got \(4,\)"):
        of_sets.sample(jr.key(0), jnp.ones(4), 2)


def test_bad_observations_and_parameters(linear):
    with pytest.raises(ValueError, match=r"has shape \(2,\), as in the simulations"):
        linear.sample(jr.key(0), jnp.ones(3), 2)
    with pytest.raises(ValueError, match="must be finite"):
        linear.sample(jr.key(0), jnp.asarray([np.nan, 1.0]), 2)
    with pytest.raises(ValueError, match=r"`theta` has shape \(2,\) or"):
        linear.log_prob(jnp.ones(3), jnp.asarray([4.0, 1.0]))
    with pytest.raises(ValueError, match="`num_jumps` must be at least 1"):
        linear.sample(jr.key(0), jnp.ones(2), 2, 0)


THETAS, XS = linear_problem(60)
SETS = np.ones((60, 3, 1))


@pytest.mark.parametrize(
    "thetas, xs, settings, message",
    [
        (THETAS[:, 0], XS, {}, r"`thetas\[:, None\]`"),
        (THETAS, XS[:59], {}, "got 60 and 59"),
        (THETAS, XS[:, 0], {}, r"\(simulations, size\)"),
        (THETAS[:40], XS[:40], {}, "At least 50 simulations are needed; got 40"),
        (np.where(THETAS > 5, np.nan, THETAS), XS, {}, "more that are not finite"),
        (THETAS * [0, 1], XS, {}, r"Parameters \[0\] are the same"),
        (THETAS, XS, {"bounds": (0.0, 1.0)}, "simulations have parameters out"),
        (THETAS, XS, {"bounds": (1.0, 0.0)}, "`bounds` must rise"),
        (THETAS, XS, {"bounds": (np.zeros(3), 9.0)}, r"each of the 2 parameters"),
        (THETAS, XS, {"bounds": (0.0, 1.0, 2.0)}, "must be a pair"),
        (THETAS, XS, {"mask": np.ones((60, 2))}, "`mask` is for `xs` of shape"),
        (THETAS, SETS, {"mask": np.ones((60, 2))}, r"each row of a set, shape \(60, 3\)"),
        (THETAS, [np.ones((2, 1)), np.ones((2, 3))] * 30, {}, "with the same size"),
        (THETAS, list(SETS), {"mask": np.ones((60, 3))}, "needs no `mask`"),
        (THETAS, XS, {"minutes": 0.0}, "`minutes` must be positive"),
        (THETAS, XS, {"width": 0}, "`width` must be at least 1"),
    ],
)
def test_bad_simulations(thetas, xs, settings, message):
    with pytest.raises(ValueError, match=message):
        learn_posterior(thetas, xs, progress=False, **settings)


def test_text_is_refused():
    with pytest.raises(TypeError, match="`thetas` must be real numbers"):
        learn_posterior(np.full((60, 2), "a"), XS)


@pytest.mark.slow
def test_too_little_time():
    with pytest.raises(ValueError, match="no time left to train"):
        learn_posterior(*linear_problem(60), minutes=1e-3, progress=False)
