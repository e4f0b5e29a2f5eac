from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._check import check_between
from .._derivative import Derivative
from .._time import times_like
from .._tree import add_scaled, freeze, subtract
from .._types import State
from ..identities import transport_derivative
from ..times._base import AbstractTimes
from ..times._mixtures import DiagonalMixture
from ..times._uniform import UniformTriangle
from ..weights._base import AbstractWeight, NoWeight
from ._base import (
    AbstractResidualObjective,
    StopGradient,
    check_stop_gradient,
    stop_gradient_field,
)
from ._eulerian import AbstractEulerian
from ._teaching import data_direction, own_map, teacher_velocity
from ._two_piece import eulerian_quotient


class MeanFlow(AbstractEulerian):
    r"""MeanFlow: $|v_{s,t}(I_s) - \mathrm{sg}(\dot I_s + (t - s)\,D v_{s,t}(I_s))|^2$.

    Here $D = \partial_s + \dot I_s \cdot \nabla$. This is the Eulerian equation along the
    data with every derivative held fixed: the equation gives the regression target of the
    average velocity. It takes one forward-mode pass, and nothing is differentiated twice.
    The loss includes a variance and need not fall.

    In the papers, where data are at time 0, $v_{s,t}$ is $-u(z_{1-s}, 1-t, 1-s)$.

    **Arguments:**

    - `times`: the distribution of times. By default uniform, with half of the batch on
      the diagonal. The paper's distribution for ImageNet latents rarely draws a long
      jump. In our convention it is `DiagonalMixture(LogitNormal(0.4, 1.0), 0.75,
      Diagonal(LogitNormal(0.4, 1.0), start=True))`.
    - `weight`: maps the squared error to the loss. The paper uses
      `PowerWeight(1.0, 1e-2)`, for data with a spread of about 1. In few dimensions it
      moves the minimiser: see [`flowdiffrax.weights.PowerWeight`][].
    - `guidance`: a rule that guides the direction,
      [`flowdiffrax.velocities.MeanFlowGuidance`][], or `None`.
    - `stop_gradient`: what is held fixed, by default every derivative.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None` to learn from data, or a velocity `(t, x, args) -> dx/dt` to use
    instead of $\dot I_s$.

    **Raises:** when called, `ValueError` if both a teacher and `guidance` are given.

    ??? cite "Reference"

        [arXiv:2505.13447](https://arxiv.org/abs/2505.13447), algorithm 1.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5)
    weight: AbstractWeight = NoWeight()
    guidance: Callable | None = None
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.DERIVATIVE)
    jvp: Derivative = jax.jvp

    has_dropout_off_diagonal = True

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        if teacher is not None:
            if self.guidance is not None:
                raise ValueError(
                    "`guidance` applies to learning from data, but a teacher was given. "
                    "Guide the teacher instead: `GuidedVelocity(teacher, rule)`."
                )
            return teacher_velocity(teacher, s, I_s, args)
        return data_direction(flow_map, path, s, args, self.guidance)


class ImprovedMeanFlow(AbstractResidualObjective):
    r"""iMF: $|v_{s,t}(I_s) - (t - s)\,\mathrm{sg}(D v_{s,t}(I_s)) - \dot I_s|^2$.

    Here $D = \partial_s + v_{s,s}(I_s) \cdot \nabla$ is the derivative along the map's
    own velocity. The map's estimate of the velocity is regressed on $\dot I_s$. The noise
    of $\dot I_s$ does not pass through the derivative, so the loss falls as the map
    improves, down to the variance of flow matching. If the interpolant also scales space,
    the two parts of the error get different time-dependent factors.

    **Arguments:**

    - `times`: the distribution of times. By default uniform, with half of the batch on
      the diagonal. The paper's distribution and weight are as for
      [`flowdiffrax.objectives.MeanFlow`][], with a share of 0.5.
    - `weight`: maps the squared error to the loss.
    - `guidance`: a rule that guides the regression target,
      [`flowdiffrax.velocities.MeanFlowGuidance`][], or `None`.
    - `stop_gradient`: `StopGradient.DERIVATIVE` holds the derivative fixed, as the paper
      does to save time; `StopGradient.TEACHER` holds only its direction fixed.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None` to use the map's own velocity as the direction, or a flow map
    to use instead, such as a moving average.

    **Raises:** `ValueError` for any other `stop_gradient`.

    ??? cite "Reference"

        Improved mean flows, [arXiv:2512.02012](https://arxiv.org/abs/2512.02012).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5)
    weight: AbstractWeight = NoWeight()
    guidance: Callable | None = None
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.DERIVATIVE)
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        allowed = StopGradient.TEACHER, StopGradient.DERIVATIVE
        check_stop_gradient(self.stop_gradient, *allowed)

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        I_s = path.evaluate(s)
        s, t = times_like(I_s, s, t)
        w = own_map(flow_map, teacher).velocity(s, I_s, args)
        v_st, dv = transport_derivative(
            flow_map.average_velocity, s, t, I_s, freeze(w), args, jvp=self.jvp
        )
        if self.stop_gradient is StopGradient.DERIVATIVE:
            dv = freeze(dv)
        # The map's estimate of the velocity, by the Eulerian equation.
        v_ss = add_scaled(v_st, s - t, dv)
        return subtract(v_ss, data_direction(flow_map, path, s, args, self.guidance))

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        v_tt = flow_map.velocity(t, path.evaluate(t), args)
        return subtract(v_tt, data_direction(flow_map, path, t, args, self.guidance))


class AlphaFlow(AbstractResidualObjective):
    r"""AlphaFlow: MeanFlow as a difference quotient, starting from flow matching.

    The loss is $\tfrac1a |v_{s,t}(I_s) - \mathrm{sg}(a\,\dot I_s + (1 - a)\,
    v_{u,t}(I_s + (u - s) \dot I_s))|^2$ with $u = s + a (t - s)$: a short step along the
    data, then the map. No derivative of the map is taken. At $a = 1$ every jump learns
    the velocity. As $a$ falls, the loss and its gradient converge to those of
    [`flowdiffrax.objectives.MeanFlow`][] with the same weight.

    For this limit, the reported error is the expression above divided by $a$ once more;
    the gradient is not. `weight` receives the reported error, so the paper's adaptive
    weight $a / (e + c)$ would be $1 / (e / a^2 + c)$ here. At small $a$ its floor is
    lower here, and rows off the diagonal weigh more, as those of MeanFlow do. The step is
    a share of the jump in time, so at large $a$ the gradient depends on how time is
    parametrised.

    **Arguments:**

    - `times`: the distribution of times. By default uniform, with a quarter of the batch
      on the diagonal. The paper's distribution is as for
      [`flowdiffrax.objectives.MeanFlow`][], with a share of 0.25.
    - `weight`: maps the squared error to the loss. The paper uses
      `PowerWeight(1.0, 1e-3)`, for data with a spread of about 1.
    - `alpha`: the share $a$ of the step, in (0, 1]. The paper lowers it from 1 to 0.005
      during training: use [`flowdiffrax.objectives.Scheduled`][] with
      [`flowdiffrax.objectives.sigmoid_schedule`][]. Below 0.005, float32 rounding errors
      show; in bfloat16 they show at much larger values.
    - `guidance`: a rule that guides the direction,
      [`flowdiffrax.velocities.MeanFlowGuidance`][], or `None`.

    The teacher is not used.

    **Raises:** `ValueError` for an `alpha` outside (0, 1].

    ??? cite "Reference"

        [arXiv:2510.20771](https://arxiv.org/abs/2510.20771). The consistency loss of
        SoFlow, [arXiv:2512.15657](https://arxiv.org/abs/2512.15657), is this loss too, up
        to its weight, with an `alpha` that falls during training.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.25)
    weight: AbstractWeight = NoWeight()
    alpha: ArrayLike = 5e-3
    guidance: Callable | None = None

    def __check_init__(self):
        check_between(self.alpha, 0, 1, "alpha", "(]")

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, key
        I_s = path.evaluate(s)
        w = data_direction(flow_map, path, s, args, self.guidance)
        return eulerian_quotient(flow_map, s, t, I_s, w, self.alpha, args)

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        # Where s = t, the quotient is this for every `alpha`, with more rounding.
        del teacher, key
        v_tt = flow_map.velocity(t, path.evaluate(t), args)
        return subtract(v_tt, data_direction(flow_map, path, t, args, self.guidance))


def sigmoid_schedule(
    num_steps: int, temperature: float = 25.0, low: float = 5e-3
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    r"""A schedule for `AlphaFlow`'s step that falls from 1 to `low` along a sigmoid.

    **Arguments:**

    - `num_steps`: the number of steps it covers. The sigmoid is centred at half of them.
    - `temperature`: the steepness, 25 in the paper.
    - `low`: the lower bound of the schedule.

    **Returns:** a function of the step number.
    """

    def schedule(step):
        progress = jnp.asarray(step, float) / num_steps
        return jnp.maximum(jax.nn.sigmoid(temperature * (0.5 - progress)), low)

    return schedule
