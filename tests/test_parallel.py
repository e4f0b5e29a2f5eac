"""Training on several devices and processes, simulated, against one device."""

import json
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import flowdiffrax as fd

SCRIPT = pathlib.Path(__file__).parent / "parallel_train.py"


def start(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def found(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def devices():
    return found(start(8))


@pytest.mark.parametrize(
    "many, one",
    [
        ("whole", "alone"),
        ("parts", "alone"),
        ("accumulated", "alone, accumulated"),
    ],
)
def test_eight_devices_equal_one(devices, many, one):
    np.testing.assert_allclose(devices[many], devices[one], rtol=1e-12, atol=1e-13)


def test_each_device_keeps_its_part(devices):
    assert devices["share"] == 1 / 8


def test_batch_that_does_not_divide(devices):
    assert "32 rows does not divide among 3 devices" in devices["error"]


def test_two_processes_equal_one(devices):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [start(2, address, 2, index) for index in (0, 1)]
    for process in map(found, runs):
        assert process["share"] == 1 / 4
        for many, one in (("whole", "alone"), ("parts", "alone")):
            np.testing.assert_allclose(
                process[many], devices[one], rtol=1e-12, atol=1e-13
            )


def test_one_device_is_a_device():
    parallel = fd.train.DataParallel()
    tree = {"x": jnp.arange(6.0), "name": "kept", "none": None}
    for placed in (parallel.place(tree), parallel.replicate(tree), parallel.split(tree)):
        assert np.array_equal(placed.pop("x"), tree["x"])
        assert placed == {"name": "kept", "none": None}


def test_no_devices():
    with pytest.raises(ValueError, match="at least one device; got none"):
        fd.train.DataParallel(())
