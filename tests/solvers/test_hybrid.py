"""`HybridSolver`: jumps where their estimate allows them, classical steps elsewhere."""

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    max_abs,
    mlp_map,
    tight_solve,
    without_type_checks,
)

import flowdiffrax as fd
from flowdiffrax.solvers._hybrid import can_correct
from flowdiffrax.solvers._predict import is_hopeless

X = jnp.asarray([0.8, -0.5])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
EXACT = gaussian_map()
FIELD = EXACT.velocity


class Flawed(eqx.Module):
    """The exact map with an error, and NaN from times before `first` or after `last`.

    The flaws are arrays, so that all such maps are compiled once.
    """

    first: jax.Array
    last: jax.Array
    slope: jax.Array
    wave: jax.Array

    def __call__(self, s, t, x, args):
        y = EXACT(s, t, x) + self.slope * (t - s) + self.wave * jnp.sin(t - s)
        return jnp.where((self.first <= s) & (s <= self.last), y, jnp.nan)


def flawed(first=-jnp.inf, last=jnp.inf, slope=0.0, wave=0.0):
    return Flawed(*map(jnp.asarray, (first, last, slope, wave)))


def identity(s, t, x, args):
    return x


MAPS = {
    "exact": flawed(),
    "untrained": mlp_map(),
    "nan": flawed(first=jnp.inf),
    "nan-early": flawed(first=0.4),
}


def solve(
    flow_map,
    t0=0.1,
    t1=0.9,
    x=X,
    *,
    field=FIELD,
    fallback=None,
    tol=1e-6,
    saveat=None,
    options=None,
    **kwargs,
):
    """`diffeqsolve` with a hybrid, from a first step of the whole interval."""
    fallback = diffrax.Tsit5() if fallback is None else fallback
    # Arrays, so that other times and tolerances compile nothing.
    t0, t1, tol = map(jnp.asarray, (t0, t1, tol))
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    saveat = diffrax.SaveAt(t1=True, solver_state=True) if saveat is None else saveat
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        fd.HybridSolver(flow_map, fallback, **({} if options is None else options)),
        t0,
        t1,
        2 * (t1 - t0),
        x,
        saveat=saveat,
        **{"stepsize_controller": controller, **kwargs},
    )


def counts(sol):
    return int(sol.solver_state.num_learned), int(sol.solver_state.num_classical)


# What is promised


def pulse(t, x, onset):
    """Decay, and a push of half a time unit that `decay` knows nothing of."""
    is_on = (t >= onset) & (t < onset + 0.5)
    return jnp.where(is_on, 5.0, 0.0) - x


def decay(s, t, x, args):
    return x * jnp.exp(s - t)


@jax.jit
def errors_after_pulses(dtmax, later):
    """Of the hybrid and of Tsit5, told of each pulse so much later; and the jumps."""

    def errors(onset):
        ends = jnp.stack([onset, onset + 0.5])
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=dtmax),
            jump_ts=ends + later,
        )
        exact = X * jnp.exp(-4.0) + 5 * (jnp.exp(ends[1] - 4) - jnp.exp(onset - 4))

        def error(solver):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(pulse),
                solver,
                0.0,
                4.0,
                8.0,
                X,
                args=onset,
                stepsize_controller=controller,
                saveat=diffrax.SaveAt(t1=True, solver_state=True),
            )
            return jnp.max(jnp.abs(sol.ys[0] - exact)), sol.solver_state

        found, state = error(fd.HybridSolver(decay))
        return found, error(diffrax.Tsit5())[0], state.num_learned

    return jax.vmap(errors)(jnp.linspace(0.1, 3.4, 12))


@pytest.mark.parametrize(
    "dtmax, later",
    [(10.0, 0.0), (0.5, 10.0)],
    ids=["steps that end there", "short steps"],
)
def test_short_events_are_missed_no_more_than_by_a_classical_solver(dtmax, later):
    found, classical, learned = errors_after_pulses(dtmax, later)
    assert jnp.max(found) < 1.5 * jnp.max(classical) + 1e-3 < 0.2
    assert jnp.min(learned) >= 1


@pytest.mark.parametrize("t0, t1", SPANS)
def test_good_map_is_one_jump(t0, t1):
    sol = solve(MAPS["exact"], t0, t1)
    assert counts(sol) == (1, 0)
    assert sol.stats["num_steps"] == 1
    assert_close(sol.ys[0], EXACT(t0, t1, X), 1e-8, 1e-8)


FALLBACKS = {
    "tsit5": diffrax.Tsit5(),
    "dopri8": diffrax.Dopri8(),
    "bosh3": diffrax.Bosh3(),
    "kvaerno5": diffrax.Kvaerno5(),
    "implicit": diffrax.Kvaerno3(
        root_finder=diffrax.VeryChord(rtol=1e-8, atol=1e-8, norm=optx.rms_norm)
    ),
    "half": diffrax.HalfSolver(diffrax.Heun()),
    "reversible": diffrax.ReversibleHeun(),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [k if k == "tsit5" else slow(k) for k in FALLBACKS])
