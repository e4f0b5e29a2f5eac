import dataclasses
import time
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ._autonomous import depends_on_time
from ._errors import flops_of
from ._problem import (
    Problem,
    Rows,
    as_flags,
    call_afresh,
    check_field,
    double_precision,
    in_double,
)
from ._solvers import make_solver

# A solver that takes more steps than this is not the one to use, and one that takes more
# than that is stopped. In between is room for tighter tolerances.
_MANY_STEPS, _MAX_STEPS = 8192, 16384
# Below this number of explicit steps, an implicit solver cannot be the faster one.
_FEW_STEPS = 200
# Of the trajectories that a map learns from, and of those that it is judged by.
TEACHER_RTOL, EXACT_RTOL = 1e-5, 1e-6
# Of initial states, in units of their ranges, to find how errors grow.
PERTURBATION = 1e-3
_NUM_STARTS = 32
_NUM_TIMES = 64


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a few exact solutions tell about a problem.

    **Attributes:**

    - `is_autonomous`: whether the vector field does not depend on time.
    - `is_positive`: which entries stay positive: where one is zero, its rate is never
      negative.
    - `is_stiff`: whether an implicit solver is the faster one.
    - `solves`: solves of the problem, by the faster of Tsit5 and Kvaerno5.
    - `num_steps`: the mean number of its steps, at the tolerance of the teacher.
    - `solve_seconds`: the seconds that one solve takes in a batch.
    - `scale`: the largest size of each entry.
    - `ranges`: the units in which states are solved.
    - `shortest`: the time in which the first entries begin to change.
    - `solve_flops`: about how many floating-point operations one solve has.
    - `growth`, `contraction`: by how much an error in the initial state grows until
      `t1` at most, and shrinks at most; the median over initial states, with entries in
      units of their scale.
    - `num_failed`: how many of the solves failed.
    - `rtol`: the relative tolerance of the trajectories to learn from.
    - `ts`, `ys`, `args`: the solutions, ten times as exact as the teacher.
    """

    is_autonomous: bool
    is_positive: Bool[np.ndarray, " size"]
    is_stiff: bool
    solves: "Solves"
    num_steps: float
    solve_seconds: float
    scale: Float[np.ndarray, " size"]
    ranges: "Ranges"
    shortest: float
    solve_flops: float
    growth: float
    contraction: float
    num_failed: int
    rtol: float
    ts: Float[np.ndarray, " times"]
    ys: Float[np.ndarray, "starts times size"]
    args: Rows | None

    @property
    def std(self) -> Float[np.ndarray, " size"]:
        """The standard deviation of each entry, or a tiny number if it does not vary."""
        return np.maximum(self.ys.std((0, 1)), 1e-12 * self.scale)


def probe(
    problem: Problem,
    key: Key[Array, ""],
    is_positive: Any = None,
    solver: diffrax.AbstractSolver | None = None,
) -> Facts:
    """Solves a few initial states, and looks at the solutions.

    **Raises:** `ValueError` if the vector field is not finite, or no solver can solve
    most of the initial states.
    """
    x0, args = problem.draw(key, _NUM_STARTS)
    check_field(problem, x0, args)
    span = problem.t1 - problem.t0
    # Fast parts show on a logarithmic grid, and slow ones on a uniform one.
    steps = np.concatenate(
        [np.geomspace(1e-12, 1e-2, _NUM_TIMES), np.linspace(1e-2, 1, _NUM_TIMES)[1:]]
    )
    ts = problem.t0 + span * np.concatenate([[0.0], steps])
    tried = _try_solvers(problem, x0, args, ts, solver)
    if not tried:
        raise ValueError(
            "Neither Tsit5 nor Kvaerno5 can solve this problem: more than half of "
            f"{len(x0)} solves failed. Check the vector field and its units, shorten the "
            "interval, or pass a `solver` that can."
        )
    seconds, solves, ys, num_steps = min(tried, key=_badness)
    exact, _ = solves(x0, args, ts, EXACT_RTOL, Ranges.of(ys))
    ys = np.where(np.isfinite(exact).all((1, 2), keepdims=True), exact, ys)
    good = np.isfinite(ys).all((1, 2))
    is_stiff = isinstance(solves.solver, diffrax.AbstractImplicitSolver)
    ys, args = ys[good], None if args is None else args[good]
    scale, ranges = scale_of(ys), Ranges.of(ys)
    growth, contraction = _sensitivity(
        problem, solves, ys[:, 0], args, ts, ranges, len(x0)
    )
    return Facts(
        is_autonomous=not depends_on_time(problem),
        is_positive=_are_positive(problem, ts, ys, args, scale, is_positive),
        is_stiff=is_stiff,
        solves=solves,
        num_steps=float(num_steps[good].mean()),
        solve_seconds=seconds / len(x0),
        scale=scale,
        ranges=ranges,
        shortest=_shortest(ts - problem.t0, ys, ranges.scale),
        solve_flops=_solve_flops(problem, is_stiff, float(num_steps[good].mean())),
        growth=growth,
        contraction=contraction,
        num_failed=int((~good).sum()),
        rtol=TEACHER_RTOL,
        ts=ts,
        ys=ys,
        args=args,
    )


def _rough_ranges(problem, x0, args) -> "Ranges":
    """A guess at the size of each entry: that of its start, or else a small one."""
    rates = np.abs(problem.rates(np.full(len(x0), problem.t0), x0, args)).max(0)
    size = np.abs(x0).max(0)
    largest = max(size.max(), 1e-300)
    early = 1e-6 * rates * (problem.t1 - problem.t0)
    scale = np.where(size > 0, size, np.clip(early, 1e-12 * largest, largest))
    return Ranges(np.zeros(problem.size), scale)


def _try_solvers(problem, x0, args, ts, solver) -> list[tuple]:
    """Seconds, solver, solutions and numbers of steps, for each solver that works."""
    names = "Tsit5", "Kvaerno5"
    candidates = [solver] if solver else list(map(make_solver, names))
    rough = _rough_ranges(problem, x0, args)
    found = []
    for candidate in candidates:
        solves = Solves(problem, candidate)
        # With a scale that is too small, this is slower than it need be, but right.
        ys, _ = solves(x0, args, ts, 1e-2, rough)
        if np.isfinite(ys).all((1, 2)).mean() < 0.5:
            continue
        ranges = Ranges.of(ys)
        begin = time.perf_counter()
        ys, num_steps = solves(x0, args, ts, TEACHER_RTOL, ranges)
        seconds = time.perf_counter() - begin
        ys = np.where(num_steps[:, None, None] > _MANY_STEPS, np.nan, ys)
        if np.isfinite(ys).all((1, 2)).mean() < 0.5:
            continue
        found.append((seconds, solves, ys, num_steps))
        if num_steps.mean() < _FEW_STEPS:
            break
    return found


def _badness(tried: tuple) -> tuple[float, float]:
    """First the share of solves that failed, in tenths, and then the time."""
    seconds, _, ys, _ = tried
    return round((~np.isfinite(ys).all((1, 2))).mean(), 1), seconds


def scale_of(ys: Float[np.ndarray, "rows times size"]) -> Float[np.ndarray, " size"]:
    """The largest size of each entry, or 1 if it is always zero."""
    scale = np.nanmax(np.abs(ys), (0, 1))
    return np.where(scale > 0, scale, 1.0)


class Ranges(NamedTuple):
    """Units in which each entry is of order one, and its tolerances are relative.

    An entry that varies by much less than its size, such as a temperature of 300 to 301
    kelvin, is measured from `centre`: an error relative to its size could be as large as
    all that happens to it.
    """

    centre: Float[np.ndarray, " size"]
    scale: Float[np.ndarray, " size"]

    @classmethod
    def of(cls, ys: Float[np.ndarray, "rows times size"]) -> "Ranges":
        """The units of solutions, of which those that failed are NaN."""
        size = scale_of(ys)
        low, high = np.nanmin(ys, (0, 1)), np.nanmax(ys, (0, 1))
        spread = (high - low) / 2
        # Rounding errors must stay far below the tolerances.
        narrow = np.maximum(spread, 1e-5 * size)
        is_narrow = spread < 0.1 * np.maximum(np.abs(low), np.abs(high))
        # Not from the middle, where an error relative to the distance would be absurd.
        centre = np.where(is_narrow, low - narrow, 0)
        return cls(centre, np.where(is_narrow, narrow, size))


class Solves:
    """Solves batches of a problem, at any tolerance without compiling anew.

    Entries are measured in units of their ranges. What fails is NaN.
    """

    def __init__(
        self,
        problem: Problem,
        solver: diffrax.AbstractSolver,
        max_steps: int = _MAX_STEPS,
    ):
        self.solver = solver
        axis = None if problem.args_size == 0 else 0

        def solve(x0, args, ts, rtol, ranges):
            centre, scale = ranges
            at = lambda z: centre + z * scale
            field = lambda t, z, args: problem.vector_field(t, at(z), args) / scale
            # Small concentrations matter as much as large ones.
            controller = diffrax.PIDController(rtol=rtol, atol=1e-4 * rtol)
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                ts[0],
                ts[-1],
                None,
                (x0 - centre) / scale,
                args,
                saveat=diffrax.SaveAt(ts=ts),
                stepsize_controller=controller,
                max_steps=max_steps,
                throw=False,
            )
            is_good = solution.result == diffrax.RESULTS.successful
            ys = jnp.where(is_good, jax.vmap(at)(solution.ys), jnp.nan)
            return ys, solution.stats["num_steps"]

        self._solve = jax.jit(jax.vmap(solve, (0, axis, None, None, None)))

    def __call__(
        self, x0: Rows, args: Rows | None, ts: Any, rtol: float, ranges: Ranges
    ) -> tuple[Float[np.ndarray, "rows times size"], Any]:
        """Solutions at the given times, and the number of steps of each."""
        with double_precision():
            given = map(in_double, (x0, args, ts, rtol, ranges))
            ys, num_steps = call_afresh(self._solve, *given)
            return np.asarray(ys), np.asarray(num_steps)


def _solve_flops(problem: Problem, is_stiff: bool, num_steps: float) -> float:
    """About: seven stages a step, and for implicit ones three iterations each."""
    size = problem.size
    field = field_flops(problem)
    if not is_stiff:
        return num_steps * 7 * (field + 14 * size)
    return num_steps * (size * field + size**3 + 7 * 3 * (field + 2 * size**2))


def field_flops(problem: Problem) -> float:
    """The floating-point operations of one evaluation of the vector field."""
    vectors = jnp.zeros(problem.size), jnp.zeros(problem.args_size)
    return call_afresh(flops_of, problem.vector_field, jnp.zeros(()), *vectors)


def _are_positive(problem, ts, ys, args, scale, given) -> Bool[np.ndarray, " size"]:
    """Whether an entry that is zero can only rise, and none is ever negative."""
    # Within the tolerance of the solver.
    never_negative = (ys >= -1e-6 * scale).all((0, 1))
    if given is not None:
        given = as_flags(given, problem.size)
        wrong = np.flatnonzero(given & ~never_negative)
        if wrong.size > 0:
            raise ValueError(
                f"Entries {wrong[:5].tolist()} should be positive, but solutions reach "
                f"{ys.min((0, 1))[wrong[:5]].tolist()}. Leave them out of `is_positive`."
            )
        return given
    times = np.linspace(0, len(ts) - 1, 9).astype(int)
    states = ys[:, times].reshape(-1, problem.size)
    states = np.where(never_negative, np.maximum(states, 0), states)
    at = np.tile(ts[times], len(ys))
    conditions = None if args is None else np.repeat(args, len(times), 0)
    result = np.zeros(problem.size, bool)
    for index in np.flatnonzero(never_negative):
        on_edge = states.copy()
        on_edge[:, index] = 0
        rates = problem.rates(at, on_edge, conditions)
        size = np.abs(rates[:, index]).max() + np.abs(scale[index])
        result[index] = (rates[:, index] >= -1e-12 * size).all()
    return result


def _shortest(ts, ys, scale) -> float:
    """The time in which a quarter of the entries go a tenth of their way."""
    way = np.abs(ys - ys[:, :1]) / scale
    way = np.maximum.accumulate(way, axis=1)
    whole = way[:, -1:]
    begun = np.where(whole > 1e-6, way >= 0.1 * whole, False)
    first = np.where(begun.any(1), ts[np.argmax(begun, axis=1)], ts[-1])
    quarter = np.quantile(np.median(first, axis=0), 0.25)
    return float(np.clip(0.3 * quarter, 1e-9 * ts[-1], 1e-2 * ts[-1]))


def _sensitivity(problem, solves, x0, args, ts, ranges, num_rows) -> tuple[float, float]:
    """The largest and the smallest singular value of the Jacobian of the flow.

    All solves are made in one batch of `num_rows`, for which they are compiled already.
    """
    size, scale = PERTURBATION, ranges.scale
    num = min(problem.size, num_rows // 2 - 1)
    directions = np.eye(problem.size)
    if num < problem.size:
        random = np.asarray(jr.normal(jr.key(0), (problem.size, num)))
        directions = np.linalg.qr(random)[0].T
    x0 = x0[: num_rows // (num + 1)]
    # A positive entry that is zero must not become negative.
    towards = np.where(x0[:, None] > 0, -1, 1) * size * scale * directions
    starts = np.concatenate([x0[:, None], x0[:, None] + towards], axis=1)
    starts = starts.reshape(-1, problem.size)
    rows = None if args is None else np.repeat(args[: len(x0)], num + 1, 0)
    index = np.arange(num_rows) % len(starts)
    rows = None if rows is None else rows[index]
    ends, _ = solves(starts[index], rows, ts, TEACHER_RTOL, ranges)
    ends = ends[: len(starts), -1].reshape(len(x0), num + 1, problem.size) / scale
    jacobian = (ends[:, 1:] - ends[:, :1]) / size
    jacobian = jacobian[np.isfinite(jacobian).all((1, 2))]
    if len(jacobian) == 0:
        return float("nan"), float("nan")
    values = np.linalg.svd(jacobian, compute_uv=False)
    return float(np.median(values[:, 0])), float(np.median(values[:, -1]))
