import dataclasses
import time

import numpy as np

from ._errors import scaled_errors
from ._probe import Facts, Solves
from ._problem import Problem
from ._solvers import make_solver

# So many trajectories are enough not to look for a cheaper teacher.
_PLENTY = 4096
_LOOSE = 1e-3
# The median, the 90 % and the 99 % quantile of its errors: a tenth of those that a good
# map has.
_SHARES, _MOST = (0.5, 0.9, 0.99), (1e-4, 1e-3, 1e-2)


def cheaper_teacher(
    problem: Problem, facts: Facts, num: int, seconds: float, only_solver: bool
) -> Facts:
    """Takes a looser tolerance where exact trajectories would be too few.

    A map of an expensive system learns more from many trajectories with errors of a few
    tenths of a percent at most than from a few hundred exact ones. A method of order 3
    can be the faster one there.

    **Arguments:**

    - `num`: how many trajectories there can be at most.
    - `seconds`: the time for trajectories.
    - `only_solver`: whether to keep the solver.
    """
    if facts.solve_seconds * min(_PLENTY, num) < seconds:
        return facts
    solvers = [facts.solves]
    if facts.is_stiff and not only_solver:
        solvers.append(Solves(problem, make_solver("Kvaerno3")))
    best = facts
    for solves in solvers:
        given = facts.ys[:, 0], facts.args, facts.ts
        solves(*given, _LOOSE, facts.ranges)  # compiles
        begin = time.perf_counter()
        ys, num_steps = solves(*given, _LOOSE, facts.ranges)
        each = (time.perf_counter() - begin) / len(ys)
        as_rows = lambda ys: ys.reshape(-1, problem.size)
        scales = facts.is_positive, facts.scale, facts.std
        errors = scaled_errors(as_rows(ys), as_rows(facts.ys), *scales)
        is_exact = (np.quantile(errors, _SHARES) <= _MOST).all()
        if is_exact and each < best.solve_seconds:
            best = dataclasses.replace(
                facts,
                solves=solves,
                rtol=_LOOSE,
                num_steps=float(num_steps.mean()),
                solve_seconds=each,
            )
    return best