@pytest.mark.parametrize("t0, t1", SPANS[1:])
def test_useless_map_leaves_the_classical_solution(name, t0, t1):
    # All but the steps that are too long, with which the map is tried.
    sol = solve(MAPS["nan"], t0, t1, fallback=FALLBACKS[name], tol=1e-5)
    truth = diffrax.diffeqsolve(
        diffrax.ODETerm(FIELD),
        FALLBACKS[name],
        jnp.asarray(t0),
        jnp.asarray(t1),
        jnp.asarray(2 * (t1 - t0)),
        X,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
    )
    assert counts(sol)[0] == 0
    assert sol.stats["num_steps"] <= 1.25 * truth.stats["num_steps"]
    exact = EXACT(t0, t1, X)
    assert max_abs(sol.ys[0] - exact) <= 2 * max_abs(truth.ys[0] - exact) + 1e-6


@jax.jit
def halved(flow_map):
    sol = solve(flow_map, fallback=diffrax.HalfSolver(diffrax.Euler()), tol=1e-3)
    return sol.ys[0], sol.solver_state[:2]


@pytest.mark.parametrize("flow_map, learned", [(flawed(), 1), (flawed(first=9.0), 0)])
def test_solver_of_half_steps_as_the_fallback(flow_map, learned):
    # Its own estimate comes from two steps of half the length.
    y, (num_learned, num_classical) = halved(flow_map)
    assert num_learned == learned and (num_classical > 1) == (learned == 0)
    assert max_abs(y - EXACT(0.1, 0.9, X)) < 2e-2


@pytest.mark.parametrize(
    "name, t0, t1",
    [("tsit5", 0.1, 0.9), ("tsit5", 0.85, 0.2), slow("kvaerno5", 0.1, 0.9)]
    + [("reversible", 0.1, 0.9), slow("half", 0.85, 0.2)],
)
def test_classical_solver_starts_anew_after_a_jump(name, t0, t1):
    # What it remembers of before the jump would spoil its first step after it.
    switch = 0.5
    at_first = flawed(last=0.49) if t0 < t1 else flawed(first=0.51)
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-5, atol=1e-5), step_ts=jnp.asarray([switch])
    )
    sol = solve(
        at_first, t0, t1, fallback=FALLBACKS[name], stepsize_controller=controller
    )
    assert counts(sol)[0] >= 1 and counts(sol)[1] >= 1
    assert max_abs(sol.ys[0] - EXACT(t0, t1, X)) < 1e-3


@hypothesis.given(
    seed=st.integers(0, 50),
    gain=st.floats(0.0, 30.0),
    backwards=st.booleans(),
    tol=st.sampled_from([1e-3, 1e-5, 1e-7]),
)
def test_any_map_keeps_the_tolerance(seed, gain, backwards, tol):
    # A field that neither grows nor shrinks errors much, and maps from nearly still to
    # wild: what the classical solver promises is what comes out.
    t0, t1 = (1.5, -0.5) if backwards else (-0.5, 1.5)
    wild = Wild(mlp_map(seed), jnp.asarray(gain))
    error = error_in_rotation(wild, jnp.asarray(t0), jnp.asarray(t1), jnp.asarray(tol))
    assert error < 20 * tol


class Wild(eqx.Module):
    net: fd.FlowMap
    gain: jax.Array

    def __call__(self, s, t, x, args):
        return x + self.gain * (t - s) * self.net.average_velocity(s, t, x)


@eqx.filter_jit
def error_in_rotation(flow_map, t0, t1, tol):
    y0, signs = jnp.asarray([0.6, 0.3]), jnp.asarray([-1.0, 1.0])
    field = lambda t, x, args: (1 + t) * signs * x[::-1]
    sol = solve(flow_map, t0, t1, y0, field=field, tol=tol)
    angle = t1 - t0 + 0.5 * (t1**2 - t0**2)
    c, s = jnp.cos(angle), jnp.sin(angle)
    end = jnp.stack([c * y0[0] - s * y0[1], s * y0[0] + c * y0[1]])
    return jnp.max(jnp.abs(sol.ys[0] - end))


@hypothesis.given(
    seed=st.integers(0, 50),
    gain=st.floats(0.0, 3.0),
    off=st.floats(-7.0, 0.0),
    tol=st.sampled_from([1e-2, 1e-4]),
)
def test_any_map_keeps_the_tolerance_of_a_stiff_system(seed, gain, off, tol):
    # From wild maps to nearly exact ones, which a good estimate lets pass.
    wild = Wild(mlp_map(seed), jnp.asarray(gain))
    error, _ = error_in_kaps(wild, jnp.asarray(10.0**off), jnp.asarray(tol))
    assert error < 20 * tol


def test_good_map_of_a_stiff_system_is_one_jump():
    wild = Wild(mlp_map(), jnp.asarray(1.0))
    # The residuals, of the fast direction, are large.
    assert error_in_kaps(wild, jnp.asarray(1e-5), jnp.asarray(1e-3))[1] == (1, 0)


