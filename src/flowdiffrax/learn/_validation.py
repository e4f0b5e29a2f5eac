import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._errors import QUANTILES, Jumps, scaled_errors
from ._plan import Plan
from ._pool import Pool
from ._probe import scale_of
from ._problem import Domain

_NUM_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class JumpErrors:
    """The errors of a map at the end of fresh trajectories.

    Errors are relative for positive entries, and in standard deviations of the
    trajectories for the others. For positive entries that vary by less than a tenth of
    their size, they are relative to ten standard deviations. Quantiles are over
    trajectories and entries.

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


class Validation:
    """Compares maps with fresh trajectories, from the start of each.

    Trajectories may have times of their own, filled up with NaN if they are shorter, and
    states that are NaN except at the start: these are not compared.
    """

    def __init__(self, domain: Domain, plan: Plan, fresh: Pool):
        self.fresh, self.scale = fresh, scale_of(fresh.ys)
        self.std = np.maximum(np.nanstd(fresh.ys, (0, 1)), 1e-12 * self.scale)
        self._plan, self._jumps = plan, Jumps(domain)
        self._ts = np.broadcast_to(fresh.ts, fresh.ys.shape[:2])
        self._last = np.isfinite(self._ts).sum(1) - 1

    def errors(
        self, flow_map: Any, num_jumps: int = 1, share: float = 1.0
    ) -> tuple[np.ndarray, int]:
        """Errors in a share of each trajectory, and how many entries are negative."""
        fresh, plan = self.fresh, self._plan
        rows = np.arange(len(fresh.ys))
        index = np.maximum((share * self._last).astype(int), 1)
        times = np.linspace(self._ts[:, 0], self._ts[rows, index], num_jumps + 1)
        ys = self._jumps(flow_map, times, fresh.ys[:, 0], fresh.args)
        exact = fresh.ys[rows, index]
        found = self.measure(ys, exact)[np.isfinite(exact)]
        return found, int((ys < 0)[:, plan.is_positive].sum())

    def measure(self, ys: Any, exact: Any) -> np.ndarray:
        """The errors of states."""
        plan = self._plan
        noise = 0.0 if plan.noise is None else plan.noise
        return scaled_errors(ys, exact, plan.is_positive, self.scale, self.std, noise)

    def by_num_jumps(
        self, flow_map: Any, numbers: Sequence[int]
    ) -> tuple[JumpErrors, ...]:
        """The errors at the end of the trajectories."""
        rows = []
        for num in numbers:
            errors, num_negative = self.errors(flow_map, num)
            median, most, worst = map(float, np.quantile(errors, QUANTILES))
            rows.append(JumpErrors(num, median, most, worst, num_negative))
        return tuple(rows)

    def shown(self, flow_map: Any) -> dict[str, np.ndarray]:
        """Some of the trajectories, with jumps from the start to each of their times."""
        some = slice(0, _NUM_SHOWN)
        fresh, ts = self.fresh, self._ts[some]
        x0 = fresh.ys[some, 0]
        args = None if fresh.args is None else fresh.args[some]
        learned = [x0]
        for now in ts.T[1:]:
            # A trajectory that has ended stays at its start, and is not shown.
            times = np.stack([ts[:, 0], np.where(np.isfinite(now), now, ts[:, 0])])
            ys = self._jumps(flow_map, times, x0, args)
            learned.append(np.where(np.isfinite(now)[:, None], ys, np.nan))
        shown = {"ts": fresh.ts if fresh.ts.ndim == 1 else ts, "exact": fresh.ys[some]}
        return shown | {"learned": np.stack(learned, axis=1)}
