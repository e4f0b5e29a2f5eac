"""What a jump costs, beside the best classical solve of equal error."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._errors import flops_of, seconds_of, timed
from ._problem import Domain, Problem, Rows, call_afresh, double_precision
from ._solvers import make_solver

# A solve that would take longer is timed on fewer states.
_LONGEST = 3.0
TOLERANCES = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7


@dataclasses.dataclass(frozen=True)
class Solve:
    """What a classical solve of a batch costs, and how exact it is.

    **Attributes:**

    - `solver`, `rtol`: the name of the Diffrax solver, and its relative tolerance.
    - `batch_size`: the number of initial states.
    - `seconds`: the seconds for the batch. Where it would take more than three, they are
      extrapolated from a smaller batch.
    - `num_steps`: the mean number of steps.
    - `median`, `most`: the median and the 90 % quantile of its errors at `t1`.
    """

    solver: str
    rtol: float
    batch_size: int
    seconds: float
    num_steps: float
    median: float
    most: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a jump over the whole interval costs, beside a solve of equal error.

    **Attributes:**

    - `batch_size`: the number of initial states.
    - `jump_seconds`: the seconds of one jump of all of them.
    - `solve`: the fastest [`flowdiffrax.learn.Solve`][] that was tried whose errors are
      no larger; `None` if there is none.
    """

    batch_size: int
    jump_seconds: float
    solve: Solve | None

    @property
    def speedup(self) -> float:
        """How many times longer the solve takes; NaN if there is none."""
        if self.solve is None:
            return float("nan")
        return self.solve.seconds / self.jump_seconds

    def __str__(self) -> str:
        text = f"batch of {self.batch_size}: a jump takes {_ms(self.jump_seconds)}"
        if self.solve is None:
            return text
        solve = self.solve
        return (
            f"{text}; {solve.solver} to rtol {solve.rtol:g}, no less exact, "
            f"{_ms(solve.seconds)}: {self.speedup:.3g} times"
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


class ClassicalSolves:
    """Solves to `t1` as an expert would: stiff ones in float64, others in float32.

    Entries are measured in units of `scale`, so that one absolute tolerance fits all.
    """

    def __init__(self, problem: Problem, is_stiff: bool, scale: Any):
        names = ("Kvaerno3", "Kvaerno5") if is_stiff else ("Bosh3", "Tsit5")
        self.names = names
        self._context = double_precision if is_stiff else contextlib.nullcontext
        self._dtype = np.float64 if is_stiff else np.float32
        axis = None if problem.args_size == 0 else 0

        def solve(solver, x0, args, rtol):
            size = jnp.asarray(scale, x0.dtype)
            field = lambda t, z, args: problem.vector_field(t, z * size, args) / size
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                jnp.asarray(problem.t0, x0.dtype),
                jnp.asarray(problem.t1, x0.dtype),
                None,
                x0 / size,
                args,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-4 * rtol),
                max_steps=8192,
                throw=False,
            )
            assert solution.ys is not None
            return solution.ys[0] * size, solution.stats["num_steps"]

        self._solves = {
            name: jax.jit(
                jax.vmap(functools.partial(solve, make_solver(name)), (0, axis, None))
            )
            for name in names
        }

    def __call__(self, name: str, x0: Rows, args: Rows | None, rtol: float) -> tuple:
        """The states at `t1`, the numbers of steps, and the seconds of the batch.

        What fails is not finite. The first call for a batch of some size compiles.
        """
        with self._context():
            as_jax = lambda rows: jnp.asarray(rows, self._dtype)
            given = as_jax(x0), None if args is None else as_jax(args), as_jax(rtol)

        def run():
            with self._context():
                ys, num_steps = call_afresh(self._solves[name], *given)
                return np.asarray(ys, np.float64), np.asarray(num_steps)

        (ys, num_steps), seconds = timed(run, 0.1)
        return ys, num_steps, seconds


def scan_tolerances(
    solves: ClassicalSolves,
    x0: Rows,
    args: Rows | None,
    errors_of: Callable[[Any], Any],
    until: tuple[float, float],
) -> list[Solve]:
    """Solves at tighter and tighter tolerances, until both quantiles are reached.

    Seconds are for the batch. Looser is not always faster, so none is skipped.
    """
    found = []
    for name in solves.names:
        solves(name, x0, args, TOLERANCES[0])  # compiles
        for rtol in TOLERANCES:
            ys, num_steps, seconds = solves(name, x0, args, rtol)
            median, most = np.quantile(errors_of(ys), (0.5, 0.9))
            row = Solve(
                name, rtol, len(x0), seconds, float(num_steps.mean()), median, most
            )
            found.append(row)
            if median <= until[0] / 10 and most <= until[1] / 10:
                break
    return found


def fastest(solves: list[Solve], median: float, most: float) -> Solve | None:
    """The fastest of those whose errors are no larger."""
    good = [row for row in solves if row.median <= median and row.most <= most]
    return min(good, key=lambda row: row.seconds, default=None)


def at_batch(
    solves: ClassicalSolves, solve: Solve, x0: Rows, args: Rows | None, batch_size: int
) -> Solve:
    """The same solve with its seconds for a batch of another size."""
    num = min(batch_size, int(_LONGEST * solve.batch_size / solve.seconds))
    # All states step together until the last is done, so small batches cost less each.
    num = max(num, min(solve.batch_size, batch_size))
    index = np.resize(np.arange(len(x0)), num)
    given = solve.solver, x0[index], None if args is None else args[index], solve.rtol
    solves(*given)  # compiles
    seconds = solves(*given)[2] * batch_size / num
    return dataclasses.replace(solve, batch_size=batch_size, seconds=seconds)


def jump_seconds(domain: Domain, flow_map: Any, x0: Rows, args: Rows | None) -> float:
    """The seconds of one jump of a batch over the whole interval."""
    user = domain.to_user(x0, args)
    axis = None if args is None else 0
    times = jnp.float32(domain.t0), jnp.float32(domain.t1)
    jump = lambda flow_map, *given: jax.vmap(
        lambda x, args: flow_map(*times, x, args), (0, axis)
    )(*given)
    run = eqx.filter_jit(jump)
    return seconds_of(lambda: jax.block_until_ready(run(flow_map, *user)))


def jump_flops(domain: Domain, flow_map: Any) -> float:
    """The floating-point operations of one jump of one state."""
    times = jnp.float32(domain.t0), jnp.float32(domain.t1)
    return flops_of(lambda f, *given: f(*given), flow_map, *times, domain.x, domain.args)
