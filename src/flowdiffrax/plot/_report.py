"""One page on a flow map: pictures in which faults of a map can be seen."""

import base64
import html
import io
import pathlib
import timeit
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._check import check_callable, check_flow_map, check_instance
from .._io import StrPath, import_extra, write_whole
from .._tree import num_rows, ravel
from .._types import Args, State, TwoTimeMap, VectorField
from ..flow_maps._base import as_time_range
from ..paths import solve_trajectories
from ..solvers import sample

# Times of trajectories, of which every fourth is an end of jumps in the table of times.
_NUM_TIMES = 49
_NUM_JUMPS = 1, 2, 4, 8, 16
_TOLERANCES = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5
# Distinct for colour-blind readers and in print, with these dashes.
_COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_DASHES = "-", "--", "-.", ":"
_BOX = {"facecolor": "white", "alpha": 0.8, "linewidth": 0}


class MapReport(NamedTuple):
    """The numbers of [`flowdiffrax.plot.report`][].

    Errors are the largest entry, by magnitude, of the difference from the ODE, relative
    to the spread of that entry over all states.

    **Attributes:**

    - `num_jumps`: numbers of jumps from the first time to the last.
    - `errors`: the errors at the last time, for each of them and each initial state.
    - `times`: a grid of times.
    - `by_times`: the median error of jumps between any two of these times: rows are start
      times and columns are end times, with NaN on the diagonal.
    - `bias`: for each entry of the state, the mean of the signed error of the single jump
      over its spread.
    """

    num_jumps: tuple[int, ...]
    errors: Float[np.ndarray, "nums states"]
    times: Float[np.ndarray, " times"]
    by_times: Float[np.ndarray, "times times"]
    bias: Float[np.ndarray, " entries"]


class _Facts(NamedTuple):
    """What the panels draw, all as arrays of vectors."""

    ts: np.ndarray
    exact: np.ndarray  # (states, times, entries)
    jumps: np.ndarray  # single jumps from the first time to all others
    spread: np.ndarray  # (entries,)
    ends: np.ndarray  # (nums, states, entries), after numbers of jumps
    numbers: MapReport
    work: list[tuple[str, list[float], list[float]]]  # name, seconds, errors


