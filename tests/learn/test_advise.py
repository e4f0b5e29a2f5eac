"""What is said before any training, beside what then happens."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import flowdiffrax as fd
from flowdiffrax.learn._advise import warnings_of
from flowdiffrax.learn._costs import ClassicalSolves
from flowdiffrax.learn._probe import probe
from flowdiffrax.learn._problem import make_problem


def box(low, high, size):
    return lambda key: jr.uniform(key, (size,), minval=low, maxval=high)


def test_a_cheap_field_cannot_be_beaten():
    field, args = lambda t, x, args: -args * x, lambda key: jnp.ones(1)
    advice = fd.advise(field, box(0.5, 2.0, 1), 0.0, 1.0, args)
    assert not advice.is_stiff and advice.is_autonomous
    assert advice.field_flops <= 2 and advice.warnings == ()
    # Shrinks to exp(-1) of the largest size.
    np.testing.assert_allclose(advice.growth, np.exp(-1.0), rtol=1e-2)
    assert advice.solve.median <= 1e-2 and advice.solve.batch_size == 1024
    check_flops(advice)


def check_flops(advice):
    flops = [row.flops for row in advice.networks]
    assert flops == sorted(flops)
    # The hidden matrices alone.
    for row in advice.networks:
        hidden = 2 * (row.depth - 1) * row.width**2
        assert hidden < row.flops < 4 * hidden + 20_000


def kinetics(t, x, args):
    fast = 1e5 * x[0] * x[1] - 1e4 * x[2]
    slow = args[0] * x[2]
    return jnp.stack([-fast, slow - fast, fast - slow])


@pytest.mark.slow
def test_stiff_kinetics_can():
    args = lambda key: jr.uniform(key, (1,), minval=0.5)
    advice = fd.advise(kinetics, box(0.1, 1.0, 3), 0.0, 20.0, args, batch_size=64)
    assert advice.is_stiff and advice.solve.solver.startswith("Kvaerno")
    check_flops(advice)


def test_stiff_solves_are_implicit_and_in_float64():
    field, x0 = lambda t, x, args: -1e4 * (x - 1), np.full((40, 1), 2.0)
    problem = make_problem(field, x0, 0.0, 1.0, None, False)
    solves = ClassicalSolves(problem, True, np.ones(1))
    assert solves.names == ("Kvaerno3", "Kvaerno5")
    ys, num_steps, seconds = solves("Kvaerno3", x0[:3], None, 1e-9)
    np.testing.assert_allclose(ys, 1.0, atol=1e-8)
    assert (num_steps < 4000).all() and seconds > 0


@pytest.mark.parametrize(
    "rate, settings, word",
    [
        (-20.0, dict(tol=1e-2, both_directions=True), "ill-posed"),
        (6.0, dict(tol=1e-2, both_directions=False), "grows at least"),
        (-1.0, dict(tol=1e-6, both_directions=False), "out of reach"),
        (-1.0, dict(tol=1e-2, both_directions=True), None),
    ],
)
def test_warnings(rate, settings, word):
    problem = make_problem(
        lambda t, x, args: rate * x, box(0.5, 1.0, 2), 0.0, 1.0, None, False
    )
    warnings = warnings_of(probe(problem, jr.key(0)), **settings)
    assert len(warnings) == (word is not None)
    assert all(word in text for text in warnings)


@pytest.mark.parametrize(
    "speedups, network, words",
    [
        ((0.9, 0.4), None, "cannot be faster here"),
        ((1.9, 0.9), None, "can hardly be faster"),
        ((5.0, 2.5), (64, 3), "can be 2.5 times faster, with 3 hidden layers of 64"),
        # The largest network with which a jump is ten times faster.
        ((40.0, 4.0), (32, 3), "can be 40 times faster"),
        ((40.0, 11.0), (64, 3), "can be 11 times faster"),
        ((float("nan"), float("nan")), None, "nothing that a jump could be compared"),
    ],
)
def test_verdict(speedups, network, words):
    sizes = (32, 3), (64, 3)
    networks = [
        fd.learn.NetworkCost(*size, 1e3 * size[0], 1.0, speedup)
        for size, speedup in zip(sizes, speedups, strict=True)
    ]
    solve = fd.learn.Solve("Tsit5", 1e-3, 64, 1.0, 20.0, 1e-3, 1e-2)
    solve = None if np.isnan(speedups[0]) else solve
    advice = fd.learn.Advice(
        1e-2, 64, False, True, solve, 10.0, tuple(networks), 1.0, 1.0, ("a warning",)
    )
    found = advice.network
    assert (found and (found.width, found.depth)) == network
    assert words in str(advice) and "Warning: a warning" in str(advice)


def test_bad_settings():
    for settings in (dict(tol=0.0), dict(batch_size=0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            fd.advise(lambda t, x, args: -x, box(0.5, 1.0, 1), 0.0, 1.0, **settings)
