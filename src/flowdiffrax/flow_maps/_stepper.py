from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from .._check import check_callable, check_count, check_like
from .._tree import Frozen, add_scaled
from .._types import Args, Scalar, State
from ._base import AbstractFlowMap, as_time_range


class StepperFlowMap(AbstractFlowMap):
    r"""Any classical step plus a learned correction.

    It is $X_{s,t}(x) = B_{s,t}(x) + h^{p+1}\,n_{s,t}(x)$ with $h = t - s$, the step $B$
    of a classical method of order $p$, and a network $n$. With $n = 0$, as the networks
    of `nn` start, the map is the classical step.

    The step may be anything that is cheap compared with an accurate solve: a step of an
    exponential or an implicit-explicit integrator, a few steps of any solver of Diffrax
    by [`flowdiffrax.ODEFlowMap`][] with `num_steps`, or a solve on a coarse grid. For
    explicit Runge-Kutta steps, use [`flowdiffrax.HypersolverFlowMap`][], which is faster.

    !!! info "Numerics"

        The map is the identity at $s = t$ exactly if the step is. A solve on a coarse
        grid is not, so let it return `x + refine(solve(coarsen(x)) - coarsen(x))`.

        The velocity is the derivative of the step at $h = 0$, plus the network if
        $p = 0$. If the step is a flow map, its own velocity is used. Otherwise, the step
        must support forward mode.

    !!! info "What is trained"

        Only the network. The arrays of the step are held fixed, as in
        [`flowdiffrax.HypersolverFlowMap`][].

    **Arguments:**

    - `base`: a callable `base(s, t, x, args)` that returns the state at time `t`.
    - `net`: any callable `net(s, t, x, args)` that returns the correction $n$, like `x`.
    - `order`: the order $p$ of the step, so that its error is of the size of the
      correction. With 0, the step need not be consistent.
    - `time_range`: the interval `(low, high)` that the network is trained on; `None` for
      no check.

    **Raises:** `TypeError` if `base` or `net` is not callable, or if `order` is not an
    integer; `ValueError` if it is negative. When called, `ValueError` or `TypeError` if
    the output of either is not like the state.
    """

    net: Callable
    frozen_base: Frozen
    order: int = eqx.field(static=True)
    time_range: tuple[float, float] | None = eqx.field(static=True)

    def __init__(
        self,
        base: Callable,
        net: Callable,
        order: int = 0,
        time_range: tuple[float, float] | None = None,
    ):
        check_callable(base, "base", "base(s, t, x, args)")
        check_callable(net, "net", "net(s, t, x, args)")
        check_count(order, 0, "order")
        self.net = net
        self.frozen_base = Frozen(base)
        self.order = int(order)
        self.time_range = as_time_range(time_range)

    @property
    def base(self) -> AbstractFlowMap:
        """The step as a flow map, with its arrays held fixed."""
        base = self.frozen_base.thaw()
        return base if isinstance(base, AbstractFlowMap) else _Step(base)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Takes the step and adds the correction."""
        step = self.base(s, t, x, args)
        return add_scaled(step, (t - s) ** (self.order + 1), self._net(s, t, x, args))

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity of the step, plus that of the correction."""
        step = self.base.average_velocity(s, t, x, args)
        # A power of zero has no derivative at zero.
        power = (t - s) ** self.order if self.order > 0 else jnp.ones_like(t)
        return add_scaled(step, power, self._net(s, t, x, args))

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity of the step, plus the network for order 0."""
        velocity = self.base.velocity(t, x, args)
        if self.order > 0:
            return velocity
        return add_scaled(velocity, jnp.ones_like(t), self._net(t, t, x, args))

    def _net(self, s, t, x, args):
        return check_like(self.net(s, t, x, args), x, "`StepperFlowMap.net`")


class _Step(AbstractFlowMap):
    """A step that is a function."""

    step: Callable

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        return check_like(self.step(s, t, x, args), x, "`StepperFlowMap.base`")