@eqx.filter_jit
def error_in_kaps(wild, off, tol):
    """Kaps' problem: from (1, 1) it goes to (exp(-2t), exp(-t)), however stiff it is."""
    fast = 1e6

    def field(t, x, args):
        return jnp.stack([-(2 + fast) * x[0] + fast * x[1] ** 2, x[0] - x[1] - x[1] ** 2])

    def flow_map(s, t, x, args):
        # From any state on the slow solution through its second entry.
        y = x[1] * jnp.exp(s - t)
        return jnp.stack([y**2, y]) + off * (wild(s, t, x, args) - x)

    sol = solve(
        flow_map,
        0.0,
        2.0,
        jnp.ones(2),
        field=field,
        fallback=diffrax.Kvaerno5(),
        tol=tol,
    )
    truth = jnp.exp(jnp.asarray([-4.0, -2.0]))
    state = sol.solver_state
    error = jnp.max(jnp.abs(sol.ys[0] - truth))
    return error, (state.num_learned, state.num_classical)


NEWTON = optx.Newton(1e-6, 1e-10)


def onto_a_wave(t, x, args):
    return -100 * (x - jnp.cos(t)) - jnp.sin(t)


def along_a_wave(s, t, x, args):
    return jnp.cos(t) + (x - jnp.cos(s)) * jnp.exp(-100 * (t - s))


@eqx.filter_jit
def follow(x, ts, dt0, tol, stepsize_controller=None):
    fallback = diffrax.Kvaerno5(root_finder=NEWTON)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(onto_a_wave),
        fd.HybridSolver(along_a_wave, fallback, rtol=tol, atol=tol),
        0.0,
        ts[-1],
        dt0,
        x,
        saveat=diffrax.SaveAt(ts=ts, solver_state=True),
        stepsize_controller=stepsize_controller or diffrax.PIDController(tol, tol),
    )


@pytest.mark.parametrize("end, start, tol", [(480, 480, 1e-6), (300, 1e-3, 1e-3)])
def test_nodes_that_miss_most_periods_of_a_stiff_system(end, start, tol):
    ts = jnp.linspace(0.0, end, 31)[1:]
    sol = follow(jnp.asarray(1.5), ts, *map(jnp.asarray, (start, tol)))
    assert max_abs(sol.ys - jnp.cos(ts)) < 3 * tol
    # Kvaerno5 takes 284 steps at the looser tolerance, and 5,800 at the other.
    assert sol.stats["num_steps"] < 200


def test_long_fixed_steps_of_a_stiff_system():
    # Where nothing controls the steps, none can be refused.
    x, ts, tol = jnp.asarray(1.5), jnp.asarray([0.5, 40.0]), jnp.asarray(1e-8)
    how = {"stepsize_controller": diffrax.StepTo(jnp.asarray([0.0, 1e-3, 0.5, 40.0]))}
    sol = follow(x, ts, None, tol, **how)
    assert sol.solver_state.num_classical > 0
    how |= {"saveat": diffrax.SaveAt(ts=ts)}
    term, solver = diffrax.ODETerm(onto_a_wave), diffrax.Kvaerno5(root_finder=NEWTON)
    alone = diffrax.diffeqsolve(term, solver, 0.0, 40.0, None, x, **how)
    assert_close(sol.ys, alone.ys, 1e-5)


class Shortcut(eqx.Module):
    """Follows x' = -x from soon after the start on, a tenth off."""

    rate: jax.Array
    offset: jax.Array

    def __call__(self, s, t, x, args):
        h = t - s
        return (x + 0.1 * jnp.tanh(self.rate * h) + self.offset) * jnp.exp(-h)


SHORTCUTS = {"fast": (10.0, 0.0), "faster": (50.0, 0.0), "no identity": (0.0, 0.1)}


def downwards(t, x, args):
    return -x


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_wrong_from_the_start(name, size):
    flow_map = Shortcut(*map(jnp.asarray, SHORTCUTS[name]))
    sol = solve(flow_map, 0.0, 2.0, jnp.ones(size), field=downwards, tol=1e-4)
    assert_close(sol.ys[0], np.full(size, np.exp(-2.0)), 1e-3)


def test_layer_with_a_wrong_effect():
    # The first entry falls within 1e-3, and leaves half of itself with the second.
    field = lambda t, x, args: jnp.stack([-1e3 * x[0], 500 * x[0] - 0.1 * x[1]])

    def flow_map(s, t, x, args):
        fallen = jnp.exp(-1e3 * (t - s))
        second = x[1] + 0.45 * x[0] * (1 - fallen)  # should be 0.50005
        return jnp.stack([x[0] * fallen, second * jnp.exp(-0.1 * (t - s))])

    sol = solve(
        flow_map,
        0.0,
        5.0,
        jnp.ones(2),
        field=field,
        fallback=diffrax.Kvaerno5(),
        tol=1e-4,
    )
    end = (1 + 500 / (1e3 - 0.1)) * np.exp(-0.5)
    assert_close(sol.ys[0], np.asarray([0.0, end]), 1e-3)


@pytest.mark.parametrize("size", [1e-7, 1e-2])
def test_error_of_the_map_is_corrected(size):
    sol = solve(flawed(wave=size), tol=1e-4)
    assert counts(sol)[0] > 0
    assert max_abs(sol.ys[0] - EXACT(0.1, 0.9, X)) < 1e-4


def test_map_serves_where_it_is_good():
    # NaN at first and exact afterwards: both kinds of step in one solve.
    sol = solve(flawed(first=0.2), 0.1, 0.9, tol=1e-10)
    assert counts(sol)[0] > 0 and counts(sol)[1] > 0
    assert max_abs(sol.ys[0] - EXACT(0.1, 0.9, X)) < 1e-8


