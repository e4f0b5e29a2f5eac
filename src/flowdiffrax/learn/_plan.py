import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from .._check import check_count, check_positive
from ..flow_maps._conserve_linear import find_linear_invariants
from ._probe import Facts
from ._problem import Domain, Problem

FORMS = "relaxation", "residual"
# Widths and depths of networks, from about 10 to 700 kFLOP a jump.
NETWORKS = (32, 3), (64, 3), (128, 4), (256, 4)
# Trajectories per pool, and numbers: more are worth it where they cost little.
_LARGEST_POOL, _MOST_NUMBERS = 32_768, 2**26


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that [`flowdiffrax.learn_solver`][] chooses before it trains.

    Printing it shows each choice with its reason.

    **Attributes:**

    - `solver`: the name of the Diffrax solver whose trajectories are learned.
    - `is_stiff`: whether that solver is an implicit one.
    - `rtol`: its relative tolerance.
    - `ts`: the times at which trajectories are saved.
    - `form`: `"relaxation"` for a [`flowdiffrax.flow_maps.RelaxationFlowMap`][], or
      `"residual"` for a [`flowdiffrax.FlowMap`][].
    - `is_autonomous`: whether the map depends on the lengths of jumps only.
    - `is_positive`: which entries stay positive.
    - `invariants`: linear combinations of the entries that are conserved.
    - `width`, `depth`: the width and the number of hidden layers of the network.
    - `pool_size`: the largest number of trajectories to learn from.
    - `batch_size`: the number of pairs of states in each training step.
    - `num_steps`: the number of training steps; `None` for as many as time allows.
    - `both_directions`: whether backward jumps are learned as well.
    - `args_size`: the number of parameters that vary.
    - `is_vector`: whether the user's states and `args` are vectors already.
    - `minutes`: the time for everything.
    - `reasons`: why each of these was chosen.
    - `noise`: the standard deviation of the errors of observations, for each entry;
      `None` if states are exact.

    From observations alone there is no solver, and `solver` and `rtol` are `None`.
    """

    solver: str | None
    is_stiff: bool
    rtol: float | None
    ts: Float[np.ndarray, " times"]
    form: str
    is_autonomous: bool
    is_positive: Bool[np.ndarray, " size"]
    invariants: Float[np.ndarray, "invariants size"]
    width: int
    depth: int
    pool_size: int
    batch_size: int
    num_steps: int | None
    both_directions: bool
    args_size: int
    is_vector: bool
    minutes: float
    reasons: dict[str, str]
    noise: Float[np.ndarray, " size"] | None = None

    @property
    def size(self) -> int:
        """The number of entries of the state."""
        return len(self.is_positive)

    @property
    def _teacher(self) -> str:
        return f"{self.solver}, rtol {self.rtol:g}"

    def to_json(self) -> dict[str, Any]:
        """All of it as numbers, strings and lists."""
        as_plain = lambda value: (
            value.tolist() if isinstance(value, np.ndarray) else value
        )
        return {name: as_plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Reads what `to_json` returned."""
        is_positive = np.asarray(values["is_positive"], bool)
        # No invariants are an empty list, without their second axis.
        matrix = np.asarray(values["invariants"], float).reshape(-1, len(is_positive))
        arrays: dict[str, Any] = {"is_positive": is_positive, "invariants": matrix}
        if values["noise"] is not None:
            arrays["noise"] = np.asarray(values["noise"], float)
        return cls(**{**values, **arrays, "ts": np.asarray(values["ts"], float)})

    def __str__(self) -> str:
        shown = {} if self.solver is None else {"solver": self._teacher}
        shown |= {
            "times": f"{len(self.ts)}, first gap {self.ts[1] - self.ts[0]:.3g}",
            "form": self.form,
            "is_autonomous": str(self.is_autonomous),
            "is_positive": f"{self.is_positive.sum()} of {len(self.is_positive)} entries",
            "invariants": f"{len(self.invariants)}",
            "network": f"{self.depth} hidden layers of {self.width}",
            "pool_size": f"up to {self.pool_size:,}",
            "batch_size": f"{self.batch_size:,}",
            "num_steps": f"{self.num_steps or 'as many as time allows'}",
        }
        if self.noise is not None:
            shown["noise"] = f"up to {self.noise.max():.3g}"
        rows = [
            (name, value, self.reasons.get(name, "")) for name, value in shown.items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(
            f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip()
            for name, value, reason in rows
        )


def make_plan(problem: Problem, facts: Facts, minutes: float, given: dict) -> Plan:
    """Chooses everything that is not given.

    **Raises:** `ValueError` for a form that does not exist or does not go backwards, or
    times that do not rise from `t0` to `t1`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    check_positive(minutes, "minutes")
    for name in ("width", "depth", "pool_size", "batch_size", "num_steps"):
        if name in given:
            check_count(given[name], 1, name)
    chosen, reasons = {}, {}

    def choose(name: str, value: Any, reason: str) -> None:
        chosen[name] = given.get(name, value)
        reasons[name] = "given" if name in given else reason

    solver = type(facts.solves.solver).__name__
    steps = f"{facts.num_steps:.0f} steps, {1e3 * facts.solve_seconds:.2g} ms a solve"
    choose("solver", solver, f"{'stiff' if facts.is_stiff else 'not stiff'}: {steps}")
    choose("is_stiff", facts.is_stiff, "")
    choose("rtol", facts.rtol, "")
    ts, reason = _times(problem, facts)
    choose("ts", ts, reason)
    reasons["times"] = reasons["ts"]
    both = given.get("both_directions", False)
    choose("both_directions", False, "")
    reason = "backward jumps" if both else "forward jumps, also over many time scales"
    choose("form", "residual" if both else "relaxation", reason)
    reason = "the field does not use the time" if facts.is_autonomous else "it does"
    choose("is_autonomous", facts.is_autonomous, reason)
    choose("is_positive", facts.is_positive, "an entry at zero can only rise")
    choose("invariants", _invariants(problem, facts), "found from the rates")
    # A network much larger than a solve could not be faster, and is hardly more exact.
    # The largest one learns too few steps in minutes to be more exact.
    by_size = int(np.searchsorted([0, 6], problem.size))
    level = max(by_size, 2 if facts.solve_flops > 1e5 else 1)
    width, depth = NETWORKS[level]
    reason = f"{problem.size} entries; a solve has {facts.solve_flops / 1e3:.3g} kFLOP"
    choose("width", width, reason)
    choose("depth", depth, reason)
    reasons["network"] = reasons["width"]
    most = _MOST_NUMBERS // (problem.size * len(chosen["ts"]))
    pool_size = max(min(_LARGEST_POOL, most), 256)
    choose("pool_size", pool_size, "or as many as a third of the time allows")
    choose("batch_size", 512, "")
    choose("num_steps", None, f"{minutes:g} minutes for everything")
    check_choices(problem, chosen)
    chosen["ts"] = np.asarray(chosen["ts"], np.float64)
    chosen["invariants"] = np.asarray(chosen["invariants"], np.float64)
    # Those that were found hold for the rates themselves.
    if "invariants" in given:
        check_conserved(chosen["invariants"], facts.ys, 0.01)
    chosen |= {"args_size": problem.args_size, "is_vector": problem.is_vector}
    return Plan(**chosen, minutes=minutes, reasons=reasons)


def _times(problem: Problem, facts: Facts) -> tuple[Any, str]:
    span = problem.t1 - problem.t0
    if facts.is_stiff:
        least = facts.shortest / span
        steps = np.geomspace(least, 1, 40)
        return problem.t0 + span * np.append(0, steps), "log-uniform: many time scales"
    return np.linspace(problem.t0, problem.t1, 33), "uniform"


def _invariants(problem: Problem, facts: Facts) -> Float[np.ndarray, "invariants size"]:
    """Linear invariants, from rates at states that are scattered around solutions."""
    none = np.zeros((0, problem.size))
    if problem.size > 128:
        return none
    rng = np.random.default_rng(0)
    num = 4 * problem.size + 64
    start = rng.integers(len(facts.ys), size=num)
    states = facts.ys[start, rng.integers(len(facts.ts), size=num)]
    # Every entry on its own, so that nothing but the field itself ties them together.
    states = np.abs(states) * rng.uniform(0.3, 3.0, states.shape) * np.sign(states)
    states = states + 0.01 * rng.uniform(0, 1, states.shape) * facts.scale
    args = None if facts.args is None else facts.args[start]
    rates = problem.rates(rng.uniform(problem.t0, problem.t1, num), states, args)
    rates = rates[np.isfinite(rates).all(1)]
    if len(rates) < 2 * problem.size:
        return none
    return find_linear_invariants(rates)


def check_choices(domain: Domain, chosen: dict) -> None:
    """**Raises:** `ValueError` for choices that do not fit together."""
    form = chosen["form"]
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS}; got {form!r}.")
    if form == "relaxation" and chosen["both_directions"]:
        raise ValueError(
            "The relaxation form is for forward jumps: backwards, its states would grow "
            'exponentially. Use `form="residual"`, or leave out `both_directions`.'
        )
    ts = np.asarray(chosen["ts"], np.float64)
    good = ts.ndim == 1 and len(ts) >= 2 and bool((np.diff(ts) > 0).all())
    if not good or (ts[0], ts[-1]) != (domain.t0, domain.t1):
        raise ValueError(
            f"`ts` must be times that rise from `t0` = {domain.t0:g} to "
            f"`t1` = {domain.t1:g}; got {ts}."
        )
    matrix = np.shape(chosen["invariants"])
    if len(matrix) != 2 or matrix[1] != domain.size:
        raise ValueError(
            f"`invariants` must have shape (invariants, {domain.size}), a column for "
            f"each entry of the state; got {matrix}."
        )


def check_conserved(
    matrix: Float[np.ndarray, "invariants size"],
    ys: Float[np.ndarray, "rows times size"],
    share: float,
) -> None:
    """**Raises:** `ValueError` for invariants that change along known trajectories.

    They may change by a `share` of what their entries change by. States with a NaN do not
    count.
    """
    known = np.all(np.isfinite(ys), axis=2)
    mean = np.mean(ys, 1, where=known[..., None], keepdims=True)
    away = (ys - mean)[known]
    changes = np.sqrt(np.mean((away @ matrix.T) ** 2, axis=0))
    most = np.abs(matrix) @ np.sqrt(np.mean(away**2, axis=0))
    # The solver's errors, and rounding.
    floor = 1e-6 * np.abs(matrix) @ np.abs(ys[known]).max(0)
    wrong = np.flatnonzero(changes > share * most + floor)
    if wrong.size > 0:
        index = wrong[0]
        raise ValueError(
            f"`invariants[{index}]` is not conserved: along trajectories, it changes by "
            f"{changes[index] / most[index]:.2g} of what its entries change by. Leave it "
            f"out; for none, pass `numpy.zeros((0, {matrix.shape[1]}))`."
        )
