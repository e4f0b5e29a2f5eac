"""Folders of runs: resumed exactly whatever ends them, and refused where they differ."""

import contextlib
import gc
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import without_type_checks
from run_train import begin, digest, train

import flowdiffrax as fd

pytest.importorskip("orbax.checkpoint")

# Orbax and TensorStore leave loops open when they fail, and tests make them fail.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SCRIPT = pathlib.Path(__file__).parent / "run_train.py"


def make(folder, **settings):
    return fd.train.Run(folder, {"width": 16}, **{"save_every": 3} | settings)


def numbers(run):
    """Reports without what depends on the clock."""
    clock = ("seconds", "examples_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in run.metrics()]


@pytest.fixture(autouse=True, scope="module")
def leave_nothing_open():
    """Not for tests of other files to stumble over.

    Once, because a process that has run many tests takes seconds to collect garbage.
    """
    yield
    gc.collect()


@pytest.fixture(scope="module")
def first_state():
    return train(None, 1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("unbroken"))
    return digest(train(run)), numbers(run)


def test_folder_of_a_run(tmp_path, unbroken):
    run = make(tmp_path)
    state = train(run)
    names = {path.name for path in tmp_path.iterdir() if path.name[0] != "."}
    assert names == {"config.json", "metrics.jsonl", "checkpoints"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"] == {"width": 16}
    lines = run.metrics()
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert lines[-1]["examples_per_second"] > 0
    like = eqx.filter_eval_shape(
        fd.train.TrainState.create, begin(), optax.adam(1e-2), key=jr.key(1)
    )
    assert digest(run.restore(like)) == digest(state)


# --- what ends a run ----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(tmp_path, unbroken, number):
    def kill(state, report):
        if report["step"] == 5:
            os.kill(os.getpid(), number)

    ends = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    before = signal.getsignal(number)
    with pytest.raises(ends) as caught:
        train(make(tmp_path), on_report=kill)
    assert signal.getsignal(number) is before
    if number == signal.SIGTERM:
        assert caught.value.code == 128 + 15
    run = make(tmp_path)
    assert run.newest_step == 5
    assert (digest(train(run)), numbers(run)) == unbroken


@pytest.mark.slow
def test_second_interrupt_does_not_wait(tmp_path):
    def kill(state, report):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make(tmp_path), on_report=kill)
    assert make(tmp_path).steps == ()


@pytest.mark.slow
def test_signal_while_the_last_checkpoint_is_written(tmp_path, monkeypatch, unbroken):
    close = fd.train.Run.close

    def kill_and_close(run):
        os.kill(os.getpid(), signal.SIGTERM)
        close(run)

    monkeypatch.setattr(fd.train.Run, "close", kill_and_close)
    with pytest.raises(SystemExit):
        train(make(tmp_path))
    monkeypatch.undo()
    assert digest(train(make(tmp_path))) == unbroken[0]


@pytest.mark.slow
def test_stopped_run_keeps_its_report(tmp_path):
    kill = lambda state, report: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(make(tmp_path, save_every=100), on_report=kill)
    assert make(tmp_path).best_step == 1


def test_two_processes_in_one_folder(tmp_path, unbroken):
    def another(state, report):
        if report["step"] == 4:
            with pytest.raises(ValueError, match="Another process is training in"):
                train(make(tmp_path))

    run = make(tmp_path)
    assert digest(train(run, on_report=another)) == unbroken[0]
    assert numbers(run) == unbroken[1]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt("a bug")])
def test_error_in_a_report(tmp_path, unbroken, error):
    def fail(state, report):
        if report["step"] == 8:
            raise error

    with pytest.raises(type(error), match="a bug") as caught:
        train(make(tmp_path), on_report=fail)
    assert "The state of step 8 is saved in" in caught.value.__notes__[-1]
    run = make(tmp_path)
    assert run.newest_step == 8
    assert (digest(train(run)), numbers(run)) == unbroken


class FailingStream(fd.data.StreamBatches):
    """The batches of `train`, five times."""

    def __init__(self):
        pass

    def each_step(self, step, accumulate=1, place=None):
        points = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2)
        for _ in range(step, 5):
            yield fd.data.InterpolantBatches(fd.LinearInterpolant(), points, 8)
        raise OSError("the disk is gone")