def test_out_of_its_time_range_the_map_is_not_asked():
    flow_map = fd.FlowMap(lambda s, t, x, args: 0 * x, time_range=(0.0, 0.5))
    sol = solve(flow_map, field=lambda t, x, args: jnp.where(t < 0.5, 0 * x, x))
    assert counts(sol)[1] > 0
    assert_close(sol.ys[0], X * np.exp(0.4), 1e-3, 1e-3)


def test_refused_map_is_left_alone_for_longer_and_longer():
    given = {"rtol": 1e-8, "atol": 1e-8, "norm": optx.rms_norm}
    term = diffrax.ODETerm(FIELD)
    state = diffrax.diffeqsolve(
        term,
        fd.HybridSolver(identity, **given),
        0.0,
        1.0,
        1 / 16,
        X,
        saveat=diffrax.SaveAt(t0=True, steps=True, solver_state=True),
        stepsize_controller=diffrax.ConstantStepSize(),
        max_steps=64,
    ).solver_state
    # At the first, and not for the next four. The sixth is not long enough.
    assert state.wait == 16 - (16 - 6) and state.patience == 16
    impatient = fd.HybridSolver(identity, max_wait=2, **given)
    assert impatient.init(term, 0.0, 1 / 16, X, None).patience == 2


# Tolerances


@pytest.mark.parametrize("name", ["tsit5", slow("kvaerno5")])
def test_tolerances_with_fixed_steps(name):
    given = {"rtol": 1e-6, "atol": 1e-6}
    controller = diffrax.ConstantStepSize()
    run = lambda flow_map: solve(
        flow_map,
        0.1,
        0.15,
        fallback=FALLBACKS[name],
        options=given,
        stepsize_controller=controller,
    )
    assert counts(run(MAPS["exact"])) == (1, 0)
    assert counts(run(MAPS["nan"])) == (0, 1)


def test_fixed_steps_without_tolerances():
    with pytest.raises(ValueError, match="fixed step size controller"):
        solve(EXACT, stepsize_controller=diffrax.ConstantStepSize())


def test_manual_steps():
    term = diffrax.ODETerm(FIELD)
    solver = fd.HybridSolver(EXACT, rtol=1e-6, atol=1e-6)
    state = solver.init(term, 0.1, 0.9, X, None)
    y1, *_, state, result = solver.step(term, 0.1, 0.9, X, None, state, False)
    assert state.num_learned == 1 and result == diffrax.RESULTS.successful
    assert_close(y1, EXACT(0.1, 0.9, X), 1e-8, 1e-8)
    with pytest.raises(ValueError, match="give `HybridSolver` `rtol`"):
        fd.HybridSolver(EXACT).init(term, 0.1, 0.9, X, None)


LARGE = jnp.linspace(1.0, 2.0, 40)  # too large for Newton steps


def still(t, x, args):
    return 0 * x


def drifting(s, t, x, args):
    """In error by `args`, after a jump of 0.8."""
    return x + args * (t - s) / 0.8


@eqx.filter_jit
def one_step(error, state, t1, safety=0.5, atol=1.0, fallback=diffrax.Tsit5()):  # noqa: B008
    """A step from 0.1 to `t1`, where a jump of 0.8 has this error; or the first state."""
    hybrid = fd.HybridSolver(
        drifting, fallback, safety=safety, rtol=0.0, atol=atol, norm=optx.max_norm
    )
    term = diffrax.ODETerm(still)
    if state is None:
        return hybrid.init(term, 0.1, t1, LARGE, error)
    return hybrid.step(term, 0.1, t1, LARGE, error, state, False)


@pytest.mark.parametrize("safety", [0.5, 0.1])
def test_jump_may_use_its_share_of_the_tolerance(safety):
    def run(share):
        at = jnp.asarray(share * safety * 1e-3), jnp.asarray(0.9), safety, 1e-3
        start = one_step(at[0], None, *at[1:])
        return one_step(at[0], start, *at[1:])

    y1, error, _, state, _ = run(0.9)
    assert state.num_learned == 1
    assert_close(y1, LARGE + 0.9 * safety * 1e-3)
    # The controller is to see how much of its share was used, in terms of its own order.
    assert_close(jnp.max(error), jnp.asarray(1e-3 * 0.9 ** (5 / 4)))
    y1, error, _, state, _ = run(1.1)
    assert state.num_learned == 0
    assert_close(y1, LARGE)


def test_what_a_failure_costs():
    # Half of the tolerance is the most, and half of that is still no help.
    fine, poor, bad = 0.1, 0.3, 0.9
    t1 = jnp.asarray(0.9)
    state = one_step(jnp.asarray(0.0), None, t1)
    seen = []
    for error, num in ((poor, 1), (bad, 4), (bad, 1), (bad, 16), (bad, 1), (fine, 65)):
        for _ in range(num):
            state = state._replace(shortest=0 * state.shortest)
            state = one_step(jnp.asarray(error), state, t1)[3]
        seen.append((int(state.wait), int(state.patience), int(state.num_learned)))
    assert seen == [
        (4, 16, 1),  # taken, and then left alone
        (0, 16, 1),
        (16, 64, 1),
        (0, 64, 1),
        (64, 64, 1),  # and no longer than that
        (0, 4, 2),  # all is forgiven
    ]


