"""Scores during a run: lines, curves, the best map, errors, and the background."""

import json
import socket
import subprocess
import sys
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import flowdiffrax as fd
from flowdiffrax.images import _score_curves, _scores_file

OPTIM = optax.sgd(1e-2)
SHAPE = (6, 4, 1)
FEATURES = fd.images.RandomFeatures(SHAPE, key=jr.key(7), width=8)


class Brighten(eqx.Module):
    """Adds a known amount over [0, 1], in any number of jumps, and half in twice."""

    amount: jnp.ndarray

    def __call__(self, s, t, x, args):
        factor = self.amount if args is None else args * self.amount
        return factor * jnp.ones_like(x)


def images_of(seed, number=40, brighter=0):
    values = np.random.default_rng(seed).integers(60, 190, (number, *SHAPE))
    return (values + brighter).astype(np.uint8)


REFERENCE = fd.images.ImageReference.of(FEATURES, images_of(0), source="test train")
STARTS = fd.images.from_uint8(images_of(1))


def state_of(*amounts):
    """A state whose averages add these amounts of the range of pixels."""
    decays = tuple(0.9 + 0.01 * index for index in range(len(amounts)))
    maps = [fd.FlowMap(Brighten(jnp.asarray(a / 127.5, jnp.float32))) for a in amounts]
    state = fd.train.TrainState.create(maps[0], OPTIM, key=jr.key(0), ema_decay=decays)
    return eqx.tree_at(lambda s: s.averages, state, tuple(maps))


def curves_of(folder, **settings):
    settings = {"num_jumps": (1, 2), "seed": 3, **settings}
    return fd.images.ScoreCurves(
        folder, STARTS, reference=REFERENCE, features=FEATURES, **settings
    )


def lines_of(folder):
    return [json.loads(x) for x in (folder / "scores.jsonl").read_text().splitlines()]


def test_conditions_reach_the_map(tmp_path):
    curves = curves_of(tmp_path, num_jumps=(1,), args=np.full(len(STARTS), 6, np.float32))
    found = curves(state_of(10), {"step": 1})
    expected = fd.images.score_images(
        images_of(1, brighter=60), images_of(0), FEATURES, seed=3, source="test train"
    )
    assert found["frechet_1"] == pytest.approx(expected.frechet)


def test_lines_and_reports(tmp_path):
    state = state_of(10, 60)
    held_out = images_of(2)
    curves = curves_of(
        tmp_path / "new", held_out=held_out, batch_size=30, every=5,
        config={"preset": "small"},
    )  # fmt: skip
    assert curves(state, {"step": 4}) is None and not (tmp_path / "new").exists()
    found = curves(state, {"step": 5})
    # Samples whose values are known: the starting points, brighter.
    score = lambda images: fd.images.score_images(
        images, images_of(0), FEATURES, seed=3, source="test train", held_out=held_out
    )
    near, far = score(images_of(1, brighter=10)), score(images_of(1, brighter=60))
    names = ["frechet_1", "frechet_1_0.91", "frechet_2", "frechet_2_0.91"]
    values = [near.frechet, far.frechet] * 2
    assert found == pytest.approx(
        {"scored_step": 5} | dict(zip(names, values, strict=True))
    )
    rows = lines_of(tmp_path / "new")
    assert [(row["average"], row["jumps"]) for row in rows] == [
        ("0.9", 1), ("0.91", 1), ("0.9", 2), ("0.91", 2),
    ]  # fmt: skip
    for row, known in zip(rows, (near, far) * 2, strict=True):
        for name, value in json.loads(json.dumps(known.as_dict())).items():
            assert row[name] == (
                pytest.approx(value) if isinstance(value, float) else value
            )
        assert (row["step"], row["attempt"]) == (5, 1)
        assert row["config"] == {"preset": "small"} and row["date"].startswith("20")
        assert row["versions"]["jax"] == jax.__version__
    assert rows[0]["weights"] == fd.train.fingerprint(state.averages[0])
    assert rows[0]["weights"] != rows[1]["weights"]
    png = (tmp_path / "new" / "scores.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_a_repeated_step_adds_lines_and_readers_take_the_last(tmp_path):
    for amount in (30, 10):
        curves = curves_of(tmp_path, num_jumps=[1])
        for step in (1, 2):
            curves(state_of(amount + step), {"step": step})
    assert [row["attempt"] for row in lines_of(tmp_path)] == [1, 1, 2, 2]
    rows = fd.images.read_scores(tmp_path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 2), (2, 2)]
    assert rows == lines_of(tmp_path)[2:]
    assert fd.images.read_scores(tmp_path / "absent") == []


