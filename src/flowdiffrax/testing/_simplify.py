"""The simplest point at which something still fails.

Hypothesis cannot start from a point that was found elsewhere, so this is done here.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

from ._points import Points, Space
from ._strategies import drop_rounding

# How many numbers of a state are made simple one by one.
_FEW = 16
# How many blocks of them are set to zero.
_MOST_BLOCKS = 512

Fails = Callable[[Points], Iterable[bool]]


def simplify(space: Space, point: Points, names: str, fails: Fails) -> Points:
    """Makes one number after the other as simple as the others allow, twice.

    Of times and numbers, those with fewer digits are simpler, and of these the smaller
    ones. In a large state, blocks of numbers are set to zero first. If many are left,
    they are rounded together.

    **Arguments:**

    - `space`: where the point may move. The states of a strategy stay as they are.
    - `point`: a single point that fails.
    - `names`: which of the times `s`, `u` and `t` matter.
    - `fails`: whether each of some points fails.
    """
    asked = ["sut".index(name) for name in names]
    for _ in range(2):
        before = point
        for index in asked:
            options = _simple_times(point.times[0, index], space.t0, space.t1)
            times = _with(point.times, index, options)
            if space.ordered:
                times = times[(np.diff(times[:, asked]) >= 0).all(axis=1)]
            point = _first(point, times, point.states, fails)
        if space.given is None:
            point = _simplify_state(space, point, fails)
        if all(np.array_equal(a, b) for a, b in zip(point, before, strict=True)):
            break
    return point


def _simplify_state(space: Space, point: Points, fails: Fails) -> Points:
    size = space.low.size
    blocks = [np.arange(size)] if size > _FEW else []
    for _ in range(_MOST_BLOCKS):
        if not blocks:
            break
        block = blocks.pop()
        state = _with(point.states, block, [space.smallest[block]])
        point = _first(point, point.times, state, fails)
        if not np.array_equal(point.states, state) and len(block) > 1:
            blocks += np.array_split(block, 2)
    left = np.arange(size)
    if size > _FEW:
        left = np.flatnonzero(point.states[0] != space.smallest)
    if len(left) > _FEW:
        rounded = [_rounded(point.states[0], digits) for digits in range(1, 7)]
        states = np.clip(rounded, space.low, space.high)
        return _first(point, point.times, states, fails)
    for index in left.tolist():
        number = point.states[0, index]
        options = _simple_numbers(number, space.low[index], space.high[index])
        states = _with(point.states, index, options)
        point = _first(point, point.times, states, fails)
    return point


def _first(point: Points, times: np.ndarray, states: np.ndarray, fails: Fails) -> Points:
    """The first of some points that fails, or the one there is."""
    num = max(len(times), len(states))
    repeat = lambda rows: np.broadcast_to(rows, (num, rows.shape[1]))
    trials = Points(repeat(times), repeat(states))
    for row, failed in enumerate(fails(trials)):
        if failed:
            return trials.rows([row])
    return point


def _with(row: np.ndarray, index: int | np.ndarray, options: list) -> np.ndarray:
    """Copies of a row, each with another value at an index."""
    rows = np.repeat(row, len(options), axis=0)
    rows[:, index] = options
    return rows


def _simple_times(time: float, t0: float, t1: float) -> list[float]:
    """Tenths and hundredths of the interval, and the time to more and more digits."""
    shares = [k / 10 for k in range(11)] + [k / 100 for k in range(101)]
    share = (time - t0) / (t1 - t0)
    for scale in (1e3, 1e4, 1e5, 1e6):
        shares += [math.floor(share * scale) / scale, math.ceil(share * scale) / scale]
    return [drop_rounding(t0 + (t1 - t0) * share, t0, t1) for share in shares]


def _simple_numbers(number: float, low: float, high: float) -> list[float]:
    """Numbers of one or two digits, small ones first, and the number to more and more."""
    numbers = [float(np.clip(0.0, low, high))]
    if low < high:
        unit = 10.0 ** (math.floor(math.log10(high - low)) - 1)
        steps = range(math.ceil(low / unit), math.floor(high / unit) + 1)
        steps = sorted(steps, key=lambda step: (step < 0, abs(step)))
        numbers += [float(f"{step * unit:.12g}") for step in steps]
        numbers += [float(_rounded(np.asarray(number), n)) for n in range(1, 7)]
    return [number for number in numbers if low <= number <= high]


def _rounded(numbers: np.ndarray, digits: int) -> np.ndarray:
    """Numbers to so many significant digits."""
    write = lambda number: float(f"{number:.{digits}g}")
    return np.vectorize(write, otypes=[float])(numbers)
