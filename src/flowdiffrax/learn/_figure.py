import os
import pathlib
from typing import Any

import numpy as np

from .._io import import_extra


def draw_report(learned: Any, path: str | os.PathLike) -> None:
    """Draws the errors, the work, some trajectories and the training into one figure."""
    plt = import_extra("matplotlib.pyplot", "plot", "A report's figure")
    draws = [_draw_errors, _draw_work, _draw_trajectories, _draw_training]
    size = {"figsize": (11, 8), "layout": "constrained"}
    if learned.solves:
        figure, axes = plt.subplots(2, 2, **size)
    else:
        draws.remove(_draw_work)
        figure, axes = plt.subplots(1, 3, **size | {"figsize": (15, 4)})
    for draw, axis in zip(draws, axes.flat, strict=True):
        draw(axis, learned)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_errors(axes: Any, learned: Any) -> None:
    num_jumps = [row.num_jumps for row in learned.errors]
    for name, label in (("median", "median"), ("most", "90 %"), ("worst", "worst")):
        values = [getattr(row, name) for row in learned.errors]
        axes.plot(num_jumps, values, "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="jumps", ylabel="error at the end")
    axes.set(title="Error by number of jumps, on fresh starts")
    axes.set_xticks(num_jumps, [str(num) for num in num_jumps])
    axes.minorticks_off()
    axes.legend()


def _draw_work(axes: Any, learned: Any) -> None:
    names = dict.fromkeys(row.solver for row in learned.solves)
    for name in names:
        rows = [row for row in learned.solves if row.solver == name]
        rows = [row for row in rows if np.isfinite(row.median)]
        axes.plot(
            [r.median for r in rows], [1e3 * r.seconds for r in rows], "o-", label=name
        )
    cost, error = learned.costs[0], learned.errors[0].median
    axes.plot([error], [1e3 * cost.jump_seconds], "k*", markersize=14, label="one jump")
    axes.set(xscale="log", yscale="log", xlabel="median error at the end")
    axes.set(
        ylabel=f"ms for a batch of {cost.batch_size}", title="Work against precision"
    )
    axes.legend()


def _draw_trajectories(axes: Any, learned: Any) -> None:
    fresh = learned.fresh
    exact, ours = fresh["exact"], fresh["learned"]
    # The entries that move most, in their own units, of the first start.
    size = np.nanmax(np.abs(exact), (0, 1)) + 1e-300
    moved = (np.nanmax(exact[0], 0) - np.nanmin(exact[0], 0)) / size
    ts = np.broadcast_to(fresh["ts"], exact.shape[:2])
    is_log = ts[0, 1] - ts[0, 0] < 1e-2 * (np.nanmax(ts[0]) - ts[0, 0])
    ts = ts - ts[:, :1] if is_log else ts
    first = 1 if is_log else 0
    for color, entry in enumerate(np.argsort(-moved)[:4]):
        scale = size[entry] if len(size) > 1 else 1.0
        for start in range(min(len(exact), 2)):
            style = {"color": f"C{color}", "alpha": 1.0 if start == 0 else 0.5}
            label = f"entry {entry}" if start == 0 else None
            values = exact[start, first:, entry] / scale
            seen = np.isfinite(values)
            axes.plot(ts[start, first:][seen], values[seen], lw=1, **style)
            values = ours[start, first:, entry] / scale
            axes.plot(ts[start, first:], values, ".", label=label, **style)
    axes.set(
        xlabel="time since the start" if is_log else "time",
        xscale="log" if is_log else "linear",
    )
    truth = "Exact" if learned.solves else "Observed"
    axes.set(title=f"{truth} (lines), and one jump to each time (dots)")
    axes.set(ylabel="state / its largest size")
    axes.legend()


def _draw_training(axes: Any, learned: Any) -> None:
    steps = [row["step"] for row in learned.history]
    axes.plot(steps, [row["median"] for row in learned.history], label="error, median")
    axes.plot(steps, [row["most"] for row in learned.history], label="error, 90 %")
    axes.plot(steps, [row["loss"] for row in learned.history], label="training loss")
    axes.set(yscale="log", xlabel="step", title="Training, and error on fresh starts")
    axes.legend()
