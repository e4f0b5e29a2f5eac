"""Error estimates, and the step sizes that `PIDController` makes of them."""

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
    linear_map,
    max_abs,
    mlp_map,
    nonlinear_field,
    tight_solve,
    unroll,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
PID = diffrax.PIDController(rtol=1e-6, atol=1e-6)
# The first step is twice the span, which Diffrax cuts at `t1` to the last bit.
SOLVERS = {
    "semigroup": fd.AdaptiveFlowMapSolver,
    "lagrangian": lambda m: fd.AdaptiveFlowMapSolver(m, fd.estimates.LagrangianDefect()),
    "half": lambda m: diffrax.HalfSolver(fd.FlowMapSolver(m)),
}


class Perturbed(fd.AbstractFlowMap):
    """A map with an error of a given power of the jump."""

    flow_map: fd.AbstractFlowMap
    size: float = eqx.field(static=True)
    power: int = eqx.field(static=True)

    def jump(self, s, t, x, args):
        h = jnp.asarray(t) - jnp.asarray(s)
        error = self.size * h**self.power * jnp.cos(3 * x + s)
        return self.flow_map(s, t, x, args) + error


@eqx.filter_jit
def first_error(solver, field, t0, t1):
    term = diffrax.ODETerm(field)
    return solver.step(term, t0, t1, X, None, None, made_jump=False)[1]


# Estimates


def test_semigroup_defect_trusts_any_flow():
    # The exact flow of one ODE, and another as the teacher.
    flow_map, teacher = linear_map(), gaussian_map().velocity
    semigroup = first_error(SOLVERS["semigroup"](flow_map), teacher, 0.1, 0.9)
    lagrangian = first_error(SOLVERS["lagrangian"](flow_map), teacher, 0.1, 0.9)
    assert max_abs(semigroup) < 1e-13
    assert max_abs(lagrangian) > 0.1


@pytest.mark.parametrize("t0, t1", SPANS)
def test_semigroup_estimate_is_one_jump_against_two(t0, t1):
    flow_map = mlp_map()
    one = unroll(flow_map, [t0, t1], X)
    two = unroll(flow_map, [t0, (t0 + t1) / 2, t1], X)
    for name in ("semigroup", "half"):
        error = first_error(SOLVERS[name](flow_map), nonlinear_field, t0, t1)
        assert_close(error, jnp.abs(two - one), 1e-13, 1e-13)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_lagrangian_estimate_equals_finite_difference(t0, t1):
    flow_map, step = mlp_map(), 1e-6
    end = flow_map(t0, t1, X)
    rate = (flow_map(t0, t1 + step, X) - flow_map(t0, t1 - step, X)) / (2 * step)
    truth = jnp.abs((t1 - t0) * (rate - nonlinear_field(t1, end, None)))
    error = first_error(SOLVERS["lagrangian"](flow_map), nonlinear_field, t0, t1)
    assert_close(error, truth, 1e-8, 1e-8)


@pytest.mark.parametrize(
    "power, name, slope",
    [
        (1, "semigroup", 2),
        (1, "half", 2),
        (1, "lagrangian", 1),
        (2, "semigroup", 2),
        (2, "lagrangian", 2),
    ],
)
def test_estimates_vanish_at_their_order(power, name, slope):
    exact = gaussian_map()
    solver = SOLVERS[name](Perturbed(exact, 0.1, power))
    steps = jnp.asarray([2.0**-k for k in range(4, 9)])
    estimate = jax.jit(
        jax.vmap(lambda h: first_error(solver, exact.velocity, 0.3, 0.3 + h))
    )
    norms = jnp.linalg.norm(estimate(steps), axis=1)
    observed = np.polyfit(np.log(steps), np.log(norms), 1)[0]
    assert observed == pytest.approx(slope, abs=0.1)


