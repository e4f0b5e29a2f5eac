"""`sample`, the scan fast path, equals the solver and a Python loop."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    RUN_TIME_ERROR,
    assert_close,
    finite_difference,
    gaussian_map,
    mlp_map,
    tight_solve,
    unroll,
    without_type_checks,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
ARGS = jnp.asarray([0.3, 0.7])
GRIDS = [(0.1, 0.15, 0.6, 0.9), (0.85, 0.4, 0.3, 0.2)]


@pytest.mark.parametrize("ts", GRIDS)
def test_sample_equals_the_solver(ts):
    flow_map, ts = mlp_map(), jnp.asarray(ts)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(flow_map.velocity),
        fd.FlowMapSolver(flow_map),
        ts[0],
        ts[-1],
        None,
        X,
        args=ARGS,
        stepsize_controller=diffrax.StepTo(ts),
    )
    assert_close(fd.sample(flow_map, X, ts, ARGS), sol.ys[0], 1e-14, 1e-14)


@pytest.mark.parametrize("ts", GRIDS)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_sample_equals_loop(ts, kind):
    y = fd.sample(mlp_map(), X, kind(ts), ARGS)
    assert_close(y, unroll(mlp_map(), ts, X, ARGS), 1e-14, 1e-14)


@pytest.mark.parametrize("turns", [2, True])
def test_unrolling_changes_nothing(turns):
    y = fd.sample(mlp_map(), X, jnp.asarray(GRIDS[1]), ARGS, unroll=turns)
    assert_close(y, unroll(mlp_map(), GRIDS[1], X, ARGS), 1e-14, 1e-14)


@pytest.mark.parametrize("ts", GRIDS)
def test_roll_out_has_all_states(ts):
    xs = fd.solvers.roll_out(mlp_map(), X, jnp.asarray(ts), ARGS)
    ends = [unroll(mlp_map(), ts[: k + 1], X, ARGS) for k in range(len(ts))]
    assert_close(xs, jnp.stack(ends), 1e-14, 1e-14)


def test_roll_out_says_where_it_blows_up():
    # Ten times as large with each jump, in float32.
    grow = lambda s, t, x, args: args * x
    run = lambda x, args, **how: fd.solvers.roll_out(grow, x, 50, args, **how)
    x = jnp.asarray([1.0, 2.0], jnp.float32)
    rates = jnp.asarray([1.0, 10.0, 100.0], jnp.float32)
    with pytest.raises(RUN_TIME_ERROR, match="blew up: jump 39 of 50 returned a state"):
        jax.block_until_ready(jax.jit(run)(x, rates[1]))
    short = lambda x, args: fd.solvers.roll_out(grow, x, 39, args)
    with pytest.raises(RUN_TIME_ERROR, match="blew up: jump 39 of 39 returned a state"):
        jax.block_until_ready(jax.jit(short)(x, rates[1]))
    with pytest.raises(RUN_TIME_ERROR, match="blew up: jump"):
        jax.block_until_ready(jax.jit(jax.vmap(run, (None, 0)))(x, rates))
    xs = jax.vmap(lambda args: run(x, args, throw=False))(rates)
    assert fd.metrics.first_bad_jump(xs).tolist() == [0, 39, 20]
    assert np.isfinite(xs[0]).all() and np.isinf(xs[1, -1]).all()


@pytest.mark.parametrize("ts", GRIDS)
def test_sample_of_an_exact_map_equals_diffrax(ts):
    exact = gaussian_map()
    truth = tight_solve(exact.velocity, ts[0], ts[-1], X).ys[0]
    assert_close(fd.sample(exact, X, jnp.asarray(ts)), truth, 1e-9, 1e-9)


@pytest.mark.parametrize("time_range", [None, (-2.0, -1.0)])
def test_a_number_of_jumps_spans_the_range(time_range):
    flow_map = fd.FlowMap(mlp_map().net, time_range)
    low, high = time_range or (0.0, 1.0)
    for number in (1, np.int64(3)):
        truth = unroll(flow_map, np.linspace(low, high, int(number) + 1), X)
        assert_close(fd.sample(flow_map, X, number), truth, 1e-14, 1e-14)


def test_plain_function_has_the_unit_range():
    y = fd.sample(lambda s, t, x, args: x + (t - s) * args, X, 3, ARGS)
    assert_close(y, X + ARGS)


def test_state_keeps_its_dtypes():
    # Also with x64 on, and with a grid of another precision.
    flow_map = lambda s, t, x, args: {
        name: leaf + (t - s).astype(leaf.dtype) * leaf for name, leaf in x.items()
    }
    state = {
        "single": X.astype(jnp.float32),
        "half": X.astype(jnp.bfloat16),
        "complex": (X.astype(complex) * 1j).astype(jnp.complex64),
    }
    for ts in (1, np.asarray([0.0, 1.0]), jnp.asarray([0, 1])):
        y = fd.sample(flow_map, state, ts)
        for name, leaf in state.items():
            assert y[name].dtype == leaf.dtype
            assert_close(y[name].astype(complex), 2 * leaf.astype(complex), 1e-6, 1e-6)


@pytest.mark.parametrize(
    "state, times", [("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2]
)
def test_times_come_in_the_precision_of_the_state(state, times):
    seen = []
    flow_map = lambda s, t, x, args: seen.extend([s.dtype, t.dtype]) or x
    for ts in (2, jnp.linspace(0, 1, 3), jnp.linspace(0, 1, 3, dtype=jnp.float32)):
        fd.sample(flow_map, X.astype(state), ts)
    assert len(seen) > 0 and all(dtype == times for dtype in seen)


def test_args_of_any_kind():
    args = {"shift": ARGS, "fn": jnp.tanh, "none": None, "name": "a", "key": jr.key(0)}
    flow_map = lambda s, t, x, args: x + (t - s) * args["fn"](args["shift"])
    y = fd.sample(flow_map, {"x": X}["x"], 2, args)
    assert_close(y, X + jnp.tanh(ARGS))


def test_vmap_over_states_grids_and_args():
    flow_map = mlp_map()
    x, args, ts = jnp.stack([X, 2 * X]), jnp.stack([ARGS, -ARGS]), jnp.asarray(GRIDS)
    ys = jax.vmap(lambda x, ts, args: fd.sample(flow_map, x, ts, args))(x, ts, args)
    for k in range(2):
        assert_close(ys[k], unroll(flow_map, ts[k], x[k], args[k]), 1e-14, 1e-14)


def test_derivatives_equal_the_loop():
    params, static = eqx.partition(mlp_map(), eqx.is_inexact_array)
    inputs = (params, X, jnp.asarray(GRIDS[1]), ARGS)

    def value(run, inputs):
        params, x, ts, args = inputs
        return jnp.sum(run(eqx.combine(params, static), x, ts, args) ** 2)

    sampled = jax.jit(lambda inputs: value(fd.sample, inputs))
    looped = lambda inputs: value(lambda m, x, ts, args: unroll(m, ts, x, args), inputs)
    truth = jax.jit(jax.grad(looped))(inputs)
    assert_close(jax.jit(jax.grad(sampled))(inputs), truth, 1e-12, 1e-12)
    _, derivative = jax.jvp(sampled, (inputs,), (truth,))
    assert_close(derivative, finite_difference(sampled, inputs, truth), 1e-7, 1e-7)


class Traces:
    count = 0


def test_one_compilation_for_all_values():
    traces = Traces()

    @eqx.filter_jit
    def run(net, x, ts, args):
        def flow_map(s, t, x, args):
            traces.count += 1
            return fd.FlowMap(net)(s, t, x, args)

        return fd.sample(flow_map, x, ts, args)

    run(mlp_map(0).net, X, jnp.asarray(GRIDS[0]), ARGS)
    first = traces.count
    y = run(mlp_map(1).net, 2 * X, jnp.asarray(GRIDS[1]), -ARGS)
    assert traces.count == first == 1
    assert_close(y, unroll(mlp_map(1), GRIDS[1], 2 * X, -ARGS))


# Refusals


@pytest.mark.parametrize(
    "ts", [[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.6, 0.5], [0.5, 0.0, 1.0]]
)
@pytest.mark.parametrize("jit", [False, True])
def test_grids_that_turn_are_refused(ts, jit):
    run = lambda x: fd.sample(mlp_map(), x, np.asarray(ts))
    with pytest.raises(ValueError, match="strictly rise or strictly fall"):
        (jax.jit(run) if jit else run)(X)


@pytest.mark.parametrize("ts", [(0.5, 1.2), (-0.1, 0.5), (1.2, 0.5)])
def test_times_outside_the_range_are_refused(ts):
    exact, ts = gaussian_map(), jnp.asarray(ts)
    with pytest.raises(ValueError, match="time range of the flow map"):
        fd.sample(exact, X, ts)
    with pytest.raises(ValueError, match="time range of the flow map"):
        jax.jit(lambda x: fd.sample(exact, x, np.asarray(ts)))(X)
    with pytest.raises(RuntimeError, match="time range of the flow map"):
        jax.block_until_ready(jax.jit(lambda ts: fd.sample(exact, X, ts))(ts))


def test_constant_state_within_jit():
    ys = jax.jit(lambda ts: fd.sample(mlp_map(), X, ts))(jnp.asarray(GRIDS[0]))
    assert_close(ys, unroll(mlp_map(), GRIDS[0], X), 1e-14, 1e-14)


# --- restarts -------------------------------------------------------------------------


def restarted(times, x0, interpolant=None, **options):
    """Of a batch, whose base is the one of `gaussian_map`."""
    interpolant = fd.LinearInterpolant() if interpolant is None else interpolant

    def base(key, x):
        return jnp.asarray([0.1, -0.2]) + 1.3 * jr.normal(key, x.shape)

    def one(x, key):
        return fd.sample_with_restarts(
            gaussian_map(interpolant),
            interpolant,
            x,
            times,
            base=base,
            key=key,
            **options,
        )

    times = jnp.asarray(times, float)
    return jax.vmap(one)(x0, jr.split(jr.key(7), len(x0)))


def from_the_base():
    return 1.3 * jr.normal(jr.key(1), (40_000, 2)) + jnp.asarray([[0.1, -0.2]])


@pytest.mark.parametrize("unroll", [1, True])
@pytest.mark.parametrize("times", [[0.0], [0.3, 0.8], [0.9, 0.2, 0.5]])
def test_restarts_keep_the_law_of_the_data(times, unroll):
    x1 = restarted(times, from_the_base(), unroll=unroll)
    # Standard errors are a three-hundredth and less.
    np.testing.assert_allclose(x1.mean(axis=0), [0.7, 0.5], atol=0.012)
    np.testing.assert_allclose(x1.std(axis=0), [0.6, 0.4], atol=0.009)


def test_args_reach_every_jump_of_restarts():
    # Jumps to the data that forget their start: the last one's end is left.
    flow_map = lambda s, t, x, args: args["scale"] * (t - s) * jnp.ones_like(x)
    run = lambda times: fd.sample_with_restarts(
        flow_map,
        fd.LinearInterpolant(),
        X,
        jnp.asarray(times, float),
        {"scale": jnp.asarray(3.0)},
        base=fd.data.GaussianBase(),
        key=jr.key(0),
    )
    assert_close(run([]), jnp.full(2, 3.0))
    assert_close(run([0.75]), jnp.full(2, 0.75))


def test_a_restart_at_the_base_forgets_the_start():
    x1 = restarted([0.0], jnp.full((40_000, 2), 50.0))
    np.testing.assert_allclose(x1.mean(axis=0), [0.7, 0.5], atol=0.012)
    np.testing.assert_allclose(x1.std(axis=0), [0.6, 0.4], atol=0.009)


def test_a_restart_near_the_data_keeps_the_sample():
    start = jr.normal(jr.key(1), (100, 2))
    near = restarted([1 - 1e-6], start)
    np.testing.assert_allclose(near, restarted([], start), atol=1e-5)


def test_restarts_draw_the_latent():
    interpolant = fd.LinearInterpolant(latent=fd.paths.BrownianLatent(0.5))
    x1 = restarted([0.3, 0.8], from_the_base(), interpolant=interpolant)
    np.testing.assert_allclose(x1.mean(axis=0), [0.7, 0.5], atol=0.012)
    np.testing.assert_allclose(x1.std(axis=0), [0.6, 0.4], atol=0.009)


# --- refusals ---------------------------------------------------------------------------


def jump_by(ts, flow_map=mlp_map(), x=X):
    return fd.sample(flow_map, x, ts)


REFUSALS = {
    "no jumps": (lambda: jump_by(0), ValueError, "must be at least 1; got 0"),
    "no jumps, in NumPy": (lambda: jump_by(np.int64(0)), ValueError, "at least 1; got 0"),
    "one time": (lambda: jump_by(jnp.asarray([0.5])), ValueError, "at least two times"),
    "two axes of times": (
        lambda: jump_by(jnp.asarray([[0.0, 1.0]])),
        ValueError,
        r"at least two times; got shape \(1, 2\)",
    ),
    "a time as a number of jumps": (
        lambda: jump_by(0.5),
        ValueError,
        "at least two times; got 0.5",
    ),
    "a time that is not a number": (
        lambda: jump_by(jnp.asarray([0.0, jnp.nan, 1.0])),
        ValueError,
        "strictly rise or strictly fall",
    ),
    "state that is not finite": (
        lambda: jump_by(1, x={"x": X, "y": X.at[0].set(jnp.inf)}),
        ValueError,
        "not finite",
    ),
    "map to another structure": (
        lambda: jump_by(1, lambda s, t, x, args: (x,)),
        ValueError,
        "structure of the state",
    ),
    "map to another shape": (
        lambda: jump_by(1, lambda s, t, x, args: x[:1]),
        ValueError,
        "shape of the state",
    ),
    "map to another dtype": (
        lambda: jump_by(1, lambda s, t, x, args: x.astype(jnp.float32)),
        TypeError,
        "got float32",
    ),
    "restart at the data": (
        lambda: restarted([1.0], jnp.zeros((3, 2))),
        ValueError,
        "`times` must be",
    ),
    "restart at a time that is not a number": (
        lambda: restarted([0.5, jnp.nan], jnp.zeros((3, 2))),
        ValueError,
        "`times` must be",
    ),
    "restart at one time": (
        lambda: restarted(0.5, jnp.zeros((3, 2))),
        ValueError,
        "`times` must be an array",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, error, match = REFUSALS[name]
    with without_type_checks(), pytest.raises(error, match=match):
        make()
