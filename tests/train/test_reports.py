"""What looks at a run: losses by times, grids of samples, TensorBoard, W&B."""

import importlib
import io
import json
import re
import subprocess
import sys
import types

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import linear_map, mlp_map, without_type_checks

import flowdiffrax as fd

OPTIM = optax.adam(3e-3)


class Known(fd.objectives.AbstractObjective):
    """A loss that is a function of the times alone."""

    factor: float = 1.0
    times: fd.times.AbstractTimes = fd.times.UniformTriangle()
    weight: fd.weights.AbstractWeight = fd.weights.NoWeight()

    def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None):
        return self.factor * (2 * s + 3 * t**2)


class Brighten(eqx.Module):
    """Each jump makes images brighter by a known amount, whatever its length."""

    amount: jnp.ndarray

    def __call__(self, s, t, x, args):
        return (self.amount * jnp.ones_like(x) if args is None else args + 0 * x) / (
            t - s
        )


def brighten(amount=0.2):
    return fd.FlowMap(Brighten(jnp.asarray(amount)))


def paths(n=64):
    return fd.LinearInterpolant()(*jr.normal(jr.key(3), (2, n, 2)))


def state_of(flow_map, **kwargs):
    return fd.train.TrainState.create(flow_map, OPTIM, key=jr.key(0), **kwargs)


def by_times(objective, n=64, teacher=None, **kwargs):
    return fd.metrics.loss_by_times(
        objective, linear_map(), teacher, paths(n), key=jr.key(1), **kwargs
    )


# --- losses by times ----------------------------------------------------------------


def test_bins_of_known_times():
    # Three pairs of times, each in a bin of its own.
    objective = Known(times=fd.times.GridTimes([0.1, 0.4, 0.8]))
    mean, count, edges = by_times(objective, num_bins=4)
    expected = np.full((4, 4), np.nan)
    expected[0, 1], expected[0, 3], expected[1, 3] = 0.68, 2.12, 2.72
    np.testing.assert_allclose(mean, expected)
    np.testing.assert_array_equal(count > 0, np.isfinite(expected))
    assert count.sum() == 64
    np.testing.assert_allclose(edges, [0, 0.25, 0.5, 0.75, 1])


def test_bins_of_all_times():
    # The loss rises with both times, so a bin's mean lies between its corners.
    law = fd.times.EitherDirection(fd.times.UniformTriangle())
    mean, count, _ = by_times(Known(times=law), n=400, num_bins=3)
    corner = np.arange(3) / 3
    low = 2 * corner[:, None] + 3 * corner**2
    high = 2 * (corner[:, None] + 1 / 3) + 3 * (corner + 1 / 3) ** 2
    assert count.sum() == 400 and (count > 0).all()
    assert ((low < mean) & (mean < high)).all()


def test_diagonal_is_on_the_diagonal():
    law = fd.times.DiagonalMixture(fd.times.GridTimes([0.1, 0.9]), 0.75)
    _, count, _ = by_times(Known(times=law), num_bins=2)
    assert np.trace(count) == 48 and count[0, 1] == 16


def test_mean_of_bins_is_the_batch_loss():
    # Weights that are not the shares, and an objective with rows on the diagonal.
    mixture = fd.objectives.Mixture(
        (fd.LagrangianSelfDistillation(), Known(0.5)), (3.0, 1.0), (0.3, jnp.asarray(5.0))
    )
    mean, count, _ = by_times(mixture)
    pooled = np.nansum(mean * count) / count.sum()
    jitted = eqx.filter_jit(fd.objectives.batch_loss)
    loss, _ = jitted(mixture, linear_map(), None, paths(), key=jr.key(1))
    np.testing.assert_allclose(pooled, loss, rtol=1e-12)


def test_bins_of_another_interval():
    law = fd.times.OnInterval(fd.times.GridTimes([0.0, 1.0]), -2.0, 6.0)
    mean, count, edges = by_times(Known(times=law), num_bins=4, time_range=(-2.0, 6.0))
    assert count[0, 3] == 64 and mean[0, 3] == pytest.approx(104)
    np.testing.assert_array_equal(edges, [-2, 0, 2, 4, 6])


