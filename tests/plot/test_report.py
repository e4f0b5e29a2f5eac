"""The page on a map: its numbers show the faults that were planted, and it is whole."""

import base64
import io
import re

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import without_type_checks
from PIL import Image

import flowdiffrax as fd

X0 = jr.normal(jr.key(0), (16, 2))
EXACT = fd.exact.LinearFlowMap([[0.0, 1.0], [-1.0, 0.0]], [0.0, 0.0])


def faulty(s, t, x, args):
    """Biased, does not go backwards, and forgets to move from times around 1."""
    moved = EXACT(s, t, x) + (t - s) * jnp.asarray([args, 0.0])
    stays = (t < s) | (jnp.abs(s - 1.0) < 0.1)
    return jnp.where(stays, x, moved)


def test_faults_are_in_the_numbers_and_the_page_is_whole(tmp_path):
    path = tmp_path / "new" / "page.html"
    field = lambda t, x, args: EXACT.velocity(t, x) * (args / 0.2)
    settings = dict(time_range=(0.0, 3.0), title="a < b")
    made = fd.plot.report(path, faulty, field, X0, 0.2, **settings)
    assert made.num_jumps == (1, 2, 4, 8, 16) and made.errors.shape == (5, 16)
    # One entry is off by 3 * 0.2, in units of its spread along the circles.
    ts = np.linspace(0, 3, 49)
    x0 = np.asarray(X0)
    along = np.cos(ts) * x0[:, :1] + np.sin(ts) * x0[:, 1:]
    assert made.bias[0] == pytest.approx(0.6 / np.std(along), rel=1e-4)
    assert abs(made.bias[1]) < 1e-6
    np.testing.assert_allclose(made.errors[0], 0.6 / np.std(along), rtol=1e-4)
    assert np.isnan(np.diagonal(made.by_times)).all()
    gap = np.abs(made.times[:, None] - made.times)
    forwards = made.times[:, None] < made.times
    stays = ~forwards | (made.times == 1.0)[:, None]
    far = gap > 1
    assert np.nanmin(made.by_times[stays & far]) > 0.5
    expected = 0.2 * gap / np.std(along)
    good = ~stays & ~np.eye(len(gap), dtype=bool)
    np.testing.assert_allclose(made.by_times[good], expected[good], rtol=1e-4)

    text = path.read_text()
    assert "<h1>a &lt; b</h1>" in text and "http" not in text
    pictures = re.findall(r'base64,([^"]+)"', text)
    sizes = [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures]
    assert len(sizes) == 5 and min(min(size) for size in sizes) > 300


@pytest.mark.slow
def test_exact_map_of_a_tree_in_its_time_range(tmp_path):
    field = lambda t, x, args: {"a": -args * x["a"], "b": -x["b"]}
    flow_map = fd.ODEFlowMap(field, time_range=(1.0, 2.0))
    x0 = {"a": X0, "b": X0[:, 0] + 2}
    made = fd.plot.report(tmp_path / "page.html", flow_map, field, x0, 0.5)
    assert made.times[0] == 1 and made.times[-1] == 2
    assert made.errors.max() < 1e-5 and np.nanmax(made.by_times) < 1e-5
    assert made.bias.shape == (3,)


def test_bad_input(tmp_path):
    field = lambda t, x, args: EXACT.velocity(t, x)
    with pytest.raises(ValueError, match="`time_range` must have low < high"):
        fd.plot.report(tmp_path / "p.html", EXACT, field, X0, time_range=(1.0, 0.0))
    with pytest.raises(ValueError, match="`x0` must be arrays with one common leading"):
        fd.plot.report(tmp_path / "p.html", EXACT, field, jnp.asarray(1.0))
    with without_type_checks(), pytest.raises(TypeError, match="`vector_field`"):
        fd.plot.report(tmp_path / "p.html", EXACT, None, X0)
    with pytest.raises(ValueError, match="`path` must be a file; got .* a folder"):
        fd.plot.report(tmp_path, EXACT, field, X0)
    with pytest.raises(ValueError, match="is not finite after any of the jumps"):
        nan = lambda s, t, x, args: x * jnp.nan
        fd.plot.report(tmp_path / "p.html", nan, field, X0)
    assert not list(tmp_path.iterdir())


def test_a_map_that_fails_at_some_states(tmp_path):
    path = tmp_path / "page.html"
    field = lambda t, x, args: EXACT.velocity(t, x)
    fails = lambda s, t, x, args: jnp.where((x[0] > 0) & (s > 2), jnp.nan, EXACT(s, t, x))
    made = fd.plot.report(path, fails, field, X0, time_range=(0.0, 3.0))
    lost = np.isnan(made.errors).sum(axis=1)
    # One jump and two start before time 2; four do not.
    assert lost[0] == lost[1] == 0 and 0 < lost[2] < 16
    assert f"{lost.sum()} of 80 errors are not finite" in " ".join(
        path.read_text().split()
    )
    assert np.isfinite(made.by_times[0, 1:]).all()