def test_a_jump_is_longer_than_the_classical_steps_that_it_costs():
    step = lambda error, state, t1: one_step(jnp.asarray(error), state, jnp.asarray(t1))
    state = step(0.9, step(0.0, None, 0.9), 0.9)[3]
    assert_close(state.shortest, jnp.asarray(0.8))
    state = state._replace(wait=0 * state.wait)
    for t1, learned in ((0.1 + 2.6 * 0.8, 0), (0.1 + 2.7 * 0.8, 1)):
        assert int(step(0.0, state, t1)[3].num_learned) == learned


# Corrections


def growth(t, x, args):
    """Logistic growth, and its integral."""
    return jnp.stack([args * x[0] * (1 - x[0]), x[0]])


def grown(s, t, x, args):
    more = x[0] * jnp.expm1(args * (t - s))
    return jnp.stack([(x[0] + more) / (1 + more), x[1] + jnp.log1p(more) / args])


class OffGrowth(eqx.Module):
    """The flow of `growth`, with an error, and with derivatives that are all wrong."""

    size: jax.Array
    frequency: jax.Array

    def __call__(self, s, t, x, args):
        wave = jnp.sin(self.frequency * (t - s) + x) * -jnp.expm1(-jnp.abs(t - s))
        return jax.lax.stop_gradient(grown(s, t, x, args) + self.size * wave)


SEED, RATE = jnp.asarray([0.5, -0.4]), jnp.asarray(1.0)


def grow(flow_map, t0=0.0, t1=3.0, x=SEED, args=RATE, **kwargs):
    return solve(flow_map, t0, t1, x, field=growth, args=args, **kwargs)


@pytest.mark.parametrize("t0, t1", [(0.0, 3.0), slow(2.0, -1.0)])
@pytest.mark.parametrize("times_tol", [10, slow(300)])
def test_a_jump_that_is_off_is_corrected(t0, t1, times_tol):
    tol = 1e-5
    flow_map = OffGrowth(jnp.asarray(times_tol * tol), jnp.asarray(2.0))
    truth = grown(t0, t1, SEED, RATE)
    assert max_abs(flow_map(t0, t1, SEED, RATE) - truth) > times_tol * tol / 5
    sol = grow(flow_map, t0, t1, tol=tol)
    assert counts(sol)[1] == 0
    assert max_abs(sol.ys[0] - truth) < tol


def test_many_nodes_in_single_precision():
    x, times = X.astype(jnp.float32), jnp.asarray([0.0, 1.0], jnp.float32)
    flow_map = lambda s, t, x, args: x * jnp.exp(s - t)
    options = {"num_nodes": 64}
    sol = solve(flow_map, *times, x, field=downwards, tol=1e-3, options=options)
    assert counts(sol)[0] == 1


def test_an_error_that_oscillates_is_no_larger_for_that():
    # Its time derivative is 30 times as large.
    sol = grow(OffGrowth(jnp.asarray(1e-6), jnp.asarray(30.0)), tol=1e-4)
    assert counts(sol) == (1, 0)


def test_dense_output_of_a_corrected_jump():
    ts = jnp.linspace(0.0, 3.0, 7)
    truth = jax.vmap(lambda t: grown(0.0, t, SEED, RATE))(ts)
    flow_map = OffGrowth(jnp.asarray(1e-3), jnp.asarray(2.0))
    sol = grow(flow_map, saveat=diffrax.SaveAt(ts=ts, dense=True, solver_state=True))
    assert counts(sol)[1] == 0
    assert_close(sol.ys, truth, 1e-5, 1e-5)
    assert_close(jax.vmap(sol.evaluate)(ts), truth, 1e-5, 1e-5)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_gradients_of_a_corrected_jump(mode):
    # In the state, the parameters and the end, of a map whose own are zero.
    flow_map = OffGrowth(jnp.asarray(1e-3), jnp.asarray(2.0))
    reverse = mode == "reverse"
    adjoint = diffrax.RecursiveCheckpointAdjoint() if reverse else diffrax.ForwardMode()

    def run(x, args, t1):
        sol = grow(flow_map, t1=t1, x=x, args=args, tol=1e-6, adjoint=adjoint)
        return jnp.sum(jnp.sin(sol.ys))

    def truth(x, args, t1):
        return jnp.sum(jnp.sin(grown(0.0, t1, x, args)))

    at = SEED, RATE, jnp.asarray(3.0)
    assert counts(grow(flow_map, tol=1e-6))[1] == 0
    if reverse:
        found = jax.jit(jax.grad(run, (0, 1, 2)))(*at)
    else:
        found = jax.jit(jax.jacfwd(run, (0, 1, 2)))(*at)
    assert_close(found, jax.jit(jax.grad(truth, (0, 1, 2)))(*at), 1e-5, 1e-5)


@pytest.mark.parametrize("size", [8, slow(32), 33])
def test_states_that_are_corrected(size):
    # Beyond 32 entries, a jump is taken as it is or not at all.
    rates = jnp.linspace(0.1, 1.0, size)
    field = lambda t, x, args: -rates * x
    off = lambda s, t, x, args: x * jnp.exp((s - t) * rates) + 1e-3 * jnp.sin(t - s)
    sol = solve(off, x=jnp.ones(size), field=field, tol=1e-4)
    assert (counts(sol)[0] > 0) == (size <= 32)
    assert_close(sol.ys[0], jnp.exp(-0.8 * rates), 1e-4, 1e-4)