def test_declared_orders():
    term = diffrax.ODETerm(nonlinear_field)
    orders = {
        name: make(gaussian_map()).error_order(term) for name, make in SOLVERS.items()
    }
    assert orders == {"semigroup": 2, "lagrangian": 1, "half": 2}


# Step sizes


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("t0, t1", SPANS)
def test_exact_map_takes_one_step(name, t0, t1):
    # Backwards too: the teacher must be asked at the true time.
    exact = gaussian_map()
    solver = SOLVERS[name](exact)
    sol = jump_solve(exact, t0, t1, X, steps=0.5, solver=solver, stepsize_controller=PID)
    assert sol.stats["num_steps"] == 1
    truth = tight_solve(exact.velocity, t0, t1, X)
    assert_close(sol.ys, truth.ys, 1e-9, 1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_grow_as_the_tolerance_falls(name):
    # An error of h^2 a step asks for about tolerance^(-1/2) steps.
    exact = gaussian_map()
    solver = SOLVERS[name](Perturbed(exact, 0.3, 2))

    def run(tolerance):
        sol = jump_solve(
            exact,
            0.9,
            0.1,
            X,
            steps=0.5,
            solver=solver,
            stepsize_controller=diffrax.PIDController(rtol=0.0, atol=tolerance),
            max_steps=4096,
        )
        return sol.stats["num_accepted_steps"], sol.ys[0]

    tolerances = jnp.asarray([1e-3, 1e-4, 1e-5, 1e-6])
    steps, ys = jax.jit(jax.vmap(run))(tolerances)
    assert np.all(np.diff(steps) > 0)
    slope = np.polyfit(np.log(tolerances), np.log(steps), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1 if name != "lagrangian" else 0.3)
    errors = jnp.max(jnp.abs(ys - exact(0.9, 0.1, X)[None]), axis=1)
    assert np.all(np.diff(errors) < 0)


def test_lanes_choose_their_own_steps():
    flow_map = Perturbed(gaussian_map(), 0.3, 2)
    solver = fd.AdaptiveFlowMapSolver(flow_map)
    pid = diffrax.PIDController(rtol=0.0, atol=1e-3)
    run = lambda t0, t1: jump_solve(
        flow_map, t0, t1, X, steps=0.5, solver=solver, stepsize_controller=pid
    )
    t0, t1 = jnp.asarray([0.1, 0.9, 0.5, 0.5]), jnp.asarray([0.8, 0.1, 0.5, 0.52])
    batch = jax.vmap(run)(t0, t1)
    assert batch.stats["num_accepted_steps"][2:].tolist() == [0, 1]
    for k in range(2):
        single = run(t0[k], t1[k])
        assert single.stats["num_accepted_steps"] > 2
        assert batch.stats["num_accepted_steps"][k] == single.stats["num_accepted_steps"]
        assert_close(batch.ys[k], single.ys)


def test_shortest_step_bounds_the_cost():
    # A constant error, which no step size can reduce.
    flow_map = Perturbed(gaussian_map(), 1e-2, 0)
    pid = diffrax.PIDController(rtol=0.0, atol=1e-6, dtmin=0.8 / 16)
    sol = jump_solve(
        flow_map,
        0.1,
        0.9,
        X,
        steps=0.5,
        solver=fd.AdaptiveFlowMapSolver(flow_map),
        stepsize_controller=pid,
    )
    assert sol.stats["num_accepted_steps"] <= 17


@pytest.mark.parametrize("t0, t1, step_ts", [(0.1, 0.9, [0.3, 0.55]), (0.85, 0.2, [0.6])])
@pytest.mark.slow
def test_clipped_controller_steps_to_the_times(t0, t1, step_ts):
    flow_map = mlp_map()
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=0.0, atol=1e-2), step_ts=jnp.asarray(step_ts)
    )
    sol = jump_solve(
        flow_map,
        t0,
        t1,
        X,
        steps=0.5,
        solver=fd.AdaptiveFlowMapSolver(flow_map),
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t0=True, steps=True),
    )
    ts = sol.ts[: int(sol.stats["num_accepted_steps"]) + 1]
    assert all(np.min(np.abs(ts - t)) < 1e-12 for t in step_ts)
    end = sol.ys[len(ts) - 1]
    assert_close(end, unroll(flow_map, ts, X))