def test_interval_of_the_map():
    flow_map = fd.FlowMap(lambda s, t, x, args: x, time_range=(0.0, 4.0))
    law = fd.times.OnInterval(fd.times.UniformTriangle(), 0.0, 4.0)
    made = fd.metrics.loss_by_times(
        Known(times=law), flow_map, None, paths(), key=jr.key(0), num_bins=2
    )
    np.testing.assert_array_equal(made.edges, [0, 2, 4])


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"num_bins": 0}, "`num_bins` must be at least 1; got 0"),
        ({"time_range": (0.0, 0.5)}, "are outside of"),
    ],
)
def test_bad_bins(settings, match):
    with pytest.raises(ValueError, match=match):
        by_times(Known(times=fd.times.GridTimes([0.2, 0.9])), **settings)


def test_loss_by_times_in_a_run():
    class Batches(eqx.Module):
        def __call__(self, key):
            return fd.LinearInterpolant()(*jr.normal(key, (2, 16, 2))), None

    schedule = lambda step: Known(1.0 + step, times=fd.times.GridTimes([0.1, 0.4, 0.8]))
    looked = fd.train.LossByTimes(
        fd.objectives.Scheduled(schedule),
        Batches(),
        key=jr.key(2),
        num_batches=3,
        num_bins=2,
    )
    state = eqx.tree_at(lambda s: s.step, state_of(mlp_map()), jnp.asarray(9))
    found = looked(state, {"step": 9})["loss_by_times"]
    # (0.1, 0.8) and (0.4, 0.8) share a bin, ten times as high at step 9.
    assert found[0][0] == pytest.approx(6.8) and found[1] == [None, None]
    assert 21.2 < found[0][1] < 27.2
    assert looked(state, {"step": 9})["loss_by_times"] == found
    json.dumps(found, allow_nan=False)


def test_loss_that_is_not_finite():
    looked = fd.train.LossByTimes(
        Known(jnp.nan), lambda key: (paths(4), None), key=jr.key(2), num_bins=1
    )
    assert looked(state_of(mlp_map()), {"step": 1}) == {"loss_by_times": [[None]]}


def test_loss_uses_what_the_run_has():
    # A learned weight that has moved, or another average as the teacher.
    objective = fd.objectives.ProgressiveFlowMapMatching(
        weight=fd.weights.LearnedWeight(2)
    )
    state = state_of(brighten(0.2), objective=objective, teacher_decay=0.9)
    weight = lambda s: s.learned[0].coefficients
    amount = lambda s: s.teacher_average.net.amount
    looked = fd.train.LossByTimes(
        objective, lambda key: (paths(8), None), key=jr.key(2), num_bins=1
    )
    states = (
        state,
        eqx.tree_at(weight, state, replace_fn=lambda w: w + 0.7),
        eqx.tree_at(amount, state, jnp.asarray(0.9)),
    )
    assert len({looked(one, {"step": 1})["loss_by_times"][0][0] for one in states}) == 3


def test_learned_weights_of_another_run():
    objective = fd.FlowMatching(weight=fd.weights.LearnedWeight(2))
    looked = fd.train.LossByTimes(objective, lambda key: (paths(4), None), key=jr.key(2))
    with pytest.raises(ValueError, match="1 learned weights, but .* run has 0"):
        looked(state_of(mlp_map()), {"step": 1})
    # An objective without any can look at a run that has some; at every second step.
    state = state_of(mlp_map(), objective=objective)
    plain = fd.train.LossByTimes(
        Known(), lambda key: (paths(4), None), key=jr.key(2), num_bins=1, every=2
    )
    found = [plain(state, {"step": step}) for step in range(1, 5)]
    assert not found[0] and found[1] and not found[2] and found[3] == found[1]


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"objective": fd.FlowMatching}, TypeError, "`objective` must be an instance"),
        ({"batches": paths(4)}, TypeError, "`batches` must be a callable"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be at least 1"),
        ({"num_bins": 0}, ValueError, "`num_bins` must be at least 1"),
        ({"every": 0}, ValueError, "`every` must be at least 1"),
    ],
)
def test_bad_loss_by_times(settings, error, match):
    settings = {"objective": Known(), "batches": lambda key: None, **settings}
    with without_type_checks(), pytest.raises(error, match=match):
        fd.train.LossByTimes(**settings, key=jr.key(0))


# --- grids of images ----------------------------------------------------------------


@pytest.fixture
def axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def drawn(axes):
    return axes.get_images()[0].get_array()


