"""Batches in which only some jumps are good."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, gaussian_map, max_abs, without_type_checks

import flowdiffrax as fd

EXACT = gaussian_map()
FIELD = EXACT.velocity
XS = jr.normal(jr.key(0), (70, 2))


class Flawed(eqx.Module):
    """The exact map with an error, broken before a time, or for small first entries."""

    first: jax.Array
    least: jax.Array
    wave: jax.Array

    def __call__(self, s, t, x, args):
        is_right = (s >= self.first) & (x[0] >= self.least)
        y = EXACT(s, t, x) + self.wave * jnp.sin(9 * (t - s) + x)
        return jnp.where(is_right, y, jnp.nan)


def flawed(first=-jnp.inf, least=-jnp.inf, wave=0.0):
    return Flawed(*map(jnp.asarray, (first, least, wave)))


def run(flow_map, ts=(0.1, 0.9), x0=XS, **given):
    given = dict(rtol=1e-5, atol=1e-5, chunk_size=16) | given
    return fd.solve_batch(flow_map, FIELD, jnp.asarray(ts), x0, **given)


# Maps and times are arrays, so that others compile nothing.
run_flawed = eqx.filter_jit(lambda flow_map, ts: run(flow_map, ts))


def exact(ts, x0=XS):
    flow = lambda x: jnp.stack([EXACT(ts[0], t, x) for t in ts])
    return jax.vmap(flow)(x0)


@pytest.mark.parametrize("ts", [(0.1, 0.5, 0.9), (0.9, 0.5, 0.2)])
def test_a_good_map_makes_all_jumps(ts):
    solution = run_flawed(flawed(), jnp.asarray(ts))
    assert solution.is_learned.shape == (len(XS), len(ts) - 1)
    assert solution.is_learned.all() and solution.is_successful.all()
    assert_close(solution.ys, exact(ts), 1e-6, 1e-6)


@pytest.mark.parametrize("chunk_size", [1, 16, 1000])
def test_what_fails_is_solved_classically(chunk_size):
    ts, half = jnp.asarray([0.1, 0.5, 0.9]), flawed(least=0.0)
    if chunk_size == 16:
        solution = run_flawed(half, ts)
    else:
        solution = jax.jit(lambda: run(half, ts, chunk_size=chunk_size))()
    assert solution.is_learned[:, 0].tolist() == (XS[:, 0] >= 0).tolist()
    assert solution.is_successful.all()
    assert_close(solution.ys, exact(ts), 1e-4, 1e-4)


def test_each_interval_is_judged_anew():
    solution = run_flawed(flawed(first=0.5), jnp.asarray([0.1, 0.5, 0.9]))
    assert not solution.is_learned[:, 0].any() and solution.is_learned[:, 1].all()
    assert_close(solution.ys, exact((0.1, 0.5, 0.9)), 1e-4, 1e-4)


def test_what_is_off_is_corrected():
    ts = (0.9, 0.4, 0.1)
    solution = run_flawed(flawed(wave=1e-3), jnp.asarray(ts))
    assert solution.is_learned.all()
    assert_close(solution.ys, exact(ts), 1e-6, 1e-6)


def test_a_useless_map_costs_only_a_chunk():
    rows = []

    def count(x):
        rows.append(x.shape[0])
        return x

    def useless(s, t, x, args):
        return args * jax.pure_callback(count, x, x, vmap_method="broadcast_all")

    solve = jax.jit(lambda value: run(useless, args=value))
    classical = jax.vmap(
        lambda x: diffrax.diffeqsolve(
            diffrax.ODETerm(FIELD),
            diffrax.Tsit5(),
            0.1,
            0.9,
            None,
            x,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        ).ys[0]
    )(XS)
    for value in (0.0, np.nan):
        rows.clear()
        solution = solve(jnp.asarray(value))
        assert not solution.is_learned.any()
        assert_close(solution.ys[:, 1], classical, 1e-10, 1e-10)
        assert rows == [16]


def test_only_chunks_with_failures_are_solved():
    turns = []

    def here(x):
        turns.append(x.shape)
        return x

    @jax.custom_jvp
    def seen(x):
        return jax.pure_callback(here, x, x, vmap_method="broadcast_all")

    seen.defjvp(lambda x, dx: (seen(*x), *dx))
    field = lambda t, x, args: FIELD(t, seen(x), args)
    few = lambda s, t, x, args: EXACT(s, t, x) + jnp.where(x[0] > 1.5, 1.0, 0.0)

    @jax.jit
    def solve(x):
        ts, tols = jnp.asarray([0.1, 0.9]), dict(rtol=1e-2, atol=1e-2)
        return fd.solve_batch(few, field, ts, x, chunk_size=8, **tols)

    assert 0 < int((~solve(XS).is_learned).sum()) <= 8
    with_failures = turns.count((8, 2))
    turns.clear()
    # Nothing fails, and no chunk is solved: each is only predicted.
    assert solve(jnp.where(XS > 1.5, 0.0, XS)).is_learned.all()
    assert turns.count((8, 2)) == 0 < with_failures


def test_args_and_trees():
    field = lambda t, x, args: {"a": -args["rate"] * x["a"]}
    flow_map = lambda s, t, x, args: {"a": x["a"] * jnp.exp(args["rate"] * (s - t))}
    x0, rates = {"a": XS}, {"rate": np.linspace(0.5, 2.0, len(XS))}
    given = jnp.asarray([0.0, 1.0]), x0
    tols = dict(rtol=1e-6, atol=1e-6)
    each = fd.solve_batch(flow_map, field, *given, rates, args_per_example=True, **tols)
    decayed = XS * jnp.exp(-rates["rate"])[:, None]
    assert_close(each.ys["a"][:, 1], decayed, 1e-5, 1e-5)
    assert each.is_learned.all()
    same = fd.solve_batch(flow_map, field, *given, {"rate": jnp.asarray(1.0)}, **tols)
    assert_close(same.ys["a"][:, 1], XS * jnp.exp(-1.0), 1e-5, 1e-5)


def test_a_classical_solve_that_fails():
    field = lambda t, x, args: jnp.where(x[0] > 1, jnp.nan, 1.0) * x
    wrong = lambda s, t, x, args: x
    solution = fd.solve_batch(
        wrong, field, jnp.asarray([0.0, 0.01]), XS, rtol=1e-3, atol=1e-3, max_steps=64
    )
    assert solution.is_successful.tolist() == (XS[:, 0] <= 1).tolist()
    assert jnp.isnan(solution.ys[~solution.is_successful, 1]).all()
    assert max_abs(solution.ys[solution.is_successful]) < 10


def test_times_outside_the_map():
    flow_map = fd.FlowMap(EXACT.average_velocity, (0.0, 0.5))
    solution = run(flow_map, (0.1, 0.5, 0.9))
    assert solution.is_learned[:, 0].all() and not solution.is_learned[:, 1].any()


def test_safety():
    # States that are too large to be corrected, in error by 1e-3.
    x0 = jnp.ones((3, 40))
    off = lambda s, t, x, args: x + 1e-3 * (t - s)
    still = lambda t, x, args: 0 * x
    for safety, is_learned in ((0.9, False), (1.0, True)):
        tols = dict(rtol=1e-9, atol=1.05e-3, safety=safety)
        solution = fd.solve_batch(off, still, jnp.asarray([0.0, 1.0]), x0, **tols)
        assert (solution.is_learned == is_learned).all()


@pytest.mark.parametrize(
    "given, match",
    [
        ({"rtol": 0.0}, "`rtol` must be"),
        ({"atol": -1.0}, "`atol` must be"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"num_nodes": 1}, "`num_nodes` must be at least 2"),
        ({"safety": 0.0}, "`safety` must be"),
        ({"safety": 3.0}, "`safety` must be"),
        ({"ts": (0.1, np.nan)}, "`ts` must be finite"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"ts": (0.1,)}, "at least two times"),
        ({"fallback": diffrax.Euler()}, "error estimate"),
        ({"x0": {"a": XS, "b": XS[:3]}}, "leading axis"),
        ({"args": jnp.zeros(3), "args_per_example": True}, "leading axis"),
    ],
)
def test_bad_arguments(given, match):
    with pytest.raises(ValueError, match=match):
        run(EXACT, **given)


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"chunk_size": 2.5}, TypeError, "`chunk_size` must be an integer"),
        ({"x0": XS.astype(jnp.float16)}, TypeError, "float32, float64"),
        ({"x0": jnp.ones((3, 2), int)}, TypeError, "float32, float64"),
    ],
)
def test_bad_types(given, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        run(EXACT, **given)


def test_field_of_another_shape():
    sums = lambda t, x, args: x.sum()
    with pytest.raises(ValueError, match="`vector_field` must return the shape"):
        fd.solve_batch(EXACT, sums, jnp.asarray([0.0, 1.0]), XS, rtol=1.0, atol=1.0)


def test_bare_network():
    with pytest.raises(TypeError, match="bare network"):
        run(fd.nn.MLP(2, key=jr.key(0)))
    with pytest.raises(TypeError, match="vector_field"):
        fd.solve_batch(EXACT, 1.0, jnp.asarray([0.0, 1.0]), XS, rtol=1.0, atol=1.0)
