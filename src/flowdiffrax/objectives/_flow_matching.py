from typing import Any

import diffrax
import jax
from jaxtyping import Array, Key

from .._derivative import Derivative
from .._tree import squared_norm, subtract
from .._types import Args, Scalar, State, Time
from ..flow_maps._base import AbstractFlowMap
from ..identities import end_derivative
from ..times._base import AbstractTimes
from ..times._uniform import Diagonal, UniformSquare
from ..weights._base import AbstractWeight, NoWeight
from ._base import AbstractObjective, AbstractResidualObjective
from ._teaching import data_residual


class FlowMatching(AbstractResidualObjective):
    r"""Learns the velocity from data: $|v_{t,t}(I_t) - \dot I_t|^2$.

    It trains the diagonal of a map, whose velocity can then serve as a teacher. It uses
    no teacher itself and holds nothing fixed. Its minimum is the variance of $\dot I_t$
    given $I_t$, not zero.

    **Arguments:**

    - `times`: the distribution of times. Only the end time is used.
    - `weight`: maps the squared error to the loss.

    ??? cite "Reference"

        [arXiv:2210.02747](https://arxiv.org/abs/2210.02747), equation (5);
        [arXiv:2303.08797](https://arxiv.org/abs/2303.08797), equation (2.13).
    """

    times: AbstractTimes = Diagonal()
    weight: AbstractWeight = NoWeight()

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, s, key
        return data_residual(flow_map, path, t, args)


class FlowMapMatching(AbstractObjective):
    r"""FMM: learns the map from data alone, through its own inverse.

    The loss is $|\partial_t X_{s,t}(y) - \dot I_t|^2 + \lambda\,|X_{s,t}(y) - I_t|^2$
    with $y = X_{t,s}(I_t)$, where $\partial_t$ acts on the outer map only. Because $y$ is
    $I_t$ pulled back to time $s$, the rate $\dot I_t$ is an unbiased sample of the
    velocity at the end of the jump, which the Lagrangian equation needs. Gradients flow
    through both maps.

    The first term includes the variance of $\dot I_t$ given $I_t$, so the minimum is not
    zero. Long jumps are hard to learn directly: first train on $|t - s| \le 1/K$
    (`UniformSquare(max_gap=1 / K)`), then continue with
    [`flowdiffrax.objectives.ProgressiveFlowMapMatching`][].

    **Arguments:**

    - `times`: the distribution of times. It must draw both directions of time.
    - `weight`: maps the sum of both squared errors to the loss.
    - `inverse_weight`: the factor $\lambda$ of the round trip, in units of one over time
      squared. If time is rescaled, the same factor weights the round trip differently.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is not used.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), proposition 3.11.
    """

    times: AbstractTimes = UniformSquare()
    weight: AbstractWeight = NoWeight()
    inverse_weight: float = 1.0
    jvp: Derivative = jax.jvp

    def __call__(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        s: Time,
        t: Time,
        args: Args = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Scalar:
        del teacher, key
        I_t, dI_t = path.evaluate(t), path.derivative(t)
        # Not held fixed: the round trip below trains the inverse as well.
        y = flow_map(t, s, I_t, args)
        X_st, dX_dt = end_derivative(flow_map, s, t, y, args, jvp=self.jvp)
        rate_error = squared_norm(subtract(dX_dt, dI_t))
        round_trip = squared_norm(subtract(X_st, I_t))
        return self.weight(s, t, rate_error + self.inverse_weight * round_trip)
