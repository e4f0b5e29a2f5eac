"""A file with a line of JSON for each score, which only grows, and its picture."""

import datetime
import importlib.metadata
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from .._io import StrPath, import_extra
from ..train._json import plain

SCORES = "scores.jsonl"

# Scores that differ in one of these cannot be compared.
COMPARABLE = ("fingerprint", "source", "num_samples", "num_reference", "seed", "starts")

# What two lines have in common if one repeats the measurement of the other.
_IDENTITY = (
    "step", "average", "sampler", "guidance", "ode", "num_samples", "num_reference",
    "source", "seed", "starts", "fingerprint",
)  # fmt: skip


def read_scores(folder: StrPath) -> list[dict[str, Any]]:
    """Reads the scores of a run.

    Lines are only ever added to the file, so a run that resumed, or a command that was
    repeated, has measured some things twice. This function returns the last measurement
    of each.

    **Arguments:**

    - `folder`: the folder of the run, with the file `scores.jsonl`.

    **Returns:** one dictionary for each measurement, in the order of the file: the fields
    of [`flowdiffrax.images.ImageScores`][] and what they depend on, such as `step`,
    `average`, `sampler`, `weights` (the fingerprint of the map), `date` and `versions`.
    Scores of [`flowdiffrax.images.ScoreCurves`][] also have `jumps`, and `attempt`, which
    counts how often the run was started. There are none if the file does not exist.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in _all_rows(pathlib.Path(folder, SCORES)):
        key = [row.get(name) for name in _IDENTITY] + ["attempt" in row]
        # Take the old one out first, for the order of the last measurements.
        rows.pop(json.dumps(key), None)
        rows[json.dumps(key)] = row
    return list(rows.values())


def last_attempt(folder: pathlib.Path) -> int:
    """The largest number of an attempt so far; 0 if there is none."""
    return max((row.get("attempt", 0) for row in _all_rows(folder / SCORES)), default=0)


def append_score(folder: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Adds a line, with the date, the device and the versions of the libraries."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("flowdiffrax", "jax", "jaxlib", "equinox", "numpy")
    }
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "versions": versions,
        "device": jax.devices()[0].device_kind,
    }
    line = json.dumps(plain({**row, **about}, "scores")) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / SCORES, "a+b") as file:
        # A process that was killed while it wrote has left part of a line.
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _all_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # left by a process that was killed while it wrote
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def score_picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a PNG of the distances by step."""
    # Avoid `pyplot`, which keeps figures and may open windows.
    figures = import_extra("matplotlib.figure", "plot", "ScoreCurves")
    figure = figures.Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    draw_scores(figure.add_subplot(), rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_scores(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws a line for each average and number of jumps, and the floor.

    Only scores that can be compared with the last one are drawn.
    """
    last = rows[-1]
    rows = [row for row in rows if is_comparable(row, last)]
    averages = sorted({row["average"] for row in rows})
    jumps = sorted({row["jumps"] for row in rows})
    for index, number in enumerate(jumps):
        for which, average in enumerate(averages):
            curve = sorted(
                (row["step"], row["frechet"])
                for row in rows
                if (row["jumps"], row["average"]) == (number, average)
            )
            label = f"{number} jump{'s' * (number > 1)}"
            label += f", average {average}" if len(averages) > 1 else ""
            axes.plot(
                *zip(*curve, strict=True),
                color=f"C{index}",
                marker="os^Dv"[which % 5],
                linestyle=("-", "-.", ":")[which % 3],
                markersize=4,
                label=label,
            )
    if last["floor"] is not None:
        label = f"{last['num_held_out']} held-out images"
        axes.axhline(last["floor"], color="black", linestyle="--", label=label)
    # Matplotlib warns of logarithms without a positive number.
    scale = "log" if any(row["frechet"] > 0 for row in rows) else "linear"
    axes.set(yscale=scale, xlabel="step", ylabel=last["frechet_name"])
    axes.set_title(
        f"{last['num_samples']} samples against {last['num_reference'] or 'those'} of "
        f"{last['source']}",
        fontsize="medium",
    )
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def is_comparable(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(row.get(name) == other.get(name) for name in COMPARABLE)
