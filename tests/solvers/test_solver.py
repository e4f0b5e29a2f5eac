"""`FlowMapSolver` in `diffeqsolve`: steps, times, states, transforms and refusals."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    RUN_TIME_ERROR,
    assert_close,
    gaussian_map,
    jump_solve,
    mlp_map,
    nonlinear_field,
    tight_solve,
    unroll,
    without_type_checks,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
ARGS = jnp.asarray([0.3, 0.7])
SPANS = [(0.1, 0.9), (0.85, 0.2)]


# Steps


@pytest.mark.parametrize("t0, t1", SPANS)
@pytest.mark.parametrize("steps", [1, 5])
def test_exact_map_equals_diffrax(t0, t1, steps):
    exact = gaussian_map()
    truth = tight_solve(exact.velocity, t0, t1, X)
    assert_close(jump_solve(exact, t0, t1, X, steps=steps).ys, truth.ys, 1e-9, 1e-9)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_integrated_map_equals_diffrax(t0, t1):
    flow_map = fd.ODEFlowMap(nonlinear_field, rtol=1e-12, atol=1e-12)
    truth = tight_solve(nonlinear_field, t0, t1, X)
    assert_close(jump_solve(flow_map, t0, t1, X, steps=2).ys, truth.ys, 1e-9, 1e-9)


@pytest.mark.parametrize("t0, t1, dt0", [(0.1, 0.9, 0.3), (0.85, 0.2, -0.25)])
def test_constant_steps_equal_loop(t0, t1, dt0):
    # The step does not divide the span: Diffrax's own grid is the reference.
    flow_map = mlp_map()
    run = lambda solver, saveat: diffrax.diffeqsolve(
        diffrax.ODETerm(flow_map.velocity), solver, t0, t1, dt0, X, ARGS, saveat=saveat
    )
    ts = run(diffrax.Euler(), diffrax.SaveAt(t0=True, steps=True)).ts[:4]
    sol = run(fd.FlowMapSolver(flow_map), diffrax.SaveAt(t1=True))
    assert_close(sol.ys[0], unroll(flow_map, ts, X, ARGS), 1e-13, 1e-13)
    assert sol.stats["num_steps"] == sol.stats["num_accepted_steps"] == 3


@pytest.mark.parametrize("ts", [(0.1, 0.15, 0.6, 0.9), (0.85, 0.4, 0.3, 0.2)])
def test_step_to_equals_loop(ts):
    flow_map = mlp_map()
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(nonlinear_field),
        fd.FlowMapSolver(flow_map),
        ts[0],
        ts[-1],
        None,
        X,
        args=ARGS,
        stepsize_controller=diffrax.StepTo(jnp.asarray(ts)),
    )
    assert_close(sol.ys[0], unroll(flow_map, ts, X, ARGS), 1e-13, 1e-13)


def test_empty_span_returns_the_state():
    sol = jump_solve(mlp_map(), 0.4, 0.4, X)
    assert_close(sol.ys[0], X, 0, 0)
    assert sol.stats["num_steps"] == 0


@pytest.mark.parametrize("t0, t1", SPANS)
def test_half_solver_takes_half_jumps(t0, t1):
    flow_map = mlp_map()
    solver = diffrax.HalfSolver(fd.FlowMapSolver(flow_map))
    sol = jump_solve(flow_map, t0, t1, X, steps=2, solver=solver)
    ts = np.linspace(t0, t1, 5)
    assert_close(sol.ys[0], unroll(flow_map, ts, X), 1e-13, 1e-13)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_manual_stepping_equals_loop(t0, t1):
    flow_map = mlp_map()
    solver = fd.FlowMapSolver(flow_map)
    term = diffrax.ODETerm(nonlinear_field)
    ts = np.linspace(t0, t1, 4)
    state = solver.init(term, ts[0], ts[1], X, None)
    y = X
    for k in range(3):
        y, error, dense_info, state, result = solver.step(
            term, ts[k], ts[k + 1], y, None, state, made_jump=False
        )
        assert error is None
        assert result == diffrax.RESULTS.successful
    assert_close(y, unroll(flow_map, ts, X), 1e-14, 1e-14)
    local = solver.interpolation_cls(t0=ts[2], t1=ts[3], **dense_info)
    assert_close(local.evaluate(ts[3]), y, 1e-12, 1e-12)


def test_func_is_the_teacher():
    term = diffrax.ODETerm(nonlinear_field)
    solver = fd.FlowMapSolver(gaussian_map())
    assert_close(solver.func(term, 0.3, X, None), nonlinear_field(0.3, X, None))


@pytest.mark.parametrize("t0, t1", SPANS)
def test_max_steps(t0, t1):
    flow_map = mlp_map()
    run = lambda throw: jump_solve(flow_map, t0, t1, X, max_steps=2, throw=throw)
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        run(True)
    sol = run(False)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert sol.stats["max_steps"] == sol.stats["num_steps"] == 2
    ts = np.linspace(t0, t1, 5)[:3]
    assert_close(sol.ts[0], ts[-1])
    assert_close(sol.ys[0], unroll(flow_map, ts, X))


def test_progress_meter(capfd):
    meter = diffrax.TextProgressMeter(minimum_increase=0.01)
    jax.block_until_ready(jump_solve(mlp_map(), 0.1, 0.9, X, progress_meter=meter))
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert "25.00%" in printed and "100.00%" in printed


def test_state_of_a_solve_continues_it():
    flow_map = mlp_map()
    saveat = diffrax.SaveAt(t1=True, solver_state=True, made_jump=True)
    first = jump_solve(flow_map, 0.1, 0.5, X, steps=2, saveat=saveat)
    second = jump_solve(
        flow_map,
        0.5,
        0.9,
        first.ys[0],
        steps=2,
        solver_state=first.solver_state,
        made_jump=first.made_jump,
    )
    assert_close(second.ys, jump_solve(flow_map, 0.1, 0.9, X, steps=4).ys)


# Times


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "time, dtype",
    [
        (int, jnp.float64),
        slow(float, jnp.float64),
        slow(np.float64, jnp.float64),
        (lambda t: jnp.asarray(t, jnp.float16), jnp.float32),
        slow(lambda t: jnp.asarray(t, jnp.bfloat16), jnp.float32),
        (lambda t: jnp.asarray(t, jnp.float32), jnp.float32),
        (lambda t: jnp.asarray(t, jnp.float64), jnp.float64),
        (lambda t: jnp.asarray(t, jnp.int32), jnp.float64),
    ],
    ids=["int", "float", "numpy", "f16", "bf16", "f32", "f64", "i32"],
)
def test_time_dtypes(time, dtype):
    # Diffrax promotes the state to the times; the map must see a state of one dtype.
    exact = gaussian_map()
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(exact.velocity),
        fd.FlowMapSolver(exact),
        time(1),
        time(0),
        time(-1),
        X.astype(jnp.float32),
        saveat=diffrax.SaveAt(t1=True, dense=True),
    )
    assert sol.ys.dtype == dtype
    assert_close(sol.ys[0].astype(float), exact(1.0, 0.0, X), 1e-6, 1e-6)
    middle = sol.evaluate(time(1) / 2 if dtype == jnp.float32 else 0.5)
    assert_close(middle.astype(float), exact(1.0, 0.5, X), 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_state_in_half_precision(dtype):
    flow_map = gaussian_map()
    times = [jnp.asarray(t, dtype) for t in (0.0, 1.0, 0.5)]
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(flow_map.velocity),
        fd.FlowMapSolver(flow_map),
        *times,
        X.astype(dtype),
    )
    assert sol.ys.dtype == dtype
    assert_close(sol.ys[0].astype(float), flow_map(0.0, 1.0, X), 0.05, 0.05)


def test_half_precision_times_skip_steps():
    # Diffrax's, and documented: it rounds off a step that ends close to `t1`.
    times = [jnp.asarray(t, jnp.bfloat16) for t in (0.0, 1.0)]
    sol = jump_solve(gaussian_map(), *times, X, steps=8)
    assert sol.stats["num_steps"] < 8
    assert_close(sol.ys[0], gaussian_map()(0.0, 1.0, X), 1e-6, 1e-6)


# States and args


def growth(s, t):
    return jnp.sin(2 * t) + t - jnp.sin(2 * s) - s


def growing_map(s, t, x, args):
    """The exact map of x' = (0.3 + leaf index) (2 cos 2t + 1) x, on any PyTree."""
    leaves, structure = jtu.tree_flatten(x)
    grown = [
        x * jnp.exp((0.3 + 0.2 * k) * growth(s, t)).astype(x.dtype)
        for k, x in enumerate(leaves)
    ]
    return jtu.tree_unflatten(structure, grown)


