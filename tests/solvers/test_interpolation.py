"""`FlowMapInterpolation`: a solution between its steps, by the map itself."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    jump_solve,
    mlp_map,
    tight_solve,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
STEPS = diffrax.SaveAt(t0=True, steps=True)
EXACT = gaussian_map()


def path_of(flow_map, t0, t1, steps=3, **kwargs):
    sol = jump_solve(flow_map, t0, t1, X, steps=steps, saveat=STEPS, **kwargs)
    return fd.solvers.FlowMapInterpolation.of(sol, flow_map)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("t0, t1", SPANS)
def test_exact_map_between_steps(t0, t1, steps):
    # The solution is padded beyond its steps.
    path = path_of(EXACT, t0, t1, steps)
    assert not np.all(np.isfinite(path.ts))
    assert_close((path.t0, path.t1), (jnp.asarray(t0), jnp.asarray(t1)), 1e-15)
    ts = jnp.linspace(t0, t1, 9)
    truth = tight_solve(EXACT.velocity, t0, t1, X, saveat=diffrax.SaveAt(ts=ts))
    assert_close(path.evaluate(ts), truth.ys, 1e-10, 1e-10)
    rates = jax.vmap(lambda t, y: EXACT.velocity(t, y))(ts, truth.ys)
    assert_close(path.derivative(ts), rates, 1e-9, 1e-9)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_jumps_start_at_the_step_before(t0, t1):
    # A map consistent with nothing: the start is seen.
    flow_map = mlp_map()
    ts = jnp.linspace(t0, t1, 5)
    path = path_of(flow_map, t0, t1, 4)
    x1 = flow_map(ts[0], ts[1], X)
    inside = ts[1] + 0.3 * (ts[2] - ts[1])
    assert_close(path.evaluate(inside), flow_map(ts[1], inside, x1))
    # At a saved time: from the step before, or that very state.
    assert_close(path.evaluate(ts[2]), flow_map(ts[1], ts[2], x1))
    assert_close(path.evaluate(ts[2], left=False), path.ys[2], 1e-15, 1e-15)
    assert_close(path.evaluate(ts[0]), X, 1e-15, 1e-15)
    assert_close(path.evaluate(ts[0], ts[1]), x1 - X)


@pytest.mark.parametrize("sign", [1, -1])
def test_sides_of_a_saved_time(sign):
    # States that no jump connects: 10, 20 and 30 at times of which the map is told.
    ts, ys = sign * jnp.asarray([0.0, 0.3, 1.0]), jnp.asarray([[10.0], [20.0], [30.0]])
    path = fd.solvers.FlowMapInterpolation(ts, ys, lambda s, t, x, args: x * (1 + t - s))
    before, after = 10 * (1 + sign * 0.3), 20.0
    assert_close(path.evaluate(ts[1]), jnp.asarray([before]))
    assert_close(path.evaluate(ts[1], left=True), jnp.asarray([before]))
    assert_close(path.evaluate(ts[1], left=False), jnp.asarray([after]))
    assert_close(path.derivative(ts[1]), jnp.asarray([10.0]))
    assert_close(path.derivative(ts[1], left=True), jnp.asarray([10.0]))
    assert_close(path.derivative(ts[1], left=False), jnp.asarray([20.0]))
    end = 20 * (1 + sign * 0.7)
    assert_close(path.evaluate(ts[1], ts[2]), jnp.asarray([end - before]))
    assert_close(path.evaluate(ts[1], ts[2], left=False), jnp.asarray([end - after]))
    assert_close(path.evaluate(ts[0], ts[1], left=False), jnp.asarray([after - 10]))


def test_equals_diffrax_at_saved_times():
    flow_map, ts = mlp_map(), jnp.linspace(0.12, 0.88, 7)
    both = diffrax.SaveAt(
        subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t0=True, steps=True)]
    )
    sol = jump_solve(flow_map, 0.1, 0.9, X, steps=3, saveat=both)
    path = fd.solvers.FlowMapInterpolation(sol.ts[1], sol.ys[1], flow_map)
    assert_close(path.evaluate(ts), sol.ys[0])


def test_any_solver_and_its_map():
    # Steps by Tsit5, and the map between them.
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(EXACT.velocity),
        diffrax.Tsit5(),
        0.1,
        0.9,
        0.05,
        X,
        saveat=STEPS,
        max_steps=64,
    )
    path = fd.solvers.FlowMapInterpolation.of(sol, EXACT)
    ts = jnp.linspace(0.1, 0.9, 50)
    truth = jax.vmap(lambda t: EXACT(0.1, t, X))(ts)
    assert_close(path.evaluate(ts), truth, 1e-6, 1e-6)


def test_shapes_and_transformations():
    path = path_of(EXACT, 0.1, 0.9)
    ts = jnp.linspace(0.2, 0.7, 6).reshape(2, 3)
    values = path.evaluate(ts)
    assert values.shape == (2, 3, 2)
    assert_close(jax.vmap(jax.vmap(path.evaluate))(ts), values)
    assert_close(jax.jit(lambda t: path.evaluate(t))(ts[0, 0]), values[0, 0])
    slope = jax.jacfwd(path.evaluate)(0.33)
    assert_close(slope, path.derivative(0.33), 1e-12, 1e-12)
    xs = jnp.stack([X, -X])
    run = lambda x: fd.solvers.FlowMapInterpolation.of(
        jump_solve(EXACT, 0.1, 0.9, x, saveat=STEPS), EXACT
    )
    batch = eqx.filter_vmap(run)(xs)
    ends = eqx.filter_vmap(lambda path: path.evaluate(0.4))(batch)
    assert_close(ends, jax.vmap(lambda x: EXACT(0.1, 0.4, x))(xs), 1e-12, 1e-12)


def test_gradients_in_the_map():
    direction = jax.tree_util.tree_map(
        jnp.ones_like, eqx.filter(mlp_map(), eqx.is_inexact_array)
    )
    rest = eqx.filter(mlp_map(), eqx.is_inexact_array, inverse=True)
    weights = eqx.filter(mlp_map(), eqx.is_inexact_array)

    def loss(weights):
        path = path_of(eqx.combine(weights, rest), 0.1, 0.9)
        return jnp.sum(path.evaluate(jnp.asarray([0.3, 0.8])) ** 2)

    grad = jax.grad(loss)(weights)
    slope = sum(jnp.sum(leaf) for leaf in jax.tree_util.tree_leaves(grad))
    assert_close(slope, finite_difference(loss, weights, direction), 1e-5, 1e-5)


def test_outside_is_not_a_number():
    path = path_of(EXACT, 0.85, 0.2)
    assert np.all(np.isnan(path.evaluate(jnp.asarray([0.1, 0.9]))))
    assert np.all(np.isnan(path.derivative(0.9)))


def test_trees_and_args_in_float32():
    field = lambda t, y, args: {"a": args * y["a"]}
    exact = lambda s, t, y, args: {"a": y["a"] * jnp.exp(args * (t - s))}
    ts, rate = jnp.asarray([0.0, 0.5, 1.0], jnp.float32), jnp.asarray(0.7, jnp.float32)
    ys = {"a": jnp.exp(rate * ts)[:, None] * jnp.ones((1, 3), jnp.float32)}
    path = fd.solvers.FlowMapInterpolation(ts, ys, exact, rate)
    value, slope = path.evaluate(0.25), path.derivative(0.25)
    assert value["a"].dtype == slope["a"].dtype == jnp.float32
    assert_close(value["a"], np.full(3, np.exp(0.175)), 1e-6, 1e-6)
    assert_close(slope, field(0.25, value, rate), 1e-5, 1e-5)


def test_bad_solutions():
    ts, ys = jnp.asarray([0.1, 0.9]), jnp.stack([X, X])
    with pytest.raises(ValueError, match=r"SaveAt\(t0=True, steps=True\)"):
        fd.solvers.FlowMapInterpolation(ts[:1], ys[:1], EXACT)
    with pytest.raises(ValueError, match="`ts` and `ys` must be arrays with one common"):
        fd.solvers.FlowMapInterpolation(ts, X[None], EXACT)
    dense = jump_solve(EXACT, 0.1, 0.9, X, saveat=diffrax.SaveAt(dense=True))
    with pytest.raises(ValueError, match="No state saved at t0 = 0.1"):
        fd.solvers.FlowMapInterpolation.of(dense, EXACT)
    late = jump_solve(
        EXACT, 0.1, 0.9, X, saveat=diffrax.SaveAt(ts=ts.at[0].set(0.2)), steps=4
    )
    with pytest.raises(ValueError, match="No state saved at t0 = 0.1"):
        fd.solvers.FlowMapInterpolation.of(late, EXACT)