# What Diffrax offers


@pytest.mark.parametrize(
    "name, t0, t1",
    [slow("exact", 0.1, 0.9), slow("nan", 0.85, 0.2)]
    + [slow("nan-early", 0.1, 0.9), ("nan-early", 0.85, 0.2)],
)
def test_saved_times_and_dense_output(name, t0, t1):
    ts = jnp.linspace(t0, t1, 6)
    saveat = diffrax.SaveAt(ts=ts, dense=True)
    sol = solve(MAPS[name], t0, t1, saveat=saveat, tol=1e-8, max_steps=64)
    truth = tight_solve(FIELD, t0, t1, X, saveat=diffrax.SaveAt(ts=ts))
    assert_close(sol.ys, truth.ys, 1e-5, 1e-5)
    dense = jax.vmap(sol.evaluate)(ts)
    assert_close(dense, sol.ys, 1e-6, 1e-6)


@pytest.mark.parametrize("name", ["exact", slow("nan"), slow("nan-early")])
def test_event_within_a_step(name):
    # It moves steadily, so that the first entry takes every value once.
    x = jnp.asarray([-1.5, 0.7])
    level = EXACT(0.1, 0.45, x)[0]
    event = diffrax.Event(
        lambda t, y, args, **kwargs: y[0] - level, optx.Newton(rtol=1e-10, atol=1e-10)
    )
    sol = solve(MAPS[name], x=x, event=event, tol=1e-8)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert_close(sol.ts[0], 0.45, 1e-5, 1e-5)


def test_batch_equals_each_alone():
    # Some lanes jump and some do not, in both directions of time.
    run = lambda t0, t1, x: solve(MAPS["nan-early"], t0, t1, x)
    t0 = jnp.asarray([0.1, 0.9, 0.5, 0.5, 0.3])
    t1 = jnp.asarray([0.9, 0.1, 0.9, 0.5, 0.35])
    xs = jr.normal(jr.key(0), (5, 2))
    batch = jax.jit(jax.vmap(run))(t0, t1, xs)
    for k in range(5):
        single = run(t0[k], t1[k], xs[k])
        assert_close(batch.ys[k], single.ys, 1e-12, 1e-12)
        state = jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], batch.solver_state)
        assert_close(state[:2], single.solver_state[:2])


def test_batch_does_not_copy_the_weights():
    # A condition that differs between lanes would make a batch of every weight.
    run = lambda x: solve(mlp_map(), x=x, options={"num_nodes": 3}).ys
    text = str(jax.make_jaxpr(jax.vmap(run))(jnp.zeros((7, 2))))
    assert "f64[16,16]" in text
    assert "f64[7,16,16]" not in text


@pytest.mark.parametrize(
    "name, adjoint",
    [slow("exact", "recursive"), slow("untrained", "direct")]
    + [
        slow("nan-early", "recursive"),
        slow("nan-early", "direct"),
        ("nan-early", "forward"),
        slow("nan", "recursive"),
    ],
)
def test_gradients(name, adjoint):
    kind = {
        "recursive": diffrax.RecursiveCheckpointAdjoint(),
        "direct": diffrax.DirectAdjoint(),
        "forward": diffrax.ForwardMode(),
    }[adjoint]
    run = lambda x: jnp.sum(
        jnp.sin(solve(MAPS[name], x=x, adjoint=kind, max_steps=32).ys)
    )
    direction = jnp.asarray([0.6, -1.1])
    if adjoint == "forward":
        slope = jax.jit(lambda x: jax.jvp(run, (x,), (direction,)))(X)[1]
    else:
        slope = jax.jit(jax.grad(run))(X) @ direction
    truth = lambda x: jnp.sum(jnp.sin(EXACT(0.1, 0.9, x)))
    assert_close(slope, finite_difference(truth, X, direction), 1e-4, 1e-4)


@pytest.mark.parametrize("dense", [False, slow(True)])
def test_gradients_of_a_batch_in_which_some_maps_fail(dense):
    # NaN, with derivatives that are: zero cotangents times those would be NaN as well. At
    # saved times too, which the map fills in.
    flow_map = lambda s, t, x, args: EXACT(s, t, x) * jnp.where(x[0] > 0, jnp.nan, 1)
    ts = jnp.asarray([0.3, 0.6, 0.9])
    saveat = diffrax.SaveAt(dense=True) if dense else diffrax.SaveAt(ts=ts)

    def run(x):
        sol = solve(flow_map, x=x, saveat=saveat)
        return jnp.sum(jnp.sin(jax.vmap(sol.evaluate)(ts) if dense else sol.ys))

    xs = jnp.asarray([[0.3, -1.2], [-0.3, 1.2]])
    slopes = jax.jit(jax.vmap(jax.grad(run)))(xs)
    ends = lambda x: jnp.stack([EXACT(0.1, t, x) for t in ts])
    truth = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(ends(x))))))(xs)
    assert_close(slopes, truth, 1e-3, 1e-3)


