"""Parts of the benchmarks: systems, surrogates, posteriors and particles."""

import importlib.util
import pathlib

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
    path = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


systems, surrogates, sbi = load("systems"), load("surrogates"), load("sbi")
boltzmann, apebench = load("boltzmann"), load("apebench")
MECHANISM = systems.random_mechanism()
ALL = {**systems.SYSTEMS, "mechanism": MECHANISM}


@pytest.fixture(autouse=True)
def without_strict_promotion():
    # Benchmarks are scripts, and run with JAX's own settings.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rates(system, num=4):
    """Starts, and rates at states around them none of whose entries is zero."""

    def evaluate(key):
        x0, args = systems.draw(system, key, num)
        x = x0 + jr.uniform(jr.fold_in(key, 2), x0.shape) * jnp.abs(x0).max()
        axes = 0, None if args is None else 0
        return x0, jax.vmap(lambda *row: system.vector_field(0.0, *row), axes)(x, args)

    return map(np.asarray, jax.jit(evaluate)(jr.key(0)))


@pytest.mark.parametrize("name", ALL)
def test_rates_are_finite(name):
    x0, x_rates = rates(ALL[name])
    assert x0.shape == x_rates.shape
    assert np.isfinite(x0).all() and np.isfinite(x_rates).all()


@pytest.mark.parametrize("name", [n for n in ALL if ALL[n].conserved is not None])
def test_totals_are_conserved(name):
    (_, x_rates), matrix = rates(ALL[name]), ALL[name].conserved
    assert (matrix >= 0).all() and (matrix.sum(1) > 0).all()
    change = matrix @ x_rates.T
    assert (abs(change) <= 1e-13 * (matrix @ abs(x_rates).T)).all()


def test_mass_action_of_robertson():
    reactions = [(0.04, [0], [1]), (1e4, [1, 2], [0, 2]), (3e7, [1, 1], [1, 2])]
    field = systems.MassAction(reactions, 3)
    x = jnp.array([0.9, 2e-5, 0.1])
    expected = systems.robertson(0.0, x, None)
    assert jnp.allclose(field(0.0, x, jnp.ones(3)), expected, rtol=1e-12)


def test_pollu_reaches_the_published_state():
    # Mazzia and Magherini, test set for IVP solvers, at t = 60.
    published = {
        0: 0.5646255480022769e-1,
        1: 0.1342484130422339,
        3: 0.5523140207484359e-2,
    }
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(systems.pollu),
        diffrax.Kvaerno5(),
        0.0,
        60.0,
        None,
        systems.POLLU_START,
        jnp.ones(1),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-10),
    )
    ends = solution.ys[0]
    assert all(abs(ends[i] / value - 1) < 1e-5 for i, value in published.items())


def test_mechanism_is_stiff():
    """It takes Tsit5 more than ten times the steps of Kvaerno5."""
    x0, args = (leaf[0] for leaf in systems.draw(MECHANISM, jr.key(0), 1))
    assert (x0 == 0).sum() >= 40 and x0.max() > 0

    def solve(solver, max_steps):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(MECHANISM.vector_field),
            solver,
            0.0,
            MECHANISM.t1,
            None,
            x0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-4),
            max_steps=max_steps,
            throw=False,
        )

    implicit = solve(diffrax.Kvaerno5(), 4096)
    assert implicit.result == diffrax.RESULTS.successful
    ends = implicit.ys[0]
    # An atom of each species is in the totals, which bound it.
    assert ends.min() > -1e-3 and ends.max() < (MECHANISM.conserved @ x0).max()
    most = 10 * int(implicit.stats["num_steps"])
    explicit = solve(diffrax.Tsit5(), most)
    assert explicit.result == diffrax.RESULTS.max_steps_reached


@pytest.mark.parametrize("size", [30, 60])
def test_only_elements_are_conserved(size):
    mechanism = systems.random_mechanism(size, seed=1)
    assert mechanism.conserved.shape == (4, size)
    _, x_rates = rates(mechanism, 4 * size)
    values = np.linalg.svd(x_rates, compute_uv=False)
    assert (values > 1e-10 * values[0]).sum() == size - 4


def test_errors_in_decades():
    exact = np.log10([[1.0, 2.0], [3.0, 4.0]])
    errors = surrogates.errors_of(exact + 1, exact, log=True)
    assert np.isclose(errors["mae"], 1) and np.isclose(errors["p99"], 1)
    assert np.isclose(errors["relative"], 9) and np.isclose(errors["median_relative"], 9)


