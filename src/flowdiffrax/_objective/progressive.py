from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Key

from .._custom_types import Args, Scalar, Time
from .._flow_map import AbstractFlowMap, ComposedFlowMap
from .._misc import squared_norm, subtract
from .._times import AbstractTimes, UniformTriangle
from .base import AbstractObjective, freeze
from .weight import AbstractWeight, NoWeight


class ProgressiveFlowMapMatching(AbstractObjective):
    r"""PFMM: one jump must equal `num_jumps` jumps of a frozen teacher map.

    $|X_{s,t}(I_s) - \bar X_{t_{K-1},t} \circ \dots \circ \bar X_{s,t_1}(I_s)|^2$, the
    whole composition held fixed. No derivative of any map is taken.

    Train on $|t - s| \le \tau$, `UniformTriangle(max_gap=...)`, where the teacher's jumps
    of length $\tau / K$ are good; then make the student the teacher, and $\tau$ longer.

    **Arguments:**

    - `num_jumps`: the number of teacher jumps $K$, at least 2. (The paper counts the
      $K + 1$ times instead.)
    - `times`: the law of times.
    - `weight`: what is made of the squared error. With
      [`flowdiffrax.InverseGap`][] the loss compares velocities.

    The teacher is a map `(s, t, x, args) -> x_t`, for example the student of the stage
    before or a [`flowdiffrax.ODEFlowMap`][]; with `None`, the trained map itself.

    **Raises:** `ValueError` if `num_jumps` is below 2.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), section 3.3.
    """

    num_jumps: int = eqx.field(static=True, default=2)
    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = NoWeight()

    def __check_init__(self):
        if self.num_jumps < 2:
            raise ValueError(f"`num_jumps` must be at least 2; got {self.num_jumps}.")

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
        del key
        frozen = freeze(flow_map if teacher is None else teacher)
        I_s = path.evaluate(s)
        target = freeze(ComposedFlowMap(frozen, self.num_jumps)(s, t, I_s, args))
        error = subtract(flow_map(s, t, I_s, args), target)
        return self.weight(s, t, squared_norm(error))