def test_second_derivatives_of_a_jump():
    run = lambda x: jnp.sum(
        jnp.sin(solve(EXACT, x=x, adjoint=diffrax.ForwardMode(), max_steps=32).ys)
    )
    truth = lambda x: jnp.sum(jnp.sin(EXACT(0.1, 0.9, x)))
    made = jax.jit(jax.jacfwd(jax.jacfwd(run)))(X)
    assert_close(made, jax.jit(jax.hessian(truth))(X), 1e-8, 1e-8)


def test_bad_map_where_the_fallback_is_bound_by_stability():
    # Tsit5's own errors are then far below the tolerance, and jumps that used all of it
    # would add up to many times the tolerance.
    field = lambda t, x, args: jnp.stack([x[1], 1.5 * (1 - x[0] ** 2) * x[1] - x[0]])
    starts = jnp.stack([jnp.linspace(3, 6, 10), jnp.zeros(10)], axis=1)

    def run(solver, tol):
        return jax.vmap(
            lambda x: diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                2.0,
                5.0,
                6.0,
                x,
                stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            ).ys[0]
        )(starts)

    error = run(fd.HybridSolver(identity), 1e-2) - run(diffrax.Tsit5(), 1e-10)
    assert max_abs(error) < 0.03


def test_state_goes_in_again():
    saveat = diffrax.SaveAt(
        t1=True, solver_state=True, controller_state=True, made_jump=True
    )
    first = solve(MAPS["nan-early"], 0.1, 0.5, saveat=saveat)
    second = solve(
        MAPS["nan-early"],
        0.5,
        0.9,
        first.ys[0],
        solver_state=first.solver_state,
        controller_state=first.controller_state,
        made_jump=first.made_jump,
    )
    assert counts(second)[1] >= counts(first)[1] > 0
    assert max_abs(second.ys[0] - EXACT(0.1, 0.9, X)) < 1e-5


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax:UserWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.complex128)])
def test_other_states(dtype):
    field = lambda t, y, args: {"a": -y["a"], "b": (y["b"][0] * 0.5,)}
    exact = lambda s, t, y, args: {
        "a": y["a"] * jnp.exp(s - t).astype(y["a"].dtype),
        "b": (y["b"][0] * jnp.exp((t - s) / 2).astype(y["a"].dtype),),
    }
    # Of speed 0, it stands still.
    flow_map = lambda s, t, y, args: exact(s, s + args * (t - s), y, None)
    y = {"a": jnp.ones((2, 3), dtype), "b": (jnp.asarray(0.5, dtype),)}
    t0, t1 = jnp.asarray(0.0, jnp.float32), jnp.asarray(1.0, jnp.float32)
    for speed, kinds in ((1, (True, False)), (0, (False, True))):
        speed = jnp.asarray(speed, jnp.float32)
        sol = solve(flow_map, t0, t1, y, field=field, args=speed, tol=1e-4)
        assert tuple(n > 0 for n in counts(sol)) == kinds
        end = jax.tree_util.tree_map(lambda leaf: leaf[0], sol.ys)
        assert_close(end, exact(t0, t1, y, None), 1e-3, 1e-3)
        assert end["a"].dtype == dtype


def test_args_reach_map_and_field():
    field = lambda t, x, args: args["rate"] * x
    exact = lambda s, t, x, args: x * jnp.exp(args["rate"] * (t - s))
    sol = solve(exact, field=field, args={"rate": jnp.asarray(0.7)})
    assert counts(sol) == (1, 0)


# What cannot be done


@pytest.mark.parametrize(
    "args, found",
    [(None, "NoneType"), ({"rate": jnp.ones(3)}, "dict"), (jnp.ones(2), r"\(2,\)")],
    ids=["missing", "structure", "shape"],
)
def test_args_that_do_not_fit_the_network(args, found):
    net = fd.nn.MLP(2, 8, 1, args_size=3, key=jr.key(0))
    with pytest.raises(ValueError, match=rf"`args` of shape \(3,\); got {found}"):
        solve(fd.FlowMap(net), args=args)


def test_tolerance_that_nobody_meets():
    field = lambda t, x, args: jnp.nan * x
    results = diffrax.RESULTS
    for dtmin, result in (
        (0.0, results.max_steps_reached),
        (1e-3, results.dt_min_reached),
    ):
        controller = diffrax.PIDController(
            rtol=1e-6, atol=1e-6, dtmin=jnp.asarray(dtmin), force_dtmin=False
        )
        sol = solve(
            identity,
            field=field,
            throw=False,
            max_steps=50,
            stepsize_controller=controller,
        )
        assert sol.result == result


