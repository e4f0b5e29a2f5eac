import dataclasses
import os
import time
from typing import Any

import jax.random as jr
import numpy as np

from ..flow_maps._base import AbstractFlowMap
from ..train import load, save
from ._build import build, restore
from ._costs import (
    ClassicalSolves,
    Cost,
    Solve,
    at_batch,
    fastest,
    jump_flops,
    jump_seconds,
    scan_tolerances,
)
from ._figure import draw_report
from ._plan import Plan
from ._pool import empty_pool
from ._problem import Domain, Problem
from ._validation import JumpErrors, Validation

_NUM_JUMPS = 1, 2, 4, 8
_BATCHES = 64, 1024


@dataclasses.dataclass(frozen=True)
class LearnedSolver:
    """A learned flow map with its validation, from [`flowdiffrax.learn_solver`][] or
    [`flowdiffrax.learn.learn_from_data`][].

    **Attributes:**

    - `flow_map`: the map, of the user's states, times and `args`. Run it in Diffrax with
      [`flowdiffrax.FlowMapSolver`][].
    - `trained`: the map of vectors in the user's units, before invariants are restored.
    - `plan`: what was chosen, a [`flowdiffrax.learn.Plan`][].
    - `errors`: a [`flowdiffrax.learn.JumpErrors`][] for each number of jumps.
    - `costs`: a [`flowdiffrax.learn.Cost`][] for each batch size.
    - `solves`: a [`flowdiffrax.learn.Solve`][] for each classical solver and tolerance
      that was tried; none from observations alone.
    - `flops`: the floating-point operations of one jump of one state.
    - `num_trajectories`, `num_dropped`: how many trajectories the map learned from, and
      how many were dropped because their solve failed, or too little was observed.
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
        if self.solves and self.costs[0].solve is None:
            lines.append("No classical solver that was tried is as exact.")
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
            if "plan" not in config:
                raise ValueError(
                    f"{path} is a checkpoint, but not one of a learned solver. Read it "
                    "with `flowdiffrax.train.load`."
                )
            plan = Plan.from_json(config["plan"])
            parts = build(plan, empty_pool(plan), jr.key(0))
            shapes = config["shapes"].items()
            fresh = {name: np.zeros(shape) for name, shape in shapes}
            return parts.in_user_units(parts.flow_map), fresh

        config, (trained, fresh) = load(path, make)
        plan = Plan.from_json(config["plan"])
        costs = [
            Cost(
                row["batch_size"],
                row["jump_seconds"],
                row["solve"] and Solve(**row["solve"]),
            )
            for row in config["costs"]
        ]
        return cls(
            flow_map=restore(plan, trained),
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
    domain: Domain,
    plan: Plan,
    validation: Validation,
    trained: Any,
    numbers: tuple[int, int],
    say: Any,
    *,
    num_jumps: tuple[int, ...] = _NUM_JUMPS,
) -> LearnedSolver:
    """Compares a trained map with fresh trajectories, and with classical solvers.

    `numbers` are of trajectories learned from, and dropped. There are classical solvers
    if the domain is that of a `Problem`; Ctrl-C leaves them out.
    """
    flow_map = trained.flow_map
    errors = validation.by_num_jumps(flow_map, num_jumps)
    solves, fastest_of = [], {}
    if isinstance(domain, Problem):
        try:
            solves, fastest_of = _classical(domain, plan, validation, errors[0])
        except KeyboardInterrupt:
            say("stopped; the map is not compared with classical solvers")
    x0, args = validation.fresh.ys[:, 0], validation.fresh.args
    costs = []
    for batch_size in _BATCHES:
        index = np.resize(np.arange(len(x0)), batch_size)
        batch = x0[index], None if args is None else args[index]
        seconds = jump_seconds(domain, flow_map, *batch)
        costs.append(Cost(batch_size, seconds, fastest_of.get(batch_size)))
    return LearnedSolver(
        flow_map=flow_map,
        trained=trained.parts.in_user_units(trained.state.ema_map),
        plan=plan,
        errors=errors,
        costs=tuple(costs),
        solves=tuple(solves),
        flops=jump_flops(domain, flow_map),
        num_trajectories=numbers[0],
        num_dropped=numbers[1],
        minutes=(time.perf_counter() - say.begin) / 60,
        history=trained.history,
        fresh=validation.shown(flow_map),
        parts=trained.parts,
        optim=trained.optim,
        state=trained.state,
    )


def _classical(
    problem: Problem, plan: Plan, validation: Validation, aim: JumpErrors
) -> tuple[list[Solve], dict[int, Solve]]:
    """Solves at many tolerances, and for each batch the fastest that is as exact."""
    # Measured on few states: a stiff solve is slow.
    few, fresh = slice(0, _BATCHES[0]), validation.fresh
    args = None if fresh.args is None else fresh.args[few]
    errors_of = lambda ys: validation.measure(ys, fresh.ys[few, -1])
    classical = ClassicalSolves(problem, plan.is_stiff, validation.scale)
    aims = aim.median, aim.most
    scanned = scan_tolerances(classical, fresh.ys[few, 0], args, errors_of, aims)
    best = fastest(scanned, *aims)
    if best is None:
        return scanned, {}
    given = classical, best, fresh.ys[:, 0], fresh.args
    found = {size: at_batch(*given, size) for size in _BATCHES if size != best.batch_size}
    return scanned, found | {best.batch_size: best}