def growing_field(t, x, args):
    leaves, structure = jtu.tree_flatten(x)
    rate = 2 * jnp.cos(2 * t) + 1
    return jtu.tree_unflatten(
        structure, [(0.3 + 0.2 * k) * rate * x for k, x in enumerate(leaves)]
    )


STATES = {
    "nested": {"a": X, "b": (jnp.asarray(0.3), [jnp.arange(6.0).reshape(2, 3, 1)])},
    "scalar": 0.7,
    "integer": 2,
    "empty": {"a": jnp.zeros((0, 2)), "b": X},
}


@pytest.mark.parametrize(
    "name, t0, t1",
    [
        ("nested", 0.85, 0.2),
        ("scalar", 0.1, 0.9),
        pytest.param("integer", 0.9, 0.0, marks=pytest.mark.slow),
        ("empty", 0, 1),
    ],
)
def test_states_equal_diffrax(name, t0, t1):
    ts = jnp.linspace(t0, t1, 4)
    sol = jump_solve(
        growing_map,
        t0,
        t1,
        STATES[name],
        field=growing_field,
        steps=2,
        saveat=diffrax.SaveAt(ts=ts),
    )
    truth = tight_solve(growing_field, t0, t1, STATES[name], saveat=diffrax.SaveAt(ts=ts))
    assert_close(sol.ys, truth.ys, 1e-9, 1e-9)