def test_error_of_a_stream(tmp_path, unbroken):
    with pytest.raises(OSError, match="the disk is gone"):
        train(make(tmp_path), batches=FailingStream(), report_every=4)
    run = make(tmp_path)
    assert run.newest_step == 5
    assert digest(train(run)) == unbroken[0]


def test_error_before_the_first_step_saves_nothing(tmp_path):
    with pytest.raises(TypeError, match="must return a pair"):
        train(make(tmp_path), batches=lambda key: jnp.ones(3))
    assert make(tmp_path).steps == ()


def test_error_without_a_run_hands_the_state_on(unbroken):
    def fail(state, report):
        if report["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        train(None, on_report=fail)
    assert "The state of step 8" in caught.value.__notes__[-1]
    assert digest(train(None, flow_map=caught.value.state)) == unbroken[0]


def started(folder, *arguments):
    command = [sys.executable, SCRIPT, folder, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def printed(folder, *arguments):
    """The last line of a run that ends by itself."""
    with started(folder, *arguments) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 20])
def test_killed_run_ends_in_the_same_weights(tmp_path, num_kills):
    steps, draws = 20 * num_kills, random.Random(0)
    for _ in range(num_kills):
        with started(tmp_path / "killed", steps) as process:
            # Some reports after it began, so that each life gets somewhere.
            for _ in range(draws.randrange(4, 16)):
                assert process.stdout.readline().startswith("report")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draws.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    found = printed(tmp_path / "killed", steps)
    assert found == printed(tmp_path / "unbroken", steps)
    broken, whole = make(tmp_path / "killed"), make(tmp_path / "unbroken")
    assert numbers(broken) == numbers(whole)
    assert len(whole.metrics()) == steps


@contextlib.contextmanager
def largest_file(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(tmp_path, unbroken):
    train(make(tmp_path), 3)
    with pytest.raises(
        OSError, match="could not be written.*If the disk is full"
    ) as caught:
        with largest_file(6000):
            train(make(tmp_path))
    assert "The checkpoints of steps [3] are complete" in str(caught.value)
    run = make(tmp_path)
    assert run.newest_step == 3
    assert (digest(train(run)), numbers(run)) == unbroken


# --- what is kept -------------------------------------------------------------------


def test_newest_and_best(tmp_path):
    def score(state, report):
        return {"score": abs(report["step"] - 4)}

    run = make(tmp_path, save_every=2, newest=2, best=1, best_by="score")
    train(run, on_report=score)
    assert run.steps == (4, 10, 12)
    assert (run.newest_step, run.best_step) == (12, 4)
    again = make(tmp_path, save_every=2, newest=1, best=2, best_by="score")
    train(again, 14, on_report=score)
    assert again.steps == (4, 10, 14) and again.best_step == 4


@pytest.mark.slow
def test_reports_that_are_not_candidates(tmp_path):
    scores = {3: None, 6: float("nan"), 9: 2.0, 12: 3.0}
    score = lambda state, report: {"score": scores.get(report["step"])}
    run = make(tmp_path, newest=1, best_by="score")
    train(run, on_report=score)
    assert run.steps == (9, 12) and run.best_step == 9
    assert run.metrics()[5]["score"] is None


@pytest.mark.slow
def test_another_number_tells_the_best(tmp_path):
    train(make(tmp_path), 6)
    score = lambda state, report: {"score": jnp.asarray(100.0 - report["step"])}
    run = make(tmp_path, newest=1, best_by="score")
    train(run, 15, on_report=score)
    assert run.best_step == 15
    with pytest.raises(ValueError, match=r"has a number 'scor' .*'score'"):
        print(make(tmp_path, best_by="scor").best_step)


def test_best_by_what_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="`best_by` must name a number; 'name' is 'x'"):
        run = make(tmp_path, best_by="name")
        train(run, on_report=lambda state, report: {"name": "x"})


@pytest.mark.parametrize(
    "value, written",
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (jnp.asarray(0.5, jnp.bfloat16), 0.5),
        (jnp.arange(2), [0, 1]),
        ({"a": (1, np.float64("nan"))}, {"a": [1, None]}),
        ("text", "text"),
    ],
)
def test_values_in_a_report(tmp_path, value, written):
    run = make(tmp_path)
    run.log({"step": 1, "value": value})
    assert run.metrics() == [{"step": 1, "value": written}]


