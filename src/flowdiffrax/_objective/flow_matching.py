from typing import Any

import diffrax
from jaxtyping import Array, Key

from .._custom_types import Args, Scalar, Time
from .._flow_map import AbstractFlowMap
from .._misc import squared_norm, subtract
from .._times import AbstractTimes, Diagonal
from .base import AbstractObjective
from .weight import AbstractWeight, NoWeight


class FlowMatching(AbstractObjective):
    r"""Learns the velocity from data: $|v_{t,t}(I_t) - \dot I_t|^2$.

    It trains the diagonal of a map, which then is a teacher. There is no teacher and no
    stop-gradient. Its least value is the variance of $\dot I_t$ given $I_t$, not zero.

    **Arguments:**

    - `times`: the law of times, of which the end time is used.
    - `weight`: what is made of the squared error.

    ??? cite "Reference"

        [arXiv:2210.02747](https://arxiv.org/abs/2210.02747), equation (5);
        [arXiv:2303.08797](https://arxiv.org/abs/2303.08797), equation (2.13).
    """

    times: AbstractTimes = Diagonal()
    weight: AbstractWeight = NoWeight()

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
        error = subtract(flow_map.velocity(t, I_t, args), dI_t)
        return self.weight(s, t, squared_norm(error))