def report(
    path: StrPath,
    flow_map: TwoTimeMap,
    vector_field: VectorField,
    x0: State,
    args: Args = None,
    *,
    time_range: tuple[float, float] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    title: str = "A flow map",
) -> MapReport:
    """Compares a map with its ODE, and writes what is seen to one HTML file.

    The page needs no other file. It shows trajectories in single jumps with the spread
    over the initial states, the error by number of jumps, the error of jumps between any
    two times in both directions, the signed errors of each entry, and the error against
    the seconds of a batch, beside Diffrax at several tolerances.

    **Arguments:**

    - `path`: the file to write. Missing folders are created.
    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `vector_field`: the ODE that it should solve, `(t, x, args) -> dx/dt`.
    - `x0`: a batch of initial states with a leading axis; 64 to 1,024 are enough.
    - `args`: passed to both, the same for all states.
    - `time_range`: the first and the last time; `None` for the map's `time_range`, or for
      [0, 1] if it declares none.
    - `solver`: the Diffrax solver; `None` for `diffrax.Tsit5()`. For stiff problems, use
      an implicit solver such as `diffrax.Kvaerno5()`.
    - `title`: the heading.

    **Returns:** [`flowdiffrax.plot.MapReport`][].

    **Raises:** `ValueError` if `x0` has no common leading axis, if `time_range` is not
    two times that increase, if `path` is a folder, or if no jump is finite; `TypeError`
    for complex states; `ImportError` if Matplotlib, from the `plot` extra, is missing.
    """
    check_flow_map(flow_map)
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    plt = import_extra("matplotlib.pyplot", "plot", "report")
    num_rows(x0, "`x0`")
    check_instance(path, StrPath, "path", 'a path, for example "out/report.html"')
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"`path` must be a file; got {path}, which is a folder.")
    own = getattr(flow_map, "time_range", None)
    ends = as_time_range(time_range) or own or (0.0, 1.0)
    with warnings.catch_warnings():
        # NumPy warns of medians of nothing but NaN, which the page shows as gaps.
        warnings.simplefilter("ignore", RuntimeWarning)
        facts = _measure(flow_map, vector_field, x0, ends, args, solver)
        sections = [
            (heading, text, _as_picture(plt, draw, facts))
            for heading, text, draw in _PANELS
        ]
        page = _page(title, flow_map, facts.numbers, sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return facts.numbers


def _vectors(tree: State) -> np.ndarray:
    """States with two leading axes, as vectors."""
    flat = jax.vmap(jax.vmap(lambda x: ravel(x, "`report`")[0]))(tree)
    return np.asarray(flat, float)


def _measure(flow_map, vector_field, x0, ends, args, solver) -> _Facts:
    ts = np.linspace(ends[0], ends[1], _NUM_TIMES)
    dtype = jnp.result_type(float)
    times = jnp.asarray(ts, dtype)
    states = solve_trajectories(vector_field, x0, times, args, solver=solver)
    exact = _vectors(states)
    spread = exact.std(axis=(0, 1)) + 1e-300
    error = lambda made, true: np.abs((made - true) / spread).max(axis=-1)

    jump = lambda s, t, x: flow_map(s, t, x, args)
    to_all = lambda x: jax.vmap(lambda t: jump(times[0], t, x))(times)
    jumps = _vectors(jax.jit(jax.vmap(to_all))(x0))

    # From any of these times to any other, from the states of the ODE.
    coarse = np.arange(0, _NUM_TIMES, 4)
    starts = jax.tree_util.tree_map(lambda leaf: leaf[:, coarse], states)
    across = jax.vmap(lambda s, x: jax.vmap(lambda t: jump(s, t, x))(times[coarse]))
    all_jumps = jax.jit(jax.vmap(lambda x: across(times[coarse], x)))(starts)
    flat = jax.vmap(jax.vmap(jax.vmap(lambda x: ravel(x, "`report`")[0])))(all_jumps)
    by_times = np.nanmedian(
        error(np.asarray(flat, float), exact[:, None, coarse]), axis=0
    )
    np.fill_diagonal(by_times, np.nan)

    work, made = [("map", [], [])], []
    for num in _NUM_JUMPS:
        grid = jnp.linspace(times[0], times[-1], num + 1)
        run = jax.jit(jax.vmap(lambda x, grid=grid: sample(flow_map, x, grid, args)))
        seconds, out = _timed(run, x0)
        made.append(_vectors(jax.tree_util.tree_map(lambda leaf: leaf[:, None], out)))
        work[0][1].append(seconds)
    after = np.stack([out[:, 0] for out in made])
    errors = error(after, exact[:, -1])
    if not np.isfinite(errors).any():
        raise ValueError(
            "`flow_map` is not finite after any of the jumps, from any of the states."
        )
    work[0][2].extend(np.nanmedian(errors, axis=1))
    work.append(_classical(vector_field, x0, times, args, solver, exact[:, -1], error))
    bias = (after[0] - exact[:, -1]) / spread
    bias = np.nanmean(bias, axis=0)
    numbers = MapReport(_NUM_JUMPS, errors, ts[coarse], by_times, bias)
    return _Facts(ts, exact, jumps, spread, after, numbers, work)


def _timed(run: Callable, x0: State) -> tuple[float, State]:
    """The seconds of a compiled call, the smallest of three, and its result."""
    out = jax.block_until_ready(run(x0))
    again = lambda: jax.block_until_ready(run(x0))
    return min(timeit.repeat(again, number=1, repeat=3)), out


def _classical(vector_field, x0, times, args, solver, exact, error):
    """The seconds and the median errors of Diffrax by tolerance."""
    solver = diffrax.Tsit5() if solver is None else solver
    seconds, errors = [], []

    @eqx.filter_jit
    def run(x0, rtol):
        controller = diffrax.PIDController(rtol=rtol, atol=rtol)
        solve = lambda x: diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field), solver, times[0], times[-1], None, x, args,
            stepsize_controller=controller, throw=False,
        ).ys  # fmt: skip
        return jax.vmap(solve)(x0)

    for tolerance in _TOLERANCES:
        rtol = jnp.asarray(tolerance, times.dtype)
        each, out = _timed(lambda x0, rtol=rtol: run(x0, rtol), x0)
        off = np.median(error(_vectors(out)[:, 0], exact))
        if np.isfinite(off):
            seconds.append(each)
            errors.append(float(off))
    return type(solver).__name__, seconds, errors