def test_grid_of_rows(axes):
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((4, 5, 1), "u1")
    fd.images.image_grid(axes, grey, row_labels=["a", "b"])
    picture = drawn(axes)
    # Two pixels between images of four by five, and around them.
    assert picture.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    for index in range(6):
        row, column = divmod(index, 3)
        corner = picture[2 + 6 * row :, 2 + 7 * column :]
        assert (corner[:4, :5] == index).all()
        assert (corner[4, :5] == 255).all() and (corner[:4, 5] == 255).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    np.testing.assert_array_equal(axes.get_yticks(), [3.5, 9.5])


def test_grid_of_a_list(axes):
    # Four images in three columns: the last row has one, and two white places.
    images = np.stack([np.full((2, 2, 3), value) for value in (-1, -0.6, -0.2, 0.2)])
    fd.images.image_grid(axes, images, num_columns=3)
    picture = drawn(axes)
    assert picture.shape == (2 * 4 + 2, 3 * 4 + 2, 3)
    places = picture[2::4, 2::4, 0].ravel().tolist()
    assert places == [0, 51, 102, 153, 255, 255]


def test_grid_is_square(axes):
    fd.images.image_grid(axes, np.zeros((8, 1, 1, 1)))
    assert drawn(axes).shape == (3 * 3 + 2, 3 * 3 + 2, 3)


def test_grid_clips(axes):
    values = jnp.asarray([-3.0, jnp.nan, 0.0, 7.0, jnp.inf], jnp.bfloat16)
    fd.images.image_grid(axes, values.reshape(1, 5, 1, 1, 1))
    assert drawn(axes)[2, 2::3, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "images, settings, error, match",
    [
        (np.zeros((3, 4, 4)), {}, ValueError, r"images\[..., None\]"),
        (np.zeros((3, 4, 4, 2)), {}, ValueError, "1 or 3 channels"),
        (np.zeros((0, 4, 4, 1)), {}, ValueError, "not be empty"),
        (np.zeros((3, 4, 4, 1), int), {}, TypeError, "got int64"),
        (np.zeros((3, 4, 4, 1)), {"num_columns": 0}, ValueError, "at least 1; got 0"),
        (np.zeros((1, 3, 4, 4, 1)), {"num_columns": 2}, ValueError, "without an axis"),
        (np.zeros((1, 3, 4, 4, 1)), {"row_labels": "ab"}, ValueError, "one label per"),
    ],
)
def test_bad_images(axes, images, settings, error, match):
    with pytest.raises(error, match=match):
        fd.images.image_grid(axes, images, **settings)


# --- samples in a run ---------------------------------------------------------------


DARK = np.zeros((3, 8, 8, 1)) - 0.6


def picture(path):
    opened = pytest.importorskip("PIL.Image").open(path)
    return np.asarray(opened.convert("RGB"))


def test_picture_of_samples(tmp_path):
    pytest.importorskip("matplotlib")
    grids = fd.images.SampleGrids(tmp_path / "new", DARK, num_jumps=(1, 4), num_columns=2)
    assert grids(state_of(brighten()), {"step": 30}) == {}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples-30.png"]
    values = picture(tmp_path / "new" / "samples-30.png")
    # Eight pixels for each of an image's; two rows and columns of 8 x 8, and gaps of 2.
    assert values.shape[0] == 8 * (2 * 10 + 2)
    assert values.shape[1] == values.shape[0] + 12 + 9 * len("4 jumps")
    grid = values[:, -values.shape[0] :]
    inside = [grid[16:80, 16:80], grid[16:80, 96:160], grid[96:160, 16:80]]
    # From -0.6 in one jump to -0.4, and in four to 0.2.
    for part, value in zip(inside, (76, 76, 153), strict=True):
        assert np.abs(part.astype(int) - value).max() <= 1
    assert (grid[:16] == 255).all() and (values[:, :60] < 128).any()


def test_distances_by_jumps():
    conditions = jnp.asarray([0.1, 0.2, 0.6])[:, None, None, None]
    for batch_size in (None, 1):
        grids = fd.images.SampleGrids(
            None,
            np.zeros((3, 2)),
            np.asarray(conditions[..., 0, 0]),
            num_jumps=[2, 3],
            distance=lambda x: np.mean(x[:, 0]),
            batch_size=batch_size,
        )
        # Two or three times the mean of the conditions, 0.3.
        found = grids(state_of(brighten()), {"step": 1})
        assert found == pytest.approx({"distance_2": 0.6, "distance_3": 0.9})
        assert all(type(value) is float for value in found.values())


