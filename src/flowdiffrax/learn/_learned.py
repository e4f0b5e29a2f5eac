import dataclasses
import os
import time
from typing import Any

import jax.random as jr
import numpy as np

from ..flow_maps._base import AbstractFlowMap
from ..train import load, save
from ._build import build
from ._costs import (
    ClassicalSolves,
    Cost,
    Solve,
    fastest,
    jump_flops,
    jump_seconds,
    scan_tolerances,
)
from ._errors import QUANTILES, Jumps, scaled_errors
from ._figure import draw_report
from ._plan import Plan
from ._pool import Pool, empty_pool
from ._probe import scale_of
from ._problem import Problem

_NUM_JUMPS = 1, 2, 4, 8
_BATCHES = 64, 1024


@dataclasses.dataclass(frozen=True)
class JumpErrors:
    """The errors of a map at `t1`, on fresh trajectories.

    Errors are relative for positive entries, and in standard deviations of the
    trajectories for the others. Quantiles are over initial states and entries.

    **Attributes:**

    - `num_jumps`: the number of jumps, of equal length.
    - `median`, `most`, `worst`: the 50 %, 90 % and 100 % quantiles.
    - `num_negative`: how many positive entries came out negative.
    """

    num_jumps: int
    median: float
    most: float
    worst: float
    num_negative: int


