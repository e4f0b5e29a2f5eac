import diffrax
import equinox as eqx
import jax
from jaxtyping import ArrayLike

from .._derivative import Derivative
from .._time import times_like
from .._tree import freeze, subtract
from .._types import Args, State, Time, VectorField
from ..paths._trajectory import StatePath
from ..times._base import AbstractTimes
from ..times._changes import EndAt
from ..times._karras import KarrasNeighbours
from ..times._uniform import UniformSquare
from ..weights._base import AbstractWeight, NoWeight
from ..weights._gaps import InverseNoiseGap
from ._base import AbstractResidualObjective, StopGradient
from ._eulerian import AbstractEulerian
from ._teaching import data_neighbour, own_map, teacher_velocity


class ConsistencyTraining(AbstractResidualObjective):
    r"""CT: two neighbouring points of a path must have the same end point.

    The loss is $|X_{s,1}(I_s) - \mathrm{sg}(X_{u,1}(I_u))|^2 / (\sigma_s - \sigma_u)$,
    where $u$ is the next time on a grid, $\sigma$ the noise level, and $I_u$ on the same
    path. Only jumps to the end are learned. At the data end, the target is the data point
    itself; all other targets depend on this one. Finer grids have less bias and more
    variance. On a [`flowdiffrax.paths.PlugInPath`][], $I_u$ is a step from $I_s$ along
    the plug-in velocity: this approaches consistency distillation as the batch grows.

    **Arguments:**

    - `times`: the distribution of pairs of neighbouring times, $s$ and $u$. To refine the
      grid during training, as the papers do, see
      [`flowdiffrax.times.KarrasNeighbours`][].
    - `weight`: maps the squared error to the loss, given $s$ and $u$. The default is for
      the linear interpolant; for another one, use `InverseNoiseGap(interpolant)`. The
      metric of iCT on images, `WeightChain((PseudoHuber(c), InverseNoiseGap()))`, moves
      the minimiser in few dimensions: see [`flowdiffrax.weights.PseudoHuber`][].
    - `end`: the end time of all jumps.

    The teacher is `None` to take the target from the map itself, or a flow map to take it
    from, such as a moving average.

    ??? cite "Reference"

        [arXiv:2303.01469](https://arxiv.org/abs/2303.01469), algorithm 3, with the 150
        intervals that its grid grows to; weight of
        [arXiv:2310.14189](https://arxiv.org/abs/2310.14189).
    """

    times: AbstractTimes = KarrasNeighbours(151)
    weight: AbstractWeight = InverseNoiseGap()
    end: float = 1.0

    has_dropout_off_diagonal = True

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        if isinstance(path, StatePath):
            # Raises `TypeError`: a single state is not a path of the data.
            path.derivative(s)
        I_u = data_neighbour(path, s, t)
        target = own_map(flow_map, teacher)(t, self.end, I_u, args)
        X_s1 = flow_map(s, self.end, path.evaluate(s), args)
        return subtract(X_s1, freeze(target))


class ConsistencyDistillation(AbstractResidualObjective):
    r"""CD: a point and the teacher's next point must have the same end point.

    The loss is $|X_{s,1}(I_s) - \mathrm{sg}(X_{u,1}(\Phi_{s,u}(I_s)))|^2$, where $\Phi$
    is one step of a Diffrax solver with the teacher, to the next time $u$ on a grid. The
    error of this step depends on how time is parametrised.

    **Arguments:**

    - `times`: the distribution of pairs of neighbouring times, $s$ and $u$.
    - `weight`: maps the squared error to the loss, given $s$ and $u$.
    - `solver`: the explicit Diffrax solver that takes the step.
    - `end`: the end time of all jumps.

    The teacher is a velocity `(t, x, args) -> dx/dt`. The target comes from the trained
    map itself.

    ??? cite "Reference"

        [arXiv:2303.01469](https://arxiv.org/abs/2303.01469), algorithm 2.
    """

    times: AbstractTimes = KarrasNeighbours(19)
    weight: AbstractWeight = NoWeight()
    solver: diffrax.AbstractSolver = diffrax.Heun()
    end: float = 1.0

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        I_s = path.evaluate(s)
        s, t = times_like(I_s, s, t)
        velocity = lambda t, x, args: teacher_velocity(teacher, t, x, args)
        x_u = _solver_step(self.solver, velocity, s, t, I_s, args)
        # The paper takes the target from a moving average of the map.
        target = flow_map(t, self.end, x_u, args)
        return subtract(flow_map(s, self.end, I_s, args), freeze(target))


class ContinuousConsistency(AbstractEulerian):
    r"""sCM: consistency in the limit of a fine grid.

    The loss is $|v - \mathrm{sg}(v - g)|^2$ with $v = v_{s,1}(I_s)$ and the tangent
    $g = v - w - r\,(1 - s)(\partial_s + w \cdot \nabla) v_{s,1}(I_s)$. This is the
    Eulerian equation for jumps to the end, with every derivative held fixed. With a
    teacher (sCD), $w$ is its velocity; without one (sCT), $w$ is the rate of the data.

    The paper uses the trigonometric interpolant and a network $F$ with
    $X = \cos(\tau) x - \sin(\tau) \sigma F$. Here any interpolant and any map will do;
    the losses differ by a time-dependent factor.

    **Arguments:**

    - `times`: the distribution of times, all with the same end time. By default the
      starts are uniform. The paper's noise levels, which suit images, are
      `EndAt(LogitNormal(1.0, 1.4, sort=False), 1.0)` if the standard deviation is 1 for
      the base and 0.5 for the data.
    - `weight`: maps $|g|^2$ to the loss. The paper uses
      [`flowdiffrax.weights.NormalisedTangent`][], for data of a known scale, with
      [`flowdiffrax.weights.LearnedWeight`][]: see [`flowdiffrax.weights.WeightChain`][].
    - `tangent_scale`: the factor $r$. The paper raises it from 0 to 1 over the first
      steps: use [`flowdiffrax.objectives.Scheduled`][] with a linear schedule.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None` to learn from data, or a velocity `(t, x, args) -> dx/dt`.

    ??? cite "Reference"

        [arXiv:2410.11081](https://arxiv.org/abs/2410.11081).
    """

    times: AbstractTimes = EndAt(UniformSquare(), 1.0)
    weight: AbstractWeight = NoWeight()
    tangent_scale: ArrayLike = 1.0
    # Not a setting: the method trains the leading velocity only.
    stop_gradient: StopGradient = eqx.field(
        static=True, default=StopGradient.DERIVATIVE, init=False
    )
    jvp: Derivative = jax.jvp

    has_dropout_off_diagonal = True

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map
        if teacher is None:
            return path.derivative(s)
        return teacher_velocity(teacher, s, I_s, args)


def _solver_step(
    solver: diffrax.AbstractSolver,
    teacher: VectorField,
    s: Time,
    u: Time,
    x: State,
    args: Args,
) -> State:
    # A single step needs neither the loop nor the adjoint of `diffeqsolve`.
    term = diffrax.ODETerm(teacher)
    solver_state = solver.init(term, s, u, x, args)
    x_u, *_ = solver.step(term, s, u, x, args, solver_state, made_jump=False)
    return x_u
