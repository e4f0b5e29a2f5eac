from .._custom_types import State
from .._interpolant import InterpolantPath
from .._misc import subtract
from .._times import AbstractTimes, UniformTriangle
from .._trajectory import StatePath
from .base import AbstractResidualObjective
from .weight import AbstractWeight, InverseGap


class TrajectoryMatching(AbstractResidualObjective):
    r"""Regression on exact trajectories, $|X_{s,t}(x_s) - x_t|^2 / (t - s)^2$.

    The path is a solution of the ODE itself, $x_s$ and $x_t$ two points of it: no
    teacher, no derivative, no stop-gradient, a target that never moves. Zero exactly at
    the flow map. It is the natural first stage wherever trajectories can be had.

    **Arguments:**

    - `times`: the law of times. For trajectories saved on a grid,
      [`flowdiffrax.GridTimes`][], so that nothing is interpolated.
    - `weight`: what is made of the squared error of the states; the default makes it
      the squared error of average velocities.

    The teacher is not used. Paths come from [`flowdiffrax.solve_trajectories`][].

    ??? cite "Reference"

        As mid-training, [arXiv:2509.24526](https://arxiv.org/abs/2509.24526).
    """

    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = InverseGap()

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, key
        if isinstance(path, InterpolantPath | StatePath):
            raise TypeError(
                "`TrajectoryMatching` learns from trajectories of the ODE; got a "
                f"{type(path).__name__}. Use `solve_trajectories` and "
                "`data.TrajectoryBatches`."
            )
        x_s, x_t = path.evaluate(s), path.evaluate(t)
        return subtract(flow_map(s, t, x_s, args), x_t)
