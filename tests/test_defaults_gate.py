"""The gate of defaults judges every objective, and judges rightly.

The gate itself takes an hour: `python benchmarks/defaults.py`.
"""

import importlib.util
import pathlib
import sys

import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import public_objectives

import flowdiffrax as fd

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gate():
    path = ROOT / "benchmarks" / "defaults.py"
    sys.path.insert(0, str(path.parent))  # of the modules that it imports
    spec = importlib.util.spec_from_file_location("defaults_gate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def test_no_objective_is_left_out_without_a_reason(gate):
    public = public_objectives() | {"split_mean_flow", "free_flow"}
    judged = {row.make.__name__ for row in gate.OBJECTIVES.values()}
    left_out = {row.make.__name__ for row in gate.METHODS.values() if row.no_sampler}
    assert judged | left_out == public
    assert not judged & left_out
    # Defaults are what is judged: classes and functions, without settings.
    for row in gate.METHODS.values():
        assert row.make is getattr(fd.objectives, row.make.__name__)


def test_densities_differ_in_all_that_matters(gate):
    densities = gate.DENSITIES.values()
    assert len(densities) >= 6
    assert {2, 16} <= {density.size for density in densities}
    assert {0.01, 1.0, 1000.0} == {density.scale for density in densities}
    assert {0.0, 20.0} == {density.mean for density in densities}
    sizes = {density.batch_size for density in densities}
    assert min(sizes) == 32 and max(sizes) == 1024
    assert {density.accumulate > 1 for density in densities} == {True, False}
    for density in densities:
        x = np.asarray(density.draw(jr.key(0), 20_000), float)
        assert x.std() == pytest.approx(density.scale, rel=0.05)
        assert x.mean() == pytest.approx(density.mean, abs=0.05 * density.scale)


def test_what_fails(gate):
    line = lambda name, one, four: {
        "objective": name, "density": "a", "errors": {"1": one, "4": four}
    }  # fmt: skip
    lines = [
        line("LSD", 0.10, 0.05),
        line("PSD", 0.15, 0.15),
        line("EE", 0.17, 0.04),
        line("MeanFlow", 0.10, 0.13),
        line("AlphaFlow", float("nan"), float("nan")),
        line("CT", 0.10, 0.50),
    ]
    found = {(name, jumps) for name, _, jumps, _ in gate.failures(lines)}
    nan = {("AlphaFlow", 1), ("AlphaFlow", 4)}
    assert found == {("EE", 1), ("MeanFlow", 4), ("CT", 4)} | nan
    assert ("CT", 4) in gate.EXCEPTIONS


def test_docs_repeat_the_exceptions(gate):
    page = " ".join((ROOT / "docs" / "objectives" / "defaults.md").read_text().split())
    left_out = {row.no_sampler for row in gate.METHODS.values() if row.no_sampler}
    for reason in {*gate.EXCEPTIONS.values(), *left_out}:
        assert reason in page


def test_distance_of_a_moved_sample(gate):
    # All directions see a shift along them: its mean square is that over the dimension.
    x = np.asarray(jax.random.normal(jr.key(0), (2000, 2)))
    found = gate.sliced_wasserstein(x, x + np.asarray([3.0, 0.0]), 2000)
    assert found == pytest.approx(3 / 2**0.5, rel=0.05)
