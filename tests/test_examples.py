"""Examples that need more than `.ci/run` installs, with few steps of everything."""

import functools
import importlib
import pathlib
import sys

import jax
import pytest

import flowdiffrax as fd

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["posterior", "posterior_stiff"])
def test_posterior(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("blackjax")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    short = {"num_steps": 20, "pool_size": 128, "progress": False}
    learn_solver = functools.partial(fd.learn_solver, **short)
    monkeypatch.setattr(fd, "learn_solver", learn_solver)
    path = tmp_path / "map.safetensors"
    settings = {"chains": 2, "num_samples": 8, "tuning": 20, "out": str(path)}
    example = importlib.import_module(name)
    # Examples are scripts, and run with JAX's own settings.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # The check takes keys in loops under `vmap` for a second use.
        with jax.debug_key_reuse(False):
            example.main(**settings)
    assert path.exists() and path.with_suffix(".png").exists()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["map", "map, corrected", "exact"]