def test_the_average_is_sampled():
    state = state_of(brighten(0.2))
    moved = eqx.tree_at(lambda s: s.averages[0].net.amount, state, jnp.asarray(0.5))
    grids = fd.images.SampleGrids(None, np.zeros((1, 2)), distance=np.max, num_jumps=[1])
    assert grids(moved, {"step": 1})["distance_1"] == pytest.approx(0.5)


def test_each_batch_of_samples_has_its_own_conditions():
    seen = []
    grids = fd.images.SampleGrids(
        None,
        np.zeros((4, 2)),
        jnp.arange(4.0),
        num_jumps=(1,),
        batch_size=2,
        distance=lambda samples: seen.append(samples) or 0.0,
    )
    grids(state_of(brighten()), {"step": 1})
    np.testing.assert_allclose(seen[0], np.stack([np.arange(4.0)] * 2, axis=1))


def test_samples_over_other_times():
    seen = {}
    for time_range in (None, (0.5, 2.0), (1.0, 0.0)):
        grids = fd.images.SampleGrids(
            None,
            np.ones((1, 2)),
            num_jumps=[2],
            time_range=time_range,
            distance=lambda x: x[0, 0],
        )
        # The average velocity is 1, so a jump moves by its length.
        flow_map = fd.FlowMap(lambda s, t, x, args: 0 * x + 1, time_range=(-1.0, 3.0))
        seen[time_range] = grids(state_of(flow_map), {"step": 1})["distance_2"]
    assert seen == pytest.approx({None: 5.0, (0.5, 2.0): 2.5, (1.0, 0.0): 0.0})


def test_one_compilation_a_number_of_jumps():
    traces = []

    class Counted(eqx.Module):
        weight: jnp.ndarray

        def __call__(self, s, t, x, args):
            traces.append(1)
            return self.weight * x

    settings = {"num_jumps": (1, 2, 4), "distance": np.mean, "batch_size": 2}
    grids = fd.images.SampleGrids(None, np.ones((4, 2)), **settings)
    reports, counts = [], []
    for weight in (0.0, 1.0, 2.0):
        flow_map = fd.FlowMap(Counted(jnp.asarray(weight)))
        reports.append(grids(state_of(flow_map), {"step": 1}))
        counts.append(len(traces))
    # A scan may trace its body more often than once, but only the first time.
    assert counts == counts[:1] * 3
    assert len({tuple(report.values()) for report in reports}) == 3


def test_every_so_many_steps(tmp_path):
    state = state_of(brighten())
    grids = fd.images.SampleGrids(
        None, np.zeros((1, 2)), distance=np.max, num_jumps=[1], every=2
    )
    found = [grids(state, {"step": step}) for step in range(4)]
    assert found[1] is None and found[3] is None and found[0] == found[2] != {}


def test_latents_are_decoded(tmp_path):
    pytest.importorskip("matplotlib")
    decode = lambda z: np.broadcast_to(z["z"][:, :, None, None], (len(z["z"]), 5, 5, 1))
    flow_map = fd.FlowMap(lambda s, t, x, args: {"z": jnp.zeros_like(x["z"])})
    x0 = {"z": np.ones((2, 5))}
    grids = fd.images.SampleGrids(tmp_path, x0, to_images=decode, num_jumps=[1])
    grids(state_of(flow_map), {"step": 1})
    assert (tmp_path / "samples-1.png").is_file()
    grids = fd.images.SampleGrids(tmp_path, x0, to_images=lambda z: z["z"])
    with pytest.raises(ValueError, match=r"`to_images` must return images.*\(2, 5\)"):
        grids(state_of(flow_map), {"step": 2})