def _draw_trajectories(figure: Any, facts: _Facts) -> None:
    moved = np.ptp(facts.exact, axis=1).mean(0)
    entries = np.argsort(-moved / facts.spread)[:4]
    axes = figure.subplots(1, len(entries), squeeze=False)[0]
    for axis, entry in zip(axes, sorted(entries), strict=True):
        for values, colour, name in (
            (facts.exact, _COLOURS[0], "ODE"),
            (facts.jumps, _COLOURS[1], "single jumps"),
        ):
            low, middle, high = np.nanpercentile(values[..., entry], [5, 50, 95], axis=0)
            style = "-" if name == "ODE" else "--"
            axis.fill_between(facts.ts, low, high, color=colour, alpha=0.2)
            axis.plot(facts.ts, middle, style, color=colour, label=name)
        # One trajectory of each, since medians hide much.
        axis.plot(facts.ts, facts.exact[0, :, entry], "-", color=_COLOURS[0], lw=0.8)
        axis.plot(facts.ts, facts.jumps[0, :, entry], ".", color=_COLOURS[1], ms=3)
        axis.set(title=f"entry {entry}", xlabel="time")
    axes[0].legend()


def _draw_errors(figure: Any, facts: _Facts) -> None:
    axis = figure.subplots()
    errors = facts.numbers.errors
    for name, share, dash, colour in zip(
        ("median", "90 %", "worst"), (0.5, 0.9, 1.0), _DASHES, _COLOURS, strict=False
    ):
        rows = np.nanquantile(errors, share, axis=1)
        axis.plot(_NUM_JUMPS, rows, dash, marker="o", color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="jumps", ylabel="relative error")
    axis.set_xticks(_NUM_JUMPS, [str(num) for num in _NUM_JUMPS])
    axis.minorticks_off()
    # Whole decades, so that the size can be read.
    known = errors[np.isfinite(errors) & (errors > 0)]
    if known.size > 0:
        low, high = np.floor(np.log10(known.min())), np.ceil(np.log10(known.max()))
        axis.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axis.legend()


def _draw_times(figure: Any, facts: _Facts) -> None:
    axis = figure.subplots()
    times, values = facts.numbers.times, facts.numbers.by_times
    shown = np.log10(np.clip(values, 1e-6, 1e2))
    half = (times[1] - times[0]) / 2
    extent = (times[0] - half, times[-1] + half) * 2
    image = axis.imshow(
        shown.T, origin="lower", extent=extent, cmap="cividis", vmin=-4, vmax=0,
        aspect="equal",
    )  # fmt: skip
    axis.plot(times[[0, -1]], times[[0, -1]], ":", color="white")
    axis.set(xlabel="start time", ylabel="end time")
    axis.text(0.96, 0.04, "backwards", ha="right", bbox=_BOX, transform=axis.transAxes)
    axis.text(0.04, 0.92, "forwards", bbox=_BOX, transform=axis.transAxes)
    figure.colorbar(image, ax=axis, label="log10 of the median error", extend="both")


