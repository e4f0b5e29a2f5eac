"""Trajectories by any teacher, and pools of them on disk."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, linear_map

import flowdiffrax as fd

TS = jnp.asarray([0.0, 0.5, 0.75, 1.0])
DECAY = lambda t, x, args: -args * x


def exact(x0, ts, args):
    """Of the decay, in NumPy."""
    decayed = np.exp(-np.asarray(args)[:, None, None] * np.asarray(ts)[:, None])
    return np.asarray(x0)[:, None] * decayed


def draw(key, n):
    keys = jr.split(key)
    x0 = 1 + jr.uniform(keys[0], (n, 3))
    return fd.data.ConditionedPoints(x0, jr.uniform(keys[1], (n,)))


SOLVE = functools.partial(fd.solve_trajectories, DECAY, args_per_example=True)


def heun(s, t, x, args):
    h = t - s
    ahead = x + h * DECAY(s, x, args)
    return x + h / 2 * (DECAY(s, x, args) + DECAY(t, ahead, args))


# --- steppers -------------------------------------------------------------------------


def test_an_exact_step_needs_no_substeps():
    flow_map, x0 = linear_map(), jr.normal(jr.key(0), (5, 2))
    made = fd.paths.step_trajectories(flow_map, x0, TS, chunk_size=2)
    solved = fd.solve_trajectories(flow_map.velocity, x0, TS, rtol=1e-11, atol=1e-11)
    assert_close(made, solved, 1e-8, 1e-8)


def test_substeps_have_the_order_of_the_step():
    x0, args = draw(jr.key(0), 4)
    errors = []
    for num in (8, 16):
        made = fd.paths.step_trajectories(
            heun, x0, TS, args, args_per_example=True, num_substeps=num
        )
        errors.append(np.abs(made - exact(x0, TS, args)).max())
    assert errors[0] < 1e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_times_of_substeps():
    # A step that adds up its own times, on times of each example.
    add = lambda s, t, x, args: x + (t**2 - s**2) * args
    ts = jnp.stack([TS, 2 + TS[::-1]])
    made = fd.paths.step_trajectories(
        add, jnp.zeros(2), ts, jnp.asarray(3.0), num_substeps=3
    )
    assert_close(made, 3 * (ts**2 - ts[:, :1] ** 2), 1e-12)


# --- on disk --------------------------------------------------------------------------


def store(folder, teacher=SOLVE, draw=draw, num=10, **settings):
    settings = {"key": jr.key(3), "chunk_size": 4, **settings}
    return fd.data.store_trajectories(folder, teacher, draw, TS, num, **settings)


@pytest.mark.parametrize("teacher", ["solver", "stepper"])
def test_what_is_stored(tmp_path, teacher):
    step = functools.partial(
        fd.paths.step_trajectories, heun, args_per_example=True, num_substeps=64
    )
    made = store(tmp_path / "pool", SOLVE if teacher == "solver" else step)
    assert isinstance(made.ys, np.memmap) and made.ys.shape == (10, 4, 3)
    np.testing.assert_allclose(made.ys, exact(made.ys[:, 0], TS, made.args), rtol=1e-4)
    assert made.num_dropped == 0 and len(np.unique(made.args)) == 10
    again = fd.data.load_trajectories(tmp_path / "pool")
    jax.tree.map(np.testing.assert_array_equal, again, made)
    # A chunk is a function of its number.
    x0, args = draw(jr.fold_in(jr.key(3), 1), 4)
    np.testing.assert_array_equal(made.args[4:8], args)
    np.testing.assert_array_equal(made.ys[4:8, 0], x0)


def test_rows_that_are_not_finite_are_dropped_and_replaced(tmp_path):
    chunks = []

    def teacher(x0, ts, args):
        # The second row of each chunk fails.
        chunks.append(np.asarray(args))
        ys = np.array(exact(x0, ts, args))
        ys[1, 2, 0] = np.nan
        return ys

    made = store(tmp_path, teacher, num=7, max_dropped=0.5)
    assert made.num_dropped == 3
    good = [args[[0, 2, 3]] for args in chunks]
    np.testing.assert_array_equal(made.args, np.concatenate(good)[:7])
    assert np.isfinite(made.ys).all()
    with pytest.raises(ValueError, match="2 of 8 trajectories are not finite, more than"):
        store(tmp_path / "strict", teacher, num=7)


def test_without_conditions(tmp_path):
    teacher = lambda x0, ts, args: exact(x0, ts, np.ones(len(x0)))
    # As an interrupted run with conditions leaves it.
    np.save(tmp_path / "args.npy", np.zeros(3))
    made = store(tmp_path, teacher, lambda key, n: jr.normal(key, (n, 2, 5))[:, 0])
    assert made.args is None and made.ys.shape == (10, 4, 5)


def test_training_on_what_is_stored(tmp_path):
    pytest.importorskip("grain")
    pool = store(tmp_path)
    make = lambda rows: fd.data.TrajectoryBatches(TS, rows["ys"], 5, rows["args"], False)
    source = {"ys": pool.ys, "args": pool.args}
    batches = fd.data.StreamBatches(source, 5, make)
    paths, args = next(batches.each_step(0))(jr.key(0))
    expected = exact(paths.ys[:, 0], TS, args)
    np.testing.assert_allclose(paths.ys, expected, rtol=1e-4)


# --- mistakes -------------------------------------------------------------------------


def test_folder_with_a_pool(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no complete pool"):
        fd.data.load_trajectories(tmp_path)
    teacher = lambda x0, ts, args: exact(x0, ts, args)
    store(tmp_path, teacher)
    with pytest.raises(FileExistsError, match="has a pool already"):
        store(tmp_path, teacher)


@pytest.mark.parametrize(
    "settings, error, match",
    [
        (
            {"teacher": lambda x0, ts, args: exact(x0, ts, args)[:, -1]},
            ValueError,
            r"must return states of shape \(4, 4, 3\)",
        ),
        (
            {"draw": lambda key: 0},
            TypeError,
            r"draw\(key, chunk_size\)",
        ),
        ({"num": 0}, ValueError, "`num_trajectories` must be at least 1"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"max_dropped": -0.1}, ValueError, "`max_dropped` must be at least 0"),
    ],
)
def test_bad_settings(tmp_path, settings, error, match):
    with pytest.raises(error, match=match):
        store(tmp_path, **settings)


@pytest.mark.parametrize(
    "step, num, match",
    [
        (heun, 0, "`num_substeps` must be at least 1"),
        (lambda s, t, x, args: x[:1], 1, "`step` must return the shape of the state"),
    ],
)
def test_bad_steps(step, num, match):
    with pytest.raises(ValueError, match=match):
        fd.paths.step_trajectories(step, jnp.ones((2, 3)), TS, 1.0, num_substeps=num)
