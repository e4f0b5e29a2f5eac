"""Windows of a long trajectory that are solved side by side."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, max_abs, tight_solve

import flowdiffrax as fd

X = {"angle": jnp.asarray([0.3]), "speed": jnp.asarray([0.0])}
TS = jnp.linspace(0.0, 12.0, 9)
RATE = jnp.asarray(1.3)


def swing(t, x, rate):
    return {"angle": x["speed"], "speed": -rate * jnp.sin(x["angle"]) + 0.02 * jnp.cos(t)}


def rotation(s, t, x, rate):
    """The exact map of small angles without a force."""
    w = jnp.sqrt(rate)
    c, n = jnp.cos(w * (t - s)), jnp.sin(w * (t - s))
    a, v = x["angle"], x["speed"]
    return {"angle": c * a + n / w * v, "speed": c * v - w * n * a}


@jax.jit
def solve(ts, x=X, rate=RATE):
    return fd.solvers.parareal(rotation, swing, ts, x, rate, rtol=1e-7, atol=1e-7)


def truth(ts):
    saveat = diffrax.SaveAt(ts=jnp.sort(ts) if ts[0] < ts[-1] else ts)
    return tight_solve(swing, ts[0], ts[-1], X, RATE, saveat=saveat).ys


@pytest.mark.parametrize("ts", [TS, 12.0 - TS])
def test_windows_join_to_the_trajectory(ts):
    sol = solve(ts)
    assert sol.is_successful and sol.num_sweeps < len(ts) - 1
    assert_close(sol.ys, truth(ts), 3e-6)
    made = sol.changes[: sol.num_sweeps]
    # It converges faster than linearly.
    assert made[-1] < 1 and (np.diff(made) < 0).all()
    assert np.isnan(sol.changes[sol.num_sweeps :]).all()


@pytest.mark.parametrize("bad", [jnp.nan, 0.0, 50.0])
def test_any_map_gives_the_classical_solution(bad):
    useless = lambda s, t, x, args: jax.tree.map(lambda leaf: bad * leaf, x)
    given = {"rtol": 1e-7, "atol": 1e-7}
    sol = fd.solvers.parareal(useless, swing, TS[:4], X, RATE, **given)
    assert sol.is_successful and sol.num_sweeps <= 3
    assert_close(sol.ys, truth(TS[:4]), 3e-6)
    few = fd.solvers.parareal(useless, swing, TS[:4], X, RATE, max_sweeps=1, **given)
    assert few.num_sweeps == 1 and not few.is_successful
    right = jax.tree.map(lambda leaf: leaf[:2], (few.ys, truth(TS[:4])))
    assert_close(*right, 3e-6)
    assert max_abs(few.ys["angle"] - truth(TS[:4])["angle"]) > 1e-3


def test_failed_window_is_said():
    sol = fd.solvers.parareal(
        rotation, swing, TS, X, RATE, rtol=1e-7, atol=1e-7, max_steps=2
    )
    assert not sol.is_successful


def test_bad_arguments_of_parareal():
    def bad(match, field=swing, ts=TS, **kwargs):
        with pytest.raises(ValueError, match=match):
            given = {"rtol": 1e-3, "atol": 1e-3, **kwargs}
            fd.solvers.parareal(rotation, field, ts, X, RATE, **given)

    bad("`ts` must be at least two times", ts=TS[:1])
    bad("must strictly rise or strictly fall", ts=TS[jnp.asarray([0, 2, 1])])
    bad("`max_sweeps` must be at least 1; got 0", max_sweeps=0)
    bad("`rtol` must be", rtol=-1.0)
    bad("`vector_field`", field=lambda t, x, args: x["angle"])


def test_one_failed_window_is_enough():
    late = lambda t, x, args: jax.tree.map(
        lambda leaf: leaf + jnp.where(t > 11.0, 9.0 * jnp.cos(300.0 * t), 0.0),
        swing(t, x, args),
    )
    given = {"rtol": 1e-4, "atol": 1e-4, "max_steps": 40}
    sol = fd.solvers.parareal(rotation, late, TS, X, RATE, **given)
    assert sol.num_sweeps > 1 and not sol.is_successful
    assert fd.solvers.parareal(rotation, swing, TS, X, RATE, **given).is_successful
