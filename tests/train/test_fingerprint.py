"""Fingerprints of arrays: of their contents alone, wherever they are."""

import subprocess
import sys

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import flowdiffrax as fd
from flowdiffrax.train import _fingerprint

IMAGES = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)


def test_same_contents(tmp_path, monkeypatch):
    found = fd.train.fingerprint((IMAGES, None))
    assert len(found) == 16 and int(found, 16) >= 0
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    turned = np.ascontiguousarray(IMAGES.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    for same in (jnp.asarray(IMAGES), mapped, turned):
        assert fd.train.fingerprint((same, None)) == found
    monkeypatch.setattr(_fingerprint, "_AT_ONCE", 7)
    assert fd.train.fingerprint((IMAGES, None)) == found


def test_same_in_another_process():
    code = (
        "import numpy as np, flowdiffrax as fd;"
        "images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3);"
        "print(fd.train.fingerprint((images, {'b': images, 'a': 1.5})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = fd.train.fingerprint((IMAGES, {"a": 2.5, "b": IMAGES}))
    assert done.stdout.strip() == found


@pytest.mark.parametrize(
    "other",
    [
        np.where(np.arange(96).reshape(IMAGES.shape) == 95, 0, IMAGES).astype(np.uint8),
        IMAGES[::-1],
        IMAGES[:1],
        IMAGES.reshape(4, 2, 4, 3),
        IMAGES.astype(np.int8),
        {"images": IMAGES},
    ],
)
def test_other_contents(other):
    assert fd.train.fingerprint(other) != fd.train.fingerprint(IMAGES)


def test_keys_and_low_precision():
    one, two = (
        fd.train.fingerprint({"key": jr.key(seed), "x": jnp.ones(3, jnp.bfloat16)})
        for seed in (0, 1)
    )
    assert one != two