@pytest.mark.parametrize("t0, t1", SPANS)
def test_saved_times_after_rejected_steps(t0, t1):
    flow_map = Perturbed(gaussian_map(), 0.3, 2)
    ts = jnp.linspace(t0, t1, 5)
    sol = jump_solve(
        flow_map,
        t0,
        t1,
        X,
        steps=0.5,
        solver=fd.AdaptiveFlowMapSolver(flow_map),
        stepsize_controller=diffrax.PIDController(rtol=0.0, atol=1e-5),
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t0=True, steps=True)],
            dense=True,
        ),
        max_steps=512,
    )
    assert sol.stats["num_rejected_steps"] > 0
    (saved_ts, grid), (saved_ys, path) = sol.ts, sol.ys
    grid = grid[: int(sol.stats["num_accepted_steps"]) + 1]
    for t, y in zip(saved_ts, saved_ys, strict=True):
        # The last step before each time, and a jump from there.
        done = int(jnp.sum((grid - t) * jnp.sign(t1 - t0) < -1e-12)) - 1
        start = max(done, 0)
        assert_close(y, flow_map(grid[start], t, path[start]))
        assert_close(sol.evaluate(t), y)


@pytest.mark.slow
def test_controller_state_continues_a_solve():
    flow_map = Perturbed(gaussian_map(), 0.3, 2)
    solver = fd.AdaptiveFlowMapSolver(flow_map)
    pid = diffrax.PIDController(rtol=0.0, atol=1e-4)
    saveat = diffrax.SaveAt(
        t1=True, controller_state=True, solver_state=True, made_jump=True
    )
    first = jump_solve(
        flow_map, 0.1, 0.5, X, solver=solver, stepsize_controller=pid, saveat=saveat
    )
    second = jump_solve(
        flow_map,
        0.5,
        0.9,
        first.ys[0],
        solver=solver,
        stepsize_controller=pid,
        controller_state=first.controller_state,
        solver_state=first.solver_state,
        made_jump=first.made_jump,
    )
    assert_close(second.ys[0], gaussian_map()(0.1, 0.9, X), 1e-2, 1e-2)


# States that are not finite


def test_bad_state_is_flagged_in_its_lane_only():
    # Diffrax rejects every step from a NaN; an infinity ends the solve at once.
    flow_map = mlp_map()
    run = lambda x: jump_solve(
        flow_map,
        0.1,
        0.9,
        x,
        solver=fd.AdaptiveFlowMapSolver(flow_map),
        stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
        throw=False,
    )
    sol = jax.vmap(run)(jnp.stack([X, X.at[0].set(jnp.inf), X.at[0].set(jnp.nan)]))
    results = ["successful", "nonlinear_divergence", "max_steps_reached"]
    for lane, name in enumerate(results):
        flagged = sol.result == getattr(diffrax.RESULTS, name)
        assert flagged.tolist() == [k == lane for k in range(3)]
    assert sol.stats["num_steps"][1] == 1
    assert_close(sol.ys[0], run(X).ys)


def test_overflow_of_a_long_jump_is_rejected():
    # Not a number beyond a quarter: shorter jumps are the cure.
    exact = gaussian_map()
    flow_map = lambda s, t, x, args: jnp.where(t - s > 0.25, jnp.nan, exact(s, t, x))
    sol = jump_solve(
        flow_map,
        0.1,
        0.9,
        X,
        field=exact.velocity,
        steps=0.5,
        solver=fd.AdaptiveFlowMapSolver(flow_map),
        stepsize_controller=PID,
    )
    assert sol.stats["num_rejected_steps"] > 0
    assert_close(sol.ys[0], exact(0.1, 0.9, X))