@dataclasses.dataclass(frozen=True)
class LearnedSolver:
    """A learned flow map with its validation, from [`flowdiffrax.learn_solver`][].

    **Attributes:**

    - `flow_map`: the map, of the user's states, times and `args`. Run it in Diffrax with
      [`flowdiffrax.FlowMapSolver`][].
    - `trained`: the map of vectors as it was trained, before invariants are restored.
    - `plan`: what was chosen, a [`flowdiffrax.learn.Plan`][].
    - `errors`: a [`flowdiffrax.learn.JumpErrors`][] for each number of jumps.
    - `costs`: a [`flowdiffrax.learn.Cost`][] for each batch size.
    - `solves`: a [`flowdiffrax.learn.Solve`][] for each classical solver and tolerance
      that was tried.
    - `flops`: the floating-point operations of one jump of one state.
    - `num_trajectories`, `num_dropped`: how many trajectories the map learned from, and
      how many were dropped because their solve failed.
    - `minutes`: the time that everything took.
    - `history`: the loss and the error on fresh trajectories during the training.
    - `fresh`: some of the fresh trajectories, with the map's states at the same times.
    - `parts`, `optim`, `state`: the objects of the training: its map, objective and
      batches, its optimiser and its final state; `None` if loaded from a file.
    """

    flow_map: AbstractFlowMap
    trained: AbstractFlowMap
    plan: Plan
    errors: tuple[JumpErrors, ...]
    costs: tuple[Cost, ...]
    solves: tuple[Solve, ...]
    flops: float
    num_trajectories: int
    num_dropped: int
    minutes: float
    history: tuple[dict[str, float], ...]
    fresh: dict[str, np.ndarray]
    parts: Any = None
    optim: Any = None
    state: Any = None

    def __str__(self) -> str:
        lines = ["jumps  error: median      90 %     worst  negative"]
        for row in self.errors:
            quantiles = f"{row.median:>13.3%} {row.most:>9.3%} {row.worst:>9.3%}"
            lines.append(f"{row.num_jumps:>5}  {quantiles} {row.num_negative:>9}")
        lines += ["", *map(str, self.costs)]
        lines.append(
            f"{self.flops / 1e3:.3g} kFLOP a jump; learned from "
            f"{self.num_trajectories:,} trajectories in {self.minutes:.1f} minutes"
            + f", {self.num_dropped} dropped"
            * (self.num_dropped > 0)
        )
        return "\n".join(lines)

    def report(self, path: str | os.PathLike | None = None) -> str:
        """Returns the table of errors and costs, and draws them into one figure.

        The figure shows the error by number of jumps, the work of classical solvers
        beside that of a jump, some fresh trajectories with the map on top, and the curves
        of the training.

        **Arguments:**

        - `path`: the image to write, such as `report.png`; `None` for the table alone.

        **Raises:** `ImportError` if Matplotlib is needed and not installed.
        """
        if path is not None:
            draw_report(self, path)
        return str(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the map with its plan and its validation to one file.

        The file is in the format of [`flowdiffrax.train.save`][]. The vector field and
        the objects of the training are not kept.

        **Arguments:**

        - `path`: the file, such as `map.safetensors`.
        """
        names = "flops", "num_trajectories", "num_dropped", "minutes", "history"
        config = {name: getattr(self, name) for name in names}
        config |= {"plan": self.plan.to_json(), "shapes": _shapes(self.fresh)}
        for name in ("errors", "costs", "solves"):
            config[name] = [dataclasses.asdict(row) for row in getattr(self, name)]
        save(path, config, (self.trained, self.fresh))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LearnedSolver":
        """Reads what `save` wrote.

        **Arguments:**

        - `path`: the file.

        **Raises:** as [`flowdiffrax.train.load`][].
        """

        def make(config: dict[str, Any]) -> Any:
            plan = Plan.from_json(config["plan"])
            parts = build(plan, empty_pool(plan), jr.key(0))
            shapes = config["shapes"].items()
            fresh = {name: np.zeros(shape) for name, shape in shapes}
            return parts.flow_map, fresh

        config, (trained, fresh) = load(path, make)
        plan = Plan.from_json(config["plan"])
        finish = build(plan, empty_pool(plan), jr.key(0)).finish
        costs = [
            Cost(
                row["batch_size"],
                row["jump_seconds"],
                row["solve"] and Solve(**row["solve"]),
            )
            for row in config["costs"]
        ]
        return cls(
            flow_map=finish(trained),
            trained=trained,
            plan=plan,
            errors=tuple(JumpErrors(**row) for row in config["errors"]),
            costs=tuple(costs),
            solves=tuple(Solve(**row) for row in config["solves"]),
            flops=config["flops"],
            num_trajectories=config["num_trajectories"],
            num_dropped=config["num_dropped"],
            minutes=config["minutes"],
            history=tuple(config["history"]),
            fresh=fresh,
        )


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


def evaluate(
    problem: Problem,
    plan: Plan,
    is_stiff: bool,
    pool: Pool,
    fresh: Pool,
    trained: Any,
    begin: float,
) -> LearnedSolver:
    """Compares a trained map with fresh trajectories and with classical solvers."""
    jumps, flow_map = Jumps(problem), trained.flow_map
    scale = scale_of(fresh.ys)
    std = np.maximum(fresh.ys.std((0, 1)), 1e-12 * scale)
    x0, exact = fresh.ys[:, 0], fresh.ys[:, -1]
    measure = lambda ys: scaled_errors(ys, exact, plan.is_positive, scale, std)
    rows = []
    for num in _NUM_JUMPS:
        times = np.linspace(problem.t0, problem.t1, num + 1)
        ys = jumps(flow_map, times, x0, fresh.args)
        median, most, worst = map(float, np.quantile(measure(ys), QUANTILES))
        num_negative = int((ys < 0)[:, plan.is_positive].sum())
        rows.append(JumpErrors(num, median, most, worst, num_negative))
    some = slice(0, 4)
    args = None if fresh.args is None else fresh.args[some]
    at = [jumps(flow_map, [fresh.ts[0], t], x0[some], args) for t in fresh.ts[1:]]
    shown = {"ts": fresh.ts, "exact": fresh.ys[some]}
    shown["learned"] = np.stack([x0[some], *at], axis=1)
    # The work of classical solvers is measured on fewer states: a stiff solve is slow.
    few = slice(0, _BATCHES[0])
    few_args = None if fresh.args is None else fresh.args[few]
    few_errors = lambda ys: scaled_errors(ys, exact[few], plan.is_positive, scale, std)
    best = rows[0]
    classical = ClassicalSolves(problem, is_stiff, scale)
    scanned = scan_tolerances(
        classical, x0[few], few_args, few_errors, (best.median, best.most)
    )
    costs = []
    for batch_size in _BATCHES:
        index = np.resize(np.arange(len(x0)), batch_size)
        batch = x0[index], None if fresh.args is None else fresh.args[index]
        solve = fastest(scanned, best.median, best.most)
        if solve is not None and batch_size != solve.batch_size:
            seconds = classical.seconds(solve.solver, *batch, solve.rtol)
            solve = dataclasses.replace(solve, batch_size=batch_size, seconds=seconds)
        costs.append(Cost(batch_size, jump_seconds(problem, flow_map, *batch), solve))
    return LearnedSolver(
        flow_map=flow_map,
        trained=trained.state.ema_map,
        plan=plan,
        errors=tuple(rows),
        costs=tuple(costs),
        solves=tuple(scanned),
        flops=jump_flops(problem, flow_map),
        num_trajectories=len(pool.ys),
        num_dropped=pool.num_dropped,
        minutes=(time.perf_counter() - begin) / 60,
        history=trained.history,
        fresh=shown,
        parts=trained.parts,
        optim=trained.optim,
        state=trained.state,
    )
