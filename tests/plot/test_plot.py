"""Colours of the pictures: what is bright, and on which scale."""

import numpy as np
import pytest

import flowdiffrax as fd
from flowdiffrax import testing


@pytest.fixture
def axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots(1, 2)


def luminance(mesh):
    red, green, blue, _ = np.moveaxis(mesh.to_rgba(mesh.get_array()), -1, 0)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_density_is_bright_where_samples_are_dense(axes):
    # Three quarters of them on the left half of a square of area 4.
    x = np.random.default_rng(0).uniform(-1, 1, (40_000, 2))
    x[:20_000, 0] = -np.abs(x[:20_000, 0])
    fd.plot.density(axes[0], x, low=-1, high=1, bins=10)
    (mesh,) = axes[0].collections
    left, right = np.split(np.reshape(luminance(mesh), (10, 10)), 2, axis=1)
    assert left.min() > right.max() + 0.2
    # Densities, 3/8 and 1/8; the counts of a bin have a deviation of 2 % and 3 %.
    left, right = np.split(np.reshape(mesh.get_array(), (10, 10)), 2, axis=1)
    np.testing.assert_allclose(left.mean(), 3 / 8, rtol=0.01)
    np.testing.assert_allclose(right.mean(), 1 / 8, rtol=0.02)


def test_densities_with_one_peak_have_one_scale(axes):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 2))
    # Half as dense, since every other sample lies outside.
    outside = np.concatenate([x, x + 10])
    for panel, samples in zip(axes, (x, outside), strict=True):
        fd.plot.density(panel, samples, low=-1, high=1, bins=5, peak=0.5)
    first, second = (panel.collections[0] for panel in axes)
    assert first.get_clim() == second.get_clim() == (0, 0.5)
    np.testing.assert_allclose(first.get_array(), 2 * second.get_array(), rtol=1e-12)


def test_report_has_one_scale_without_the_rounding_of_the_diagonal():
    pytest.importorskip("matplotlib")
    times = np.linspace(0, 1, 5)
    gaps = np.abs(times[:, None] - times)
    # As of a map whose error is its gap: only rounding is left where there is no gap.
    values = {
        "starts_as_identity": np.where(np.eye(5) == 1, 1e-12, np.nan),
        "semigroup": np.where(gaps == 0, 1e-10, 0.01 * gaps),
        "lagrangian": np.where(gaps == 0, 1e-10, gaps),
    }
    figure = testing.DefectReport(times, values, values).plot()
    meshes = {
        panel.get_title(): panel.collections[0]
        for panel in figure.axes
        if panel.get_title()
    }
    assert {mesh.get_clim() for mesh in meshes.values()} == {(0.01 / 4, 1.0)}
    # An identity that holds is dark throughout, and none but the worst jump is brightest.
    bright = luminance(meshes["lagrangian"])
    holds = luminance(meshes["starts_as_identity"])[np.eye(5) == 1]
    assert (holds == bright.min()).all()
    assert bright[0, 4] == bright.max() and bright[0, 0] == bright.min()


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 2), (2,)])
def test_points_that_are_not_in_the_plane(axes, shape):
    """Of three coordinates, two would be drawn without a word."""
    with pytest.raises(ValueError, match=r"`samples` must have shape \(samples, 2\)"):
        fd.plot.density(axes[0], np.zeros(shape), low=-1, high=1)
    paths = np.zeros((*shape[:-1], 3))
    with pytest.raises(ValueError, match=r"`paths` must have shape \(paths, times, 2\)"):
        fd.plot.trajectories(axes[0], paths)
