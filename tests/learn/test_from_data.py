"""From observed trajectories to a validated map, without a vector field."""

import dataclasses
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Interrupting

import flowdiffrax as fd
from flowdiffrax.learn import LearnedSolver, _streamed, learn_from_data
from flowdiffrax.learn._observed import PairBatches, observe
from flowdiffrax.learn._smooth import smooth
from flowdiffrax.learn._streamed import File, Streamed
from flowdiffrax.train._fit import source_of

# A quick training, so that only compilation takes time.
QUICK = dict(minutes=10, num_steps=300, width=16, depth=2, progress=False)


def exact_decay(h, x, args):
    """Two concentrations, one of which becomes the other, at a rate of `args`."""
    left = x[..., :1] * np.exp(-h * args)
    return np.concatenate([left, x.sum(-1, keepdims=True) - left], axis=-1)


def exact_rotation(h, x):
    c, s = np.cos(h), np.sin(h)
    turned = c * x[..., 0] + s * x[..., 1], c * x[..., 1] - s * x[..., 0]
    return np.stack(turned, axis=-1)


def decays(num=300, seed=0):
    """Ragged, irregular, from any time, and a fifth of the entries missing."""
    rng = np.random.default_rng(seed)
    ts, ys, args = [], [], rng.uniform(0.5, 1.5, (num, 1))
    for rate in args:
        own = np.sort(rng.uniform(5.0, 7.0, rng.integers(6, 14)))
        exact = exact_decay(own[:, None] - own[0], rng.uniform(0.5, 2.0, 2), rate)
        missing = rng.uniform(size=exact.shape) < 0.2
        missing[0] = False
        ts.append(own)
        ys.append(np.where(missing, np.nan, exact))
    return ts, ys, args


def rotations(noise, num=300, num_times=20):
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0.0, 4.0, (num, num_times)), axis=1)
    exact = exact_rotation(ts, rng.normal(size=(num, 1, 2)))
    return ts, exact, exact + noise * rng.normal(size=exact.shape)


@pytest.fixture(scope="module")
def learned():
    return learn_from_data(*decays(), **QUICK)


# --- what comes out -------------------------------------------------------------------


def test_ragged_and_in_part_against_the_closed_form(learned):
    rng = np.random.default_rng(1)
    x, args = rng.uniform(0.5, 2.0, (128, 2)), rng.uniform(0.5, 1.5, (128, 1))
    for h in (0.3, 1.5):
        ends = jax.vmap(learned.flow_map, (None, None, 0, 0))(0.0, h, x, args)
        error = np.abs(ends / exact_decay(h, x, args) - 1)
        assert np.quantile(error, 0.9) < 0.05
    # Also from later times.
    x, args = jnp.asarray([1.0, 0.5]), jnp.asarray([0.8])
    late, early = (learned.flow_map(s, s + 1.0, x, args) for s in (3.0, 0.0))
    np.testing.assert_allclose(late, early, rtol=1e-6)


def test_choices_and_table(learned):
    plan = learned.plan
    assert plan.form == "relaxation" and plan.solver is None and plan.is_autonomous
    assert plan.is_positive.tolist() == [True, True] and plan.invariants.shape == (0, 2)
    assert [row.num_jumps for row in learned.errors] == [1, 2, 4]
    assert learned.num_trajectories == 240 and learned.num_dropped == 0
    assert learned.solves == () and [cost.solve for cost in learned.costs] == [None] * 2
    text = str(learned)
    assert f"{learned.errors[0].median:.3%}" in text and "240 trajectories" in text
    assert "solver" not in str(plan) and "classical" not in text
    assert learned.history[0]["error"] > 2 * learned.history[-1]["error"]


def test_save_load_and_report(learned, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    path = tmp_path / "map.safetensors"
    learned.save(path)
    loaded = LearnedSolver.load(path)
    assert str(loaded) == str(learned) and str(loaded.plan) == str(learned.plan)
    given = 0.1, 0.9, jnp.asarray([1.0, 0.7]), jnp.asarray([1.2])
    assert (loaded.flow_map(*given) == learned.flow_map(*given)).all()
    for part in (learned, loaded):
        assert part.report(tmp_path / "report.png") == str(learned)
        assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_residual_form_with_times_of_its_own(unmeasured):
    # A drive: dx/dt = t, from times that differ between trajectories.
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0.0, 2.0, (200, 8)), axis=1)
    ys = (ts**2 / 2 + rng.normal(size=(200, 1)))[..., None]
    mask = rng.uniform(size=ys.shape) < 0.9
    learned = learn_from_data(
        ts,
        np.where(mask, ys, 99.0),
        mask=mask,
        is_autonomous=False,
        form="residual",
        **QUICK,
    )
    assert isinstance(learned.flow_map, fd.NormalisedFlowMap)
    for s, t in ((0.2, 0.9), (1.0, 1.8)):
        end = learned.flow_map(s, t, jnp.asarray([0.4]))
        np.testing.assert_allclose(end, 0.4 + (t**2 - s**2) / 2, atol=0.1)


