"""Units of order one: there and back, exact maps in them, and one that is learned."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    finite_difference,
    linear_map,
    mlp_map,
    tight_solve,
    without_type_checks,
)

import flowdiffrax as fd

T0, T1 = 2.0, 7.0
# A spring in millimetres and metres a second, with a mass of grams.
X = {"q": jnp.asarray([800.0, -300.0]), "p": jnp.asarray(0.02)}


def units():
    return fd.Normalisation(
        {"q": jnp.asarray([100.0, -50.0]), "p": 0.01},
        {"q": jnp.asarray([400.0, 250.0]), "p": 0.03},
        T0,
        T1,
    )


def field(t, x, args):
    """Of two positions and a momentum, with a drive that knows the time."""
    rate = 1.0 if args is None else args
    push = 1e-2 * jnp.cos(t) - 2e-5 * jnp.sin(x["q"][0] / 300)
    return {"q": jnp.stack([1e4 * x["p"], -0.2 * x["q"][1]]) * rate, "p": push}


# --- there and back -----------------------------------------------------------------


def test_state_in_units():
    z = units().state(X)
    assert_close(z, {"q": jnp.asarray([1.75, -1.0]), "p": jnp.asarray(1 / 3)}, 1e-14)
    assert_close(units().undo_state(z), X, 1e-12)


def test_time_in_units():
    assert_close(units().time(3.0), jnp.asarray(0.2), 1e-15)
    assert_close(units().undo_time(0.2), jnp.asarray(3.0), 1e-15)


@pytest.mark.parametrize("t0, t1", [(0.1, 0.7), (-1e3, 1 / 3), (2.0, 7.0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ends_are_the_ends_to_the_last_bit(t0, t1, dtype):
    made = fd.Normalisation(0.0, 1.0, t0, t1)
    for end, unit in [(t0, 0), (t1, 1)]:
        end = jnp.asarray(end, dtype)
        assert made.time(end) == unit
        assert made.undo_time(jnp.asarray(unit, dtype)) == end


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_state_keeps_its_dtype(dtype):
    made = fd.Normalisation(jnp.asarray([1.0, 2.0]), jnp.asarray(3.0), T0, T1)
    x = jnp.asarray([4.0, 5.0], dtype)
    z = made.state(x)
    assert z.dtype == made.undo_state(z).dtype == dtype
    assert_close(z, jnp.ones(2, dtype))


def test_args_stay_unless_told():
    args = {"rate": jnp.asarray(3.0), "label": jnp.asarray(2)}
    assert units().args(args) is args and units().undo_args(args) is args
    mean, std = {"rate": 1.0, "label": 0.0}, {"rate": 4.0, "label": 1.0}
    made = fd.Normalisation(0.0, 1.0, T0, T1, mean, std)
    assert_close(made.args(args), {"rate": jnp.asarray(0.5), "label": jnp.asarray(2)})
    assert_close(made.undo_args(made.args(args)), args)


# --- statistics ---------------------------------------------------------------------


def test_statistics_of_a_pool():
    rng = np.random.default_rng(0)
    ys = {"a": 5 + 100 * rng.standard_normal((40, 6, 2)), "b": 0.1 * rng.random((40, 6))}
    ts = np.linspace(T0, T1, 6)
    made = fd.Normalisation.of(ts, ys)
    assert (made.t0, made.t1) == (T0, T1)
    times, zs = made.trajectories(ts, ys)
    assert_close(times, jnp.linspace(0, 1, 6), 1e-15)
    for z in zs.values():
        np.testing.assert_allclose(np.mean(z, (0, 1)), 0, atol=1e-12)
        np.testing.assert_allclose(np.std(z, (0, 1)), 1)


def test_statistics_with_own_times():
    ts = jnp.asarray([[2.0, 3.0, 4.0], [5.0, 6.5, 7.0]])
    made = fd.Normalisation.of(ts, jr.normal(jr.key(0), (2, 3, 4)))
    times, zs = made.trajectories(ts, jnp.zeros((2, 3, 4)))
    assert_close(times, (ts - 2) / 5, 1e-15)
    assert zs.shape == (2, 3, 4)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e20])
def test_statistics_of_what_does_not_vary(constant):
    ys = jr.normal(jr.key(0), (30, 7, 2)).at[..., 1].set(constant)
    made = fd.Normalisation.of(jnp.linspace(0, 1, 7), ys)
    assert made.std[1] == 1 and made.std[0] != 1
    assert np.isfinite(made.state(ys[0, 0])).all()


def test_statistics_of_args():
    args = {"rate": jnp.asarray([1.0, 3.0]), "label": jnp.asarray([4, 9])}
    made = fd.Normalisation.of(jnp.asarray([0.0, 1.0]), jnp.ones((2, 2)), args)
    expected = {"rate": jnp.asarray([-1.0, 1.0]), "label": args["label"]}
    assert_close(jax.vmap(made.args)(args), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_in_low_precision(dtype):
    ys = (100 + jr.normal(jr.key(0), (50, 20, 2))).astype(dtype)
    made = fd.Normalisation.of(jnp.linspace(0, 1, 20, dtype=jnp.float32), ys)
    assert made.mean.dtype == made.std.dtype == jnp.float32
    np.testing.assert_allclose(made.mean, np.mean(np.asarray(ys, float), (0, 1)), 1e-5)
    times, zs = made.trajectories(jnp.linspace(0, 1, 20, dtype=jnp.float32), ys)
    assert zs.dtype == dtype and times.dtype == jnp.float32


def test_statistics_by_channel():
    rng = np.random.default_rng(0)
    scales, means = np.asarray([0.1, 30.0]), np.asarray([5.0, -2.0])
    field = means + scales * rng.standard_normal((20, 5, 8, 6, 2))
    ys = {"field": jnp.asarray(field), "total": jnp.asarray(field[:, :, 0, 0, :])}
    made = fd.Normalisation.of(jnp.linspace(0, 1, 5), ys, by_channel=True)
    assert made.mean["field"].shape == made.std["field"].shape == (1, 1, 2)
    expected = field.reshape(-1, 2)
    np.testing.assert_allclose(made.mean["field"][0, 0], expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.std["field"][0, 0], expected.std(0), rtol=1e-12)
    # The units hold on any grid, and there and back.
    x = {"field": 3 + jnp.ones((4, 16, 2)), "total": jnp.ones(2)}
    assert_close(made.undo_state(made.state(x)), x, 1e-12)
    batch = jtu.tree_map(lambda leaf: jnp.stack([leaf, leaf]), x)
    with pytest.raises(ValueError, match="For a batch, use `jax.vmap`"):
        made.state(batch)


def test_map_in_units_by_channel():
    made = fd.Normalisation(jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 0.5]]), T0, T1)
    inner = fd.FlowMap(lambda s, t, x, args: jnp.ones_like(x))
    x = jnp.zeros((7, 2))
    moved = made.flow_map(inner)(2.0, 4.5, x)
    assert_close(moved, jnp.broadcast_to(jnp.asarray([1.5, 0.25]), (7, 2)), 1e-12)
    velocity = made.flow_map(inner).velocity(2.0, x)
    assert_close(velocity, jnp.broadcast_to(jnp.asarray([0.6, 0.1]), (7, 2)), 1e-12)


def test_numbers_have_no_channels():
    with pytest.raises(ValueError, match="`by_channel` is for fields"):
        fd.Normalisation.of(jnp.linspace(0, 1, 3), jnp.ones((2, 3)), by_channel=True)


# --- the same ODE, the same map -----------------------------------------------------


@pytest.mark.parametrize("s, t", [(2.5, 6.0), (6.5, 2.0)])
def test_field_in_units_has_the_same_solutions(s, t):
    # y' = -(1 + 2t) y is known: y exp(-(t - s) - (t^2 - s^2)).
    made = fd.Normalisation(jnp.asarray(3.0), jnp.asarray(20.0), T0, T1)
    decay = made.vector_field(lambda t, x, args: -args * (1 + 2 * t) * x)
    start = made.state(jnp.asarray(5.0))
    solved = tight_solve(decay, made.time(s), made.time(t), start, 0.1).ys[0]
    expected = 5 * np.exp(-0.1 * ((t - s) + (t**2 - s**2)))
    assert_close(made.undo_state(solved), jnp.asarray(expected), 1e-8, 1e-8)


def exact_map():
    return units().flow_map(
        fd.ODEFlowMap(units().vector_field(field), rtol=1e-11, atol=1e-11)
    )


@pytest.fixture(scope="module")
def compiled():
    flow_map = exact_map()

    @jax.jit
    def made(s, t, x, args):
        return (
            flow_map(s, t, x, args),
            flow_map.average_velocity(s, t, x, args),
            fd.lagrangian_residual(flow_map, field, s, t, x, args),
        )

    return made


@pytest.mark.parametrize("s, t", [(2.5, 6.0), (6.5, 2.0), (4.0, 4.0)])
def test_exact_map_in_the_users_units(compiled, s, t):
    end, slope, residual = compiled(s, t, X, 0.9)
    assert_close(residual, jtu.tree_map(jnp.zeros_like, X), 1e-6)
    if s == t:
        assert_close(end, X, 0, 0)
        assert_close(slope, field(s, X, 0.9), 1e-9)
    else:
        expected = jtu.tree_map(lambda y: y[0], tight_solve(field, s, t, X, 0.9).ys)
        assert_close(end, expected, 1e-9, 1e-8)
        chord = jtu.tree_map(lambda y, x: (y - x) / (t - s), expected, X)
        assert_close(slope, chord, 1e-9, 1e-7)


def test_velocity_in_the_users_units():
    assert_close(exact_map().velocity(3.3, X, 0.9), field(3.3, X, 0.9), 1e-12)


def test_args_in_units_reach_field_and_map():
    made = fd.Normalisation(jnp.ones(2), jnp.full(2, 3.0), T0, T1, 5.0, 2.0)
    seen = []
    b = lambda t, x, args: seen.append(float(args)) or x
    assert_close(made.vector_field(b)(0.2, jnp.zeros(2), 1.5), 5 / 3 * jnp.ones(2))
    net = lambda s, t, x, args: seen.append(float(args)) or x
    flow_map = made.flow_map(fd.FlowMap(net))
    flow_map(2.0, 3.0, jnp.ones(2), 8.0)
    flow_map.velocity(2.0, jnp.ones(2), 8.0)
    flow_map.average_velocity(2.0, 3.0, jnp.ones(2), 8.0)
    assert seen == [8.0, 1.5, 1.5, 1.5]


def test_velocities_of_an_inconsistent_map():
    made = fd.Normalisation(jnp.asarray([1.0, -2.0]), jnp.asarray([3.0, 0.1]), T0, T1)
    flow_map, x = made.flow_map(mlp_map()), jnp.asarray([2.0, -2.05])
    chord = (flow_map(2.5, 6.0, x) - x) / 3.5
    assert_close(flow_map.average_velocity(2.5, 6.0, x), chord, 1e-12)
    value = lambda t: flow_map(2.5, t, x)
    slope = finite_difference(value, jnp.asarray(2.5), jnp.ones(()))
    assert_close(flow_map.velocity(2.5, x), slope, 1e-8, 1e-8)


def test_hypersolver_in_units_is_the_step_in_the_users():
    # Runge-Kutta steps do not mind a change of units.
    net = lambda s, t, z, args: jtu.tree_map(jnp.zeros_like, z)
    inner = fd.HypersolverFlowMap(units().vector_field(field), net, diffrax.Bosh3())
    flow_map = units().flow_map(inner)
    solver, term = diffrax.Bosh3(), diffrax.ODETerm(field)
    for s, t in [(2.5, 3.1), (6.5, 6.0)]:
        carry = solver.init(term, s, t, X, 0.9)
        expected, *_ = solver.step(term, s, t, X, 0.9, carry, False)
        assert_close(flow_map(s, t, X, 0.9), expected, 1e-12, 1e-12)
    assert_close(flow_map.velocity(3.3, X, 0.9), field(3.3, X, 0.9), 1e-12)


def test_field_in_units_is_a_teacher():
    # A linear system in units is one too.
    matrix, offset, mean, scale = np.asarray([[0.2, -1.1], [0.7, -0.4]]), 0.3, 2.0, 50.0
    made = fd.Normalisation(jnp.full(2, mean), jnp.full(2, scale), T0, T1)
    shift = (matrix @ np.full(2, mean) + offset) / scale
    exact = fd.exact.LinearFlowMap(5 * matrix, 5 * shift)
    teacher = made.vector_field(fd.exact.LinearFlowMap(matrix, [offset] * 2).velocity)
    source = fd.data.StateBatches(jr.normal(jr.key(0), (8, 2)), 8)
    loss = eqx.filter_jit(
        lambda exact, teacher: fd.objectives.batch_loss(
            fd.LagrangianMapDistillation(),
            exact,
            teacher,
            *source(jr.key(1)),
            key=jr.key(2),
        )[0]
    )
    assert float(loss(exact, teacher)) < 1e-18
    wrong = fd.exact.LinearFlowMap(5 * matrix, shift)
    assert float(loss(wrong, teacher)) > 1e-6


@pytest.mark.parametrize(
    "inner, time_range",
    [
        (fd.FlowMap(lambda s, t, x, args: x), (2.0, 7.0)),
        (fd.FlowMap(lambda s, t, x, args: x, time_range=(0.0, 0.4)), (2.0, 4.0)),
        (fd.AutonomousFlowMap(linear_map()), None),
        (fd.ComposedFlowMap(fd.AutonomousFlowMap(linear_map()), 2), None),
    ],
)
def test_time_range(inner, time_range):
    flow_map = fd.Normalisation(jnp.zeros(2), 1.0, T0, T1).flow_map(inner)
    assert flow_map.time_range == time_range
    if time_range is None:
        assert np.isfinite(flow_map(1.5, 30.0, jnp.ones(2))).all()
    else:
        with pytest.raises(ValueError, match="leaves the time range"):
            flow_map(1.5, 3.0, jnp.ones(2))


def test_map_keeps_float32_and_short_jumps():
    made = fd.Normalisation(jnp.asarray([1e3, 1e3]), jnp.asarray([0.5, 0.5]), T0, T1)
    flow_map = made.flow_map(fd.FlowMap(lambda s, t, z, args: jnp.ones_like(z)))
    x = jnp.asarray([1000.25, 999.5], jnp.float32)
    assert flow_map(3.0, 3.0, x).dtype == jnp.float32
    assert_close(flow_map(3.0, 3.0, x), x, 0, 0)
    average = flow_map.average_velocity(3.0, 3.0 + 1e-6, x)
    assert_close(average, jnp.full(2, 0.1, jnp.float32), 1e-7)


def test_units_are_held_fixed():
    flow_map = units().flow_map(mlp_map())
    assert_close(flow_map.normalisation.mean, units().mean, 0, 0)
    trained = jtu.tree_leaves(eqx.filter(flow_map, eqx.is_inexact_array))
    inner = jtu.tree_leaves(eqx.filter(mlp_map(), eqx.is_inexact_array))
    assert len(trained) == len(inner)


# --- learned ------------------------------------------------------------------------


def oscillator(t, x, args):
    """A driven oscillator in badly chosen units; `args` is the square of its rate."""
    del t
    return {"q": 1e5 * x["p"], "p": -1e-5 * args * x["q"]}


@pytest.fixture(scope="module")
def learned():
    key_x, key_args, key_net = jr.split(jr.key(0), 3)
    q, p = jr.normal(key_x, (2, 256))
    x0 = {"q": 1e3 * q + 400, "p": 1e-2 * p}
    args = jr.uniform(key_args, (256,), minval=0.4, maxval=0.8)
    ts = jnp.linspace(T0, T1, 11)
    ys = fd.solve_trajectories(oscillator, x0, ts, args, args_per_example=True)
    made = fd.Normalisation.of(ts, ys, args)
    times, zs = made.trajectories(ts, ys)
    pool = fd.data.TrajectoryBatches(times, zs, 128, jax.vmap(made.args)(args))
    settings = {"frequencies": (), "args_size": 1, "key": key_net}
    net = fd.nn.Ravelled(fd.nn.MLP(2, 32, 2, **settings))
    state = fd.train.fit(
        fd.AutonomousFlowMap(fd.FlowMap(net)),
        fd.TrajectoryMatching(fd.times.GridTimes(times, both_directions=True)),
        pool,
        optax.adam(optax.cosine_decay_schedule(1e-2, 500)),
        num_steps=500,
        key=jr.key(1),
        ema_decay=0.9,
        progress=False,
    )
    return made, made.flow_map(state.ema_map)


@pytest.mark.slow
def test_learned_map_in_a_solve(learned):
    made, flow_map = learned
    x0 = {"q": jnp.asarray([900.0, -500.0]), "p": jnp.asarray([-0.004, 0.012])}
    args = jnp.asarray([0.5, 0.7])
    term, learned_solver = diffrax.ODETerm(oscillator), fd.FlowMapSolver(flow_map)

    @jax.jit
    @jax.vmap
    def both(ts, x0, args):
        t0, t1 = ts[0], ts[-1]
        saveat = diffrax.SaveAt(ts=ts)
        settings = {"args": args, "saveat": saveat}
        jumps = diffrax.diffeqsolve(
            term, learned_solver, t0, t1, (t1 - t0) / 5, x0, **settings
        )
        exact = tight_solve(oscillator, t0, t1, x0, args, saveat=saveat)
        return jumps.ys, exact.ys

    # One row goes forwards, one backwards.
    there = jnp.linspace(T0, T1, 6)
    made_ys, exact_ys = both(jnp.stack([there, there[::-1]]), x0, args)
    for name, std in made.std.items():
        error = np.sqrt(np.mean((made_ys[name] - exact_ys[name]) ** 2, axis=1)) / std
        spread = np.std(exact_ys[name], axis=1) / std
        assert (error < 0.15).all() and (spread > 0.4).all(), name


# --- refusals -----------------------------------------------------------------------

TWO, POOL = jnp.arange(2.0), jnp.ones((2, 2))


@pytest.mark.parametrize(
    "act, error, match",
    [
        (lambda: fd.Normalisation(0.0, 1.0, 7.0, 2.0), ValueError, "`t0` must be less"),
        (lambda: fd.Normalisation(0.0, 0.0), ValueError, "`std` must be positive"),
        (
            lambda: fd.Normalisation(0.0, {"a": 1.0}),
            ValueError,
            "`mean` and `std` differ",
        ),
        (
            lambda: fd.Normalisation(0.0, 1.0, args_mean=1.0),
            ValueError,
            "`args_mean` and `args_std` differ",
        ),
        (
            lambda: fd.Normalisation(0.0, 1.0, 0, 1, 1.0, -1.0),
            ValueError,
            "`args_std` must be positive",
        ),
        (lambda: units().state(jnp.ones(2)), ValueError, "state differs in structure"),
        (
            lambda: units().state({"q": jnp.ones((5, 2)), "p": jnp.ones(5)}),
            ValueError,
            r"normalisation, \(2,\); got \(5, 2\).*`jax.vmap`",
        ),
        (
            lambda: fd.Normalisation.of(jnp.ones(3), jnp.ones((2, 4))),
            ValueError,
            "with times",
        ),
        (
            lambda: units().trajectories(jnp.ones(3), jnp.ones((2, 4))),
            ValueError,
            "with times",
        ),
        (lambda: fd.Normalisation.of(jnp.ones(2), POOL), ValueError, "`t0` must be less"),
        (lambda: fd.Normalisation.of(TWO, jnp.nan * POOL), ValueError, "must be finite"),
        (
            lambda: fd.Normalisation.of(TWO, POOL, jnp.ones(3)),
            ValueError,
            "common leading axis",
        ),
        (lambda: fd.Normalisation.of(TWO, POOL.astype(int)), TypeError, "floating-point"),
        (
            lambda: fd.Normalisation(0.0, 1.0).vector_field(3),
            TypeError,
            "must be a callable",
        ),
        (
            lambda: fd.Normalisation(0.0, 1.0).vector_field(lambda t, x, args: x[:1])(
                0.0, jnp.ones(2)
            ),
            ValueError,
            "`vector_field` must return the shape",
        ),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()
