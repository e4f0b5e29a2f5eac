"""Events of every kind end a solve with `FlowMapSolver` where they should."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest
from helpers import (
    assert_close,
    gaussian_map,
    jump_solve,
    nonlinear_field,
    tight_solve,
    without_type_checks,
)

import flowdiffrax as fd
from flowdiffrax.solvers._event import _several

# It moves steadily, so that the first entry takes every value once.
X = jnp.asarray([-1.5, 0.7])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
NEWTON = optx.Newton(rtol=1e-12, atol=1e-12)
EXACT = gaussian_map()


def crossing(t, y, args, **kwargs):
    # Root finders call conditions by keyword: the names are fixed.
    return y[0] - args


SOON, EXACTLY = diffrax.Event(crossing), diffrax.Event(crossing, NEWTON)


def level_of(t0, t1):
    """The first entry at 40 % of the way."""
    return EXACT(t0, t0 + 0.4 * (t1 - t0), X)[0]


@pytest.mark.parametrize("t0, t1", SPANS)
def test_event_without_root_finder_ends_after_its_step(t0, t1):
    sol = jump_solve(EXACT, t0, t1, X, level_of(t0, t1), event=SOON)
    end = t0 + 0.5 * (t1 - t0)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert_close(sol.ts[0], end)
    assert_close(sol.ys[0], EXACT(t0, end, X))


PLAIN = fd.FlowMapSolver(EXACT)
SOLVERS = {
    "plain": (PLAIN, diffrax.ConstantStepSize()),
    "half": (diffrax.HalfSolver(PLAIN), diffrax.ConstantStepSize()),
    "adaptive": (
        fd.AdaptiveFlowMapSolver(EXACT),
        diffrax.PIDController(rtol=1e-6, atol=1e-6),
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("t0, t1", SPANS)
def test_event_time_within_one_jump(name, t0, t1):
    solver, controller = SOLVERS[name]
    sol = jump_solve(
        EXACT,
        t0,
        t1,
        X,
        level_of(t0, t1),
        steps=1,
        solver=solver,
        stepsize_controller=controller,
        event=EXACTLY,
    )
    assert sol.result == diffrax.RESULTS.event_occurred
    assert_close(sol.ts[0], t0 + 0.4 * (t1 - t0), 1e-8, 1e-8)
    assert_close(sol.ys[0], EXACT(t0, sol.ts[0], X), 1e-8, 1e-8)


def test_event_time_equals_diffrax():
    # Backwards: Dopri8's interpolant is good for half of its digits.
    level = level_of(0.85, 0.2)
    sol = jump_solve(EXACT, 0.85, 0.2, X, level, steps=1, event=EXACTLY)
    truth = tight_solve(EXACT.velocity, 0.85, 0.2, X, level, event=EXACTLY)
    assert_close(sol.ts, truth.ts, 1e-6, 1e-6)


def test_no_event_changes_nothing():
    sol = jump_solve(EXACT, 0.85, 0.2, X, 100.0, steps=1, event=EXACTLY)
    assert sol.result == diffrax.RESULTS.successful
    assert_close(sol.ys[0], EXACT(0.85, 0.2, X), 1e-8, 1e-8)


def test_first_of_several_events():
    early, late = level_of(0.1, 0.9), EXACT(0.1, 0.8, X)[0]
    conditions = {
        "late": lambda t, y, args, **kwargs: y[0] - args[1],
        "early": lambda t, y, args, **kwargs: y[0] - args[0],
    }
    event = diffrax.Event(conditions, NEWTON)
    sol = jump_solve(EXACT, 0.1, 0.9, X, (early, late), event=event)
    assert sol.event_mask["early"] and not sol.event_mask["late"]
    assert_close(sol.ts[0], 0.42, 1e-8, 1e-8)


@pytest.mark.parametrize("rising", [True, False])
def test_event_of_a_direction(rising):
    # A crossing is seen along the way of integration, whichever that is.
    event = diffrax.Event(crossing, direction=rising)
    for t0, t1 in SPANS:
        sol = jump_solve(EXACT, t0, t1, X, level_of(t0, t1), event=event)
        happened = sol.result == diffrax.RESULTS.event_occurred
        assert happened == (rising == bool(EXACT(t0, t1, X)[0] > X[0]))


def test_boolean_event_ends_after_its_step():
    past = lambda t, y, args, **kwargs: y[0] > args
    for root_finder in (None, NEWTON):
        event = diffrax.Event(past, root_finder)
        sol = jump_solve(EXACT, 0.1, 0.9, X, level_of(0.1, 0.9), event=event)
        assert_close(sol.ts[0], 0.5)
        assert_close(sol.ys[0], EXACT(0.1, 0.5, X))


def test_steady_state_is_that_of_the_term():
    # The conditions ask `solver.func`, which must be the field and not the map.
    flow_map = fd.exact.LinearFlowMap([[-1.2, -1.1], [0.7, -0.9]], [0.3, -0.1])
    event = diffrax.Event(
        diffrax.steady_state_event(rtol=0.0, atol=1e-6, norm=optx.rms_norm)
    )
    sol = jump_solve(flow_map, 0.0, 100.0, X, steps=100, max_steps=100, event=event)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert optx.rms_norm(flow_map.velocity(0.0, sol.ys[0])) < 1e-6
    before = flow_map.velocity(0.0, flow_map(0.0, sol.ts[0] - 1, X))
    assert optx.rms_norm(before) > 1e-6


def test_event_deletes_what_comes_after():
    ts = jnp.asarray([0.2, 0.4, 0.45, 0.9])
    saveat = diffrax.SaveAt(ts=ts, t1=True, dense=True)
    level = level_of(0.1, 0.9)
    sol = jump_solve(EXACT, 0.1, 0.9, X, level, steps=1, saveat=saveat, event=EXACTLY)
    assert_close(sol.ts[:3], jnp.asarray([0.2, 0.4, 0.42]), 1e-8, 1e-8)
    assert jnp.all(jnp.isinf(sol.ts[3:]))
    truth = jax.vmap(lambda t: EXACT(0.1, t, X))(sol.ts[:3])
    assert_close(sol.ys[:3], truth, 1e-8, 1e-8)
    assert_close(sol.evaluate(0.3), EXACT(0.1, 0.3, X), 1e-8, 1e-8)


@pytest.mark.parametrize("event, fraction", [(SOON, 0.5), (EXACTLY, 0.4)])
def test_events_under_vmap(event, fraction):
    t0, t1 = jnp.asarray([0.1, 0.85, 0.1]), jnp.asarray([0.9, 0.2, 0.9])
    levels = jnp.asarray([level_of(0.1, 0.9), level_of(0.85, 0.2), 100.0])
    run = lambda t0, t1, level: jump_solve(EXACT, t0, t1, X, level, event=event)
    sol = jax.vmap(run)(t0, t1, levels)
    happened = sol.result == diffrax.RESULTS.event_occurred
    assert happened.tolist() == [True, True, False]
    fractions = jnp.asarray([fraction, fraction, 1.0])
    assert_close(sol.ts[:, 0], t0 + fractions * (t1 - t0), 1e-8, 1e-8)
    truth = jax.vmap(lambda s, t: EXACT(s, t, X))(t0, sol.ts[:, 0])
    assert_close(sol.ys[:, 0], truth, 1e-8, 1e-8)


def test_event_with_args_of_any_kind():
    args = {"shift": X, "fn": jnp.tanh, "none": None, "name": "a", "key": jr.key(3)}
    flow_map = lambda s, t, x, args: x + (t - s) * args["fn"](args["shift"])
    # The first entry reaches its value half way.
    half_way = lambda t, y, args, **kwargs: (
        y[0] - args["shift"][0] + 0.4 * args["fn"](args["shift"][0])
    )
    event = diffrax.Event(half_way, NEWTON)
    with jax.debug_key_reuse(False):
        sol = jump_solve(
            flow_map, 0.9, 0.1, X, args, field=nonlinear_field, steps=1, event=event
        )
    assert_close(sol.ts[0], 0.5)


def falls(t, y, args):
    return jnp.stack([y[1], -2.0])


def fallen(s, t, y, args):
    h = t - s
    return jnp.stack([y[0] + y[1] * h - h**2, y[1] - 2 * h])


# Thrown upwards from the ground, backwards in time as well: its height is h (4 - h).
UP = {1.0: jnp.asarray([0.0, 4.0]), -1.0: jnp.asarray([0.0, -4.0])}
CONTROLLER = diffrax.PIDController(rtol=1e-6, atol=1e-6)
height = lambda level: lambda t, y, args, **kwargs: y[0] - level
slower = lambda t, y, args, **kwargs: jnp.abs(y[1]) - 3.0
above = lambda t, y, args, **kwargs: (y[0] > 3.0) & (jnp.abs(y[1]) > 1.6)
THROWN = {
    "solver of a map": fd.FlowMapSolver(fallen),
    "hybrid": fd.HybridSolver(fallen),
    "explicit": diffrax.Tsit5(),
    "implicit": diffrax.Kvaerno5(),
}


def throw(solver, conditions, way=1.0, shorten=True, **kwargs):
    event = diffrax.Event(conditions, NEWTON)
    solver = fd.solvers.EventSolver(solver, event) if shorten else solver
    return diffrax.diffeqsolve(
        diffrax.ODETerm(falls),
        solver,
        0.5,
        0.5 + 3.9 * way,
        8.0 * way,
        UP[way],
        stepsize_controller=CONTROLLER,
        event=event,
        **kwargs,
    )


@pytest.mark.parametrize(
    "name, way",
    [
        ("solver of a map", 1.0),
        ("solver of a map", -1.0),
        ("hybrid", -1.0),
        ("explicit", 1.0),
        ("implicit", 1.0),
    ],
)
def test_condition_that_a_long_step_meets_twice(name, way):
    solver, level = THROWN[name], height(1.0)
    if name == "explicit":
        missed = throw(solver, level, way, shorten=False)
        assert missed.result == diffrax.RESULTS.successful
    sol = throw(solver, level, way)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert_close((sol.ts[0] - 0.5) * way, 2 - 3**0.5, 1e-8)
    assert_close(sol.ys[0, 0], 1.0, 1e-8)


def test_earliest_of_two_conditions_in_a_long_step():
    conditions = {"first": height(2.0), "second": slower}
    late = throw(THROWN["explicit"], conditions, shorten=False)
    assert not late.event_mask["second"]
    for name in ("solver of a map", "explicit"):
        sol = throw(THROWN[name], conditions)
        assert sol.event_mask == {"first": False, "second": True}
        assert_close(sol.ts[0], 1.0, 1e-8)


def test_conditions_that_are_met_at_the_same_time():
    sol = throw(THROWN["solver of a map"], [height(3.0), height(3.0)], max_steps=200)
    assert sol.event_mask == [True, False]
    assert_close(sol.ts[0], 1.5, 1e-8)


def test_boolean_condition_that_holds_for_a_short_time():
    # For a twentieth of the interval, from 1 on, and again before 3.
    sol = throw(THROWN["solver of a map"], above, way=1.0)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert above(None, sol.ys[0], None)


def test_without_events_steps_are_as_long_as_before():
    never = height(100.0)
    sol = throw(THROWN["explicit"], never)
    plain = throw(THROWN["explicit"], never, shorten=False)
    assert_close((sol.ts, sol.ys, sol.stats), (plain.ts, plain.ys, plain.stats))
    sol = throw(THROWN["solver of a map"], never)
    assert sol.stats["num_steps"] == 1


def test_gradient_and_batch_of_shortened_steps():
    def time_of(level):
        return throw(THROWN["solver of a map"], height(level)).ts[0]

    levels = jnp.asarray([1.0, 3.0, 3.75])
    ts, slopes = jax.vmap(jax.value_and_grad(time_of))(levels)
    assert_close(ts, 2.5 - jnp.sqrt(4 - levels), 1e-8)
    assert_close(slopes, 0.5 / jnp.sqrt(4 - levels), 1e-6)


def test_bad_arguments_of_an_event_solver():
    event = diffrax.Event(crossing)
    with without_type_checks():
        with pytest.raises(TypeError, match="`event` must be a `diffrax.Event`; got"):
            fd.solvers.EventSolver(PLAIN, crossing)
        with pytest.raises(TypeError, match="`solver` must be a `diffrax.Abstract"):
            fd.solvers.EventSolver(EXACT, event)
    with pytest.raises(ValueError, match="`num_points` must be at least 1; got 0"):
        fd.solvers.EventSolver(PLAIN, event, 0)


def test_what_counts_as_several_events():
    times, still, moved = jnp.linspace(0.0, 1.0, 3), jnp.ones(2), jnp.asarray([1.0, 2.0])
    signs = lambda *rows: jnp.asarray(rows, bool)
    apart = signs([0, 0], [1, 0], [0, 0])  # one condition, twice
    together = signs([0, 0], [1, 1], [1, 1])  # two, at once
    assert _several(apart, times, still, still)
    assert not _several(signs([0, 0], [1, 0], [1, 0]), times, still, moved)
    # At the same time, unless the step could be shortened to tell which is first.
    assert _several(together, times, still, moved)
    assert not _several(together, times, still, still)
    assert not _several(together, 1 + 1e-9 * times, still, moved)


@pytest.mark.parametrize("num_points, is_seen", [(1, False), (3, True)])
def test_points_are_spread_evenly_over_the_step(num_points, is_seen):
    # Three points of a step from 0 to 1 are at 0.25, 0.5 and 0.75.
    event = diffrax.Event(lambda t, y, args, **kwargs: jnp.abs(t - 0.75) < 0.01)
    solver = fd.solvers.EventSolver(fd.FlowMapSolver(fallen), event, num_points)
    term, y0 = diffrax.ODETerm(falls), UP[1.0]
    state = solver.init(term, 0.0, 1.0, y0, None)
    _, error, *_ = solver.step(
        term, jnp.asarray(0.0), jnp.asarray(1.0), y0, None, state, False
    )
    assert jnp.isinf(error).all() == is_seen