def test_pairs_of_two_times(unmeasured):
    rng = np.random.default_rng(0)
    x0 = rng.uniform(0.5, 2.0, (200, 2))
    ys = np.stack([x0, x0 * np.exp([-1.0, -2.0])], axis=1)
    learned = learn_from_data(np.asarray([3.0, 5.0]), ys, **QUICK)
    assert learned.errors[0].most < 0.1


def test_noise_too_small_to_matter():
    ts = np.broadcast_to(np.linspace(0, 2, 12), (20, 12))
    ys = np.exp(-ts)[..., None] * np.asarray([1.0, 2.0])
    np.testing.assert_allclose(smooth(ts, ys, np.full(2, 1e-12)), ys, rtol=1e-4)


def test_scalar_args_and_what_is_given(unmeasured, capsys):
    ts, ys, args = decays(61)
    ys = [np.stack([row[:, 0], 5 - row[:, 0]], axis=1) for row in ys]
    args[7] = np.nan
    given = dict(invariants=np.ones((1, 2)), is_positive=[True, False], batch_size=64)
    quick = QUICK | dict(num_steps=2, progress=True)
    learned = learn_from_data(ts, ys, args[:, 0], **quick | given)
    assert learned.plan.is_positive.tolist() == [True, False]
    end = learned.flow_map(0.0, 1.0, jnp.asarray([1.0, 2.0]), 0.7)
    assert abs(end.sum() - 3.0) < 1e-12
    assert learned.plan.reasons["batch_size"] == "given"
    assert learned.num_dropped == 1 and learned.num_trajectories == 48
    assert "1 dropped" in str(learned)
    assert "dropped 1 that cannot be used" in capsys.readouterr().err


# --- noise ----------------------------------------------------------------------------


def test_map_is_closer_to_the_flow_if_the_noise_is_known(unmeasured, tmp_path):
    ts, _, ys = rotations(0.4, num_times=30)
    x = np.random.default_rng(1).normal(size=(256, 2))
    off = []
    for noise in (None, 0.4):
        learned = learn_from_data(ts, ys, noise=noise, **QUICK | dict(num_steps=400))
        errors = []
        for h in (0.4, 1.0, 2.0):
            ends = jax.vmap(learned.flow_map, (None, None, 0))(0.0, h, x)
            errors.append(ends - exact_rotation(h, x))
        off.append(np.sqrt(np.mean(np.square(errors))))
        # Every entry crosses zero, by more than the noise.
        assert not learned.plan.is_positive.any()
    assert off[1] < 0.75 * off[0]
    learned.save(tmp_path / "map.safetensors")
    loaded = LearnedSolver.load(tmp_path / "map.safetensors")
    assert (loaded.plan.noise == 0.4).all() and "noise" in str(loaded.plan)
    given = 0.0, 1.0, jnp.asarray(x[0])
    assert (loaded.flow_map(*given) == learned.flow_map(*given)).all()


@pytest.mark.parametrize("num_times, gain", [(10, 0.75), (60, 0.4)])
def test_splines_are_closer_than_observations(num_times, gain):
    ts, exact, ys = rotations(0.2, 100, num_times)
    rms = lambda error: np.sqrt(np.nanmean(error**2))
    assert rms(smooth(ts, ys, np.full(2, 0.2)) - exact) < gain * 0.2
    # Entries that are missing are interpolated, and shorter trajectories filled up.
    ts[::2, -4:] = ys[::2, -4:] = np.nan
    ys[1::2, 3, 0] = np.nan
    found = smooth(ts, ys, np.full(2, 0.2))
    assert np.isfinite(found).all()
    seen = np.isfinite(ys)
    assert rms((found - exact)[seen]) < gain * 0.2


def test_a_straight_line_is_fitted_by_least_squares():
    ts = np.tile(np.linspace(0.0, 1.0, 7), (40, 1))
    rng = np.random.default_rng(0)
    ys = (2 * ts + rng.normal(size=(40, 1)))[..., None]
    noisy = ys + 0.1 * rng.normal(size=ys.shape)
    fits = [np.polyval(np.polyfit(ts[0], y, 1), ts[0]) for y in noisy[..., 0]]
    found = smooth(ts, noisy, np.asarray([0.1]))[..., 0]
    np.testing.assert_allclose(found, fits, atol=0.04)