def test_a_line_that_was_cut_off(tmp_path):
    curves_of(tmp_path, num_jumps=[1])(state_of(5), {"step": 1})
    path = tmp_path / "scores.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ave')
    curves_of(tmp_path, num_jumps=[1])(state_of(5), {"step": 2})
    assert len(path.read_text().splitlines()) == 3
    rows = fd.images.read_scores(tmp_path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 1), (2, 2)]


def best_of(folder):
    make = lambda config: fd.FlowMap(Brighten(jnp.zeros((), jnp.float32)))
    config, flow_map = fd.train.load(folder / "best.safetensors", make)
    return config["best"], round(float(flow_map.net.amount) * 127.5)


def test_the_best_map_survives_and_is_replaced_only_by_a_better_one(tmp_path):
    def score(step, *amounts, **settings):
        curves_of(tmp_path, **settings)(state_of(*amounts), {"step": step})
        return best_of(tmp_path)

    best, amount = score(10, 50, 20, config={"preset": "small"})
    assert amount == 20 and (best["step"], best["average"]) == (10, "0.91")
    assert best["jumps"] == 1 and best["frechet"] == lines_of(tmp_path)[1]["frechet"]
    before = (tmp_path / "best.safetensors").read_bytes()
    # Each call is a run that was started again.
    assert score(20, 30, 50)[1] == 20
    assert score(10, 50, 20, config={"preset": "small"})[1] == 20
    assert (tmp_path / "best.safetensors").read_bytes() == before
    assert score(30, 10, 50)[1] == 10
    # A worse score, which cannot be compared: it is measured in another way.
    assert score(40, 40, seed=4)[1] == 40


def test_errors_are_reported_and_training_goes_on(tmp_path):
    source = fd.data.InterpolantBatches(fd.LinearInterpolant(), STARTS, 4)
    curves = curves_of(tmp_path, num_jumps=[1])
    reports = []

    def spoil(state, report):
        # One average out of two gives samples that are not finite.
        bad = state.averages[1].net.amount * (jnp.nan if report["step"] < 2 else 1)
        spoilt = eqx.tree_at(lambda s: s.averages[1].net.amount, state, bad)
        return curves(spoilt, report)

    with pytest.warns(RuntimeWarning, match="step 1 are not complete.*average 0.6 in 1"):
        fd.train.fit(
            fd.FlowMap(Brighten(jnp.zeros((), jnp.float32))), fd.FlowMatching(), source,
            OPTIM, num_steps=3, key=jr.key(0), ema_decay=(0.5, 0.6), report_every=1,
            on_report=[spoil, lambda state, report: reports.append(report)],
            progress=False,
        )  # fmt: skip
    assert "not finite" in reports[0]["scoring_error"] and "frechet_1" in reports[0]
    assert "scoring_error" not in reports[2] and "frechet_1_0.6" in reports[2]
    assert len(fd.images.read_scores(tmp_path)) == 1 + 2 + 2