def test_complex_state():
    # Diffrax's Dopri8 takes no mixture of real and complex leaves: the closed form.
    state = {"z": jnp.asarray([0.3 + 0.4j, -1j]), "x": X}
    ts = jnp.linspace(0.9, 0.1, 3)
    saveat = diffrax.SaveAt(ts=ts, dense=True)
    with pytest.warns(UserWarning, match="Complex dtype"):
        sol = jump_solve(
            growing_map, 0.9, 0.1, state, field=growing_field, steps=2, saveat=saveat
        )
    truth = jax.vmap(lambda t: growing_map(0.9, t, state, None))(ts)
    assert_close(sol.ys, truth)
    assert_close(jax.vmap(sol.evaluate)(ts), truth, 1e-8, 1e-8)


def test_mixed_dtypes_are_kept():
    state = {"single": X.astype(jnp.float32), "double": X}
    t0, t1 = jnp.float32(0.9), jnp.float32(0.1)
    sol = jump_solve(
        growing_map,
        t0,
        t1,
        state,
        field=growing_field,
        saveat=diffrax.SaveAt(t1=True, dense=True),
    )
    for ys in (jtu.tree_map(lambda y: y[0], sol.ys), sol.evaluate(t1)):
        assert ys["single"].dtype == jnp.float32
        assert ys["double"].dtype == jnp.float64
        factors = jnp.exp(jnp.asarray([0.3, 0.5]) * growth(0.9, 0.1))
        assert_close(ys["double"], X * factors[0], 1e-6, 1e-6)
        assert_close(ys["single"], X * factors[1], 1e-6, 1e-6)


def test_args_of_any_kind():
    args = {
        "shift": ARGS,
        "fn": jnp.tanh,
        "none": None,
        "name": "swirl",
        "key": jr.key(3),
    }

    def flow_map(s, t, x, args):
        assert args["none"] is None and args["name"] == "swirl"
        noise = jr.normal(args["key"], (2,))
        return x + (t - s) * (args["fn"](x) + args["shift"] * noise)

    # One key on purpose: it is a label here.
    with jax.debug_key_reuse(False):
        sol = jump_solve(
            flow_map,
            0.1,
            0.9,
            X,
            args,
            field=nonlinear_field,
            saveat=diffrax.SaveAt(t1=True, dense=True),
        )
        truth = unroll(flow_map, np.linspace(0.1, 0.9, 5), X, args)
        middle = unroll(flow_map, [0.1, 0.3, 0.5], X, args)
    assert_close(sol.ys[0], truth)
    assert_close(sol.evaluate(0.5), middle)


def test_plain_function_as_map():
    flow_map = lambda s, t, x, args: x + (t - s) * args
    assert_close(
        jump_solve(flow_map, 0.9, 0.1, X, ARGS, field=nonlinear_field).ys[0],
        X - 0.8 * ARGS,
    )


# Transformations


@pytest.mark.parametrize("t0, t1", SPANS)
def test_jit_equals_eager(t0, t1):
    flow_map = mlp_map()
    run = lambda t0, t1, x: jump_solve(flow_map, t0, t1, x).ys
    assert_close(jax.jit(run)(t0, t1, X), run(t0, t1, X), 1e-13, 1e-13)


