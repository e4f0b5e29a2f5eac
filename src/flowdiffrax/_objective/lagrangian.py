from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Key

from .._custom_types import Args, Scalar, Time
from .._flow_map import AbstractFlowMap
from .._identities import lagrangian_residual, tangent_residual
from .._misc import check_callable, squared_norm
from .._times import AbstractTimes, Diagonal, UniformTriangle
from .base import AbstractObjective, freeze
from .weight import AbstractWeight, NoWeight


class LagrangianMapDistillation(AbstractObjective):
    r"""LMD: the map's end must move with the teacher, $|\partial_t X - b_t(X)|^2$.

    With $X = X_{s,t}(I_s)$. The teacher's value is held fixed, and with it the state it
    is evaluated at, so that the loss is quadratic in the map and no derivative of the
    teacher is needed. Zero exactly at the teacher's flow map.

    The states $I_s$ only say where the map is to be right; any path will do.

    **Arguments:**

    - `times`: the law of times.
    - `weight`: what is made of the squared error.
    - `stop_gradient`: whether the teacher's value is held fixed. If not, the gradient is
      that of the loss as written, through the teacher.

    The teacher is a velocity `(t, x, args) -> dx/dt`.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), equation (3.1); the
        stop-gradient as in [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = NoWeight()
    stop_gradient: bool = eqx.field(static=True, default=True)

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
        check_callable(teacher, "teacher", "teacher(t, x, args)")
        frozen = lambda t, x, args: freeze(teacher(t, freeze(x), args))
        followed = frozen if self.stop_gradient else teacher
        I_s = path.evaluate(s)
        residual = lagrangian_residual(flow_map, followed, s, t, I_s, args)
        return self.weight(s, t, squared_norm(residual))


class VelocityDistillation(AbstractObjective):
    r"""The diagonal of Lagrangian distillation, $|v_{t,t}(I_t) - b_t(I_t)|^2$.

    What [`flowdiffrax.LagrangianMapDistillation`][] is at $s = t$, without the
    derivative. Mix it in where short jumps matter.

    **Arguments:** as there. The teacher is a velocity `(t, x, args) -> dx/dt`; its value
    does not depend on the map, and so there is no gradient to stop.
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
        del key
        check_callable(teacher, "teacher", "teacher(t, x, args)")
        residual = tangent_residual(flow_map, teacher, t, path.evaluate(t), args)
        return self.weight(s, t, squared_norm(residual))