def test_scores_change_no_training_nor_does_a_stop(tmp_path):
    source = fd.data.InterpolantBatches(fd.LinearInterpolant(), STARTS, 4)

    def train(folder, *calls):
        run = fd.train.Run(folder, save_every=2)
        state = fd.train.fit(
            fd.FlowMap(Brighten(jnp.ones((), jnp.float32))), fd.FlowMatching(), source,
            OPTIM, num_steps=4, key=jr.key(0), ema_decay=(0.5, 0.9),
            report_every=1, on_report=calls, run=run, progress=False,
        )  # fmt: skip
        return fd.train.fingerprint(state)

    def scored(folder, *calls):
        # What the run does anew after each stop.
        return train(folder, curves_of(folder, num_jumps=[1]), *calls)

    def stop(state, report):
        if report["step"] == 3:
            raise KeyError("out of luck")

    plain, whole = train(tmp_path / "plain"), scored(tmp_path / "whole")
    with pytest.raises(KeyError, match="out of luck"):
        scored(tmp_path / "stopped", stop)
    assert plain == whole == scored(tmp_path / "stopped")
    names = ("step", "average", "frechet", "weights")
    rows = [
        [[row[name] for name in names] for row in fd.images.read_scores(folder)]
        for folder in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert len(rows[0]) == 8 and rows[0] == rows[1]


def test_scores_in_the_background(tmp_path, monkeypatch):
    begin, threads, score = threading.Event(), [], _score_curves.score_images

    def wait_and_score(*args, **kwargs):
        threads.append(threading.current_thread())
        assert begin.wait(60)
        return score(*args, **kwargs)

    monkeypatch.setattr(_score_curves, "spare_device", lambda _: jax.devices()[0])
    monkeypatch.setattr(_score_curves, "score_images", wait_and_score)
    curves = curves_of(tmp_path, num_jumps=[1], every=2)
    state = state_of(5)
    assert curves(state, {"step": 2}) is None  # returns before it has scored
    assert curves(state, {"step": 3}) is None and not fd.images.read_scores(tmp_path)
    begin.set()
    found = curves(state, {"step": 4})  # waits for the scores of step 2
    assert found["scored_step"] == 2 and found["frechet_1"] > 0
    curves.wait()
    assert [row["step"] for row in fd.images.read_scores(tmp_path)] == [2, 4]
    assert curves(state, {"step": 5})["scored_step"] == 4
    assert threading.main_thread() not in threads


def test_the_end_of_a_run_waits():
    class Waits:
        waited = 0

        def __call__(self, state, report):
            assert self.waited == 0

        def wait(self):
            self.waited += 1

    waits = Waits()
    source = fd.data.InterpolantBatches(fd.LinearInterpolant(), STARTS, 4)
    fd.train.fit(
        fd.FlowMap(Brighten(jnp.zeros((), jnp.float32))), fd.FlowMatching(), source,
        OPTIM, num_steps=2, key=jr.key(0), report_every=1, on_report=waits,
        ema_decay=(0.5, 0.6), progress=False,
    )  # fmt: skip
    assert waits.waited == 1


def rows_for_a_picture():
    row = {
        "frechet_name": "FID", "floor": 0.5, "num_held_out": 9, "num_samples": 20,
        "num_reference": 30, "source": "test", "seed": 0, "fingerprint": "f",
    }  # fmt: skip
    cells = [(s, a, j) for s in (20, 10) for a in ("0.9", "0.99") for j in (1, 4)]
    return [
        {**row, "step": step, "average": average, "jumps": jumps, "frechet": step / jumps}
        for step, average, jumps in cells
    ]


def test_picture_of_curves():
    axes = Figure().add_subplot()
    other = {**rows_for_a_picture()[0], "seed": 1, "frechet": 1e9}
    _scores_file.draw_scores(axes, [other, *rows_for_a_picture()])
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == [
        "1 jump, average 0.9", "1 jump, average 0.99", "4 jumps, average 0.9",
        "4 jumps, average 0.99", "9 held-out images",
    ]  # fmt: skip
    curve = lines["4 jumps, average 0.9"]
    assert list(curve.get_xdata()) == [10, 20] and list(curve.get_ydata()) == [2.5, 5]
    floor = lines["9 held-out images"]
    assert set(floor.get_ydata()) == {0.5} and floor.get_linestyle() == "--"
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"num_jumps": (0,)}, ValueError, "`num_jumps` must be at least 1"),
        ({"num_jumps": ()}, ValueError, "`num_jumps` is empty"),
        ({"num_jumps": (1, 1)}, ValueError, "`num_jumps` must differ"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"args": jnp.arange(3)}, ValueError, "`x0` and `args`"),
        (
            {"features": fd.images.RandomFeatures(SHAPE, key=jr.key(8), width=8)},
            ValueError,
            "`reference` is of the features",
        ),
    ],
)
def test_bad_settings(tmp_path, settings, error, match):
    own = {"reference": REFERENCE, "features": FEATURES, "seed": 0} | settings
    with pytest.raises(error, match=match):
        fd.images.ScoreCurves(tmp_path, STARTS, **own)


