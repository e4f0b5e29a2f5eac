"""Jumps over decades of time: a clock that is slow at the start."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, max_abs

import flowdiffrax as fd
from flowdiffrax.estimates._clock import Clock, grade_of

RATE, X = 1e5, jnp.asarray([1.0, 3.0])


def field(t, y, args):
    """A slow decay by a power of time, and a second entry that follows it at once."""
    x, w = y
    return jnp.stack([-(x**2), -RATE * (w - x) - x**2])


def exact(s, t, y, args=None):
    """The closed form of `field`."""
    x, w = y
    new = x / (1 + x * (t - s))
    return jnp.stack([new, new + (w - x) * jnp.exp(-RATE * (t - s))])


def off(s, t, y, args=None):
    return exact(s, t, y) * (1 + 3e-3 * (1 - jnp.exp(-(t - s))))


@pytest.mark.parametrize("grade", [0.0, 4.0, 20.0])
@pytest.mark.parametrize("times", [(0.0, 1e4), (5.0, -2.0)])
def test_clock(grade, times):
    clock = Clock(*map(jnp.asarray, times), jnp.asarray(grade))
    shares = np.asarray([0.0, 0.3, 0.8, 1.0])
    us = clock.times(shares)
    assert (us[0], us[-1]) == times
    assert_close(jax.vmap(clock.share)(us), shares, 1e-9)
    at = lambda share: clock.times(share[None])[0]
    assert_close(jax.vmap(jax.grad(at))(shares), clock.paces(shares), 1e-9)
    if grade == 4.0:
        # The time from the start grows by the same factor from share to share.
        early, late = (us[1:3] - us[0]) / (us[-1] - us[0]) + 1 / np.expm1(4.0)
        assert_close(late / early, np.exp(4.0 * 0.5), 1e-9)


@pytest.mark.parametrize("t, tol", [(1.0, 2e-3), (1e3, 5e-3)])
def test_linearised_error_over_decades(t, tol):
    truth = off(0.0, t, X) - exact(0.0, t, X)
    graded = fd.estimates.LinearisedError(24, is_graded=True)
    _, found, gap = graded.errors(off, field, 0.0, t, X)
    assert_close(found / truth, np.ones(2), tol)
    assert max_abs(gap / truth) < 1e-3
    # Even nodes do not resolve such a jump.
    even = fd.estimates.LinearisedError(24)(off, field, 0.0, t, X)[1]
    assert max_abs(even / truth - 1) > 10 * tol


def test_without_a_slow_part_nodes_are_even():
    swings = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])
    jump = lambda s, t, y, args: jnp.stack([y[0] + 0.1 * (t - s), y[1] * jnp.cos(t - s)])
    estimates = (fd.estimates.LinearisedError(6, is_graded=g) for g in (False, True))
    first, second = (e.errors(jump, swings, 0.3, 2.0, X)[1] for e in estimates)
    assert_close(first, second, 1e-15)


@pytest.mark.parametrize("flow_map, dt0", [(off, 2e6), (off, 1e-6), (exact, 1e-6)])
def test_hybrid_jumps_over_decades(flow_map, dt0):
    end = 1e6
    ts = jnp.asarray([1e-2, 1.0, 1e2, 1e4, end])
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        fd.HybridSolver(flow_map, diffrax.Kvaerno5()),
        0.0,
        end,
        dt0,
        X,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-10),
        saveat=diffrax.SaveAt(ts=ts, solver_state=True),
    )
    truth = jax.vmap(lambda t: exact(0.0, t, X))(ts)
    # Kvaerno5 takes 250 steps.
    assert sol.stats["num_steps"] < 40
    assert sol.solver_state.num_learned > 2 * sol.solver_state.num_classical
    assert max_abs(sol.ys / truth - 1) < 1e-3
    assert max_abs(sol.ys[-1] / truth[-1] - 1) < 1e-4


def test_grade_looks_at_the_share_from_the_start():
    # The field slows down half way. One leaf has no entries.
    def slower(t, y, args):
        rate = jnp.where(t < 0.5, -1e3, -1e-3)
        return {"a": rate * y["a"], "none": y["none"]}

    still = lambda s, t, y, args: y
    y = {"a": jnp.asarray([2.0]), "none": jnp.zeros(0)}
    grade = lambda share: grade_of(
        still, slower, jnp.asarray(0.0), jnp.asarray(1.0), y, None, jnp.asarray(share)
    )
    assert grade(0.25) == 0 and grade(0.75) > 5