def test_bad_lane_leaves_others_alone():
    field = lambda t, x, args: jnp.where(x > 2, jnp.nan, -x)
    run = lambda x: solve(identity, x=x, field=field, throw=False, max_steps=60)
    sol = jax.vmap(run)(jnp.asarray([[0.5], [3.0]]))
    good = sol.result == diffrax.RESULTS.successful
    assert good.tolist() == [True, False]
    assert_close(sol.ys[0, 0, 0], 0.5 * np.exp(-0.8), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "fallback, error, words",
    [
        (diffrax.Euler(), ValueError, r"HalfSolver\(Euler\(\)\)"),
        (diffrax.SemiImplicitEuler(), ValueError, "of a `diffrax.ODETerm`"),
        (diffrax.KenCarp4(), ValueError, "of a `diffrax.ODETerm`"),
        (fd.FlowMapSolver(EXACT), ValueError, "a classical solver"),
        (fd.HybridSolver(EXACT), ValueError, "a classical solver"),
        (diffrax.Tsit5, TypeError, "must be a Diffrax solver"),
    ],
)
def test_bad_fallbacks(fallback, error, words):
    with without_type_checks(), pytest.raises(error, match=words):
        fd.HybridSolver(EXACT, fallback)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="`max_wait` must be at least 1; got 0"):
        fd.HybridSolver(EXACT, max_wait=0)
    with pytest.raises(ValueError, match="`num_nodes` must be at least 2; got 1"):
        fd.HybridSolver(EXACT, num_nodes=1)
    with pytest.raises(ValueError, match="`safety` must be in \\(0, 1\\]; got 2"):
        fd.HybridSolver(EXACT, safety=2.0)
    whole = pytest.raises(TypeError, match="`num_nodes` must be an integer")
    with without_type_checks(), whole:
        fd.HybridSolver(EXACT, num_nodes=2.5)
    with pytest.raises(ValueError, match="The state has no entries"):
        solve(EXACT, x=jnp.zeros(0), field=lambda t, x, args: -x)
    with pytest.raises(TypeError, match="Times must be float32 or float64; got float16"):
        half = [jnp.asarray(t, jnp.float16) for t in (0.0, 1.0)]
        solve(EXACT, *half, X.astype(jnp.float16), field=lambda t, x, args: -x)
    with pytest.raises(TypeError, match="bare network"):
        fd.HybridSolver(fd.nn.MLP(2, key=jr.key(0)))
    with pytest.raises(ValueError, match="shape of the state"):
        solve(lambda s, t, x, args: x[:1])
    with pytest.raises(Exception, match="ODETerm"):
        term = diffrax.ControlTerm(lambda t, y, args: y, lambda t0, t1: t1 - t0)
        diffrax.diffeqsolve(term, fd.HybridSolver(EXACT), 0.0, 1.0, 1.0, X)
    with pytest.raises(Exception, match="structure"):
        # Arguments of another structure than the map and the field were made for.
        field = lambda t, x, args: args["rate"] * x
        solve(lambda s, t, x, args: {"a": x}, field=field, args={"rate": 1.0})


def test_short_jumps_do_not_hold_up_the_classical_solver():
    # An error in proportion to the jump asks for tiny ones, each within tolerance.
    sol = solve(flawed(slope=10.0), tol=1e-5)
    alone = solve(MAPS["nan"], tol=1e-5)
    assert sol.stats["num_steps"] <= 4 * alone.stats["num_steps"]
    assert max_abs(sol.ys[0] - EXACT(0.1, 0.9, X)) < 1e-3


def test_range_of_steps_of_an_autonomous_map():
    # Beyond it the map knows nothing, and the fallback steps in.
    field = lambda t, x, args: -x

    def decay(s, t, x, args):
        h = jnp.where(t == s, 1, s - t)
        return -x * jnp.where(t == s, 1, jnp.expm1(h) / h)

    flow_map = fd.AutonomousFlowMap(fd.FlowMap(decay, time_range=(0.0, 0.5)))
    sol = solve(flow_map, 3.0, 7.0, field=field)
    assert counts(sol)[0] > 0
    assert_close(sol.ys[0], X * np.exp(-4.0), 1e-5, 1e-5)


def test_overflow_of_a_first_step_is_refused():
    # Exponentials of a step over the whole interval are infinite.
    field = lambda t, x, args: jnp.stack(
        [-jnp.exp(3 * x[0]), jnp.exp(2 * x[1]) * 0 - x[1]]
    )
    x, t1 = jnp.asarray([2.0, 1.0]), 40.0
    sol = solve(identity, 0.0, t1, x, field=field, tol=1e-6)
    end = [-np.log(3 * t1 + np.exp(-6.0)) / 3, np.exp(-t1)]
    assert_close(sol.ys[0], np.asarray(end), 1e-4, 1e-4)


def test_the_first_look_stays_within_the_jump():
    # It is at another place in each jump; outside, this map is unknown.
    def known(s, t, u):
        def flow_map(s, u, x, args):
            return jnp.where((u >= s) & (u <= t), EXACT(s, u, x), jnp.nan)

        norm = lambda error, y: optx.rms_norm(error) / 1e-3
        return is_hopeless(flow_map, FIELD, s, t, X, None, norm)

    s = jr.uniform(jr.key(0), (4000,), maxval=0.4)
    t = s + jr.uniform(jr.key(1), (4000,), minval=0.1, maxval=0.5)
    assert not jax.jit(jax.vmap(known))(s, t, t).any()


def test_sizes_that_are_corrected_and_the_first_wait():
    small, large = jnp.zeros(32), jnp.zeros(33)
    assert can_correct(small, False, None) and not can_correct(large, False, None)
    assert can_correct(large, True, None)
    term = diffrax.ODETerm(FIELD)
    for most, first in ((2, 2), (64, 4)):
        solver = fd.HybridSolver(EXACT, rtol=1e-3, atol=1e-6, max_wait=most)
        assert (
            solver.init(term, jnp.asarray(0.0), jnp.asarray(1.0), X, None).patience
            == first
        )