def test_likelihood_of_observations():
    ts = np.linspace(0.0, 1.0, 3)
    states = np.random.default_rng(0).lognormal(size=(50, 3, 2))
    units = fd.nn.LogUnits.of(ts, states, np.asarray([True, False]))
    noise = np.asarray([0.1, 1e-6])
    difference = fd.learn.RobustDifference(units, 0.02, noise)
    y = jnp.asarray([0.5, 3.0])
    # In units of the noise, or of 2 % of a standard deviation where there is less.
    width = np.asarray([np.hypot(0.1, 0.02 * 0.5), 0.02 * float(units.std[1])])
    found = difference(y + 1e-3 * width, y)
    np.testing.assert_allclose(found, 1e-3 / np.sqrt(2) * np.ones(2), rtol=1e-4)
    # What was not observed does not count, and has no gradient.
    partial = lambda x: jnp.sum(difference(x, jnp.asarray([jnp.nan, 3.0])) ** 2)
    value, slope = jax.value_and_grad(partial)(jnp.asarray([0.7, 3.1]))
    assert np.isfinite(value) and slope[0] == 0 and slope[1] > 0


# --- pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize("first_share", [0.0, 0.5])
def test_pairs_are_of_one_trajectory_and_rise(first_share):
    ts, ys, args = decays(40)
    observed, _ = observe(ts, ys, args, None)
    batches = PairBatches.of(observed, 4096, first_share)
    paths, conditions = batches(jr.key(0))
    assert np.isfinite(paths.ys[:, 0]).all() and (np.diff(paths.ts) > 0).all()
    is_partial = np.isnan(paths.ys[:, 1]).any(1)
    assert 0.2 < is_partial.mean() < 0.5 and not np.isnan(paths.ys[:, 1]).all(1).any()
    # The rates tell trajectories apart.
    h, x = np.diff(paths.ts), np.asarray(paths.ys[:, 0])
    exact = exact_decay(h, x, np.asarray(conditions))
    seen = np.isfinite(paths.ys[:, 1])
    np.testing.assert_allclose(exact[seen], paths.ys[:, 1][seen], rtol=1e-4)
    assert len(np.unique(conditions)) == 40
    starts = np.asarray(
        [
            own[whole.all(1)][0]
            for own, whole in zip(ts, map(np.isfinite, ys), strict=True)
        ]
    )
    at_first = np.isin(paths.ts[:, 0], starts)
    assert at_first.mean() > first_share + 0.05


def incomplete(num=14):
    """Trajectories of one length that start late, end early, lack entries or `args`."""
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0.0, 2.0, (num, 6)), axis=1)
    args = rng.uniform(0.5, 1.5, (num, 1))
    ys = exact_decay(ts[..., None], rng.uniform(0.5, 2.0, (num, 1, 2)), args[:, None])
    ys[2, :2], ys[3, 4:], ys[5, ::2, 1], ys[6, 1:], args[7] = 5 * [np.nan]
    return ts, ys, args


@pytest.mark.parametrize("first_share", [0.0, 0.5])
def test_pairs_of_a_file_are_those_in_memory(first_share):
    ts, ys, args = incomplete(32)
    in_memory, _ = observe(ts, ys, args, None)
    file = File.open(ts, lambda rows: ys[rows], args, len(ys))
    from_file = Streamed(file.read, len(ys)).batches(8 * len(ys), first_share)
    counts = []
    for seed, batches in enumerate((in_memory.batches(1, first_share), from_file)):
        one = dataclasses.replace(next(source_of(batches)), batch_size=100_000)
        paths, conditions = eqx.filter_jit(one)(jr.key(seed))
        # What is observed of the later state is that of its time.
        h, x = np.diff(paths.ts), np.asarray(paths.ys[:, 0])
        exact, seen = (
            exact_decay(h, x, np.asarray(conditions)),
            np.isfinite(paths.ys[:, 1]),
        )
        np.testing.assert_allclose(exact[seen], paths.ys[:, 1][seen], rtol=1e-4)
        pairs, count = np.unique(np.float32(paths.ts), axis=0, return_counts=True)
        counts.append(dict(zip(map(tuple, pairs), count, strict=True)))
    assert counts[0].keys() == counts[1].keys() and len(counts[0]) > 100
    one, other = (np.asarray([count[pair] for pair in counts[0]]) for count in counts)
    # Differences of counts, in standard deviations.
    assert np.mean((one - other) ** 2 / (one + other)) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("kind", ["memory map", "function and noise"])