def test_vmap_over_states_and_args():
    flow_map = mlp_map()
    x, args = jr.normal(jr.key(1), (3, 2)), jr.normal(jr.key(2), (3, 2))
    ys = jax.vmap(lambda x, a: jump_solve(flow_map, 0.1, 0.9, x, a).ys[0])(x, args)
    for k in range(3):
        truth = unroll(flow_map, np.linspace(0.1, 0.9, 5), x[k], args[k])
        assert_close(ys[k], truth)


def test_vmap_mixes_directions():
    flow_map = mlp_map()
    t0, t1 = jnp.asarray([0.1, 0.9, 0.5]), jnp.asarray([0.8, 0.2, 0.5])

    def run(t0, t1):
        ts = t0 + (t1 - t0) * jnp.asarray([0.0, 0.25, 1.0])
        saveat = diffrax.SaveAt(t0=True, t1=True, ts=ts)
        return jump_solve(flow_map, t0, t1, X, steps=2, saveat=saveat).ys

    ys = jax.vmap(run)(t0, t1)
    for k in range(3):
        middle = unroll(flow_map, [t0[k], t0[k] + 0.25 * (t1[k] - t0[k])], X)
        end = unroll(flow_map, np.linspace(t0[k], t1[k], 3), X)
        assert_close(ys[k], jnp.stack([X, X, middle, end, end]))


def test_vmap_over_map_parameters():
    maps = [mlp_map(seed) for seed in range(3)]
    arrays = [eqx.filter(flow_map, eqx.is_array) for flow_map in maps]
    stacked = eqx.combine(jtu.tree_map(lambda *a: jnp.stack(a), *arrays), maps[0])
    ys = eqx.filter_vmap(lambda m: jump_solve(m, 0.9, 0.1, X).ys[0])(stacked)
    for k, flow_map in enumerate(maps):
        assert_close(ys[k], unroll(flow_map, np.linspace(0.9, 0.1, 5), X))


class Traces:
    count = 0


class Traced(fd.AbstractFlowMap):
    """Counts how often Python runs the map."""

    flow_map: fd.AbstractFlowMap
    traces: Traces = eqx.field(static=True)

    def jump(self, s, t, x, args):
        self.traces.count += 1
        return self.flow_map(s, t, x, args)


def test_one_compilation_for_all_values():
    traces = Traces()

    @eqx.filter_jit
    def run(flow_map, t0, t1, x, args):
        return jump_solve(flow_map, t0, t1, x, args).ys[0]

    def call(seed, t0, t1, x):
        return run(Traced(mlp_map(seed), traces), jnp.asarray(t0), jnp.asarray(t1), x, x)

    call(0, 0.1, 0.9, X)
    first = traces.count
    assert first > 0
    # Parameters, times, direction, state and args are all new.
    second = call(1, 0.8, 0.3, X + 1)
    assert traces.count == first
    ts = np.linspace(0.8, 0.3, 5)
    assert_close(second, unroll(mlp_map(1), ts, X + 1, X + 1))


# Refusals


def brownian(shape):
    return diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, shape, jr.key(0))


def unsuitable_terms():
    ode = diffrax.ODETerm(nonlinear_field)
    matrix = lambda t, y, args: 0.1 * jnp.eye(2)
    vector = lambda t, y, args: 0.1 * y
    return {
        "sde": diffrax.MultiTerm(ode, diffrax.ControlTerm(matrix, brownian((2,)))),
        "two odes": diffrax.MultiTerm(ode, ode),
        "vector noise": diffrax.ControlTerm(matrix, brownian((2,))),
        "scalar noise": diffrax.ControlTerm(vector, brownian(())),
        "tuple": (ode, ode),
        "function": nonlinear_field,
    }


@pytest.mark.parametrize("name", unsuitable_terms())
def test_other_terms_are_refused(name):
    with pytest.raises(ValueError, match="not compatible with solver(.|\n)*ODETerm"):
        diffrax.diffeqsolve(
            unsuitable_terms()[name], fd.FlowMapSolver(gaussian_map()), 0.0, 1.0, 0.5, X
        )


@pytest.mark.parametrize(
    "flow_map, error, message",
    [
        (lambda s, t, x, args: (x,), ValueError, "structure of the state"),
        (lambda s, t, x, args: x[:1], ValueError, r"shape of the state, \(2,\)"),
        (lambda s, t, x, args: x[None], ValueError, "use `jax.vmap`"),
        (lambda s, t, x, args: x.astype(jnp.float32), TypeError, "got float32"),
        (lambda s, t, x, args: x > 0, TypeError, "got bool"),
        (lambda s, t, x, args: x.astype(complex), TypeError, "got complex128"),
    ],
    ids=["structure", "shape", "rank", "float32", "bool", "complex"],
)
@pytest.mark.parametrize("solver", [fd.FlowMapSolver, fd.AdaptiveFlowMapSolver])
def test_map_unlike_its_input_is_refused(solver, flow_map, error, message):
    term = diffrax.ODETerm(nonlinear_field)
    with pytest.raises(error, match=message):
        solver(flow_map).step(term, 0.1, 0.5, X, None, None, made_jump=False)


