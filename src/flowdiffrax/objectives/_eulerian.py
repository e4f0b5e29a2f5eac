import abc
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike

from .._derivative import Derivative
from .._time import times_like
from .._tree import add_scaled, freeze, subtract
from .._types import AbstractVar, Args, State, Time
from ..flow_maps._base import AbstractFlowMap
from ..identities import transport_derivative
from ..times._base import AbstractTimes
from ..times._mixtures import DiagonalMixture
from ..times._uniform import UniformTriangle
from ..velocities._guidance import GuidanceRule
from ..weights._base import AbstractWeight, NoWeight
from ._base import (
    AbstractResidualObjective,
    StopGradient,
    check_stop_gradient,
    stop_gradient_field,
)
from ._teaching import data_residual, own_velocity, teacher_velocity


def eulerian_velocity_error(
    flow_map: AbstractFlowMap,
    s: Time,
    t: Time,
    x: State,
    w: State,
    args: Args,
    stop_gradient: StopGradient,
    jvp: Derivative,
    tangent_scale: ArrayLike,
) -> State:
    """The Eulerian residual along `w`, with gradients stopped as in `stop_gradient`.

    `tangent_scale` multiplies the derivative of the average velocity. It applies to
    `StopGradient.DERIVATIVE` only.
    """
    # In self-distillation `w` is a value of the trained map.
    if stop_gradient is not StopGradient.NONE:
        w = freeze(w)
    if stop_gradient in (StopGradient.NONE, StopGradient.TEACHER):
        _, error = transport_derivative(flow_map, s, t, x, w, args, jvp=jvp)
        return error
    s, t = times_like(x, s, t)
    if stop_gradient is StopGradient.TRANSPORT:
        # In `s` alone: a joint direction would carry a zero tangent through the network.
        _, dX_ds = jvp(lambda s: flow_map(s, t, x, args), (s,), (jnp.ones_like(s),))
        # Frozen before it is differentiated, so that no second derivative is formed.
        _, transported = jvp(lambda x: freeze(flow_map)(s, t, x, args), (x,), (w,))
        return jtu.tree_map(jnp.add, dX_ds, freeze(transported))
    # The same residual written as w + (t - s) Dv - v. Only the leading v is trained.
    v_st, dv = transport_derivative(flow_map.average_velocity, s, t, x, w, args, jvp=jvp)
    (r,) = times_like(x, tangent_scale)
    return subtract(freeze(add_scaled(w, r * (t - s), dv)), v_st)


class AbstractEulerian(AbstractResidualObjective):
    """An objective that moves the start of a jump along a direction."""

    stop_gradient: AbstractVar[StopGradient]
    jvp: AbstractVar[Derivative]
    # Objectives that warm it up override it with a field.
    tangent_scale = 1.0

    @abc.abstractmethod
    def direction(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        s: Time,
        I_s: State,
        args: Args,
    ) -> State:
        """The velocity of the start, with the structure of `I_s`."""

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        I_s = path.evaluate(s)
        w = self.direction(flow_map, teacher, path, s, I_s, args)
        return eulerian_velocity_error(
            flow_map,
            s,
            t,
            I_s,
            w,
            args,
            self.stop_gradient,
            self.jvp,
            self.tangent_scale,
        )

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        # Where s = t, no derivative is left. The sign differs, which a norm ignores.
        del key
        I_t = path.evaluate(t)
        w = freeze(self.direction(flow_map, teacher, path, t, I_t, args))
        return subtract(flow_map.velocity(t, I_t, args), w)


class EulerianMapDistillation(AbstractEulerian):
    r"""EMD: moving the start along the teacher must not move the end.

    The loss is $|\partial_s X_{s,t}(I_s) + \nabla X_{s,t}(I_s)\,b_s(I_s)|^2$. The
    residual is linear in the map and zero exactly at the teacher's flow map. By default,
    the gradient flows through the derivative in space, which is noisy for large networks.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the teacher's value only.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is a velocity `(t, x, args) -> dx/dt`.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), section 3.
    """

    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TEACHER)
    jvp: Derivative = jax.jvp

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map, path
        return teacher_velocity(teacher, s, I_s, args)


class StopGradientEulerian(AbstractEulerian):
    r"""EE: the Eulerian equation along the data, with the derivative in space held fixed.

    The loss is $|\partial_s X + \mathrm{sg}(\nabla X\,\dot I_s)|^2$ with
    $X = X_{s,t}(I_s)$. Given $I_s$, the rate $\dot I_s$ equals the velocity only on
    average. Because the rate enters the gradient linearly, the mean gradient is the one
    along the velocity itself, so the map is learned from data alone. At $s = t$ the loss
    is flow matching. The reported loss includes a variance and does not measure the
    error.

    The gradient depends on the coordinates. If all states are scaled or shifted with
    time, by another interpolant or because the means of data and base differ, the part of
    the derivative in space that describes this motion is held fixed too, which changes
    the gradient. Centre the data, or use `StopGradient.DERIVATIVE`, whose gradient
    changes only by a time-dependent factor.

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the derivative in space. If less is
      held fixed, the gradient is biased: see [`flowdiffrax.objectives.NaiveEulerian`][].
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is not used.

    **Raises:** `ValueError` if `stop_gradient` would bias the gradient.

    ??? cite "Reference"

        Consistency training in [arXiv:2505.18825](https://arxiv.org/abs/2505.18825),
        for two times.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TRANSPORT)
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        # Along the data, gradients through the derivative in space are biased.
        unbiased = StopGradient.TRANSPORT, StopGradient.DERIVATIVE
        check_stop_gradient(self.stop_gradient, *unbiased)

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map, teacher, I_s, args
        return path.derivative(s)


class NaiveEulerian(AbstractEulerian):
    r"""The Eulerian equation along the data with no gradient stopped. **Biased.**

    This class only demonstrates the bias; do not train with it. On average over
    $\dot I_s$, the loss $|\partial_s X_{s,t}(I_s) + \nabla X_{s,t}(I_s)\,\dot I_s|^2$
    exceeds the one along the velocity by
    $\mathrm{tr}(\nabla X\,\mathrm{Cov}(\dot I_s | I_s)\,\nabla X^T)$, which favours maps
    that contract. Between two standard normals in one dimension, the best linear
    $X_{0,1}$ has a slope of 0.389 instead of 1.

    **Arguments:** as for [`flowdiffrax.objectives.StopGradientEulerian`][], except
    `stop_gradient`, which is always `StopGradient.NONE`.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = eqx.field(
        static=True, default=StopGradient.NONE, init=False
    )
    jvp: Derivative = jax.jvp

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map, teacher, I_s, args
        return path.derivative(s)


class EulerianSelfDistillation(AbstractEulerian):
    r"""ESD: flow matching, and the start of a jump moves along the map's own velocity.

    Off the diagonal, the loss is $|\partial_s X + \mathrm{sg}(\nabla X\,v_{s,s}(I_s))|^2$
    with $X = X_{s,t}(I_s)$. On the diagonal, it is flow matching, which learns the
    velocity from data. For reparametrisations of time, see
    [`flowdiffrax.objectives.StopGradientEulerian`][].

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the velocity and the derivative in
      space.
    - `guidance`: a rule that guides the velocity to follow, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][], or `None`.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None` to follow the map's own velocity, or a flow map to follow
    instead, such as a moving average.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TRANSPORT)
    guidance: GuidanceRule | None = None
    jvp: Derivative = jax.jvp

    needs_diagonal = True

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del path
        return own_velocity(flow_map, teacher, self.guidance)(s, I_s, args)

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        return data_residual(flow_map, path, t, args)
