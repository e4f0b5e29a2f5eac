import dataclasses
from collections.abc import Callable
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._check import check_bools, check_count, check_key, check_positive
from .._types import Args, State, VectorField
from ._build import Pool, build
from ._costs import (
    ClassicalSolves,
    Solve,
    at_batch,
    fastest,
    jump_flops,
    jump_seconds,
    scan_tolerances,
)
from ._errors import scaled_errors
from ._plan import NETWORKS, make_plan
from ._probe import PERTURBATION, Facts, field_flops, probe
from ._problem import Problem, make_problem


@dataclasses.dataclass(frozen=True)
class NetworkCost:
    """What a jump would cost with a network of a certain size.

    **Attributes:**

    - `width`, `depth`: the width and the number of hidden layers.
    - `flops`: the floating-point operations of one jump of one state.
    - `seconds`: the seconds of one jump of the batch.
    - `speedup`: how many times longer the classical solve takes.
    """

    width: int
    depth: int
    flops: float
    seconds: float
    speedup: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """Whether a learned solver can be faster, as [`flowdiffrax.advise`][] finds it.

    **Attributes:**

    - `tol`, `batch_size`: what was asked for.
    - `is_stiff`, `is_autonomous`: whether the system is stiff, and independent of time.
    - `solve`: the fastest classical [`flowdiffrax.learn.Solve`][] that is as exact;
      `None` if none of those tried is.
    - `field_flops`: the floating-point operations of one evaluation of the vector field.
    - `networks`: a [`flowdiffrax.learn.NetworkCost`][] for each size of network.
    - `growth`, `contraction`: by how much an error in the initial state grows until `t1`
      at most, and shrinks at most, with entries in units of their largest size.
    - `warnings`: what will be difficult or impossible.
    """

    tol: float
    batch_size: int
    is_stiff: bool
    is_autonomous: bool
    solve: Solve | None
    field_flops: float
    networks: tuple[NetworkCost, ...]
    growth: float
    contraction: float
    warnings: tuple[str, ...]

    @property
    def best_speedup(self) -> float:
        """The largest speedup, with the smallest network; NaN without a solve."""
        return max((row.speedup for row in self.networks), default=float("nan"))

    @property
    def network(self) -> NetworkCost | None:
        """The largest network with which a jump is ten times faster, or else twice."""
        for aim in (10.0, 2.0):
            good = [row for row in self.networks if row.speedup >= aim]
            if good:
                return max(good, key=lambda row: row.flops)
        return None

    def __str__(self) -> str:
        kind = "stiff" if self.is_stiff else "not stiff"
        time = "autonomous" if self.is_autonomous else "depends on time"
        lines = [f"The system is {kind} and {time}; {self.field_flops:.3g} FLOP a call."]
        if self.solve is None:
            lines.append(
                f"No classical solver that was tried reaches an error of {self.tol:g}."
            )
        else:
            lines.append(
                f"{self.solve.solver} to rtol {self.solve.rtol:g} reaches an error of "
                f"{self.tol:g} in {self.solve.num_steps:.0f} steps and "
                f"{1e3 * self.solve.seconds:.3g} ms for a batch of {self.batch_size}."
            )
        lines.append("network  kFLOP a jump      ms    times faster")
        for row in self.networks:
            lines.append(
                f"{f'{row.width}x{row.depth}':<7} {row.flops / 1e3:>13.3g} "
                f"{1e3 * row.seconds:>7.3g} {row.speedup:>15.3g}"
            )
        if self.solve is None:
            lines.append("There is nothing that a jump could be compared with.")
        elif self.best_speedup < 1:
            lines.append(
                "A learned solver cannot be faster here: the field is so cheap that a "
                "whole solve costs less than one jump. It may still save evaluations in "
                "a gradient, or make many solves equally long."
            )
        elif self.network is None:
            lines.append("A learned solver can hardly be faster here.")
        else:
            row = self.network
            lines.append(
                f"A learned solver can be {row.speedup:.2g} times faster, with "
                f"{row.depth} hidden layers of {row.width}, if it gets as exact."
            )
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])


