"""Streams from the host: arrays, memory maps and functions of row numbers."""

import tracemalloc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import without_type_checks

import flowdiffrax as fd

pytest.importorskip("grain")

TS = jnp.linspace(0.0, 1.0, 3)


def rows(number=7):
    """Each row tells its number."""
    numbers = np.arange(number, dtype=float)
    return {"ys": np.tile(numbers[:, None, None], (1, 3, 2)), "args": numbers}


def first(stream, number):
    return [next(stream) for _ in range(number)]


def test_arrays_come_in_the_order_of_images():
    images = fd.images.Images(np.zeros((7, 2, 2, 1), np.uint8), np.arange(7))
    expected = [labels for _, labels in first(fd.data.stream(images, 3, seed=5), 5)]
    for batch, labels in zip(
        first(fd.data.stream(rows(), 3, seed=5), 5), expected, strict=True
    ):
        np.testing.assert_array_equal(batch["args"], labels)
        np.testing.assert_array_equal(batch["ys"][:, 1, 1], labels)


@pytest.mark.parametrize("kind", ["device", "function"])
def test_every_source_gives_the_same_batches(kind):
    pool, settings = rows(), {}
    if kind == "device":
        source = jax.tree.map(jnp.asarray, pool)
    else:
        source = lambda index: {name: pool[name][index] for name in pool}
        settings = {"size": 7}
    found = first(fd.data.stream(source, 3, start=2, **settings), 3)
    for a, b in zip(found, first(fd.data.stream(pool, 3, start=2), 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def large(tmp_path):
    """A file of 400 MB, hardly any of which takes room on the disk."""
    shape = (1_000, 3, 32_768)
    pool = np.memmap(tmp_path / "ys.bin", np.float32, mode="w+", shape=shape)
    pool[:, 1, 0] = np.arange(1_000)
    return pool


def test_memory_map_is_read_row_by_row(large):
    tracemalloc.start()
    try:
        batches = first(fd.data.stream(large, 2, num_threads=1, prefetch=1), 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    numbers = [int(number) for batch in batches for number in batch[:, 1, 0]]
    assert len(set(numbers)) == 4
    assert not isinstance(batches[0], np.memmap)
    assert peak < 0.01 * large.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda pool: fd.data.TrajectoryBatches(TS, pool, 4),
        lambda pool: fd.data.StateBatches(pool, 4),
        lambda pool: fd.data.InterpolantBatches(fd.LinearInterpolant(), pool, 4),
    ],
)
def test_memory_map_does_not_go_to_the_device(large, make):
    with pytest.raises(TypeError, match="Stream it from the disk with `data.StreamBat"):
        make(large)


def test_training_on_streamed_trajectories():
    # Constant in time, so that the map must learn to stand still.
    seen = []

    def make(batch):
        seen.append(np.asarray(batch["args"]).tolist())
        return fd.data.TrajectoryBatches(TS, batch["ys"], 4, draw=False)

    start = fd.FlowMap(fd.nn.MLP(2, 4, 1, key=jr.key(0)))
    kick = lambda tree: tree.at[...].set(0.5)
    last = start.net.last
    start = jax.tree.map(lambda leaf: kick(leaf) if leaf is last.bias else leaf, start)
    reports = []
    fd.train.fit(
        start,
        fd.TrajectoryMatching(fd.times.GridTimes(TS)),
        fd.data.StreamBatches(rows(), 4, make, seed=3),
        optax.adam(0.05),
        num_steps=30,
        key=jr.key(1),
        progress=False,
        report_every=1,
        on_report=lambda state, report: reports.append(report["loss"]),
    )
    assert reports[-1] < 0.1 * reports[0]
    expected = first(fd.data.stream(rows(), 4, seed=3), len(seen))
    assert seen == [batch["args"].tolist() for batch in expected]


@pytest.mark.parametrize("draw", [False, True])
def test_batch_of_all_rows(draw):
    points = jnp.arange(6.0)[:, None]
    batches = {
        "trajectories": fd.data.TrajectoryBatches(
            TS, jnp.tile(points[:, None], (1, 3, 1)), 6, draw=draw
        ),
        "points": fd.data.InterpolantBatches(
            fd.LinearInterpolant(), points, 6, draw=draw
        ),
    }
    for batch in batches.values():
        paths, _ = batch(jr.key(0))
        found = eqx.filter_vmap(lambda path: path.evaluate(1.0))(paths)
        assert (found.tolist() == points.tolist()) is not draw


@pytest.mark.parametrize(
    "make",
    [
        lambda ys: fd.data.TrajectoryBatches(TS, ys, 4, draw=False),
        lambda ys: fd.data.InterpolantBatches(fd.LinearInterpolant(), ys, 4, draw=False),
    ],
)
def test_batch_of_all_rows_has_one_size(make):
    with pytest.raises(ValueError, match="takes all 5 rows, not 4"):
        make(jnp.ones((5, 3, 2)))(jr.key(0))


def test_streamed_rows_that_are_not_finite():
    pool = rows()
    pool["ys"][5, 1, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 7 rows are not, the first of them row 5"):
        next(fd.data.stream(pool, 7))


@pytest.mark.parametrize(
    "source, settings, error, match",
    [
        (lambda index: index, {}, ValueError, "needs `size`"),
        (lambda index: index[:1], {"size": 7}, ValueError, "the 3 rows"),
        (lambda: 0, {"size": 7}, TypeError, r"called as `source\(rows\)`"),
        (lambda index: index, {"size": 0}, ValueError, "`size` must be at least 1"),
        ({"a": np.ones(3), "b": np.ones(4)}, {}, ValueError, "one common leading axis"),
        ([[1.0, 2.0]], {}, TypeError, "function of row numbers"),
    ],
)
def test_bad_sources(source, settings, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        next(fd.data.stream(source, 3, **settings))
