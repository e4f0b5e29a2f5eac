import abc
from collections.abc import Callable
from typing import Any

import diffrax
import jax
from jaxtyping import Array, Key

from .._check import check_like
from .._derivative import Derivative
from .._time import times_like
from .._tree import add_scaled, freeze, squared_norm, subtract
from .._types import AbstractVar, Args, Scalar, State, Time, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..identities import end_derivative, lagrangian_residual, tangent_residual
from ..times._base import AbstractTimes
from ..times._changes import StartAt
from ..times._mixtures import DiagonalMixture
from ..times._uniform import Diagonal, UniformTriangle
from ..weights._base import AbstractWeight, NoWeight
from ._base import (
    AbstractObjective,
    AbstractResidualObjective,
    StopGradient,
    stop_gradient_field,
)
from ._teaching import check_velocity, data_residual, own_velocity


def lagrangian_error(
    flow_map: AbstractFlowMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    stop_gradient: StopGradient,
    jvp: Derivative,
) -> State:
    """The Lagrangian residual, with gradients as `stop_gradient` says."""
    if stop_gradient is StopGradient.NONE:
        return lagrangian_residual(flow_map, teacher, s, t, x, args, jvp=jvp)
    frozen = lambda t, x, args: freeze(teacher(t, freeze(x), args))
    if stop_gradient is StopGradient.TEACHER:
        return lagrangian_residual(flow_map, frozen, s, t, x, args, jvp=jvp)
    # The residual as v + (t - s) dv/dt - b, of which only the leading v is trained.
    s, t = times_like(x, s, t)
    v_st, dv_dt = end_derivative(flow_map.average_velocity, s, t, x, args, jvp=jvp)
    X_st = add_scaled(x, t - s, v_st)
    b_t = check_like(frozen(t, X_st, args), x, "`teacher`")
    return subtract(v_st, freeze(add_scaled(b_t, s - t, dv_dt)))


class AbstractLagrangian(AbstractResidualObjective):
    """An objective in which the end of a jump follows some velocity."""

    stop_gradient: AbstractVar[StopGradient]
    jvp: AbstractVar[Derivative]

    def __check_init__(self):
        if self.stop_gradient is StopGradient.TRANSPORT:
            raise ValueError(
                "A Lagrangian objective has no derivative in space to stop: use "
                "`StopGradient.TEACHER` or `StopGradient.DERIVATIVE`."
            )

    @abc.abstractmethod
    def followed(self, flow_map: AbstractFlowMap, teacher: Any) -> VectorField:
        """The velocity that the end follows."""

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        followed = self.followed(flow_map, teacher)
        I_s = path.evaluate(s)
        return lagrangian_error(
            flow_map, followed, s, t, I_s, args, self.stop_gradient, self.jvp
        )