def test_trajectories_of_a_file(kind, unmeasured, monkeypatch, tmp_path):
    monkeypatch.setattr(_streamed, "_BYTES_SHOWN", 1)
    rng = np.random.default_rng(0)
    ts, args = np.linspace(0.0, 2.0, 9), rng.uniform(0.5, 1.5, (1000, 1))
    ys = exact_decay(ts[:, None], rng.uniform(0.5, 2.0, (1000, 1, 2)), args[:, None])
    noise = 0.02 if "noise" in kind else None
    if noise:
        ys = ys + noise * rng.normal(size=ys.shape)
    asked = []

    def read(rows):
        asked.append(rows)
        return ys[rows]

    given = dict(ys=read, size=1000)
    if kind == "memory map":
        np.save(tmp_path / "ys.npy", ys)
        given = dict(ys=np.load(tmp_path / "ys.npy", mmap_mode="r"))
    learned = learn_from_data(ts, args=args, noise=noise, **given, **QUICK)
    # 128 are looked at, and a fifth of these is held out.
    assert learned.num_trajectories == 975 and isinstance(
        learned.parts.batches, fd.data.StreamBatches
    )
    assert learned.plan.pool_size == 975
    if asked:
        assert max(map(len, asked)) <= 128 and len(np.unique(np.concatenate(asked))) > 900
        (held_out,) = {tuple(rows) for rows in asked if len(rows) == 25}
        trained_on = np.concatenate([rows for rows in asked if len(rows) == 64])
        assert not set(held_out) & set(trained_on)
    assert learned.errors[0].median < (0.05 if noise is None else 0.1)
    x, conditions = rng.uniform(0.5, 2.0, (64, 2)), rng.uniform(0.5, 1.5, (64, 1))
    ends = jax.vmap(learned.flow_map, (None, None, 0, 0))(0.0, 1.5, x, conditions)
    error = np.abs(ends / exact_decay(1.5, x, conditions) - 1)
    assert np.quantile(error, 0.9) < 0.1


def test_small_batches_of_a_file_with_gaps():
    # Lists will do, and one trajectory in three has nothing to learn from.
    ts, ys, args = incomplete(30)
    ys[::3, 1:] = np.nan
    file = File.open(ts.tolist(), lambda rows: ys[rows], args.tolist(), 30)
    draws = source_of(Streamed(file.read, 30).batches(1, 0.0))
    for index in range(20):
        path, _ = next(draws)(jr.key(index))
        assert path.ys.shape == (1, 2, 2) and np.isfinite(path.ys[:, 0]).all()


def test_a_small_file_is_read_at_once(tmp_path):
    ts, ys, args = incomplete()
    np.save(tmp_path / "ys.npy", ys)
    ys = np.load(tmp_path / "ys.npy", mmap_mode="r")
    learned = learn_from_data(ts, ys, args, **QUICK)
    assert learned.num_dropped == 2 and isinstance(learned.parts.batches, PairBatches)


def test_positions_do_not_mix_states():
    path = fd.paths.TrajectoryPath(
        jnp.asarray([0.0, 1.0]), jnp.asarray([[2.0], [jnp.nan]])
    )
    assert path.saved_state(0.2)[0] == 2.0 and np.isnan(path.saved_state(0.9)[0])


# --- dropped and interrupted ----------------------------------------------------------


def test_bad_trajectories_are_dropped_and_counted():
    ts, ys, args = decays(60)
    ys[3] = np.full_like(ys[3], np.nan)  # nothing observed
    ys[10][1:] = np.nan  # one time
    ys[20][:-1, 0] = np.nan  # no start
    args[30] = np.inf
    observed, _ = observe(ts, ys, args, None)
    assert observed.num_dropped == 4
    kept = np.delete(args, [3, 10, 20, 30], axis=0)
    np.testing.assert_array_equal(observed.args, kept)


def test_interrupted_and_resumed(learned, unmeasured, tmp_path, monkeypatch):
    settings = QUICK | dict(progress=True, run=tmp_path)
    stream = Interrupting("step 150")
    monkeypatch.setattr(sys, "stderr", stream)
    stopped = learn_from_data(*decays(), **settings)
    assert any("stopped" in line for line in stream.lines)
    assert 150 <= stopped.history[-1]["step"] < 300
    resumed = learn_from_data(*decays(), **settings)
    assert resumed.history == learned.history
    given = 0.0, 1.0, jnp.asarray([1.0, 0.7]), jnp.asarray([1.2])
    assert (resumed.flow_map(*given) == learned.flow_map(*given)).all()
    with pytest.raises(ValueError, match=r"another problem.*'data'"):
        learn_from_data(*decays(seed=1), **settings)


