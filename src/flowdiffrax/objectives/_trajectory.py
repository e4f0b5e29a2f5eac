from collections.abc import Callable

import equinox as eqx

from .._check import check_bools, check_callable
from .._tree import subtract
from .._types import Scalar, State
from ..paths._base import InterpolantPath
from ..paths._trajectory import StatePath, TrajectoryPath
from ..times._base import AbstractTimes
from ..times._uniform import UniformTriangle
from ..weights._base import AbstractWeight
from ..weights._gaps import InverseGap
from ._base import AbstractResidualObjective


class TrajectoryMatching(AbstractResidualObjective):
    r"""Regression on exact trajectories, $|X_{s,t}(x_s) - x_t|^2 / (t - s)^2$.

    The path is a solution of the ODE itself, and $x_s$ and $x_t$ are two points on it.
    There is no teacher, no derivative and no stop-gradient, and the target never moves.
    The loss is zero exactly at the flow map. If trajectories are available, this is the
    natural first stage of training.

    **Arguments:**

    - `times`: the distribution of times. For trajectories saved on a grid, use
      [`flowdiffrax.times.GridTimes`][], so that nothing is interpolated.
    - `weight`: maps the squared error of the states to the loss. The default turns it
      into the squared error of average velocities.
    - `positions`: whether `times` draws positions along each trajectory's own saved
      times, from 0 for the first to 1 for the last, rounded to the nearest saved time.
      Use it if trajectories do not share their times. For pairs of end points, use
      `TrajectoryMatching(GridTimes([0.0, 1.0]), positions=True)`.
    - `difference`: a function `(x, y)` of the map's state and the trajectory's, whose
      squared norm is the error. For relative errors of positive entries, use the
      `difference` of [`flowdiffrax.nn.LogUnits`][].

    The teacher is not used. Paths come from [`flowdiffrax.solve_trajectories`][].

    **Raises:** when called, `TypeError` if the path is not a trajectory.

    ??? cite "Reference"

        As mid-training, [arXiv:2509.24526](https://arxiv.org/abs/2509.24526).
    """

    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = InverseGap()
    positions: bool = eqx.field(static=True, default=False)
    difference: Callable[[State, State], State] = subtract

    def __check_init__(self):
        check_callable(self.difference, "difference", "difference(x, y)")
        check_bools(positions=self.positions)

    def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None) -> Scalar:
        if not self.positions:
            return super().__call__(flow_map, teacher, path, s, t, args, key=key)
        path = as_trajectory(path, self)
        x_s, x_t = path.saved_state(s), path.saved_state(t)
        # Converted before the weight, which needs the gap in time.
        s, t = path.saved_time(s), path.saved_time(t)
        error = self.difference(flow_map(s, t, x_s, args), x_t)
        return self._weighted(s, t, error)

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, key
        # These paths give states as well, but they do not solve the ODE.
        if isinstance(path, InterpolantPath | StatePath):
            raise _wrong_path(path, self)
        x_s, x_t = path.evaluate(s), path.evaluate(t)
        return self.difference(flow_map(s, t, x_s, args), x_t)


def as_trajectory(path: object, objective: object) -> TrajectoryPath:
    """Returns the path. **Raises:** `TypeError` if it is not a saved trajectory."""
    if not isinstance(path, TrajectoryPath):
        raise _wrong_path(path, objective)
    return path


def _wrong_path(path: object, objective: object) -> TypeError:
    return TypeError(
        f"`{type(objective).__name__}` learns from trajectories of the ODE; got a "
        f"{type(path).__name__}. Use `solve_trajectories` and "
        "`data.TrajectoryBatches`."
    )