class LagrangianMapDistillation(AbstractLagrangian):
    r"""LMD: the map's end must move with the teacher, $|\partial_t X - b_t(X)|^2$.

    With $X = X_{s,t}(I_s)$. The teacher's value is held fixed, and with it the state it
    is evaluated at, so that the loss is quadratic in the map and no derivative of the
    teacher is needed. Zero exactly at the teacher's flow map.

    The states $I_s$ only say where the map is to be right; any path will do. On another
    clock the gradient is the same up to a factor in time. Under an interpolant that
    scales space too, as the trigonometric one, it is so with `StopGradient.NONE` or
    `DERIVATIVE` only: the teacher then has a part proportional to the state, which is
    held fixed.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed: by default the teacher's value; with
      `StopGradient.NONE` the gradient is that of the loss as written, through the
      teacher.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a velocity `(t, x, args) -> dx/dt`.

    **Raises:** `ValueError` for `StopGradient.TRANSPORT`; when it is called, `TypeError`
    if the teacher is no velocity.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), equation (3.1); the
        stop-gradient as in [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TEACHER)
    jvp: Derivative = jax.jvp

    def followed(self, flow_map, teacher) -> VectorField:
        del flow_map
        check_velocity(teacher)
        return teacher

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del key
        check_velocity(teacher)
        return tangent_residual(flow_map, teacher, t, path.evaluate(t), args)


class VelocityDistillation(AbstractResidualObjective):
    r"""The diagonal of any distillation, $|v_{t,t}(I_t) - b_t(I_t)|^2$.

    What [`flowdiffrax.LagrangianMapDistillation`][] is at $s = t$, without the
    derivative. Mix it in where short jumps matter.

    **Arguments:** as there. The teacher is a velocity `(t, x, args) -> dx/dt`; its value
    does not depend on the map, and so there is no gradient to stop.
    """

    times: AbstractTimes = Diagonal()
    weight: AbstractWeight = NoWeight()

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del s, key
        check_velocity(teacher)
        return tangent_residual(flow_map, teacher, t, path.evaluate(t), args)


class LagrangianSelfDistillation(AbstractLagrangian):
    r"""LSD: flow matching, and the map's end moves with the map's own velocity.

    Off the diagonal $|\partial_t X - \mathrm{sg}(v_{t,t}(X))|^2$ with
    $X = X_{s,t}(I_s)$, and on it flow matching, which supplies the velocity from data.
    The velocity is held fixed, and so is the state it is evaluated at; gradients flow
    through $\partial_t X$. For changes of the clock see
    [`flowdiffrax.LagrangianMapDistillation`][].

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed; the teacher by default.
    - `guidance`: a rule for the velocity that is followed, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][]; `None` for none.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None`, for the map as it is, or a flow map whose diagonal is
    followed instead, such as a moving average.

    **Raises:** `ValueError` for `StopGradient.TRANSPORT`.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TEACHER)
    guidance: Callable | None = None
    jvp: Derivative = jax.jvp

    needs_diagonal = True

    def followed(self, flow_map, teacher) -> VectorField:
        return own_velocity(flow_map, teacher, self.guidance)

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        return data_residual(flow_map, path, t, args)


class TerminalVelocityMatching(AbstractObjective):
    r"""TVM: both parts of Lagrangian self-distillation on every example.

    $|\partial_t X_{s,t}(I_s) - \mathrm{sg}(v_{t,t}(X))|^2 + |v_{t,t}(I_t) - \dot I_t|^2$,
    the velocity of the first term by a moving average of the map. For changes of the
    clock see [`flowdiffrax.LagrangianMapDistillation`][].

    **Arguments:**

    - `times`: the distribution of times: uniform, half of it on the diagonal, where the
      first term vanishes. The paper's, for latents of ImageNet, is
      `LogitNormalGap(-0.8, 1.0, end_mean=0.4, end_std=1.0)`.
    - `weight`: maps the sum of both squared errors to the loss.
    - `guidance`: a rule for the velocity that is followed; `None` for none.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a flow map, the moving average with a decay of 0.99 in the paper
    (`fit(..., teacher_decay=0.99)`), or `None` for the map as it is.

    ??? cite "Reference"

        [arXiv:2511.19797](https://arxiv.org/abs/2511.19797).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5)
    weight: AbstractWeight = NoWeight()
    guidance: Callable | None = None
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
        del key
        followed = own_velocity(flow_map, teacher, self.guidance)
        terminal = lagrangian_error(
            flow_map,
            followed,
            s,
            t,
            path.evaluate(s),
            args,
            StopGradient.TEACHER,
            self.jvp,
        )
        matching = data_residual(flow_map, path, t, args)
        return self.weight(s, t, squared_norm(terminal) + squared_norm(matching))


class FreeFlow(AbstractLagrangian):
    r"""Distillation without data: jumps from the base only.

    $|v_{0,t}(x_0) - \mathrm{sg}(b_t(X_{0,t}(x_0)) - t\,\partial_t v_{0,t}(x_0))|^2$, the
    Lagrangian equation along the map's own trajectories from draws of the base. A bound
    on the sampler's error needs the residual there and nowhere else. The map learns
    $X_{0,t}$ for all $t$: sample it in one jump.

    The correction of the paper by an online score model is not part of it.

    **Arguments:**

    - `times`: the distribution of times; every jump starts at 0.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed; all but the leading $v_{0,t}$ by default.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a velocity `(t, x, args) -> dx/dt`. Paths need no data:
    [`flowdiffrax.data.StateBatches`][].

    **Raises:** `ValueError` for `StopGradient.TRANSPORT`.

    ??? cite "Reference"

        [arXiv:2511.19428](https://arxiv.org/abs/2511.19428).
    """

    times: AbstractTimes = StartAt(UniformTriangle(), 0.0)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.DERIVATIVE)
    jvp: Derivative = jax.jvp

    def followed(self, flow_map, teacher) -> VectorField:
        del flow_map
        check_velocity(teacher)
        return teacher