def test_errors_in_units_of_the_state():
    errors = surrogates.errors_of([[0.0, 2.5]], [[0.0, 2.0]], log=False)
    assert errors["mae"] == 0.25 and errors["relative"] == 0.125


def test_no_jump_is_longer_than_was_learned():
    ts, longest = np.linspace(5, 105, 101), 49.0

    def flow_map(s, t, x, args):
        good = t - s <= longest * (1 + 1e-6)
        return jnp.where(good, x * jnp.exp(-0.01 * args * (t - s)), jnp.nan)

    counts = surrogates.num_jumps(ts, longest)
    assert set(counts) == {1, 2, 3}
    x0, args = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 2.0])
    given = jnp.asarray(ts), jnp.asarray(counts), x0, args, int(counts.max())
    ys = surrogates.predict(flow_map, *given)
    decay = np.exp(-0.01 * np.outer(args, ts - 5))
    assert np.allclose(ys, decay[..., None] * np.asarray(x0)[:, None], rtol=1e-6)


@pytest.mark.parametrize(
    "setting, shape",
    [
        ("main", (8, 101, 2)),
        ("interpolation", (8, 26, 2)),
        ("extrapolation", (8, 50, 2)),
        ("sparse", (2, 101, 2)),
    ],
)
def test_what_a_setting_learns_from(setting, shape):
    ys = {part: np.zeros((8, 101, 2)) for part in surrogates.PARTS}
    params = {part: np.zeros((8, 1)) for part in surrogates.PARTS}
    data = surrogates.Data(np.arange(101.0), ys, params)
    known = surrogates.subset(data, setting)
    assert known.ys["train"].shape == shape and len(known.ts) == shape[1]
    assert len(known.params["test"]) == shape[0]


def test_summary_compares_with_the_best_surrogate():
    row = {"set": "simple_ode", "setting": "main", "us": 2.0}
    errors = {"flowdiffrax": 0.01, "FullyConnected": 0.03, "MultiONet": 0.02}
    rows = [row | {"method": name, "mae": mae} for name, mae in errors.items()]
    rows.append(row | {"method": "LatentPoly"})  # too slow to train
    last = surrogates.summary(rows).splitlines()[-1]
    assert "simple_ode | 0.01, 0.02 (MultiONet) | 2, 2" in last


# --- posteriors -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sbi.TASKS)
def test_simulations_of_a_task(name, monkeypatch):
    # The input of the generalised linear model is a file of sbibm.
    rng = np.random.default_rng(0)
    stored = lambda name, size: rng.normal(size=size)
    monkeypatch.setattr(sbi, "stored", stored)
    prior, simulator, bounds = sbi.TASKS[name]
    thetas = prior(rng, 500)
    assert np.isfinite(simulator(rng, thetas)).all()
    if bounds is not None:
        assert bounds[0] <= thetas.min() and thetas.max() <= bounds[1]
        assert np.ptp(thetas) > 0.9 * (bounds[1] - bounds[0])


def test_moments_of_simulations():
    rng = np.random.default_rng(0)
    theta = np.asarray([1.0, -2.0, 1.5, 0.5, -0.7])
    xs = sbi.slcp(rng, np.repeat(theta[None], 20_000, axis=0)).reshape(-1, 2)
    covariance = np.cov(xs.T)
    np.testing.assert_allclose(xs.mean(0), theta[:2], atol=0.05)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [2.25, 0.25], rtol=0.02)
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    np.testing.assert_allclose(correlation, np.tanh(-0.7), atol=0.01)
    # A moon has two preimages, mirrored at the line where the parameters sum to zero.
    moons = [
        sbi.two_moons(np.random.default_rng(1), np.repeat([theta], 50, axis=0))
        for theta in ([0.3, 0.1], [-0.1, -0.3])
    ]
    np.testing.assert_allclose(*moons, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_classifier_is_as_good_as_the_best(shift):
    rng = np.random.default_rng(0)
    samples, others = rng.normal(size=(2, 2000, 2))
    others[:, 0] += shift
    # Two Gaussians are told apart best in the middle between them.
    best = scipy.stats.norm.cdf(shift / 2)
    assert abs(sbi.c2st(samples, others, folds=2) - best) < 0.03


# --- particles --------------------------------------------------------------------------


def test_energies_by_a_loop():
    rng = np.random.default_rng(0)
    for name, pair, trap in (
        ("dw4", lambda d: -4 * (d - 4) ** 2 + 0.9 * (d - 4) ** 4, 0.0),
        ("lj13", lambda d: d**-12 - 2 * d**-6, 0.5),
    ):
        target = boltzmann.TARGETS[name]
        y = target.std * rng.normal(size=target.size)
        x = np.asarray(target.positions(jnp.asarray(y)))
        # Orthonormal coordinates of mean-free positions.
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
        assert np.sum(x**2) == pytest.approx(np.sum(y**2))
        bonds = [
            pair(np.linalg.norm(x[i] - x[j])) for i in range(len(x)) for j in range(i)
        ]
        expected = sum(bonds) + trap * np.sum(x**2)
        assert float(target.energy(jnp.asarray(y))) == pytest.approx(expected, rel=1e-10)


def test_particles_are_alike_and_space_has_no_direction():
    target = boltzmann.TARGETS["dw4"]
    net = target.network(8, jr.key(0))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 2))
    x -= x.mean(0)
    turn, order = np.asarray([[0.6, -0.8], [0.8, 0.6]]), [2, 0, 3, 1]
    state = lambda x: jnp.asarray((target.basis.T @ x).ravel(), jnp.float32)
    v = lambda x: np.asarray(target.positions(net(0.2, 0.7, state(x), None)))
    assert np.abs(v(x)).max() > 1e-3
    np.testing.assert_allclose(v(x[order] @ turn), v(x)[order] @ turn, atol=1e-6)


