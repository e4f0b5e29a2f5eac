"""Training on several devices and processes, simulated, against one device."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from parallel_train import LONG, summary, train

import flowdiffrax as fd

SCRIPT = pathlib.Path(__file__).parent / "parallel_train.py"


def start(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def found(process, status=0):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return json.loads(out.splitlines()[-1]) if status == 0 else None


@pytest.fixture(scope="module")
def devices():
    return found(start(8))


@pytest.fixture(scope="module")
def more():
    return found(start(8, "more"))


@pytest.mark.parametrize(
    "many, one",
    [
        ("whole", "alone"),
        ("parts", "alone"),
    ],
)
def test_eight_devices_equal_one(devices, many, one):
    np.testing.assert_allclose(devices[many], devices[one], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulated", "plug-in"])
def test_accumulation_on_eight_devices_equals_one(more, kind):
    made, expected = more[kind], more[f"alone, {kind}"]
    np.testing.assert_allclose(made, expected, rtol=1e-12, atol=1e-13)


def test_each_device_keeps_its_part(devices):
    assert devices["share"] == 1 / 8


def test_batch_that_does_not_divide(devices):
    assert "32 rows do not divide among 3 devices" in devices["error"]


def two_processes(*folder, status=0):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [start(2, address, 2, index, *folder) for index in (0, 1)]
    return [found(run, status) for run in runs]


def test_two_processes_equal_one(devices):
    for process in two_processes():
        assert process["share"] == 1 / 4
        made, expected = process["parts"], devices["alone"]
        np.testing.assert_allclose(made, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on(more, tmp_path):
    # The first of them gets a SIGTERM.
    two_processes(tmp_path / "run", status=128 + signal.SIGTERM)
    run = fd.train.Run(tmp_path / "run")
    (step,) = run.steps
    assert 2 <= step < LONG
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    # The losses of the steps that are left, and the weights.
    expected = more["alone, long"][step:]
    for process in two_processes(tmp_path / "run"):
        np.testing.assert_allclose(process["resumed"], expected, rtol=1e-12, atol=1e-13)
    assert [line["step"] for line in run.metrics()] == [*range(1, LONG + 1)]
    # Parts of weights on four devices, read by one.
    copy = fd.train.Run(tmp_path / "copy")
    alone = summary(train(None, num_steps=LONG, run=copy))
    np.testing.assert_allclose(alone, expected, rtol=1e-12, atol=1e-13)


def test_one_device_is_a_device():
    parallel = fd.train.DataParallel()
    tree = {"x": jnp.arange(6.0), "name": "kept", "none": None}
    for placed in (parallel.place(tree), parallel.replicate(tree), parallel.split(tree)):
        assert np.array_equal(placed.pop("x"), tree["x"])
        assert placed == {"name": "kept", "none": None}
