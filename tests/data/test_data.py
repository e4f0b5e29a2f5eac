"""Boards, base draws and batches."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    linear_map,
    nonlinear_field,
    tight_solve,
    without_type_checks,
)
from scipy import stats

import flowdiffrax as fd

# --- the board ----------------------------------------------------------------------


def test_boxes_of_a_small_board():
    lower, upper = fd.data.checkerboard_boxes(2)
    assert_close(lower, np.asarray([[-1.0, -1.0], [0.0, 0.0]]))
    assert_close(upper, np.asarray([[0.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize("squares", [2, 3, 4, 6])
def test_density_integrates_to_one(squares):
    side = (np.arange(120) + 0.5) / 60 - 1
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    total = fd.data.checkerboard_density(grid, squares).mean() * 4
    np.testing.assert_allclose(total, 1)


def test_density_of_single_points():
    points = np.asarray([[-0.9, -0.9], [-0.9, -0.4], [0.1, 0.1], [0.1, -0.1], [2.0, 0.1]])
    assert_close(fd.data.checkerboard_density(points), np.asarray([0.5, 0, 0.5, 0, 0]))


@pytest.mark.parametrize("squares", [2, 6])
def test_points_of_other_boards(squares):
    points = np.asarray(fd.data.checkerboard(jr.key(0), 500, squares))
    np.testing.assert_allclose(fd.data.checkerboard_density(points, squares), 0.5)
    assert 0 < np.mean(fd.data.checkerboard_density(points) == 0) < 1


def test_board_is_uniform_on_its_squares():
    # 40,000 points in 8 squares of 4x4 cells: chi-squared at one in ten thousand.
    points = np.asarray(fd.data.checkerboard(jr.key(0), 40_000))
    assert (fd.data.checkerboard_density(points) == 0.5).all()
    counts, *_ = np.histogram2d(*points.T, bins=16, range=[(-1, 1), (-1, 1)])
    filled = counts[counts > 0]
    assert filled.size == 128 and stats.chisquare(filled).pvalue > 1e-4


# --- batches ------------------------------------------------------------------------

DATA = jnp.arange(20.0).reshape(10, 2)
LABELS = jnp.arange(10)


def interpolant_batches(**kwargs):
    settings = {"data": DATA, "batch_size": 6, **kwargs}
    interpolant = settings.pop("interpolant", fd.LinearInterpolant())
    return fd.data.InterpolantBatches(interpolant, **settings)


def test_rows_are_data_with_their_labels():
    paths, labels = interpolant_batches(args=LABELS)(jr.key(0))
    assert paths.x0.shape == paths.x1.shape == (6, 2)
    assert_close(paths.x1, DATA[labels])


def test_rows_are_drawn_evenly():
    _, labels = interpolant_batches(args=LABELS, batch_size=5000)(jr.key(0))
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-4


def test_base_is_normal():
    base = fd.data.GaussianBase(2.5)(jr.key(0), jnp.zeros((5000, 2)))
    assert stats.kstest(np.ravel(base) / 2.5, "norm").pvalue > 1e-4


def test_base_off_centre():
    mean = np.asarray([20.0, -3.0])
    base = fd.data.GaussianBase(0.5, mean)(jr.key(0), jnp.zeros((5000, 2)))
    assert np.allclose(base.mean(axis=0), mean, atol=0.05)
    assert np.allclose(base.std(axis=0), 0.5, atol=0.03)


def test_base_leaves_are_independent_and_keep_dtypes():
    like = {"a": jnp.zeros((5000,), jnp.float32), "b": jnp.zeros((5000,))}
    base = fd.data.GaussianBase()(jr.key(0), like)
    assert base["a"].dtype == jnp.float32 and base["b"].dtype == jnp.float64
    correlation = np.corrcoef(base["a"], base["b"])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(5000)


def test_base_is_independent_of_the_data():
    data = jr.normal(jr.key(5), (5000, 1))
    paths, _ = interpolant_batches(data=data, batch_size=5000)(jr.key(0))
    correlation = np.corrcoef(paths.x0[:, 0], paths.x1[:, 0])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(5000)


def test_data_from_a_function():
    paths, args = interpolant_batches(data=fd.data.checkerboard)(jr.key(0))
    assert args is None
    assert (fd.data.checkerboard_density(np.asarray(paths.x1)) > 0).all()


def test_latent_is_a_fresh_normal():
    interpolant = fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent())
    source = interpolant_batches(interpolant=interpolant, batch_size=4000)
    paths, _ = source(jr.key(0))
    assert stats.kstest(np.ravel(paths.z), "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(paths.z[:, 0], paths.x0[:, 0])[0, 1]) < 4 / np.sqrt(4000)


class Bump(eqx.Module):
    """A latent weight with an array of its own, which no path has an axis of."""

    height: jax.Array

    def __call__(self, t):
        return self.height * t * (1 - t)


def test_paths_can_be_mapped_over():
    interpolant = fd.LinearInterpolant(latent=Bump(jnp.asarray(2.0)))
    paths, _ = interpolant_batches(interpolant=interpolant)(jr.key(0))
    middle = eqx.filter_vmap(lambda path: path.evaluate(0.5))(paths)
    assert_close(middle, (paths.x0 + paths.x1 + paths.z) / 2)


def test_pytree_data():
    data = {"a": jnp.ones((10, 2)), "b": jnp.zeros((10,))}
    paths, _ = interpolant_batches(data=data)(jr.key(0))
    assert paths.x0["a"].shape == (6, 2) and paths.x0["b"].shape == (6,)


class Reversed(fd.paths.AbstractCoupling):
    def __call__(self, key, x0, x1, args=None):
        return x0[::-1]


def test_coupling_moves_the_base_only():
    plain, _ = interpolant_batches()(jr.key(0))
    coupled, _ = interpolant_batches(coupling=Reversed())(jr.key(0))
    assert_close(coupled.x1, plain.x1)
    assert_close(coupled.x0, plain.x0[::-1])


# --- trajectories -------------------------------------------------------------------

TS = jnp.asarray([0.0, 0.3, 1.0])


def pool():
    return jnp.arange(24.0).reshape(4, 3, 2)


def test_trajectory_rows():
    paths, labels = fd.data.TrajectoryBatches(TS, pool(), 6, jnp.arange(4))(jr.key(0))
    assert paths.ts.shape == (6, 3)
    assert_close(paths.ys, pool()[labels])


def test_trajectory_rows_with_times_of_their_own():
    ts = jnp.stack([TS + k for k in range(4)])
    batches = fd.data.TrajectoryBatches(ts, pool(), 6, jnp.arange(4))
    paths, labels = batches(jr.key(0))
    assert_close(paths.ts, ts[labels])
    assert_close(paths.ys, pool()[labels])
    middle = jax.vmap(lambda path: path.evaluate(path.t0 + 0.3))(paths)
    assert_close(middle, pool()[labels, 1], 1e-12)
    assert len(set(map(int, labels))) > 1


def test_learning_from_rows_with_times_of_their_own():
    # Log-uniform steps from starts of their own, as one trains a map of short steps.
    starts, ends = fd.times.OnInterval(fd.times.LogUniformGap(0.01), 2.0, 7.0)(
        jr.key(0), 5
    )
    ts = jnp.stack([starts, ends], axis=1)
    ys = fd.solve_trajectories(linear_map().velocity, jnp.ones((5, 2)), ts, rtol=1e-10)
    paths, _ = fd.data.TrajectoryBatches(ts, ys, 4)(jr.key(1))
    jump = lambda path: linear_map()(path.t0, path.t1, path.evaluate(path.t0))
    expected = jax.vmap(lambda path: path.evaluate(path.t1))(paths)
    assert_close(jax.vmap(jump)(paths), expected, 1e-6, 1e-6)


def test_trajectory_path_at_and_between_times():
    path = fd.paths.TrajectoryPath(TS, {"x": pool()[0]})
    assert_close(path.evaluate(0.3), {"x": jnp.asarray([2.0, 3.0])})
    assert_close(path.evaluate(1.0), {"x": jnp.asarray([4.0, 5.0])})
    assert_close(path.evaluate(0.65), {"x": jnp.asarray([3.0, 4.0])})
    assert_close(path.evaluate(0.3, 1.0), {"x": jnp.asarray([2.0, 2.0])})
    assert (path.t0, path.t1) == (0, 1)


def test_trajectory_path_rate():
    path = fd.paths.TrajectoryPath(TS, pool()[0])
    assert_close(path.derivative(jnp.asarray(0.5)), jnp.asarray([2.0, 2.0]) / 0.7)


@pytest.mark.parametrize("ts", [[0.1, 0.4, 0.9], [0.9, 0.4, 0.1]])
def test_solved_trajectories(ts):
    x0 = jnp.asarray([[0.8, -0.5], [0.1, 0.4], [-1.0, 0.0]])
    ys = fd.solve_trajectories(nonlinear_field, x0, jnp.asarray(ts), chunk_size=2)
    assert ys.shape == (3, 3, 2)
    assert_close(ys[:, 0], x0)
    for k in (1, 2):
        expected = tight_solve(nonlinear_field, ts[0], ts[k], x0[1]).ys[0]
        assert_close(ys[1, k], expected, 1e-6)


def test_solved_trajectories_of_a_pytree_with_args():
    field = lambda t, x, args: {"y": -args * x["y"]}
    x0 = {"y": jnp.ones((2, 1), jnp.float32)}
    ys = fd.solve_trajectories(field, x0, np.asarray([0.0, 1.0]), jnp.float32(2.0))
    assert ys["y"].dtype == jnp.float32
    np.testing.assert_allclose(ys["y"][:, 1], np.exp(-2) * np.ones((2, 1)), rtol=1e-4)


def test_solved_trajectories_with_parameters_of_their_own():
    args = {"rate": jnp.asarray([0.5, 1.0, 2.0]), "shift": jnp.asarray([0.0, 1.0, -1.0])}
    field = lambda t, x, args: -args["rate"] * (x - args["shift"])
    x0, ts = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.0, 0.3, 1.5])
    ys = fd.solve_trajectories(field, x0, ts, args, args_per_example=True, chunk_size=2)
    for k in range(3):
        rate, shift = float(args["rate"][k]), float(args["shift"][k])
        expected = shift + (float(x0[k]) - shift) * np.exp(-rate * np.asarray(ts))
        np.testing.assert_allclose(ys[k], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_solved_trajectories_with_times_of_their_own(kind):
    # y' = -(1 + 2t) y, from each row's own start, forwards and backwards.
    ts = kind([[0.0, 0.5, 1.0], [0.3, 0.31, 0.33], [0.9, 0.4, -0.2]])
    field = lambda t, x, args: -args * (1 + 2 * t) * x
    ys = fd.solve_trajectories(field, jnp.asarray([1.0, 2.0, 3.0]), ts, 0.7)
    for k, row in enumerate(np.asarray(ts)):
        growth = -0.7 * ((row - row[0]) + (row**2 - row[0] ** 2))
        np.testing.assert_allclose(ys[k], (k + 1) * np.exp(growth), rtol=1e-6)


@pytest.mark.parametrize("dtype, tol", [(jnp.float64, 1e-5), (jnp.float32, 3e-3)])
def test_solved_trajectories_of_a_stiff_system(dtype, tol):
    # Relaxation to cos(t) a thousand times faster than that moves: an explicit solver
    # would take thousands of steps.
    def field(t, x, args):
        return -args * (x - jnp.cos(t).astype(x.dtype))

    def exact(t, x, rate):
        settled = rate * (rate * np.cos(t) + np.sin(t)) / (1 + rate**2)
        return settled + (x - rate**2 / (1 + rate**2)) * np.exp(-rate * t)

    rates, x0 = jnp.asarray([300.0, 1e4], dtype), jnp.asarray([2.0, -1.0], dtype)
    ts = jnp.asarray([[0.0, 1e-4, 1.0], [0.0, 0.5, 3.0]])
    ys = fd.solve_trajectories(
        field,
        x0,
        ts,
        rates,
        args_per_example=True,
        solver=diffrax.Kvaerno5(),
        max_steps=512,
    )
    assert ys.dtype == dtype
    for k in range(2):
        expected = exact(np.asarray(ts[k]), float(x0[k]), float(rates[k]))
        np.testing.assert_allclose(ys[k], expected, atol=tol)


@pytest.mark.parametrize(
    "ts, args, match",
    [
        (jnp.asarray([0.0, 1.0]), jnp.ones(3), "`args` must have one row for each"),
        (jnp.asarray([0.0, 1.0]), {"a": jnp.ones(2), "b": 1.0}, "`args` must have one"),
        (jnp.asarray([[0.0, 1.0]] * 3), jnp.ones(2), "`ts` must have one row for each"),
        (jnp.asarray([[0.0, 1.0], [0.5, 0.5]]), jnp.ones(2), "strictly rise"),
        (jnp.ones((2, 1)), jnp.ones(2), "at least two times"),
        (jnp.ones((2, 1, 3)), jnp.ones(2), "at least two times"),
    ],
)
def test_rows_that_do_not_go_together(ts, args, match):
    with pytest.raises(ValueError, match=match):
        fd.solve_trajectories(
            nonlinear_field, jnp.ones((2, 2)), ts, args, args_per_example=True
        )


def test_solves_that_fail():
    # x' = x^2 from 2 is infinite at 1/2.
    ts = jnp.asarray([0.0, 0.5, 1.0])
    solve = lambda **options: fd.solve_trajectories(
        lambda t, x, args: x**2, jnp.asarray([[0.1], [2.0]]), ts, **options
    )
    with pytest.raises(Exception, match="maximum number of solver steps"):
        solve()
    good, bad = solve(throw=False)
    assert_close(good[:, 0], 0.1 / (1 - 0.1 * ts), 1e-6)
    assert jnp.all(jnp.isnan(bad))


def test_solved_trajectories_keep_no_gradient():
    solve = lambda x: jnp.sum(
        fd.solve_trajectories(linear_map().velocity, x, jnp.asarray([0.0, 1.0]))
    )
    assert_close(jax.grad(solve)(jnp.ones((1, 2))), jnp.zeros((1, 2)))


@pytest.mark.parametrize(
    "ts, match",
    [
        (jnp.asarray([0.0]), "at least two times"),
        (jnp.asarray([0.0, 1.0, 0.5]), "strictly rise or strictly fall"),
        (np.asarray([0.0, 0.0]), "strictly rise or strictly fall"),
    ],
)
def test_bad_trajectory_times(ts, match):
    with pytest.raises(ValueError, match=match):
        fd.solve_trajectories(nonlinear_field, jnp.ones((1, 2)), ts)


def test_numpy_data_are_no_constants():
    data, labels = np.zeros((5, 2)), np.ones((5, 3))
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 4, args=labels)
    arrays = jax.tree_util.tree_leaves(eqx.filter(batches, eqx.is_array))
    assert sorted(leaf.shape for leaf in arrays) == [(5, 2), (5, 3)]


@pytest.mark.parametrize("ts", [np.asarray([0.0, 0.5, 1.0]), [0.0, 0.5, 1.0]])
def test_times_may_be_numpy_or_a_list(ts):
    batches = fd.data.TrajectoryBatches(ts, np.zeros((7, 3, 2)), 4)
    paths, _ = jax.jit(lambda key: batches(key))(jax.random.key(0))
    assert paths.ts.shape == (4, 3)
    s, t = fd.times.GridTimes(ts)(jax.random.key(0), 8)
    assert set(np.asarray(s)) <= {0.0, 0.5} and set(np.asarray(t)) <= {0.5, 1.0}


@pytest.mark.parametrize(
    "x0, options, message",
    [
        (jnp.ones((0, 2)), {}, "not empty"),
        (jnp.asarray(1.0), {}, "leading axis"),
        (jnp.ones((3, 2)), {"chunk_size": 0}, "`chunk_size` must be at least 1; got 0"),
    ],
)
def test_trajectories_of_what_is_no_batch(x0, options, message):
    with pytest.raises(ValueError, match=message):
        fd.solve_trajectories(nonlinear_field, x0, jnp.asarray([0.0, 1.0]), **options)


@pytest.mark.parametrize(
    "interpolant",
    [
        fd.paths.Interpolant(lambda t: 1 - t, lambda t: t),
        fd.paths.Interpolant(lambda t: 1 - t, lambda t: t, lambda t: t * (1 - t)),
        fd.LinearInterpolant(latent=lambda t: t * (1 - t)),
    ],
)
def test_interpolants_of_plain_functions(interpolant):
    source = fd.data.InterpolantBatches(interpolant, jnp.ones((5, 2)), 8)
    loss, _ = fd.objectives.batch_loss(
        fd.FlowMatching(), linear_map(), None, *source(jr.key(0)), key=jr.key(1)
    )
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    "objective",
    [
        fd.FlowMatching(),
        fd.LagrangianSelfDistillation(),
        fd.objectives.MeanFlow(),
        fd.objectives.ConsistencyTraining(),
        fd.TrajectoryMatching(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_single_states_are_no_data(objective):
    paths, _ = fd.data.StateBatches(jnp.ones((5, 2)), 8)(jr.key(0))
    with pytest.raises(TypeError, match="StatePath"):
        fd.objectives.batch_loss(objective, linear_map(), None, paths, key=jr.key(1))


def draw_states(key, n):
    return jr.normal(key, (n, 2))


def draw_args(key, n):
    return {"rate": jr.uniform(key, (n,))}


def test_states_with_rows_of_args():
    states, args = jnp.arange(10.0).reshape(5, 2), {"label": jnp.arange(5)}
    paths, labels = fd.data.StateBatches(states, 8, args)(jr.key(0))
    assert_close(paths.x, states[labels["label"]])


@pytest.mark.parametrize("states", [draw_states, jnp.ones((5, 2))])
def test_states_with_drawn_args(states):
    paths, args = fd.data.StateBatches(states, 2000, draw_args)(jr.key(0))
    assert paths.x.shape == (2000, 2) and args["rate"].shape == (2000,)
    assert stats.kstest(args["rate"], "uniform").pvalue > 1e-4
    if callable(states):
        assert stats.kstest(np.ravel(paths.x), "norm").pvalue > 1e-4
        correlation = np.corrcoef(paths.x[:, 0], args["rate"])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(2000)


def test_states_without_args():
    paths, args = fd.data.StateBatches(draw_states, 3)(jr.key(0))
    assert args is None and paths.x.shape == (3, 2)


def test_args_of_states_reach_the_teacher():
    source = fd.data.StateBatches(draw_states, 8, draw_args)
    teacher = lambda t, x, args: args["rate"] * x
    exact = fd.ODEFlowMap(teacher)
    objective = fd.LagrangianMapDistillation()
    loss, _ = fd.objectives.batch_loss(
        objective, exact, teacher, *source(jr.key(0)), key=jr.key(1)
    )
    assert float(loss) < 1e-10


def test_straight_lines_are_no_trajectories():
    source = fd.data.InterpolantBatches(fd.LinearInterpolant(), jnp.ones((5, 2)), 8)
    paths, _ = source(jr.key(0))
    with pytest.raises(TypeError, match="trajectories of the ODE; got a Interpolant"):
        fd.objectives.batch_loss(
            fd.TrajectoryMatching(), linear_map(), None, paths, key=jr.key(1)
        )


# --- rows that are not finite ---------------------------------------------------------


def spoilt(value=jnp.nan, rows=(1, 3)):
    """Five points, of which two are not finite."""
    return jnp.ones((5, 2)).at[jnp.asarray(rows), 1].set(value)


POOLS = {
    "trajectories": lambda bad: fd.data.TrajectoryBatches(
        jnp.asarray([0.0, 1.0]), jnp.stack([jnp.ones((5, 2)), bad], axis=1), 4
    ),
    "parameters": lambda bad: fd.data.TrajectoryBatches(
        jnp.asarray([0.0, 1.0]), jnp.ones((5, 2, 2)), 4, {"a": jnp.ones(5), "b": bad}
    ),
    "states": lambda bad: fd.data.StateBatches({"x": bad}, 4),
    "parameters of states": lambda bad: fd.data.StateBatches(jnp.ones((5, 2)), 4, bad),
    "points": lambda bad: fd.data.InterpolantBatches(fd.LinearInterpolant(), bad, 4),
    "conditions": lambda bad: fd.data.InterpolantBatches(
        fd.LinearInterpolant(), jnp.ones((5, 2)), 4, args=bad
    ),
    "initial states": lambda bad: fd.solve_trajectories(
        nonlinear_field, bad, jnp.asarray([0.0, 1.0])
    ),
    "parameters of solves": lambda bad: fd.solve_trajectories(
        nonlinear_field, bad, jnp.asarray([0.0, 1.0]), bad, args_per_example=True
    ),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_rows_that_are_not_finite_are_refused(pool, value):
    match = "2 of 5 (rows|examples) are not, the first of them (row|example) 1"
    with pytest.raises(ValueError, match=match):
        POOLS[pool](spoilt(value))


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_finite_rows(kind):
    labels = kind([10, 11, 12, 13, 14])
    (points, kept), dropped = fd.data.finite_rows((kind(spoilt()), labels))
    assert (kept.tolist(), dropped) == ([10, 12, 14], 2)
    assert points.tolist() == [[1.0, 1.0]] * 3 and type(points) is type(labels)
    assert fd.data.finite_rows({"x": points})[1] == 0


def test_pool_may_be_made_inside_jit():
    draw = lambda x: fd.data.StateBatches(x, 4)(jr.key(0))[0].x
    assert jnp.isnan(jax.jit(draw)(jnp.full((3, 1), jnp.nan))).all()


# --- trajectories of different lengths, and times of their own -------------------------

RAGGED = [np.linspace(0.0, 1.0, 4), np.linspace(0.0, 1.0, 6)]


@pytest.mark.parametrize(
    "make",
    [
        lambda ts, ys: fd.data.TrajectoryBatches(ts, ys, 4),
        lambda ts, ys: fd.data.TrajectoryBatches(np.linspace(0.0, 1.0, 4), ys, 4),
        lambda ts, ys: fd.data.TrajectoryBatches(
            np.asarray(ts, dtype=object), np.ones((2, 4, 2)), 4
        ),
        lambda ts, ys: fd.solve_trajectories(nonlinear_field, jnp.ones((2, 2)), ts),
    ],
)
def test_trajectories_of_different_lengths(make):
    ys = [np.ones((4, 2)), np.ones((6, 2))]
    with without_type_checks():
        with pytest.raises(ValueError, match=r"the same number of times; got.*\(4,\), "):
            make(RAGGED, ys)


OWN_TIMES = jnp.asarray([[0.0, 0.5], [0.5, 1.0]])


@pytest.mark.parametrize(
    "ts, objective, is_fine",
    [
        (OWN_TIMES, fd.TrajectoryMatching(), False),
        (OWN_TIMES, fd.objectives.Mixture([fd.TrajectoryMatching()], [1.0]), False),
        (jnp.asarray([0.0, 0.5]), fd.TrajectoryMatching(), False),
        (
            OWN_TIMES,
            fd.TrajectoryMatching(fd.times.GridTimes([0.0, 1.0]), positions=True),
            True,
        ),
        (
            jnp.asarray([0.0, 0.5]),
            fd.TrajectoryMatching(
                fd.times.OnInterval(fd.times.UniformTriangle(), 0.0, 0.5)
            ),
            True,
        ),
    ],
)
def test_trajectories_that_end_before_the_times_drawn(ts, objective, is_fine):
    batches = fd.data.TrajectoryBatches(ts, jnp.ones((2, 2, 2)), 4)
    train = lambda: fd.train.fit(
        fd.FlowMap(fd.nn.MLP(2, 4, 1, key=jr.key(0))),
        objective,
        batches,
        optax.sgd(0.1),
        num_steps=1,
        key=jr.key(1),
        progress=False,
    )
    if is_fine:
        assert int(train().skipped) == 0
    else:
        with pytest.raises(ValueError, match=r"draws times from.*g\(positions=True\)`"):
            train()


# --- refusals ---------------------------------------------------------------------------


def trajectory_batches(ts, args=None):
    return fd.data.TrajectoryBatches(ts, pool(), 2, args)


REFUSALS = {
    "empty batch": (
        lambda: interpolant_batches(batch_size=0),
        "`batch_size` must be at least 1",
    ),
    "no points": (lambda: interpolant_batches(data=jnp.zeros((0, 2))), "not empty"),
    "one number as data": (lambda: interpolant_batches(data=jnp.zeros(())), "not empty"),
    "leaves of other lengths": (
        lambda: interpolant_batches(data={"a": jnp.ones((3, 1)), "b": jnp.ones((4, 1))}),
        "common leading axis",
    ),
    "conditions of other points": (
        lambda: interpolant_batches(args=jnp.ones(9)),
        "common leading axis",
    ),
    "conditions of points that are drawn": (
        lambda: interpolant_batches(data=fd.data.checkerboard, args=LABELS),
        r"row for row.*use `ConditionedPoints\(points, args\)`",
    ),
    "conditions of states that are drawn": (
        lambda: fd.data.StateBatches(draw_states, 8, jnp.ones(5)),
        "row for row.*use a function that draws `args`",
    ),
    "conditions of other states": (
        lambda: fd.data.StateBatches(jnp.ones((5, 2)), 8, jnp.ones(4)),
        "common leading axis",
    ),
    "times of other states": (
        lambda: trajectory_batches(jnp.asarray([0.0, 1.0])),
        r"\(pool, times, ...\)",
    ),
    "times of fewer trajectories": (
        lambda: trajectory_batches(jnp.stack([TS, TS])),
        r"\(times,\) or \(pool, times\)",
    ),
    "times that fall": (lambda: trajectory_batches(TS[::-1]), "must rise"),
    "times of one trajectory that fall": (
        lambda: trajectory_batches(jnp.stack([TS, TS, TS[::-1], TS])),
        "must rise",
    ),
    "equal times": (
        lambda: trajectory_batches(TS.at[2].set(TS[1])),
        "must rise",
    ),
    "conditions of fewer trajectories": (
        lambda: trajectory_batches(TS, jnp.ones(3)),
        "common leading axis",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, match = REFUSALS[name]
    with pytest.raises(ValueError, match=match):
        make()


def test_a_field_of_another_shape_is_not_broadcast():
    # Diffrax would add one number to both entries.
    field = lambda t, x, args: -x[:1]
    with pytest.raises(ValueError, match=r"`vector_field` must return the shape.*\(2,\)"):
        fd.solve_trajectories(field, jnp.ones((3, 2)), jnp.linspace(0.0, 1.0, 3))