@pytest.mark.parametrize("value", [{1, 2}, 1j, b"12", object(), jr.key(0)])
def test_values_that_no_report_can_hold(tmp_path, value):
    with pytest.raises(TypeError, match="`value` must be a number|key"):
        make(tmp_path).log({"step": 1, "value": value})


@pytest.mark.parametrize("name", ["step", "loss", "FlowMatching"])
@pytest.mark.slow
def test_names_that_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}'.*has already"):
        train(make(tmp_path), on_report=lambda state, report: {name: 0})


def test_each_call_adds_to_the_report(tmp_path):
    seen = []
    calls = [
        lambda state, report: {"double": 2 * report["step"]},
        lambda state, report: {"four": 2 * report["double"], "list": [1.0, None]},
        lambda state, report: seen.append(report["four"]),
        lambda state, report: 5,
    ]
    run = make(tmp_path)
    train(run, 2, on_report=calls)
    assert seen == [4, 8]
    assert [line["list"] for line in run.metrics()] == [[1.0, None]] * 2


def test_finished_run_makes_no_step(tmp_path, unbroken):
    train(make(tmp_path))
    run = make(tmp_path)
    assert digest(train(run)) == unbroken[0]
    assert numbers(run) == unbroken[1]


@pytest.mark.slow
def test_torn_last_line(tmp_path, unbroken):
    train(make(tmp_path), 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    run = make(tmp_path)
    train(run)
    assert numbers(run) == unbroken[1]


@pytest.mark.slow
def test_pinned_checkpoints_and_other_files_stay(tmp_path, unbroken):
    train(make(tmp_path), 6)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "3", folder / "3-keep")
    (folder / ".DS_Store").touch()
    (folder / "9.orbax-checkpoint-tmp-1").mkdir()
    assert digest(train(make(tmp_path))) == unbroken[0]
    names = {path.name for path in folder.iterdir()}
    assert {"3-keep", ".DS_Store"} <= names and len(names) <= 5


@pytest.mark.slow
def test_old_damaged_checkpoint_stops_nothing(tmp_path, unbroken):
    train(make(tmp_path), 6)
    (tmp_path / "checkpoints" / "3" / "about" / "about.json").write_text("{}")
    run = make(tmp_path)
    assert digest(train(run)) == unbroken[0]
    assert run.newest_step == 12


def noisy(seed):
    return optax.chain(optax.add_noise(1e-3, 0.5, key=jr.key(seed)), optax.adam(1e-2))


@pytest.mark.slow
def test_keys_and_nothing_in_the_state(tmp_path):
    class Empty(eqx.Module):
        mlp: fd.nn.MLP
        nothing: jax.Array

        def __call__(self, s, t, x, args):
            return self.mlp(s, t, x, args)

    flow_map = fd.FlowMap(Empty(begin().net, jnp.zeros((0, 2))))
    settings = {"optim": noisy(0), "flow_map": flow_map}
    # Optax's key is used up in one step and is there again in the next state.
    with jax.debug_key_reuse(False):
        train(make(tmp_path), 5, **settings)
        broken = train(make(tmp_path), **settings)
        whole = train(None, **settings)
    plain = lambda state: eqx.filter(state, eqx.is_inexact_array)
    assert digest(plain(broken)) == digest(plain(whole))


def test_random_keys_and_empty_arrays_are_restored(tmp_path, first_state):
    tree = {
        "key": jr.key(3),
        "keys": jr.split(jr.key(4), 2),
        "nothing": jnp.zeros((0, 2)),
    }
    state = eqx.tree_at(lambda state: state.opt_state, first_state, tree)
    other = {
        "key": jr.key(5),
        "keys": jr.split(jr.key(6), 2),
        "nothing": jnp.ones((0, 2)),
    }
    like = eqx.tree_at(lambda state: state.opt_state, first_state, other)
    with make(tmp_path) as run:
        run.save(state, {"loss": 0.0})
        run.wait()
        restored = run.restore(like).opt_state
    assert restored["key"] == tree["key"]
    assert jnp.all(restored["keys"] == tree["keys"])
    assert restored["nothing"].shape == (0, 2)


