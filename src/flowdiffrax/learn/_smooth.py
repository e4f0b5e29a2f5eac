"""Smoothing splines of trajectories that are observed with errors of known size."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# Variances of the change of slope per unit of time, in units of the noise.
_WIGGLES = 10.0 ** np.arange(-2, 18.5, 0.5)
# This many trajectories show how smooth each entry is.
_NUM_SHOWN = 64


def smooth(
    ts: Float[np.ndarray, "rows times"],
    ys: Float[np.ndarray, "rows times size"],
    noise: Float[np.ndarray, " size"],
) -> Float[np.ndarray, "rows times size"]:
    """The expected states, given observations with independent normal errors.

    Each entry of each trajectory is a cubic smoothing spline: its slope is a Brownian
    motion, started anywhere. How fast the slope changes is what makes the observations
    most likely, for each entry and all trajectories together. The spline is computed by
    a Kalman filter and smoother, so times may be irregular, and NaN is not observed.

    Trajectories that are shorter are filled up with NaN, also as times.
    """
    # Less noise than that changes nothing, and its squares would be rounded off.
    noise = np.maximum(noise, 1e-6 * np.nanmax(np.abs(ys), axis=(0, 1)))
    ts = np.fmax.accumulate(ts, axis=1)
    span = np.ptp(ts, axis=1).max()
    ts, ys = ts / span, ys / noise
    scale = np.maximum(np.nanmax(np.abs(ys), axis=(0, 1)), 1.0)
    some = slice(None, None, max(len(ts) // _NUM_SHOWN, 1))
    many = _WIGGLES[:, None, None]
    _, likelihood = _filter(ts[some], ys[some], many, scale)
    wiggle = _WIGGLES[np.argmax(likelihood.sum(1), axis=0)]
    passes, _ = _filter(ts, ys, wiggle, scale)
    return noise * _backwards(ts, passes, wiggle)


class _Pass(NamedTuple):
    """Means and covariances of value and slope after each observation."""

    value: Any
    slope: Any
    values: Any
    both: Any
    slopes: Any


def _predict(h: Any, at: _Pass, wiggle: Any) -> _Pass:
    """A time `h` later. The slope has gained the variance `wiggle * h`."""
    both = at.both + h * at.slopes + wiggle * h**2 / 2
    values = at.values + h * (2 * at.both + h * at.slopes) + wiggle * h**3 / 3
    return _Pass(at.value + h * at.slope, at.slope, values, both, at.slopes + wiggle * h)


def _filter(ts: Any, ys: Any, wiggle: Any, scale: Any) -> tuple[list[_Pass], Any]:
    """From the first to the last time; also the log-likelihood of each row and entry."""
    shape = np.broadcast_shapes(ys[:, 0].shape, np.shape(wiggle))
    # Next to nothing is known at the start.
    start = 1e4 * scale**2 * np.ones(shape)
    zero = np.zeros(shape)
    at = _Pass(zero, zero, start, zero, 100 * start)
    passes, likelihood = [], zero
    for index in range(ts.shape[1]):
        h = (ts[:, index] - ts[:, max(index - 1, 0)])[:, None]
        at = _predict(h, at, wiggle)
        error = ys[:, index] - at.value
        seen = np.isfinite(error)
        error, variance = np.where(seen, error, 0), at.values + 1
        likelihood = likelihood - np.where(
            seen, np.log(variance) + error**2 / variance, 0
        )
        gain, push = (np.where(seen, c / variance, 0) for c in (at.values, at.both))
        at = _Pass(
            at.value + gain * error,
            at.slope + push * error,
            # Without a difference of numbers that are nearly equal.
            np.where(seen, at.values / variance, at.values),
            np.where(seen, at.both / variance, at.both),
            at.slopes - push * at.both,
        )
        passes.append(at)
    return passes, likelihood / 2


def _backwards(ts: Any, passes: list[_Pass], wiggle: Any) -> Any:
    """From the last to the first time, the means given all observations."""
    value, slope = passes[-1].value, passes[-1].slope
    found = [value]
    for index in reversed(range(ts.shape[1] - 1)):
        at = passes[index]
        h = (ts[:, index + 1] - ts[:, index])[:, None]
        later = _predict(h, at, wiggle)
        off_value, off_slope = value - later.value, slope - later.slope
        # The covariance of now and later, times the inverse covariance of later.
        det = later.values * later.slopes - later.both**2
        a = (later.slopes * off_value - later.both * off_slope) / det
        b = (later.values * off_slope - later.both * off_value) / det
        value = at.value + (at.values + h * at.both) * a + at.both * b
        slope = at.slope + (at.both + h * at.slopes) * a + at.slopes * b
        found.append(value)
    return np.stack(found[::-1], axis=1)
