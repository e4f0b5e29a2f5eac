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
    check_stop_gradient,
    stop_gradient_field,
)
from ._teaching import check_velocity, data_residual, own_velocity


def lagrangian_velocity_error(
    flow_map: AbstractFlowMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    stop_gradient: StopGradient,
    jvp: Derivative,
) -> State:
    """The Lagrangian residual, with gradients stopped according to `stop_gradient`."""
    if stop_gradient is StopGradient.NONE:
        return lagrangian_residual(flow_map, teacher, s, t, x, args, jvp=jvp)
    # The state is frozen too, so that the teacher is never differentiated.
    frozen = lambda t, x, args: freeze(teacher(t, freeze(x), args))
    if stop_gradient is StopGradient.TEACHER:
        return lagrangian_residual(flow_map, frozen, s, t, x, args, jvp=jvp)
    # The same residual written as v + (t - s) dv/dt - b. Only the leading v is trained.
    s, t = times_like(x, s, t)
    v_st, dv_dt = end_derivative(flow_map.average_velocity, s, t, x, args, jvp=jvp)
    X_st = add_scaled(x, t - s, v_st)
    b_t = check_like(frozen(t, X_st, args), x, "`teacher`")
    return subtract(v_st, freeze(add_scaled(b_t, s - t, dv_dt)))


class AbstractLagrangian(AbstractResidualObjective):
    """An objective in which the end of a jump follows a velocity."""

    stop_gradient: AbstractVar[StopGradient]
    jvp: AbstractVar[Derivative]

    def __check_init__(self):
        # There is no derivative in space to hold fixed.
        others = StopGradient.NONE, StopGradient.TEACHER, StopGradient.DERIVATIVE
        check_stop_gradient(self.stop_gradient, *others)

    @abc.abstractmethod
    def followed(self, flow_map: AbstractFlowMap, teacher: Any) -> VectorField:
        """The velocity that the end of a jump follows."""

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        followed = self.followed(flow_map, teacher)
        I_s = path.evaluate(s)
        return lagrangian_velocity_error(
            flow_map, followed, s, t, I_s, args, self.stop_gradient, self.jvp
        )


class LagrangianMapDistillation(AbstractLagrangian):
    r"""LMD: the end of a jump must move with the teacher, $|\partial_t X - b_t(X)|^2$.

    Here $X = X_{s,t}(I_s)$. The teacher's value and the state it is evaluated at are held
    fixed, so the loss is quadratic in the map and needs no derivative of the teacher. It
    is zero exactly at the teacher's flow map.

    The states $I_s$ only determine where the map is trained, so any path will do.
    Reparametrising time changes the gradient only by a time-dependent factor. If the
    interpolant also scales space, as the trigonometric one does, this holds only with
    `StopGradient.NONE` or `DERIVATIVE`: the teacher then has a part proportional to the
    state, which `TEACHER` holds fixed.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the teacher's value. With
      `StopGradient.NONE` the gradient is that of the loss as written and flows through
      the teacher.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a velocity `(t, x, args) -> dx/dt`.

    **Raises:** `ValueError` for `StopGradient.TRANSPORT`; when called, `TypeError` if the
    teacher is not a velocity.

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
        # Where s = t, the end derivative is the map's velocity: no derivative is needed.
        del key
        check_velocity(teacher)
        return tangent_residual(flow_map, teacher, t, path.evaluate(t), args)


class VelocityDistillation(AbstractResidualObjective):
    r"""Distillation on the diagonal, $|v_{t,t}(I_t) - b_t(I_t)|^2$.

    This is [`flowdiffrax.LagrangianMapDistillation`][] at $s = t$, without the
    derivative. Add it to a mixture if short jumps matter.

    **Arguments:** `times` and `weight` as there. The teacher is a velocity
    `(t, x, args) -> dx/dt`. Its value does not depend on the map, so there is no gradient
    to stop.
    """

    times: AbstractTimes = Diagonal()
    weight: AbstractWeight = NoWeight()

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del s, key
        check_velocity(teacher)
        return tangent_residual(flow_map, teacher, t, path.evaluate(t), args)


class LagrangianSelfDistillation(AbstractLagrangian):
    r"""LSD: flow matching, and the end of a jump moves with the map's own velocity.

    Off the diagonal, the loss is $|\partial_t X - \mathrm{sg}(v_{t,t}(X))|^2$ with
    $X = X_{s,t}(I_s)$. On the diagonal, it is flow matching, which learns the velocity
    from data. The velocity and the state it is evaluated at are held fixed; gradients
    flow through $\partial_t X$. For reparametrisations of time, see
    [`flowdiffrax.LagrangianMapDistillation`][].

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the teacher's value.
    - `guidance`: a rule that guides the velocity to follow, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][], or `None`.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None` to follow the map's own velocity, or a flow map to follow
    instead, such as a moving average.

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

    The loss is
    $|\partial_t X_{s,t}(I_s) - \mathrm{sg}(v_{t,t}(X))|^2 + |v_{t,t}(I_t) - \dot I_t|^2$.
    In the paper, the velocity in the first term comes from a moving average of the map.
    For reparametrisations of time, see [`flowdiffrax.LagrangianMapDistillation`][].

    **Arguments:**

    - `times`: the distribution of times. By default uniform, with half of the batch on
      the diagonal, where the first term vanishes if the map follows its own unguided
      velocity. For ImageNet latents, the paper uses
      `LogitNormalGap(-0.8, 1.0, end_mean=0.4, end_std=1.0)`.
    - `weight`: maps the sum of both squared errors to the loss.
    - `guidance`: a rule that guides the velocity to follow, or `None`.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a flow map, or `None` to follow the map's own velocity. The paper uses
    a moving average with a decay of 0.99 (`fit(..., teacher_decay=0.99)`).

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
        # Fixed to the paper's choice: the teacher's value is a regression target.
        terminal = lagrangian_velocity_error(
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


def free_flow(
    times: AbstractTimes = StartAt(UniformTriangle(), 0.0),
    weight: AbstractWeight = NoWeight(),
    stop_gradient: StopGradient = StopGradient.DERIVATIVE,
    jvp: Derivative = jax.jvp,
) -> LagrangianMapDistillation:
    r"""FreeFlow: Lagrangian distillation without data, from jumps that start at the base.

    The loss is
    $|v_{0,t}(x_0) - \mathrm{sg}(b_t(X_{0,t}(x_0)) - t\,\partial_t v_{0,t}(x_0))|^2$, the
    Lagrangian equation along the map's own trajectories from draws of the base. The
    residual along these trajectories is enough to bound the sampler's error. The map
    learns $X_{0,t}$ for all $t$: sample it in one jump.

    It differs from [`flowdiffrax.LagrangianMapDistillation`][] in its default settings
    only, and returns one. The paper's correction by an online score model is not
    included. Paths need no data: [`flowdiffrax.data.StateBatches`][].

    **Arguments:**

    - `times`: the distribution of times. By default every jump starts at 0.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default all but the leading $v_{0,t}$.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    **Raises:** `ValueError` for `StopGradient.TRANSPORT`.

    ??? cite "Reference"

        [arXiv:2511.19428](https://arxiv.org/abs/2511.19428).
    """
    return LagrangianMapDistillation(times, weight, stop_gradient, jvp)