def test_map_unlike_its_input_is_refused_in_a_solve():
    with pytest.raises(ValueError, match="structure of the state"):
        jump_solve(lambda s, t, x, args: {"x": x}, 0.1, 0.9, X, field=nonlinear_field)


@pytest.mark.parametrize("t0, t1", [(0.5, 1.2), (-0.1, 0.5), (1.2, 0.5), (0.5, -0.1)])
def test_times_outside_the_range_are_refused(t0, t1):
    exact = gaussian_map()
    with pytest.raises(RUN_TIME_ERROR, match="time range of the flow map"):
        jax.block_until_ready(jump_solve(exact, t0, t1, X, throw=False).ys)
    run = eqx.filter_jit(lambda t0, t1: jump_solve(exact, t0, t1, X, steps=1).ys)
    with pytest.raises(RUN_TIME_ERROR, match="time range of the flow map"):
        jax.block_until_ready(run(jnp.asarray(t0), jnp.asarray(t1)))


def test_range_is_checked_by_its_own_bounds():
    flow_map = fd.FlowMap(mlp_map().net, time_range=(-2.0, -1.0))
    ys = jump_solve(flow_map, -1.0, -2.0, X).ys[0]
    assert_close(ys, unroll(flow_map, np.linspace(-1.0, -2.0, 5), X))
    with pytest.raises(RUN_TIME_ERROR, match="time range of the flow map"):
        jax.block_until_ready(jump_solve(flow_map, 1.0, 2.0, X).ys)


def test_rounded_times_are_in_the_range():
    sol = jump_solve(gaussian_map(), 0.0, 10 * 0.1 + 1e-9, X, steps=10)
    assert_close(sol.ys[0], gaussian_map()(0.0, 1.0, X), 1e-8, 1e-8)


@pytest.mark.parametrize("solver", [fd.FlowMapSolver, fd.AdaptiveFlowMapSolver])
def test_bad_settings_are_refused(solver):
    with without_type_checks():
        with pytest.raises(TypeError, match="`flow_map` must be a callable"):
            solver(3.0)
    with pytest.raises(ValueError, match="`dense_degree` must be at least 1; got 0"):
        solver(gaussian_map(), dense_degree=0)


# States that are not finite


def test_nan_state_is_an_error():
    with pytest.raises(RUN_TIME_ERROR, match="diverged"):
        jax.block_until_ready(jump_solve(mlp_map(), 0.1, 0.9, X * jnp.nan).ys)


def test_nan_state_is_flagged_in_its_lane_only():
    flow_map = mlp_map()
    x = jnp.stack([X, X.at[1].set(jnp.nan), X.at[0].set(jnp.inf), 2 * X])
    sol = jax.vmap(lambda x: jump_solve(flow_map, 0.1, 0.9, x, throw=False))(x)
    good = sol.result == diffrax.RESULTS.successful
    bad = sol.result == diffrax.RESULTS.nonlinear_divergence
    assert good.tolist() == [True, False, False, True]
    assert bad.tolist() == [False, True, True, False]
    assert sol.stats["num_steps"].tolist() == [4, 1, 1, 4]
    for k in (0, 3):
        assert_close(sol.ys[k, 0], unroll(flow_map, np.linspace(0.1, 0.9, 5), x[k]))


def test_solve_ends_where_the_map_fails():
    flow_map = lambda s, t, x, args: jnp.where(t > 0.6, jnp.nan, x)
    sol = jump_solve(flow_map, 0.1, 0.9, X, field=nonlinear_field, throw=False)
    assert sol.result == diffrax.RESULTS.nonlinear_divergence
    assert sol.stats["num_steps"] == 3


def test_check_finite_can_be_off():
    solver = fd.FlowMapSolver(mlp_map(), check_finite=False)
    sol = jump_solve(mlp_map(), 0.1, 0.9, X * jnp.nan, solver=solver)
    assert sol.result == diffrax.RESULTS.successful
    assert jnp.all(jnp.isnan(sol.ys))