def test_a_failed_picture_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    grids = fd.images.SampleGrids(tmp_path, DARK, num_jumps=[1])
    state = state_of(brighten())
    grids(state, {"step": 1})
    before = (tmp_path / "samples-1.png").read_bytes()

    def full(*args):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        grids(state_of(brighten(0.7)), {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["samples-1.png"]
    assert (tmp_path / "samples-1.png").read_bytes() == before


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("jax.process_index", lambda: 1)
    grids = fd.images.SampleGrids(tmp_path / "x", DARK, num_jumps=[1], distance=np.mean)
    assert grids(state_of(brighten()), {"step": 1}) == pytest.approx({"distance_1": -0.4})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "x0, settings, match",
    [
        (np.float64(1.0), {}, "one common leading axis"),
        (np.zeros((2, 3)), {"args": np.zeros(3)}, "one common leading axis"),
        (np.zeros((2, 3)), {"num_jumps": (1, 0)}, "each at least 1"),
        (np.zeros((2, 3)), {"num_jumps": ()}, "each at least 1"),
        (np.zeros((2, 3)), {"num_jumps": (2, 2)}, "different numbers of jumps"),
        (np.zeros((4, 3)), {"batch_size": 3}, "must divide the 4 starting points"),
        (np.zeros((4, 3)), {"batch_size": 0}, "must divide the 4 starting points"),
        (np.zeros((4, 3)), {"num_columns": 0}, "`num_columns` must be at least 1"),
        (np.zeros((4, 3)), {"time_range": (1.0, 1.0)}, "two different times"),
        (np.zeros((4, 3)), {"every": 0}, "`every` must be at least 1"),
        (np.zeros((4, 3)), {"folder": "pictures"}, "Pictures need images"),
        (np.zeros((4, 8, 8, 4)), {"folder": "pictures"}, "Pictures need images"),
        (np.zeros((8, 8, 1)), {"folder": "pictures"}, "Pictures need images"),
        (DARK, {"folder": "file"}, "`folder` must be a folder; .* is a file"),
    ],
)
def test_bad_sample_grids(tmp_path, x0, settings, match):
    (tmp_path / "file").write_text("")
    folder = settings.get("folder")
    settings = {**settings, "folder": None if folder is None else tmp_path / folder}
    if folder is not None:
        pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=match):
        fd.images.SampleGrids(x0=x0, **settings)


@pytest.mark.parametrize("distance", [lambda x: x, lambda x: None, lambda x: "0.5"])
def test_distance_that_is_no_number(distance):
    grids = fd.images.SampleGrids(None, np.zeros((1, 2)), distance=distance)
    with pytest.raises(ValueError, match="must return one number"):
        grids(state_of(brighten()), {"step": 1})


def test_distance_that_is_no_function():
    with without_type_checks(), pytest.raises(TypeError, match="must be a callable"):
        fd.images.SampleGrids(None, np.zeros((1, 2)), distance=0.5)


# --- logs ---------------------------------------------------------------------------

REPORTS = [
    {"step": 2, "loss": 0.5, "skipped": 0, "by_times": [[1.0, None]], "note": "x"},
    {"step": 4, "loss": np.float32(0.25), "skipped": 1, "distance_1": jnp.asarray(3.0)},
]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    board = fd.train.TensorBoard(tmp_path / "board")
    for report in REPORTS:
        board(state_of(brighten()), report)
    board.writer.close()
    assert scalars(tmp_path / "board") == {
        "loss": [(2, 0.5), (4, 0.25)],
        "skipped": [(2, 0.0), (4, 1.0)],
        "distance_1": [(4, 3.0)],
    }


