"""What `SaveAt` saves, and dense output, with `FlowMapSolver`."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    gaussian_map,
    jump_solve,
    max_abs,
    mlp_map,
    nonlinear_field,
    tight_solve,
    unroll,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
DENSE = diffrax.SaveAt(dense=True)


# Saving


@pytest.mark.parametrize("t0, t1", SPANS)
def test_saved_times_equal_diffrax(t0, t1):
    # One jump, so that every time lies inside of it, and no series worth the name: the
    # map itself must have been asked.
    exact = gaussian_map()
    solver = fd.FlowMapSolver(exact, dense_degree=1)
    saveat = diffrax.SaveAt(ts=jnp.linspace(t0, t1, 7))
    sol = jump_solve(exact, t0, t1, X, steps=1, solver=solver, saveat=saveat)
    truth = tight_solve(exact.velocity, t0, t1, X, saveat=saveat)
    assert_close(sol.ts, truth.ts)
    assert_close(sol.ys, truth.ys, 1e-9, 1e-9)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_saved_times_are_jumps_from_the_last_step(t0, t1):
    flow_map = mlp_map()
    grid = np.linspace(t0, t1, 4)
    ts = np.linspace(t0, t1, 6)
    sol = jump_solve(flow_map, t0, t1, X, steps=3, saveat=diffrax.SaveAt(ts=ts))
    for t, y in zip(ts, sol.ys, strict=True):
        done = [s for s in grid if (s - t) * (t1 - t0) < -1e-9]
        assert_close(y, unroll(flow_map, [*done, t], X), 1e-12, 1e-12)


@pytest.mark.parametrize("t0, t1", SPANS)
@pytest.mark.parametrize("every", [1, 2])
def test_saved_steps_equal_loop(t0, t1, every):
    flow_map = mlp_map()
    saveat = diffrax.SaveAt(t0=True, t1=True, steps=every)
    sol = jump_solve(flow_map, t0, t1, X, steps=5, max_steps=8, saveat=saveat)
    grid = np.linspace(t0, t1, 6)
    kept = sorted({0, *range(0, 6, every), 5})
    assert_close(sol.ts[: len(kept)], jnp.asarray(grid[kept]))
    assert jnp.all(jnp.isinf(sol.ts[len(kept) :]))
    for y, k in zip(sol.ys, kept, strict=False):
        assert_close(y, unroll(flow_map, grid[: k + 1], X))


@pytest.mark.parametrize("t0, t1", SPANS)
def test_saved_functions_see_true_times(t0, t1):
    flow_map = mlp_map()
    fn = lambda t, y, args: {"t": t, "twice": 2 * y, "args": args}
    subs = {
        "ends": diffrax.SubSaveAt(t0=True, t1=True, fn=fn),
        "middle": [diffrax.SubSaveAt(ts=jnp.asarray([(t0 + t1) / 2]), fn=fn)],
    }
    sol = jump_solve(
        flow_map, t0, t1, X, 3 * X, steps=2, saveat=diffrax.SaveAt(subs=subs)
    )
    grid = [t0, (t0 + t1) / 2, t1]
    end, middle = (unroll(flow_map, grid[:k], X, 3 * X) for k in (3, 2))
    assert_close(
        sol.ts, {"ends": jnp.asarray([t0, t1]), "middle": [jnp.asarray(grid[1:2])]}
    )
    assert_close(sol.ys["ends"]["t"], jnp.asarray([t0, t1]))
    assert_close(sol.ys["ends"]["twice"], 2 * jnp.stack([X, end]))
    assert_close(sol.ys["middle"][0]["twice"], 2 * middle[None])
    assert_close(sol.ys["middle"][0]["args"], 3 * X[None])


def test_times_in_the_wrong_order_are_refused():
    saveat = diffrax.SaveAt(ts=jnp.asarray([0.5, 0.3]))
    with pytest.raises(RuntimeError, match="must be increasing or decreasing"):
        jax.block_until_ready(jump_solve(mlp_map(), 0.1, 0.9, X, saveat=saveat).ys)


# Dense output


@pytest.mark.parametrize("t0, t1", SPANS)
@pytest.mark.parametrize("half", [False, True])
def test_dense_equals_diffrax(t0, t1, half):
    exact = gaussian_map()
    solver = fd.FlowMapSolver(exact)
    solver = diffrax.HalfSolver(solver) if half else solver
    sol = jump_solve(exact, t0, t1, X, steps=2, solver=solver, saveat=DENSE)
    truth = tight_solve(exact.velocity, t0, t1, X, saveat=DENSE)
    times = jnp.linspace(t0, t1, 9)
    # Dopri8's own interpolant is good for half of its digits.
    assert_close(
        jax.vmap(sol.evaluate)(times), jax.vmap(truth.evaluate)(times), 1e-6, 1e-6
    )
    saved = jax.vmap(lambda t: exact(t0, t, X))(times)
    assert_close(jax.vmap(sol.evaluate)(times), saved, 1e-8, 1e-8)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_dense_derivative_is_the_velocity(t0, t1):
    exact = gaussian_map()
    sol = jump_solve(exact, t0, t1, X, steps=2, saveat=DENSE)
    y = exact(t0, 0.6, X)
    assert_close(sol.derivative(0.6), exact.velocity(0.6, y), 1e-6, 1e-6)


@eqx.filter_jit
def stored_arrays(solver, t0, t1):
    term = diffrax.ODETerm(nonlinear_field)
    return solver.step(term, t0, t1, X, None, None, made_jump=False)[2]


def stored(solver, t0, t1):
    """The interpolation of one step, as it is after storage: of arrays alone."""
    dense_info = stored_arrays(solver, jnp.asarray(t0), jnp.asarray(t1))
    return solver.interpolation_cls(t0=t0, t1=t1, **dense_info)


def test_dense_error_falls_geometrically():
    exact = gaussian_map()
    times = jnp.linspace(0.1, 0.9, 17)
    truth = jax.vmap(lambda t: exact(0.1, t, X))(times)
    errors = []
    for degree in (1, 4, 8, 16):
        step = stored(fd.FlowMapSolver(exact, dense_degree=degree), 0.1, 0.9)
        errors.append(max_abs(jax.vmap(step.evaluate)(times) - truth))
    assert errors[0] > 0.01
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 30
    assert errors[3] < errors[2] / 1000


def test_dense_of_low_degree_is_a_polynomial_through_the_nodes():
    # Degree two has nodes at both ends and in the middle.
    flow_map = mlp_map()
    step = stored(fd.FlowMapSolver(flow_map, dense_degree=2), 0.9, 0.1)
    start, middle, end = X, flow_map(0.9, 0.5, X), flow_map(0.9, 0.1, X)
    for t, y in ((0.9, start), (0.5, middle), (0.1, end)):
        assert_close(step.evaluate(t), y)
    quarter = 0.375 * start + 0.75 * middle - 0.125 * end
    assert_close(step.evaluate(0.7), quarter)


def test_dense_of_an_empty_step_is_its_start():
    # Lanes of a batch that are done make such steps.
    step = stored(fd.FlowMapSolver(mlp_map()), 0.4, 0.4)
    y, rate = jax.jvp(step.evaluate, (0.4,), (1.0,))
    assert_close(y, X)
    assert jnp.all(jnp.isfinite(rate))


def test_dense_between_two_times_is_the_difference():
    sol = jump_solve(mlp_map(), 0.1, 0.9, X, saveat=DENSE)
    difference = sol.evaluate(0.7) - sol.evaluate(0.2)
    assert_close(sol.evaluate(0.2, 0.7), difference)
    step = stored(fd.FlowMapSolver(mlp_map()), 0.1, 0.5)
    assert_close(step.evaluate(0.2, 0.4), step.evaluate(0.4) - step.evaluate(0.2))


def test_dense_leaves_a_jitted_function():
    # It must hold arrays only: the map's tracers are dead by then.
    flow_map = mlp_map()
    run = eqx.filter_jit(lambda m, t1: jump_solve(m, 0.9, t1, X, saveat=DENSE))
    sol = run(flow_map, jnp.asarray(0.1))
    truth = unroll(flow_map, [0.9, 0.7, 0.5, 0.4], X)
    assert_close(sol.evaluate(0.4), truth, 1e-8, 1e-8)


def test_dense_under_vmap():
    flow_map = gaussian_map()
    t0, t1 = jnp.asarray([0.1, 0.9, 0.5]), jnp.asarray([0.8, 0.2, 0.5])
    run = lambda t0, t1: jump_solve(flow_map, t0, t1, X, steps=3, saveat=DENSE)
    times = t0 + 0.4 * (t1 - t0)
    ys = jax.vmap(lambda t0, t1, t: run(t0, t1).evaluate(t))(t0, t1, times)
    truth = jax.vmap(lambda t0, t: flow_map(t0, t, X))(t0, times)
    assert_close(ys, truth, 1e-8, 1e-8)


def test_dense_is_nan_outside():
    sol = jump_solve(mlp_map(), 0.1, 0.9, X, saveat=DENSE)
    assert jnp.all(jnp.isnan(sol.evaluate(0.95)))


# Cost


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def test_dense_output_costs_nothing_unless_asked():
    net = eqx.nn.MLP(2, 2, 128, 2, activation=jnp.tanh, key=jax.random.key(0))
    flow_map = fd.FlowMap(lambda s, t, x, args: net(x))
    times = jnp.asarray([0.1, 0.9, 0.2])

    def run(times, x, degree, **saveat):
        t0, t1, dt0 = times
        solver = fd.FlowMapSolver(flow_map, dense_degree=degree)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(nonlinear_field),
            solver,
            t0,
            t1,
            dt0,
            x,
            saveat=diffrax.SaveAt(**saveat),
            throw=False,
            max_steps=8,
        )
        return sol.evaluate(t1) if sol.interpolation is not None else sol.ys

    # XLA counts the body of a loop once. The nodes are one batch: look for its size.
    flops = lambda program: program.cost_analysis()["flops"]
    one_jump = compiled(lambda times, x: flow_map(times[0], times[1], x), times, X)
    plain = compiled(lambda *a: run(*a, 37, t1=True), times, X)
    asked = compiled(lambda *a: run(*a, 37, dense=True), times, X)
    assert flops(one_jump) <= flops(plain) < 1.1 * flops(one_jump)
    nodes = re.compile(r"f64\[([0-9]+,)*37[,\]]")
    assert nodes.search(asked.as_text())
    assert not nodes.search(plain.as_text())
