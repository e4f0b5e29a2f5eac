"""Power function averages, against sums over a recorded trajectory of the weights."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import assert_close
from run_train import begin, train

import flowdiffrax as fd
from flowdiffrax.train import PowerAverage, Snapshots, power_average

NARROW, WIDE = PowerAverage(0.05), PowerAverage(0.10)
DECAYS = (0.9, NARROW, WIDE)


def vector(tree):
    """All weights, one after another."""
    return np.concatenate(
        [np.ravel(leaf) for leaf in jtu.tree_leaves(eqx.filter(tree, eqx.is_array))]
    )


def share(average, num_steps):
    """The weight of each step, as the integral of the power over the step."""
    steps = np.arange(num_steps + 1) / num_steps
    return np.diff(steps ** (average.exponent + 1))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 120 steps with the weights of each, and a snapshot at every fourth."""
    folder = tmp_path_factory.mktemp("run") / "snapshots"
    weights, states = [], []

    def record(state, report):
        weights.append(vector(state.flow_map))
        states.append(state)

    train(
        None,
        120,
        width=8,
        ema_decay=DECAYS,
        on_report=[record, Snapshots(folder, DECAYS, every=4)],
    )
    return np.stack(weights), states[-1], folder


def test_width_is_a_standard_deviation():
    for average in (NARROW, WIDE, PowerAverage(0.25)):
        share_of = share(average, 20_000)
        middle = (np.arange(20_000) + 0.5) / 20_000
        mean = share_of @ middle
        assert_close(np.sqrt(share_of @ (middle - mean) ** 2), average.sigma_rel, 1e-4)


def test_averages_are_the_sums_over_the_trajectory(recorded):
    weights, state, _ = recorded
    for average, tracked in zip(DECAYS[1:], state.averages[1:], strict=True):
        assert_close(vector(tracked), share(average, 120) @ weights, 1e-12)


def test_fixed_decay_is_as_it_was_alone(recorded):
    _, state, _ = recorded
    alone = train(None, 120, width=8, ema_decay=0.9, report_every=120)
    assert_close(vector(state.ema_map), vector(alone.ema_map), 1e-12)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_built_from_snapshots(recorded, sigma_rel):
    weights, state, folder = recorded
    built = power_average(folder, state.flow_map, sigma_rel)
    exact = share(PowerAverage(sigma_rel), 120) @ weights
    # The difference of two averages is the scale on which they matter.
    spread = np.linalg.norm(exact - weights[-1])
    assert np.linalg.norm(vector(built) - exact) < 0.03 * spread


@pytest.mark.parametrize("index", [1, 2])
def test_tracked_width_is_returned_as_it_is(recorded, index):
    _, state, folder = recorded
    built = power_average(folder, state.flow_map, DECAYS[index].sigma_rel)
    assert_close(vector(built), vector(state.averages[index]), 1e-9)


def test_built_for_an_earlier_step(recorded):
    weights, state, folder = recorded
    built = power_average(folder, state.flow_map, 0.1, step=60)
    assert_close(vector(built), share(WIDE, 60) @ weights[:60], 1e-9)


def test_few_snapshots_give_a_warning(tmp_path, recorded):
    _, state, _ = recorded
    train(
        None,
        40,
        width=8,
        ema_decay=DECAYS,
        on_report=Snapshots(tmp_path, DECAYS, every=20),
    )
    with pytest.warns(RuntimeWarning, match="2 snapshots .* with an error of"):
        power_average(tmp_path, state.flow_map, 0.01)


def test_skipped_steps_do_not_count():
    first = lambda key: jr.normal(key, (8, 2))
    broken = fd.data.StateBatches(lambda key, size: first(key) * jnp.nan, 8)
    good = fd.data.StateBatches(lambda key, size: first(key), 8)
    objective = fd.LagrangianMapDistillation()
    teacher = lambda t, x, args: -x
    settings = dict(ema_decay=(WIDE,))
    step = fd.train.make_step(objective, optax.adam(1e-2), **settings)
    state = fd.train.TrainState.create(
        begin(8), optax.adam(1e-2), key=jr.key(0), **settings
    )
    weights = []
    for batches in (broken, good, broken, good, good):
        state, info = step(state, batches, teacher)
        if info.is_finite:
            weights.append(vector(state.flow_map))
    assert_close(vector(state.ema_map), share(WIDE, 3) @ np.stack(weights), 1e-12)


def test_bfloat16_weights_are_averaged_in_float32(tmp_path):
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_array(leaf) else leaf
    flow_map = jax.tree.map(cast, begin(8))
    data = jnp.linspace(-1.0, 1.0, 64, dtype=jnp.bfloat16).reshape(32, 2)
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8)
    snapshots = Snapshots(tmp_path, DECAYS, every=2)
    state = train(
        None, 4, flow_map=flow_map, batches=batches, ema_decay=DECAYS, on_report=snapshots
    )
    assert {
        leaf.dtype for leaf in jtu.tree_leaves(eqx.filter(state.averages, eqx.is_array))
    } == {jnp.dtype(jnp.float32)}
    built = power_average(tmp_path, state.flow_map, 0.1)
    np.testing.assert_array_equal(vector(built), vector(state.ema_maps[2]))