def scalars(folder):
    """The scalars in TensorBoard's files: records of a length, its sum, data, its sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        file = io.BytesIO(path.read_bytes())
        while head := file.read(12):
            event = Event.FromString(file.read(int.from_bytes(head[:8], "little")))
            file.read(4)
            for value in event.summary.value:
                row = (event.step, value.simple_value)
                found.setdefault(value.tag, []).append(row)
    return found


def test_tensorboard_in_a_file(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        fd.train.TensorBoard(tmp_path / "file")


def test_tensorboard_of_another_process(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("jax.process_index", lambda: 1)
    board = fd.train.TensorBoard(tmp_path / "board")
    board(state_of(brighten()), REPORTS[0])
    assert board.writer is None and not (tmp_path / "board").exists()


def test_what_weights_and_biases_is_given(monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda numbers, **rest: logged.append((numbers, rest))
    )
    fake = types.SimpleNamespace(init=lambda **settings: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = fd.train.WeightsAndBiases(project="maps")
    for report in REPORTS:
        log(state_of(brighten()), report)
    assert logged == [
        ({"loss": 0.5, "skipped": 0.0}, {"step": 2, "commit": True}),
        (
            {"loss": 0.25, "skipped": 1.0, "distance_1": 3.0},
            {"step": 4, "commit": True},
        ),
    ]
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert fd.train.WeightsAndBiases().run is None


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_weights_and_biases(tmp_path):
    pytest.importorskip("wandb")
    log = fd.train.WeightsAndBiases(mode="offline", dir=str(tmp_path), project="maps")
    for report in REPORTS:
        log(state_of(brighten()), report)
    summary = dict(log.run.summary)
    log.run.finish()
    assert (summary["loss"], summary["skipped"], summary["distance_1"]) == (0.25, 1, 3)
    assert not {"by_times", "note", "step"} & set(summary)
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1 and b"distance_1" in files[0].read_bytes()


@pytest.mark.parametrize(
    "make, module, extra",
    [
        (lambda: fd.train.TensorBoard("x"), "tensorboardX", "tensorboard"),
        (lambda: fd.train.WeightsAndBiases(), "wandb", "wandb"),
        (lambda: fd.images.SampleGrids("x", DARK), "matplotlib", "plot"),
    ],
)
def test_missing_extras(monkeypatch, make, module, extra):
    def missing(name, *args):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    cure = re.escape(f'pip install "flowdiffrax[{extra}]"')
    with pytest.raises(ImportError, match=f"needs {module}.*{cure}"):
        make()


# --- all of it ----------------------------------------------------------------------


class Linear(eqx.Module):
    weight: jnp.ndarray

    def __call__(self, s, t, x, args):
        return self.weight * x


def test_in_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboardX")
    data = fd.images.DeviceImages(fd.images.digits())
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8)
    x0 = jr.normal(jr.key(5), (4, 8, 8, 1), jnp.float32)
    objective = fd.LagrangianSelfDistillation()
    reports, board = [], fd.train.TensorBoard(tmp_path / "board")
    fd.train.fit(
        fd.FlowMap(Linear(jnp.asarray(0.1, jnp.float32))),
        objective,
        batches,
        optax.sgd(1e-2),
        num_steps=4,
        key=jr.key(0),
        report_every=2,
        on_report=[
            fd.images.SampleGrids(tmp_path / "grids", x0, distance=np.std, every=4),
            fd.train.LossByTimes(objective, batches, key=jr.key(1), num_batches=1),
            board,
            lambda state, report: reports.append(report),
        ],
        progress=False,
    )
    board.writer.close()
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["samples-4.png"]
    distances = {"distance_1", "distance_2", "distance_4"}
    assert distances <= set(reports[1]) and not distances & set(reports[0])
    assert all(np.shape(report["loss_by_times"]) == (8, 8) for report in reports)
    written = scalars(tmp_path / "board")
    assert [step for step, _ in written["loss"]] == [2, 4]
    assert [step for step, _ in written["distance_4"]] == [4]


SEVERAL = """
import jax, jax.numpy as jnp, jax.random as jr, numpy as np, optax, sys
jax.config.update("jax_num_cpu_devices", 4)
import flowdiffrax as fd
x = jr.normal(jr.key(3), (200, 2))
batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), x, 32)
objective = fd.objectives.FlowMapMatching()
def numbers(parallel):
    reports = []
    fd.train.fit(
        fd.FlowMap(fd.nn.MLP(2, 64, 3, key=jr.key(0))), objective, batches,
        optax.adam(1e-2), num_steps=2, key=jr.key(1), report_every=1, parallel=parallel,
        on_report=[
            fd.images.SampleGrids(None, x, distance=np.std),
            fd.train.LossByTimes(objective, batches, key=jr.key(2), num_bins=2),
            lambda state, report: reports.append(report),
        ],
        progress=False,
    )
    last = reports[-1]
    return [last["distance_4"], *np.asarray(last["loss_by_times"], float).ravel()]
alone = numbers(None)
for shard_weights in (False, True):
    several = numbers(fd.train.DataParallel(shard_weights=shard_weights))
    np.testing.assert_allclose(several, alone, rtol=1e-4)
print(len(jax.devices()), np.isfinite(alone).sum())
"""


@pytest.mark.slow
def test_on_several_devices():
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "5"]


def test_losses_by_times_with_keys_of_any_kind():
    batches = lambda key: (paths(8), None)
    for kind in ("threefry2x32", "rbg"):
        looked = fd.train.LossByTimes(Known(), batches, key=jr.key(1, impl=kind))
        state = fd.train.TrainState.create(
            linear_map(), OPTIM, key=jr.key(0, impl=kind), objective=Known()
        )
        (row, *_) = looked(state, {"step": 0})["loss_by_times"]
        assert any(mean is not None for mean in row)