# --- what is refused ------------------------------------------------------------------

TS = np.linspace(0.0, 1.0, 5)
YS = np.random.default_rng(0).normal(size=(40, 5, 2))
FALLING = np.tile(TS, (40, 1))
FALLING[7, 3] = 0.1
UNKNOWN = np.tile(TS, (40, 1))
UNKNOWN[7, 3] = np.nan
INFINITE = YS.copy()
INFINITE[9, 0, 1] = np.inf
NEVER = YS.copy()
NEVER[:, :, 1] = np.nan
IN_TURN = YS.copy()
IN_TURN[:, ::2, 0] = np.nan
IN_TURN[:, 1::2, 1] = np.nan
ONCE = YS.copy()
ONCE[:, 1:] = np.nan


@pytest.mark.parametrize(
    "changed, error, match",
    [
        (dict(ys=YS[..., 0]), ValueError, r"3 axes.*`ys\[..., None\]`"),
        (dict(ys=[y[:, 0] for y in YS]), ValueError, r"states are vectors"),
        (dict(ys=[YS[0], YS[1, :, :1]]), ValueError, r"states are vectors"),
        (dict(ys=YS + 0j), TypeError, "real numbers; got dtype complex"),
        (dict(ts=TS[:4]), ValueError, r"in trajectory 0, got shape \(4,\) instead of"),
        (dict(ts=[TS] * 39), ValueError, "`ts` has 39 trajectories, and `ys` has 40"),
        (dict(ts=FALLING), ValueError, "rise.* in trajectory 7, 0.1 follows 0.5"),
        (dict(ts=UNKNOWN), ValueError, "trajectory 7 has 1 times that are not"),
        (dict(ys=INFINITE), ValueError, "trajectory 9 has infinite entries"),
        (dict(mask=np.ones((40, 5))), ValueError, "`mask` must have 3 axes"),
        (dict(mask=np.ones(YS.shape)), ValueError, "`mask` must be boolean"),
        (dict(mask=np.zeros(YS.shape, bool)), ValueError, "nothing to learn from"),
        (dict(ys=ONCE), ValueError, "None of 40 trajectories has two times"),
        (dict(ys=NEVER), ValueError, r"entries \[1\] are never observed.*\(delay"),
        (dict(ys=IN_TURN), ValueError, "some entry is always missing"),
        (dict(ys=YS[:9]), ValueError, "9 of 9 trajectories can be used"),
        (dict(args=np.ones((39, 1))), ValueError, "each of the 40 trajectories"),
        (dict(args=np.full(40, np.nan)), ValueError, "finite `args`"),
        (dict(noise=0.0), ValueError, "`noise` must be positive"),
        (dict(noise=np.ones(3)), ValueError, "each of the 2 entries"),
        (dict(is_positive=True), ValueError, r"Entries \[0, 1\] should be positive"),
        (dict(is_positive=[True]), ValueError, "each of the 2 entries, or for all"),
        (dict(is_positive="yes"), ValueError, "each of the 2 entries, or for all"),
        (dict(form="other"), ValueError, "must be one of"),
        (dict(invariants=[[1, 1]]), ValueError, r"`invariants\[0\]` is not conserved"),
        (dict(invariants=np.ones((1, 3))), ValueError, r"shape \(invariants, 2\)"),
        (dict(width=0), ValueError, "`width`"),
        (dict(minutes=0), ValueError, "`minutes`"),
        (dict(size=40), ValueError, "`size` is for a function"),
        (dict(ys=lambda rows: YS[rows]), ValueError, "give `size`, its number"),
        (
            dict(ys=lambda rows: YS[0], size=40),
            ValueError,
            r"one row, got shape \(5, 2\)",
        ),
        (
            dict(ys=lambda rows: YS[:1], size=40),
            ValueError,
            "For 40 rows, .* must return",
        ),
        (dict(ys=lambda rows: YS[rows], size=0), ValueError, "`size`"),
        (
            dict(ys=lambda rows: YS[rows], size=40, args=np.ones((39, 1))),
            ValueError,
            "each of the 40 trajectories; got 39",
        ),
        (
            dict(ys=lambda rows: YS[rows], size=40, mask=np.ones(YS.shape, bool)),
            ValueError,
            "instead of passing a `mask`",
        ),
    ],
)
def test_bad_input(changed, error, match):
    with pytest.raises(error, match=match):
        learn_from_data(**dict(ts=TS, ys=YS) | QUICK | changed)
