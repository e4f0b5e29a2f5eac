"""Pictures: what is drawn where, read back from the axes."""

import numpy as np
import pytest

import flowdiffrax as fd


@pytest.fixture
def axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def test_density_is_where_its_points_are(axes):
    # Three points in the cell at the lower right of a board of 2 by 2, one at its left.
    samples = np.asarray([[0.5, -0.5]] * 3 + [[-0.5, -0.7], [0.5, 5.0]])
    fd.plot.density(axes, samples, low=-1.0, high=1.0, bins=2)
    (mesh,) = axes.collections
    drawn = np.asarray(mesh.get_array()).reshape(2, 2)  # rows upwards
    # Of five samples, in cells of an area of one.
    np.testing.assert_allclose(drawn, [[1 / 5, 3 / 5], [0, 0]], rtol=1e-12)
    assert axes.get_xlim() == axes.get_ylim() == (-1, 1)
    fd.plot.density(axes, samples, low=-1.0, high=1.0)
    assert np.asarray(axes.collections[-1].get_array()).size == 100 * 100


def test_trajectories_are_lines_with_a_dot_at_the_start(axes):
    paths = np.arange(12.0).reshape(2, 3, 2)
    fd.plot.trajectories(axes, paths, linewidth=3.0)
    *lines, dots = axes.lines
    assert [line.get_linewidth() for line in lines] == [3.0, 3.0]
    for line, path in zip(lines, paths, strict=True):
        assert np.asarray(line.get_xydata()).tolist() == path.tolist()
    assert np.asarray(dots.get_xydata()).tolist() == paths[:, 0].tolist()


@pytest.mark.parametrize("floor", [None, 0.02])
def test_work_against_precision(axes, floor):
    curves = {"Tsit5": [(8, 1e-3), (2, 0.5)], "hybrid": [(1, 0.1), (4, 1e-4)]}
    fd.plot.work_precision(axes, curves, xlabel="steps", ylabel="error", floor=floor)
    drawn = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}
    assert drawn["Tsit5"].tolist() == [[2, 0.5], [8, 1e-3]]
    assert drawn["hybrid"].tolist() == [[1, 0.1], [4, 1e-4]]
    assert ("perfect sampler" in drawn) == (floor is not None)
    if floor is not None:
        assert drawn["perfect sampler"][:, 1].tolist() == [floor, floor]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "error")
    assert axes.get_xscale() == axes.get_yscale() == "log"
