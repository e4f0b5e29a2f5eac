"""Batches of splines: rows, conditions, streams, training, and what is refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import assert_close, without_type_checks

import flowdiffrax as fd

DAYS = (0.0, 2.0, 5.0, 9.0)
SPLINE = fd.paths.CubicSpline(DAYS)


def chains(number=50):
    """Chains whose number can be read off every state."""
    numbers, days = np.arange(number, dtype=float), np.asarray(DAYS)
    return jnp.asarray(numbers[:, None, None] + days[:, None] / 100)


def test_rows_are_drawn_with_their_conditions():
    batches = fd.data.SplineBatches(SPLINE, chains(), 200, args=jnp.arange(50))
    paths, args = batches(jr.key(0))
    starts = jax.vmap(lambda path: path.evaluate(0.0))(paths)
    assert_close(starts[:, 0], args.astype(float))
    assert 40 < np.unique(args).size <= 50
    ends = jax.vmap(lambda path: path.evaluate(9.0))(paths)
    assert_close(ends[:, 0], args.astype(float) + 0.09)


def test_all_rows_in_order_without_drawing():
    batches = fd.data.SplineBatches(SPLINE, chains(), 50, draw=False)
    paths, args = batches(jr.key(0))
    assert_close(paths.xs, chains(), 0, 0)
    assert args is None
    with pytest.raises(ValueError, match="takes all 50 rows"):
        fd.data.SplineBatches(SPLINE, chains(), 49, draw=False)(jr.key(0))


def test_they_stream():
    make = lambda xs: fd.data.SplineBatches(SPLINE, xs, 10, draw=False)
    state = fd.train.fit(
        fd.FlowMap(fd.nn.MLP(1, 4, 1, key=jr.key(0))),
        fd.FlowMatching(times=fd.times.OnInterval(fd.times.Diagonal(), 0.0, 9.0)),
        fd.data.StreamBatches(np.asarray(chains()), 10, make),
        optax.sgd(1e-6),
        num_steps=3,
        key=jr.key(1),
        progress=False,
    )
    assert int(state.skipped) == 0


BAD = {
    "number of times": ((SPLINE, chains()[:, :3], 8), ValueError, "shape .pool, 4, ...."),
    "no times": ((SPLINE, jnp.ones(5), 8), ValueError, "couple_snapshots"),
    "integers": ((SPLINE, jnp.ones((5, 4, 2), int), 8), TypeError, "Convert them with"),
    "NaN": ((SPLINE, chains().at[7, 2].set(jnp.nan), 8), ValueError, "them row 7"),
    "batch size": ((SPLINE, chains(), 0), ValueError, "`batch_size` must be at least 1"),
    "order": ((chains(), SPLINE, 8), TypeError, "`spline` must be an instance such as"),
    "a class": ((fd.paths.CubicSpline, chains(), 8), TypeError, "`spline` must be an"),
    "conditions": ((SPLINE, chains(), 8, jnp.ones(3)), ValueError, "Chains and condit"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_chains(bad):
    inputs, error, message = BAD[bad]
    with without_type_checks(), pytest.raises(error, match=message):
        fd.data.SplineBatches(*inputs)


def test_memory_maps_are_refused(tmp_path):
    np.save(tmp_path / "xs.npy", np.asarray(chains()))
    mapped = np.load(tmp_path / "xs.npy", mmap_mode="r")
    with without_type_checks(), pytest.raises(TypeError, match="memory map"):
        fd.data.SplineBatches(SPLINE, mapped, 8)


# --- training -------------------------------------------------------------------------


def fit(objective, spline=SPLINE, xs=None, num_steps=1, net=None, batch_size=64):
    return fd.train.fit(
        fd.FlowMap(fd.nn.MLP(1, 4, 1, key=jr.key(0)) if net is None else net),
        objective,
        fd.data.SplineBatches(spline, chains() if xs is None else xs, batch_size),
        optax.adam(optax.cosine_decay_schedule(2e-3, num_steps)),
        num_steps=num_steps,
        key=jr.key(1),
        progress=False,
    )


def test_times_outside_the_spline_are_refused():
    late = fd.times.OnInterval(fd.times.Diagonal(), 0.0, 10.0)
    with pytest.raises(ValueError, match=r"to 10, but the spline covers \[0, 9\]"):
        fit(fd.FlowMatching(times=late))
    with pytest.raises(ValueError, match=r"OnInterval\(times, 0.5, 1\)"):
        fit(fd.FlowMatching(), fd.paths.LinearSpline((0.5, 0.7, 0.8, 1.0)))


def test_days_left_out_are_noticed():
    with pytest.warns(RuntimeWarning, match=r"OnInterval\(times, 0, 9\)"):
        fit(fd.FlowMatching())


def test_units_make_the_defaults_fit():
    xs = chains()
    units = fd.Normalisation.of(np.asarray(DAYS), xs)
    ts, zs = units.trajectories(np.asarray(DAYS), xs)
    fit(fd.FlowMatching(), fd.paths.CubicSpline(ts), zs)  # without a warning


@pytest.mark.slow
def test_a_map_of_gaussians_in_days():
    # Optimal transport in one dimension is monotone, so all chains have closed forms.
    means, stds = np.array([0.0, 1.0, 1.5, 3.0]), np.array([1.0, 0.7, 1.2, 1.0])
    z = jr.normal(jr.key(2), (2000, 1, 1))
    xs = means[None, :, None] + stds[None, :, None] * z
    units = fd.Normalisation.of(np.asarray(DAYS), xs)
    ts, zs = units.trajectories(np.asarray(DAYS), xs)
    times = fd.times.DiagonalMixture(fd.times.UniformSquare(), 0.5)
    with jax.numpy_dtype_promotion("standard"):
        state = fit(
            fd.LagrangianSelfDistillation(times=times),
            fd.paths.CubicSpline(ts),
            zs,
            num_steps=2000,
            net=fd.nn.MLP(1, 64, 3, key=jr.key(3)),
            batch_size=256,
        )
    flow_map = units.flow_map(state.ema_map)
    z = np.linspace(-1.5, 1.5, 31)[:, None]
    solve = fd.ODEFlowMap(flow_map.velocity, rtol=1e-5, atol=1e-5)
    for i in range(4):
        for j in range(4):
            start, end = (jnp.asarray(means[k] + stds[k] * z) for k in (i, j))
            for one, tolerance in ((flow_map, 0.25), (solve, 0.05)):
                jump = jax.vmap(lambda x, m=one, s=DAYS[i], t=DAYS[j]: m(s, t, x))
                assert fd.metrics.rms_distance(jump(start), end) < tolerance