@pytest.mark.parametrize("text", ["{}", "", "[1]"])
def test_garbled_configuration(six_steps, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        make(tmp_path)


@pytest.mark.slow
def test_garbled_report(tmp_path, unbroken):
    train(make(tmp_path), 6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().split("\n")
    # A blank line, and an end without a line break.
    path.write_text("\n".join([lines[0], "", *lines[1:6]]))
    run = make(tmp_path)
    assert [line["step"] for line in run.metrics()] == [*range(1, 7)]
    path.write_text("\n".join([lines[0], "garbage", *lines[1:]]))
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics.jsonl is not a report"):
        train(run)


def test_configuration_with_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        fd.train.Run(tmp_path / "run", {"x": float("nan")})


@pytest.mark.slow
def test_profile(tmp_path):
    run = make(tmp_path, profile=(1, 3))
    train(run, 4)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_begin_and_end_of_a_profile(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    run, there = make(tmp_path, profile=(1, 3)), str(tmp_path / "profile")
    for made, expected in enumerate([[], [there], [there], [there, "stop"]]):
        run.profile_at(made, None)
        assert calls == expected
    # A run that ends within it ends it too, and once.
    run = make(tmp_path, profile=(0, 3))
    run.profile_at(0, None)
    run.close()
    run.close()
    assert calls == [there, "stop", there, "stop"]
    make(tmp_path).profile_at(0, None)
    assert len(calls) == 4


# --- without a step of training ------------------------------------------------------


def test_lines_of_a_report(tmp_path):
    run, path = make(tmp_path), tmp_path / "metrics.jsonl"
    assert run.metrics() == []
    run.log({"step": 1, "loss": float("inf")})
    run.log({"step": 2, "loss": 0.5})
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    assert run.metrics() == lines
    # Blank lines are none, and the last one may be torn.
    whole = path.read_text()
    path.write_text(whole.replace("\n", "\n\n") + '{"step": 3, "lo')
    assert run.metrics() == lines
    path.write_text("garbage\n" + whole)
    with pytest.raises(ValueError, match=r"Line 1 of .*metrics.jsonl is not a report"):
        run.metrics()


def test_checkpoints_that_are_kept(tmp_path, first_state):
    # The newest, and of those with a number the one with the least.
    step_of, state = lambda state: state.step, first_state
    at = lambda step: eqx.tree_at(step_of, state, jnp.asarray(step, state.step.dtype))
    with make(tmp_path, newest=1, best_by="score") as run:
        for step, score in enumerate([5.0, float("nan"), 2.0, None, 3.0], 1):
            run.save(at(step), {"score": score, "loss": -step})
        run.wait()
        assert run.steps == (3, 5) and (run.newest_step, run.best_step) == (5, 3)
        assert run.restore(state).step == 5 and run.restore(state, 3).step == 3
        # One that is there is not written again.
        run.save(at(5), {"score": 0.0})
        run.wait()
        assert run.best_step == 3
        assert run.resume(at(5)).step == 5
        with pytest.raises(ValueError, match="end at step 5, before step 6"):
            run.resume(at(6))
    with pytest.raises(ValueError, match=r"has a number 'scor' .*'score'"):
        print(make(tmp_path, best_by="scor").best_step)
    # By default the loss decides, which is least at the end.
    assert make(tmp_path).best_step == 5


def test_kill_while_an_old_checkpoint_is_deleted(tmp_path, first_state, monkeypatch):
    step_of = lambda state: state.step
    at = lambda step: eqx.tree_at(step_of, first_state, jnp.asarray(step, jnp.int32))
    run = make(tmp_path, newest=1, best=0)
    run.save(at(1), {"loss": 1.0})

    def kill(folder):
        next(path for path in pathlib.Path(folder).rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    run.save(at(2), {"loss": 1.0})
    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    monkeypatch.undo()
    # What is left is not taken for a checkpoint, and goes when the run is resumed.
    again = make(tmp_path, newest=1, best=0)
    assert again.steps == (2,)
    assert again.resume(at(0)).step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    again.close()


@pytest.mark.parametrize(
    "every, steps",
    [(3, [3, 6, 9]), (1, [*range(1, 11)]), (4, [4, 8])],
)
def test_when_a_checkpoint_is_due(tmp_path, every, steps):
    run = make(tmp_path, save_every=every)
    assert [step for step in range(1, 11) if run.is_due(step)] == steps
    # One that reports leap over is made up for.
    assert run.is_due(100) and not run.is_due(100)


def test_checkpoint_of_a_newer_version(tmp_path, six_steps, first_state):
    shutil.copytree(six_steps / "checkpoints", tmp_path / "checkpoints")
    for newer in (9, 2):  # today's is 1
        edited(tmp_path, lambda about, n=newer: about.update(format=n, version="7.0"))
        with pytest.raises(ValueError, match=r"flowdiffrax 7\.0, in a newer format.*Upd"):
            make(tmp_path).restore(first_state)
    edited(tmp_path, lambda about: about.update(format=1))
    assert make(tmp_path).restore(first_state).step == 6


# --- what is refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    train(make(folder), 6)
    return folder


@pytest.mark.parametrize(
    "other, message",
    [
        ({"width": 8}, r"another model.*is float64\[16\] there, float64\[8\] here"),
        ({"optim": optax.sgd(0.1)}, "another model, optimiser"),
        ({"ema_decay": (0.9, 0.99)}, r"`.averages\[1\].*is absent there"),
        ({"ema_decay": 0.9}, r"`.ema_decay` is \(0.999,\) there, \(0.9,\) here"),
        ({"key": 2}, "another root key"),
    ],
    ids=["model", "optimiser", "averages", "decay", "key"],
)
def test_checkpoint_of_another_run(six_steps, other, message):
    before = (six_steps / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=message):
        train(make(six_steps), **other)
    assert (six_steps / "metrics.jsonl").read_text() == before


def test_another_configuration(six_steps):
    message = "another configuration: `width` is 16 there, 8 here"
    with pytest.raises(ValueError, match=message):
        fd.train.Run(six_steps, {"width": 8})


@pytest.mark.slow
def test_run_that_began_with_a_state(tmp_path, unbroken):
    begun = train(None, 4)
    for num_steps in (8, 12):
        state = train(make(tmp_path), num_steps, flow_map=begun)
    assert digest(state) == unbroken[0]
    assert numbers(make(tmp_path)) == unbroken[1][4:]


@pytest.mark.slow
def test_state_beyond_the_checkpoints(six_steps):
    with pytest.raises(ValueError, match=r"end at step 6, before step 7 of the state"):
        train(make(six_steps), 8, flow_map=train(None, 7))


@pytest.mark.slow
def test_another_kind_of_key(tmp_path):
    train(make(tmp_path), 3, key=jr.key(1, impl="rbg"))
    with pytest.raises(ValueError, match="another root key"):
        train(make(tmp_path), key=jr.key(1, impl="unsafe_rbg"))


def test_step_without_a_checkpoint(six_steps):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; .*\[3, 6\]"):
        make(six_steps).restore(begin(), 5)


def edited(folder, change):
    path = folder / "checkpoints" / "6" / "about" / "about.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.mark.slow
def test_newer_version(tmp_path):
    train(make(tmp_path), 6)
    edited(tmp_path, lambda about: about.update(format=9, version="7.0"))
    with pytest.raises(ValueError, match=r"flowdiffrax 7\.0, in a newer format.*Update"):
        train(make(tmp_path))


def flip_a_bit(content):
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize("change", [flip_a_bit, lambda content: content[:100]])
def test_damaged_checkpoint(tmp_path, change):
    train(make(tmp_path), 6)
    files = (tmp_path / "checkpoints" / "6" / "state").rglob("d/*")
    for path in files:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"step 6 .* is damaged.*there are \[3\]"):
        train(make(tmp_path))


@pytest.mark.slow
def test_wrong_bits_are_noticed(tmp_path):
    # As a disk that returns other bits than it was given.
    train(make(tmp_path), 6)
    edited(tmp_path, lambda about: about["sums"].update({".step": 0}))
    with pytest.raises(ValueError, match="checksums differ in"):
        train(make(tmp_path))


def test_every_leaf_has_its_checksum(six_steps, first_state):
    run, like = make(six_steps), first_state
    path = six_steps / "checkpoints" / "6" / "about" / "about.json"
    about = json.loads(path.read_text())
    arrays = [leaf for leaf in jax.tree.leaves(like) if eqx.is_array(leaf)]
    assert len(about["sums"]) == sum(leaf.size > 0 for leaf in arrays)
    try:
        for name, value in about["sums"].items():
            sums = about["sums"] | {name: value ^ 1}
            path.write_text(json.dumps(about | {"sums": sums}))
            with pytest.raises(ValueError, match=r"checksums differ in \[") as error:
                run.restore(like)
            assert repr(name) in str(error.value)
    finally:
        path.write_text(json.dumps(about))
        run.close()


@pytest.mark.parametrize("dtype", [bool, "int8", "bfloat16", "float32", float, complex])
def test_checksum_sees_every_bit(dtype):
    from flowdiffrax.train._leaves import _sum

    rng = np.random.default_rng(0)
    array = np.asarray(rng.standard_normal((3, 5, 7)) > 0, jnp.dtype(dtype))
    if dtype not in (bool, "int8"):
        array = np.asarray(rng.standard_normal((3, 5, 7)), jnp.dtype(dtype))
    sums = set()
    for index in range(0, array.size, 13):
        for bit in range(1 if dtype is bool else 8 * array.itemsize):
            content = bytearray(array.tobytes())
            content[index * array.itemsize + bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
            sums.add(int(jax.jit(_sum)(other)))
    assert int(_sum(jnp.asarray(array))) not in sums
    swapped = array[::-1]
    if not np.array_equal(swapped, array):
        assert int(_sum(jnp.asarray(swapped))) != int(_sum(jnp.asarray(array)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"save_every": 0}, "`save_every` must be at least 1; got 0"),
        ({"newest": 0}, "`newest` must be at least 1; got 0"),
        ({"best": -1}, "`best` must be at least 0; got -1"),
        ({"profile": (3, 3)}, "two numbers of steps"),
        ({"profile": (3,)}, "two numbers of steps"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with without_type_checks(), pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_configuration_that_is_not_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        fd.train.Run(tmp_path / "run", {"activation": jax.nn.gelu})
    assert not (tmp_path / "run").exists()


# --- skipped steps ------------------------------------------------------------------


def sometimes_nan(rate):
    points = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2)

    def data(key, batch_size):
        row_key, nan_key = jr.split(key)
        rows = points[jr.randint(row_key, (batch_size,), 0, 32)]
        return jnp.where(jr.bernoulli(nan_key, rate), jnp.nan, rows)

    return fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8)


def test_some_skipped_steps_are_borne():
    reports = []
    settings = {"batches": sometimes_nan(0.2), "report_every": 10}
    with pytest.warns(RuntimeWarning) as warned:
        train(None, 40, on_report=lambda s, r: reports.append(r["skipped"]), **settings)
    assert 2 <= reports[-1] <= 16
    assert f"{reports[-1]} of 40 steps were skipped" in str(warned[0].message)
    with pytest.raises(fd.train.TrainingDiverged, match="not finite in"):
        train(None, 40, max_skipped=1, **settings)


@pytest.mark.slow
def test_skips_do_not_depend_on_where_a_run_was_stopped(tmp_path):
    points, bad_step = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2), 10

    class Once(eqx.Module):
        """A batch that is not finite at one step, told by its key."""

        def __call__(self, key, batch_size):
            step_key = jr.fold_in(jr.key(1), bad_step - 1)
            data_key = jr.split(jr.split(step_key)[0], 4)[0]
            bad = jnp.all(jr.key_data(key) == jr.key_data(data_key))
            return jnp.where(bad, jnp.nan, points[:batch_size])

    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), Once(), 8)
    settings = {"batches": batches, "report_every": 5}
    with pytest.warns(RuntimeWarning, match="1 of 20 steps were skipped"):
        whole = train(None, 20, **settings)
    assert int(whole.skipped) == 1
    train(make(tmp_path), 9, **settings)
    with pytest.warns(RuntimeWarning, match="1 of 11 steps were skipped"):
        assert digest(train(make(tmp_path), 20, **settings)) == digest(whole)


@pytest.mark.slow
def test_diverged_run_says_so_in_its_folder(tmp_path):
    run = make(tmp_path)
    with pytest.raises(fd.train.TrainingDiverged):
        train(run, batches=sometimes_nan(1.0), report_every=2)
    (line,) = run.metrics()
    assert line["loss"] is None and line["skipped"] == 2


def test_nothing_but_skipped_steps_ends_the_run():
    with pytest.raises(fd.train.TrainingDiverged, match="in 2 of the last 2"):
        train(None, 40, batches=sometimes_nan(1.0), report_every=2)


def test_no_best_checkpoint_need_be_kept(tmp_path, first_state):
    with make(tmp_path, newest=1, best=0) as run:
        assert run.steps == ()
    with pytest.raises(ValueError, match="`best` must be at least 0; got"):
        make(tmp_path, best=-1)