def test_averages_with_one_name(tmp_path):
    net = fd.FlowMap(Brighten(jnp.zeros((), jnp.float32)))
    decays = (0.05, fd.train.PowerAverage(0.05))
    state = fd.train.TrainState.create(net, OPTIM, key=jr.key(0), ema_decay=decays)
    with pytest.raises(ValueError, match="must differ in their numbers"):
        curves_of(tmp_path)(state, {"step": 1})


COMMON = """
import jax.random as jr, numpy as np, optax
import flowdiffrax as fd
from flowdiffrax.images import _score_curves
images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
features = fd.images.RandomFeatures((8, 8, 1), key=jr.key(0), width=4)
reference = fd.images.ImageReference.of(features, images, source="test")
batches = fd.data.InterpolantBatches(
    fd.LinearInterpolant(), fd.images.DeviceImages(images), 8
)
net = fd.nn.Ravelled(fd.nn.MLP(64, 8, 2, key=jr.key(1)))
used, jump = [], _score_curves.in_jumps
def watched(*args):
    y = jump(*args)
    used.append({shard.device.id: len(shard.data) for shard in y.addressable_shards})
    return y
_score_curves.in_jumps = watched
def last(folder, **more):
    curves = fd.images.ScoreCurves(
        folder, jr.normal(jr.key(2), (30, 8, 8, 1)), reference=reference,
        features=features, seed=2, every=2,
    )
    fd.train.fit(
        fd.FlowMap(net), fd.FlowMatching(), batches, optax.adam(1e-2), num_steps=4,
        key=jr.key(3), ema_decay=0.9, report_every=1, on_report=curves, progress=False,
        **more,
    )
    return [row["frechet"] for row in fd.images.read_scores(folder)]
"""

SEVERAL = f"""
import jax, sys
jax.config.update("jax_num_cpu_devices", 2)
{COMMON}
background = last(sys.argv[1] + "/a")
assert all(one == {{1: 30}} for one in used), used
used.clear()
both = last(sys.argv[1] + "/b", parallel=fd.train.DataParallel())
assert all(one == {{0: 15, 1: 15}} for one in used), used
np.testing.assert_allclose(background, both, rtol=1e-3)
# After training, with a block that two devices cannot divide.
from flowdiffrax.images.command import _options, _samplers, _scores
flow_map = fd.FlowMap(net)
x0, drawn = jr.normal(jr.key(2), (30, 8, 8, 1)), []
for all_devices in (False, True):
    where = _scores.own_devices(_options.Options(all_devices=all_devices))
    draw = _samplers.by_jumps(_scores.placed(flow_map, where), 2)
    drawn.append(_samplers.draw_all(draw, x0, None, 17, where)[0])
assert np.abs(np.subtract(*drawn, dtype=int)).max() <= 1
print(len(background))
"""


@pytest.mark.slow
def test_scores_on_another_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["6"], done.stderr


PROCESSES = f"""
import jax, sys
folder, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
if address:
    jax.distributed.initialize(address, 2, index)
{COMMON}
found = last(folder, parallel=fd.train.DataParallel())
assert [*used[0].values()] == [15 if address else 30], used
print("scores", *found)
"""


@pytest.mark.slow
def test_scores_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    start = lambda folder, *words: subprocess.Popen(
        [sys.executable, "-c", PROCESSES, str(tmp_path / folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = [start("two", address, "0"), start("two", address, "1")]
    rows = []
    for process in [*processes, start("one", "", "0")]:
        out, err = process.communicate()
        assert process.returncode == 0, err
        rows.append([float(x) for x in out.split("scores")[1].split()])
    two, _, one = rows
    assert len(one) == 6
    np.testing.assert_allclose(one, two, rtol=1e-3)
    # The second process writes nothing.
    assert len(lines_of(tmp_path / "two")) == 6
