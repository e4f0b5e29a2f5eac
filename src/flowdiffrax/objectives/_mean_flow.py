from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._derivative import Derivative
from .._time import times_like
from .._tree import add_scaled, freeze, subtract
from .._types import State
from ..identities import transport_derivative
from ..times._base import AbstractTimes
from ..times._mixtures import DiagonalMixture
from ..times._uniform import UniformTriangle
from ..weights._base import AbstractWeight, NoWeight
from ._base import AbstractResidualObjective, StopGradient, stop_gradient_field
from ._eulerian import AbstractEulerian
from ._teaching import data_direction, own_map, teacher_velocity
from ._two_piece import check_share, eulerian_quotient


class MeanFlow(AbstractEulerian):
    r"""MeanFlow: $|v_{s,t}(I_s) - \mathrm{sg}(\dot I_s + (t - s)\,D v_{s,t}(I_s))|^2$.

    $D = \partial_s + \dot I_s \cdot \nabla$. The Eulerian equation along the data with
    every derivative held fixed: the average velocity is regressed on what the equation
    says it is. One forward-mode pass, and nothing is differentiated twice. The loss
    keeps a variance and need not fall.

    On the papers' clock, with data at time 0, $v_{s,t}$ is $-u(z_{1-s}, 1-t, 1-s)$.

    **Arguments:**

    - `times`: the distribution of times: uniform, half of it on the diagonal. The
      paper's for latents of ImageNet hardly ever draws a long jump: on our clock
      `DiagonalMixture(LogitNormal(0.4, 1.0), 0.75, Diagonal(LogitNormal(0.4, 1.0),
      start=True))`.
    - `weight`: maps the squared error to the loss. The paper's is
      `PowerWeight(1.0, 1e-2)`, for data with a spread of about 1. In few dimensions it
      moves the minimiser: see [`flowdiffrax.weights.PowerWeight`][].
    - `guidance`: a rule for the direction, [`flowdiffrax.velocities.MeanFlowGuidance`][];
      `None` for none.
    - `stop_gradient`: what is held fixed, every derivative by default.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None`, to learn from data, or a velocity `(t, x, args) -> dx/dt`,
    which then takes the place of $\dot I_s$.

    **Raises:** when it is called, `ValueError` for a teacher and `guidance` together.

    ??? cite "Reference"

        [arXiv:2505.13447](https://arxiv.org/abs/2505.13447), algorithm 1.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5)
    weight: AbstractWeight = NoWeight()
    guidance: Callable | None = None
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.DERIVATIVE)
    jvp: Derivative = jax.jvp

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        if teacher is not None:
            if self.guidance is not None:
                raise ValueError(
                    "`guidance` is for what learns from data; a teacher came too. Guide "
                    "the teacher instead: `GuidedVelocity(teacher, rule)`."
                )
            return teacher_velocity(teacher, s, I_s, args)
        return data_direction(flow_map, path, s, args, self.guidance)


class ImprovedMeanFlow(AbstractResidualObjective):
    r"""iMF: $|v_{s,t}(I_s) - (t - s)\,\mathrm{sg}(D v_{s,t}(I_s)) - \dot I_s|^2$.

    $D = \partial_s + v_{s,s}(I_s) \cdot \nabla$, along the map's own velocity. A
    regression on $\dot I_s$ of what the map says of the velocity. The noise of
    $\dot I_s$ no longer runs through the derivative, and the loss falls as the map gets
    better, down to the variance of flow matching. Under an interpolant that scales space
    too, both parts of the error get factors of their own in time.

    **Arguments:**

    - `times`: the distribution of times: uniform, half of it on the diagonal. The
      paper's, and its weight, are as for [`flowdiffrax.objectives.MeanFlow`][], with a
      share of 0.5.
    - `weight`: maps the squared error to the loss.
    - `guidance`: a rule for the regression target,
      [`flowdiffrax.velocities.MeanFlowGuidance`][]; `None` for none.
    - `stop_gradient`: `StopGradient.DERIVATIVE` holds the derivative fixed, as the paper
      does to save time; with `StopGradient.TEACHER` only its direction is.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None`, for the map's own velocity as the direction, or a flow map
    whose diagonal is taken instead, such as a moving average.

    **Raises:** `ValueError` for another `stop_gradient`.

    ??? cite "Reference"

        Improved mean flows, [arXiv:2512.02012](https://arxiv.org/abs/2512.02012).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5)
    weight: AbstractWeight = NoWeight()
    guidance: Callable | None = None
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.DERIVATIVE)
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        if self.stop_gradient not in (StopGradient.TEACHER, StopGradient.DERIVATIVE):
            raise ValueError(
                "`stop_gradient` must be `StopGradient.TEACHER` or `DERIVATIVE`; got "
                f"{self.stop_gradient}."
            )

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
        v_ss = add_scaled(v_st, s - t, dv)
        return subtract(v_ss, data_direction(flow_map, path, s, args, self.guidance))

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        v_tt = flow_map.velocity(t, path.evaluate(t), args)
        return subtract(v_tt, data_direction(flow_map, path, t, args, self.guidance))


class AlphaFlow(AbstractResidualObjective):
    r"""AlphaFlow: MeanFlow by a difference quotient, from flow matching on.

    $\tfrac1a |v_{s,t}(I_s) - \mathrm{sg}(a\,\dot I_s + (1 - a)\, v_{u,t}(I_s + (u - s)
    \dot I_s))|^2$ with $u = s + a (t - s)$: a short step along the data, then the map. No
    derivative of the map is taken. At $a = 1$ every jump learns the velocity; as $a$
    falls, the loss and its gradient go to those of [`flowdiffrax.objectives.MeanFlow`][]
    with the same weight. To that end the reported error is the one above over $a$ once
    more, which the gradient is not. That is what `weight` sees: the paper's adaptive
    weight $a / (e + c)$ would be $1 / (e / a^2 + c)$ here. At small $a$ its floor is
    lower, and rows off the diagonal weigh more, as those of MeanFlow do. The step is a
    share of the jump in time: at large $a$, the gradient depends on the clock.

    **Arguments:**

    - `times`: the distribution of times: uniform, a quarter of it on the diagonal. The
      paper's are as for [`flowdiffrax.objectives.MeanFlow`][], with a share of 0.25.
    - `weight`: maps the squared error to the loss. The paper's is
      `PowerWeight(1.0, 1e-3)`, for data with a spread of about 1.
    - `alpha`: the share $a$ of the step in (0, 1]. The paper lowers it from 1 to 0.005
      along training: [`flowdiffrax.objectives.Scheduled`][] with
      [`flowdiffrax.objectives.sigmoid_schedule`][]. Below 0.005, float32 rounding shows;
      in bfloat16, far above.
    - `guidance`: a rule for the direction, [`flowdiffrax.velocities.MeanFlowGuidance`][];
      `None` for none.

    The teacher is not used.

    **Raises:** `ValueError` for an `alpha` outside (0, 1].

    ??? cite "Reference"

        [arXiv:2510.20771](https://arxiv.org/abs/2510.20771).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.25)
    weight: AbstractWeight = NoWeight()
    alpha: ArrayLike = 5e-3
    guidance: Callable | None = None

    def __check_init__(self):
        check_share("alpha", self.alpha)

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, key
        I_s = path.evaluate(s)
        w = data_direction(flow_map, path, s, args, self.guidance)
        return eulerian_quotient(flow_map, s, t, I_s, w, self.alpha, args)

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        v_tt = flow_map.velocity(t, path.evaluate(t), args)
        return subtract(v_tt, data_direction(flow_map, path, t, args, self.guidance))


def sigmoid_schedule(
    num_steps: int, temperature: float = 25.0, low: float = 5e-3
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    r"""From 1 down to `low` along a sigmoid: the schedule of AlphaFlow's step.

    **Arguments:**

    - `num_steps`: over how many steps; the middle of the fall is at half of them.
    - `temperature`: the steepness; 25 in the paper.
    - `low`: the value below which it does not fall.

    **Returns:** a function of the step's number.
    """

    def schedule(step):
        progress = jnp.asarray(step, float) / num_steps
        return jnp.maximum(jax.nn.sigmoid(temperature * (0.5 - progress)), low)

    return schedule
