import equinox as eqx
import jax
from jaxtyping import ArrayLike

from .._check import check_between
from .._derivative import Derivative
from .._types import State, VectorField
from ..identities import tangent_residual
from ..times._base import AbstractTimes
from ..times._logit_normal import LogitNormalGap
from ..weights._base import AbstractWeight, NoWeight
from ._base import StopGradient
from ._eulerian import AbstractEulerian
from ._lagrangian import AbstractLagrangian
from ._teaching import check_velocity, teacher_velocity
from ._two_piece import eulerian_quotient, lagrangian_quotient


class AlignYourFlowEMD(AbstractEulerian):
    r"""AYF-EMD: the Eulerian equation with everything but $v_{s,t}$ held fixed.

    The loss is $|v - \mathrm{sg}(v - g)|^2$ with $v = v_{s,t}(I_s)$, $b = b_s(I_s)$ and
    the tangent $g = v - b - r\,(t - s)(\partial_s + b \cdot \nabla) v$. With a finite
    $\epsilon$, the tangent is a difference quotient instead: the first share $\epsilon$
    of the jump follows the teacher.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps $|g|^2$ to the loss. The paper uses
      [`flowdiffrax.weights.NormalisedTangent`][], for data of a known scale.
    - `tangent_scale`: the factor $r$. Values below 1 slightly favour straight
      trajectories. The paper raises it from 0 to 0.99: use
      [`flowdiffrax.objectives.Scheduled`][] with a linear schedule. Which trajectories
      are straight depends on how time is parametrised. Used only if `epsilon` is `None`.
    - `epsilon`: the share of the first piece, in (0, 1], or `None` for the limit
      $\epsilon \to 0$. At 0.005 and below, float32 rounding errors show.
    - `jvp`: how the derivative is taken if `epsilon` is `None`.

    The teacher is a velocity `(t, x, args) -> dx/dt`. For autoguidance, use
    [`flowdiffrax.velocities.AutoguidedVelocity`][].

    **Raises:** `ValueError` for an `epsilon` outside (0, 1].

    ??? cite "Reference"

        [arXiv:2506.14603](https://arxiv.org/abs/2506.14603).
    """

    times: AbstractTimes = LogitNormalGap(-0.6, 1.6)
    weight: AbstractWeight = NoWeight()
    tangent_scale: ArrayLike = 0.99
    epsilon: float | None = None
    # Not a setting: the method trains the leading velocity only.
    stop_gradient: StopGradient = eqx.field(
        static=True, default=StopGradient.DERIVATIVE, init=False
    )
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        check_between(self.epsilon, 0, 1, "epsilon", "(]", or_none=True)

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map, path
        return teacher_velocity(teacher, s, I_s, args)

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        # Decided when the step is traced, since `None` is part of the structure.
        if self.epsilon is None:
            return super().residual(flow_map, teacher, path, s, t, args, key)
        I_s = path.evaluate(s)
        w = self.direction(flow_map, teacher, path, s, I_s, args)
        return eulerian_quotient(flow_map, s, t, I_s, w, self.epsilon, args)


class AlignYourFlowLMD(AbstractLagrangian):
    r"""AYF-LMD: the Lagrangian equation with everything but $v_{s,t}$ held fixed.

    The loss is $|v - \mathrm{sg}(v - g)|^2$ with the tangent
    $g = \partial_t X_{s,t}(I_s) - b_t(X_{s,t}(I_s))$. With a finite $\epsilon$, the
    tangent is a difference quotient instead: the last share $\epsilon$ of the jump
    follows the teacher. No derivative is taken then.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps $|g|^2$ to the loss. The paper uses
      [`flowdiffrax.weights.NormalisedTangent`][], for data of a known scale.
    - `epsilon`: the share of the last piece, in (0, 1], or `None` for the limit
      $\epsilon \to 0$. At 0.005 and below, float32 rounding errors show.
    - `jvp`: how the derivative is taken if `epsilon` is `None`.

    The teacher is a velocity `(t, x, args) -> dx/dt`. For autoguidance, use
    [`flowdiffrax.velocities.AutoguidedVelocity`][].

    **Raises:** `ValueError` for an `epsilon` outside (0, 1].

    ??? cite "Reference"

        [arXiv:2506.14603](https://arxiv.org/abs/2506.14603).
    """

    times: AbstractTimes = LogitNormalGap(-0.6, 1.6)
    weight: AbstractWeight = NoWeight()
    epsilon: float | None = None
    stop_gradient: StopGradient = eqx.field(
        static=True, default=StopGradient.DERIVATIVE, init=False
    )
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        check_between(self.epsilon, 0, 1, "epsilon", "(]", or_none=True)

    def followed(self, flow_map, teacher) -> VectorField:
        del flow_map
        check_velocity(teacher)
        return teacher

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        if self.epsilon is None:
            return super().residual(flow_map, teacher, path, s, t, args, key)
        followed, I_s = self.followed(flow_map, teacher), path.evaluate(s)
        return lagrangian_quotient(flow_map, followed, s, t, I_s, self.epsilon, args)

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        # Where s = t, limit and quotient agree, and neither needs a derivative.
        del key
        followed = self.followed(flow_map, teacher)
        return tangent_residual(flow_map, followed, t, path.evaluate(t), args)