def advise(
    vector_field: VectorField,
    x0: State | Callable[[Any], State],
    t0: float,
    t1: float,
    args: Args | Callable[[Any], Args] = None,
    *,
    args_per_example: bool = False,
    tol: float = 1e-2,
    batch_size: int = 1024,
    both_directions: bool = False,
    key: Key[Array, ""] | None = None,
) -> Advice:
    """Says before any training whether a learned solver can be faster, and by how much.

    It solves a few initial states at several tolerances, times a batch with the fastest
    solver that is exact enough, and times jumps of untrained maps: what a jump costs does
    not depend on its weights. Whether a map can become as exact is another question, to
    which only training has the answer.

    **Arguments:**

    - `vector_field`, `x0`, `t0`, `t1`, `args`, `args_per_example`: as in
      [`flowdiffrax.learn_solver`][].
    - `tol`: the error that is good enough at `t1`, in the median: relative for positive
      entries, and in standard deviations of the solutions for others.
    - `batch_size`: the number of initial states that are solved together.
    - `both_directions`: whether backward jumps are needed as well.
    - `key`: a random key; `None` uses `jax.random.key(0)`.

    **Returns:** a [`flowdiffrax.learn.Advice`][]; print it.

    **Raises:** as [`flowdiffrax.learn_solver`][], for the same arguments.
    """
    check_positive(tol, "tol")
    check_bools(both_directions=both_directions)
    check_count(batch_size, 1, "batch_size")
    key = jr.key(0) if key is None else key
    check_key(key)
    problem = make_problem(vector_field, x0, t0, t1, args, args_per_example)
    facts = probe(problem, key)
    x0_rows, rows = facts.ys[:, 0], facts.args
    exact, std = facts.ys[:, -1], facts.std
    measure = lambda ys: scaled_errors(ys, exact, facts.is_positive, facts.scale, std)
    solves = ClassicalSolves(problem, facts.is_stiff, facts.scale)
    scanned = scan_tolerances(solves, x0_rows, rows, measure, (tol, np.inf))
    solve = fastest(scanned, tol, np.inf)
    index = np.resize(np.arange(len(x0_rows)), batch_size)
    if solve is not None:
        solve = at_batch(solves, solve, x0_rows, rows, batch_size)
    batch = x0_rows[index], None if rows is None else rows[index]
    networks = []
    for width, depth in NETWORKS:
        flow_map = _untrained(problem, facts, width, depth, both_directions)
        seconds = jump_seconds(problem, flow_map, *batch)
        speedup = float("nan") if solve is None else solve.seconds / seconds
        flops = jump_flops(problem, flow_map)
        networks.append(NetworkCost(width, depth, flops, seconds, speedup))
    problem.give_back()
    return Advice(
        tol=tol,
        batch_size=batch_size,
        is_stiff=facts.is_stiff,
        is_autonomous=facts.is_autonomous,
        solve=solve,
        field_flops=field_flops(problem),
        networks=tuple(networks),
        growth=facts.growth,
        contraction=facts.contraction,
        warnings=tuple(warnings_of(facts, tol, both_directions)),
    )


def warnings_of(facts: Facts, tol: float, both_directions: bool) -> list[str]:
    """What will be difficult or impossible."""
    warnings = []
    if both_directions and facts.contraction * 1e3 < 1:
        warnings.append(
            "the system forgets its initial state, to within a factor of "
            f"{facts.contraction:.1g}. Backwards it is ill-posed: an error grows by the "
            "inverse of that, and no backward map can be exact."
        )
    if facts.growth * tol > 1:
        # The small difference that shows it cannot grow beyond the size of the solutions.
        least = "at least " if facts.growth * PERTURBATION > 0.1 else ""
        warnings.append(
            f"an error in the initial state grows {least}{facts.growth:.2g} times until "
            f"`t1`, as in chaotic systems. For an error of {tol:g} at the end, a map "
            f"would have to be exact to {tol / facts.growth:.1g} at the start, or "
            "better: learn a shorter interval."
        )
    if tol < 1e-4:
        warnings.append(
            f"an error of {tol:g} is out of reach of a small network within minutes. "
            "Expect 1e-2 to 1e-4, or correct the map's jumps."
        )
    if facts.num_failed > 0:
        warnings.append(
            f"{facts.num_failed} of {facts.num_failed + len(facts.ys)} solves failed."
        )
    return warnings


def _untrained(
    problem: Problem, facts: Facts, width: int, depth: int, both_directions: bool
) -> Any:
    given = {"width": width, "depth": depth, "both_directions": both_directions}
    plan = make_plan(problem, facts, 1.0, given)
    index = np.searchsorted(facts.ts, plan.ts).clip(max=len(facts.ts) - 1)
    ys = np.where(
        facts.is_positive, np.maximum(facts.ys[:, index], 0), facts.ys[:, index]
    )
    parts = build(plan, Pool(plan.ts, ys, facts.args), jr.key(0))
    return parts.finish(parts.flow_map)