def test_alignment_moves_base_points_only_by_symmetries():
    target = boltzmann.TARGETS["lj13"]
    rng = np.random.default_rng(2)
    x0, x1 = rng.normal(size=(2, 5, target.size))
    y0, y1 = target.align(x0, x1)
    np.testing.assert_allclose(y1, x1, atol=1e-12)
    assert (np.linalg.norm(y0 - y1, axis=1) < np.linalg.norm(x0 - x1, axis=1)).all()
    lengths = lambda y: np.sort(np.linalg.norm(target.positions(y), axis=-1), axis=-1)
    np.testing.assert_allclose(lengths(y0), lengths(x0), atol=1e-12)


@pytest.mark.slow
def test_evidence_of_the_double_well_by_quadrature():
    target = boltzmann.TARGETS["double-well"]
    x = np.linspace(-6, 6, 4001)
    ends = np.exp(-(x**4 / 4 - 3 * x**2 + x))
    expected = np.log(np.sum(ends) * (x[1] - x[0]) * np.sqrt(2 * np.pi))
    samples, evidence = boltzmann.tempered_samples(target, 4000, jr.key(0))
    assert evidence == pytest.approx(expected, abs=0.1)
    mean = np.sum(x * ends) / np.sum(ends)
    assert float(samples[:, 0].mean()) == pytest.approx(mean, abs=0.15)


def test_apebench_fits_the_linear_step_of_waves():
    # Waves that travel and decay, so the state at any time has a closed form.
    key, n = jr.key(0), jnp.arange(1, 5)
    size, angle = jr.normal(key, (2, 30, 1, 4, 1))
    x = jnp.arange(32) / 32

    def state(t):
        phase = 2 * jnp.pi * n[:, None] * (x - 0.03 * t) + angle
        decay = jnp.exp(-0.02 * n[:, None] ** 2 * t)
        return jnp.sum(size * decay * jnp.cos(phase), -2)

    us = state(jnp.arange(20.0)[:, None, None])[..., None]
    step = apebench.linear_step(us)
    for h in (1.0, 2.5, 7.0):
        expected = state(jnp.full((1, 1, 1), h))[0, 0]
        made = step(0.0, h, us[0, 0], None)[:, 0]
        np.testing.assert_allclose(made, expected, atol=1e-4)


def test_apebench_rolls_out_by_jumps_of_any_length():
    flow_map = lambda s, t, u, args: u * jnp.exp(s - t)
    u0 = jnp.ones((4, 1))
    for length in (1, 7, 50):
        made = apebench.roll_out(flow_map, length, u0)
        expected = np.exp(-np.arange(1, 101))[:, None, None] * np.ones((1, 4, 1))
        np.testing.assert_allclose(made, expected, rtol=1e-5)


def test_apebench_counts_a_roll_out_that_blew_up():
    assert apebench.geometric_mean(np.array([0.1, 10.0])) == pytest.approx(1.0)
    assert apebench.geometric_mean(np.array([1e-6, np.nan])) == pytest.approx(1.0)


def test_apebench_names_the_package_to_install():
    with pytest.raises(SystemExit, match="pip install apebench==0.1.1"):
        apebench.load("a_package_that_is_not_installed")