def test_resumed_run_has_the_same_snapshots(tmp_path):
    settings = dict(ema_decay=DECAYS, width=8)
    for name, lengths in (("whole", (12,)), ("parts", (5, 12))):
        for number in lengths:
            run = fd.train.Run(tmp_path / name, save_every=3)
            train(
                run,
                number,
                on_report=Snapshots(tmp_path / name / "s", DECAYS),
                **settings,
            )
    for step in range(1, 13):
        one, other = (
            tmp_path / name / "s" / f"{step}.safetensors" for name in ("whole", "parts")
        )
        assert one.read_bytes() == other.read_bytes()


def write(folder, state, steps, *, every=1, scale=1.0, snapshots=None):
    """Snapshots as a run makes them, of which another has other weights."""
    snapshots = Snapshots(folder, DECAYS, every=every) if snapshots is None else snapshots
    times = lambda leaf: leaf * scale if eqx.is_inexact_array(leaf) else leaf
    state = jtu.tree_map(times, state)
    for step in steps:
        snapshots(state, {"step": step, "skipped": 0})


@pytest.mark.parametrize(
    "steps, every",
    [(range(1, 4), 1), (range(1, 9), 8), (range(1, 13), 4)],
    ids=["fewer", "rarer and longer", "overtaking"],
)
def test_second_run_in_a_folder(tmp_path, recorded, steps, every):
    _, state, _ = recorded
    write(tmp_path, state, range(2, 7))
    write(tmp_path, state, steps, every=every, scale=2.0)
    with pytest.raises(ValueError, match="does not continue the snapshots before it"):
        power_average(tmp_path, state.flow_map, 0.1)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["same", "other device"])
def test_run_that_repeats_all_of_its_steps(tmp_path, recorded, scale):
    _, state, _ = recorded
    write(tmp_path, state, range(1, 7))
    write(tmp_path, state, range(4, 9), scale=scale)
    (tmp_path / "5.safetensors").unlink()
    built = power_average(tmp_path, state.flow_map, 0.1)
    expected = vector(state.averages[2]) * scale
    assert_close(vector(built), expected, 1e-9)


def test_one_object_for_two_runs(tmp_path, recorded):
    _, state, _ = recorded
    snapshots = Snapshots(tmp_path, DECAYS)
    for scale in (2.0, 1.0):
        write(tmp_path, state, range(1, 5), scale=scale, snapshots=snapshots)
    built = power_average(tmp_path, state.flow_map, 0.1)
    assert_close(vector(built), vector(state.averages[2]), 1e-9)


def refused(tmp_path, state):
    train(None, 2, width=8, ema_decay=WIDE, on_report=Snapshots(tmp_path / "a", WIDE))
    train(
        None, 3, width=8, ema_decay=WIDE, key=5, on_report=Snapshots(tmp_path / "b", WIDE)
    )
    (tmp_path / "a" / "3.safetensors").write_bytes(
        (tmp_path / "b" / "3.safetensors").read_bytes()
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.safetensors").write_bytes(b"nothing")
    report = {"step": 4, "skipped": 0}
    return [
        (lambda: PowerAverage(0.3), ValueError, "`sigma_rel` must be in"),
        (lambda: PowerAverage(0.0), ValueError, "`sigma_rel` must be in"),
        (lambda: Snapshots(tmp_path, 0.9), ValueError, "`ema_decay` has none"),
        (lambda: Snapshots(tmp_path, WIDE)(state, report), ValueError, "the same `ema_"),
        (
            lambda: Snapshots(tmp_path, (0.9, WIDE, NARROW))(state, report),
            ValueError,
            r"0.9, .*0.1\), .*0.05\)\), but the state has \(0.9, .*0.05\), .*0.1\)\)",
        ),
        (
            lambda: power_average(tmp_path / "a", state.flow_map, 0.1),
            ValueError,
            "3.safetensors does not continue",
        ),
        (
            lambda: power_average(tmp_path / "b", begin(4), 0.1),
            ValueError,
            "does not match",
        ),
        (
            lambda: power_average(tmp_path / "b", state.flow_map, 0.1, step=9),
            FileNotFoundError,
            r"no snapshot of step 9; there are \[1, 2, 3\]",
        ),
        (
            lambda: power_average(tmp_path / "c", state.flow_map, 0.1),
            ValueError,
            "not a snapshot",
        ),
        (
            lambda: power_average(tmp_path / "d", state.flow_map, 0.1),
            FileNotFoundError,
            "has no",
        ),
    ]


def test_mistakes(tmp_path, recorded):
    _, state, _ = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call, kind, message in refused(tmp_path, state):
            with pytest.raises(kind, match=message):
                call()
