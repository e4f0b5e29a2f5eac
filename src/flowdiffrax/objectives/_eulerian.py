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
from ._base import AbstractResidualObjective, StopGradient, stop_gradient_field
from ._teaching import data_residual, own_velocity, teacher_velocity


def eulerian_error(
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
    """The Eulerian residual along `w`, with gradients as `stop_gradient` says.

    `tangent_scale` multiplies the derivative of the average velocity, and is for
    `StopGradient.DERIVATIVE` only.
    """
    if stop_gradient is not StopGradient.NONE:
        w = freeze(w)
    if stop_gradient in (StopGradient.NONE, StopGradient.TEACHER):
        _, error = transport_derivative(flow_map, s, t, x, w, args, jvp=jvp)
        return error
    s, t = times_like(x, s, t)
    if stop_gradient is StopGradient.TRANSPORT:
        # Not along a zero in space, which would be carried through the network.
        _, dX_ds = jvp(lambda s: flow_map(s, t, x, args), (s,), (jnp.ones_like(s),))
        _, transported = jvp(lambda x: freeze(flow_map)(s, t, x, args), (x,), (w,))
        return jtu.tree_map(jnp.add, dX_ds, freeze(transported))
    # The residual as w + (t - s) Dv - v, of which only the leading v is trained.
    v_st, dv = transport_derivative(flow_map.average_velocity, s, t, x, w, args, jvp=jvp)
    (r,) = times_like(x, tangent_scale)
    return subtract(freeze(add_scaled(w, r * (t - s), dv)), v_st)


class AbstractEulerian(AbstractResidualObjective):
    """An objective that slides the start of a jump along some direction."""

    stop_gradient: AbstractVar[StopGradient]
    jvp: AbstractVar[Derivative]
    # A field where a method warms it up.
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
        """The velocity of the start, like `I_s`."""

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        I_s = path.evaluate(s)
        w = self.direction(flow_map, teacher, path, s, I_s, args)
        return eulerian_error(
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
        del key
        I_t = path.evaluate(t)
        w = freeze(self.direction(flow_map, teacher, path, t, I_t, args))
        return subtract(flow_map.velocity(t, I_t, args), w)


class EulerianMapDistillation(AbstractEulerian):
    r"""EMD: sliding the start along the teacher must not move the end.

    $|\partial_s X_{s,t}(I_s) + \nabla X_{s,t}(I_s)\,b_s(I_s)|^2$. It is linear in the map
    under the square, and zero exactly at the teacher's flow map. As written, the
    gradient runs through the derivative in space, which is noisy for large networks.

    **Arguments:**

    - `times`: the distribution of times.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed; the teacher only, by default.
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

    $|\partial_s X + \mathrm{sg}(\nabla X\,\dot I_s)|^2$ with $X = X_{s,t}(I_s)$. Given
    $I_s$, the rate $\dot I_s$ is the velocity only on average. Because it enters the
    gradient linearly, the gradient is that along the velocity itself, on average: the
    map is learned from data alone. At $s = t$ it is flow matching. The reported loss
    keeps a variance, and is no measure of the error. Where all states are scaled or moved
    along with time, by another interpolant or by a mean of the data that is not that of
    the base, a part of the derivative in space that only describes that is held fixed,
    and the gradient is another: centre the data, or use `StopGradient.DERIVATIVE`, whose
    gradient stays the same up to a factor in time.

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed. With less than the default, the derivative in
      space, the average no longer helps: see [`flowdiffrax.objectives.NaiveEulerian`][].
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is not used.

    **Raises:** `ValueError` for a biased `stop_gradient`.

    ??? cite "Reference"

        Consistency training in [arXiv:2505.18825](https://arxiv.org/abs/2505.18825),
        for two times.
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TRANSPORT)
    jvp: Derivative = jax.jvp

    def __check_init__(self):
        if self.stop_gradient in (StopGradient.NONE, StopGradient.TEACHER):
            raise ValueError(
                "Along the data, gradients through the derivative in space are biased: "
                "use `StopGradient.TRANSPORT` or `DERIVATIVE`. `NaiveEulerian` shows "
                "the bias."
            )

    def direction(self, flow_map, teacher, path, s, I_s, args) -> State:
        del flow_map, teacher, I_s, args
        return path.derivative(s)


class NaiveEulerian(AbstractEulerian):
    r"""The Eulerian equation along the data as it stands. **Biased: not for use.**

    $|\partial_s X_{s,t}(I_s) + \nabla X_{s,t}(I_s)\,\dot I_s|^2$ exceeds its mean over
    $\dot I_s$ by $\mathrm{tr}(\nabla X\,\mathrm{Cov}(\dot I_s | I_s)\,\nabla X^T)$,
    which rewards maps that contract. Between two standard normals on the line, the best
    linear $X_{0,1}$ has a slope of 0.389 in the place of 1. It is here to show that.

    **Arguments:** as for [`flowdiffrax.objectives.StopGradientEulerian`][], but for
    `stop_gradient`, which stays `StopGradient.NONE`.
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
    r"""ESD: flow matching, and the start slides along the map's own velocity.

    Off the diagonal $|\partial_s X + \mathrm{sg}(\nabla X\,v_{s,s}(I_s))|^2$ with
    $X = X_{s,t}(I_s)$, and on it flow matching, which supplies the velocity from data.
    For changes of the clock see [`flowdiffrax.objectives.StopGradientEulerian`][].

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed: by default the velocity and the derivative in
      space.
    - `guidance`: a rule for the velocity that is followed, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][]; `None` for none.
    - `jvp`: how the derivative is taken, see
      [`flowdiffrax.objectives.FiniteDifference`][].

    The teacher is `None`, for the map as it is, or a flow map whose diagonal is
    followed instead, such as a moving average.

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