def _draw_signed(figure: Any, facts: _Facts) -> None:
    axis = figure.subplots()
    signed = (facts.ends[0] - facts.exact[:, -1]) / facts.spread
    entries = np.argsort(-np.abs(signed).mean(0))[:12]
    axis.axhline(0.0, color="0.6", lw=1)
    boxes = signed[:, np.sort(entries)]
    boxes = [column[np.isfinite(column)] for column in boxes.T]
    axis.boxplot(boxes, tick_labels=[str(entry) for entry in np.sort(entries)], sym=".")
    # Not closer than this, so that errors that are small look small.
    axis.set_ylim(
        *(np.asarray([-1, 1]) * max(0.01, 1.1 * np.nanmax(np.abs(axis.get_ylim()))))
    )
    axis.set(xlabel="entry", ylabel="(map - ODE) / spread")


def _draw_work(figure: Any, facts: _Facts) -> None:
    axis = figure.subplots()
    for (name, seconds, errors), dash, colour in zip(
        facts.work, _DASHES, _COLOURS, strict=False
    ):
        milliseconds = [1e3 * each for each in seconds]
        axis.plot(errors, milliseconds, dash, marker="o", color=colour, label=name)
        if name == "map":
            for num, *place in zip(_NUM_JUMPS, errors, milliseconds, strict=True):
                axis.annotate(str(num), place, (4, 4), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="median error at the last time")
    axis.set(ylabel=f"ms for a batch of {len(facts.exact)}")
    axis.legend()


_PANELS = [
    (
        "Trajectories",
        "Single jumps from the first time, dashed, over the ODE: medians, bands from 5 "
        "to 95 % of the initial states, and one trajectory with dots for its jumps.",
        _draw_trajectories,
    ),
    (
        "Error by number of jumps",
        "At the last time. Where more jumps are worse, errors add up.",
        _draw_errors,
    ),
    (
        "Error by times",
        "Jumps from the ODE's own states. A light band is a time that was not learned; "
        "light below the diagonal means that the map does not go backwards.",
        _draw_times,
    ),
    (
        "Signed error of a single jump",
        "At the last time, by entry of the state. Boxes off the line are a bias.",
        _draw_signed,
    ),
    (
        "Work against precision",
        "Left and down is better. The map's points have their numbers of jumps.",
        _draw_work,
    ),
]


def _as_picture(plt: Any, draw: Callable, facts: _Facts) -> str:
    size = (13, 3.6) if draw is _draw_trajectories else (6.4, 4.4)
    figure = plt.figure(figsize=size, layout="constrained")
    try:
        draw(figure, facts)
        body = io.BytesIO()
        figure.savefig(body, format="png", dpi=110)
    finally:
        plt.close(figure)
    return base64.b64encode(body.getvalue()).decode()


_STYLE = """
body {font: 16px/1.5 sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em}
section {display: inline-block; vertical-align: top; max-width: 100%; margin-right: 2em}
section p {max-width: 40em} img {max-width: 100%} pre {overflow-x: auto}
td, th {padding: 0 1em; text-align: right}
"""


def _page(title: str, flow_map: Any, numbers: MapReport, sections: list) -> str:
    rows = [
        f"<tr><td>{num}</td>"
        + "".join(f"<td>{np.nanquantile(each, q):.2g}</td>" for q in (0.5, 0.9, 1.0))
        + "</tr>"
        for num, each in zip(numbers.num_jumps, numbers.errors, strict=True)
    ]
    pictures = [
        f"<section><h2>{heading}</h2><p>{text}</p>"
        f'<img alt="{heading}" src="data:image/png;base64,{picture}"></section>'
        for heading, text, picture in sections
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            "<p>Errors are the largest entry of the difference from the ODE, relative to "
            f"the spread of that entry; {numbers.errors.shape[1]} initial states. "
            f"{(~np.isfinite(numbers.errors)).sum()} of {numbers.errors.size} errors are "
            "not finite.</p>",
            "<table><tr><th>jumps</th><th>median</th><th>90 %</th><th>worst</th></tr>",
            *rows,
            "</table>",
            *pictures,
            f"<h2>The map</h2><pre>{html.escape(str(flow_map))}</pre>",
            "</body></html>",
        ]
    )
