from collections.abc import Callable

import equinox as eqx

from .._check import check_callable, check_like
from .._time import times_like
from .._tree import add_scaled
from .._types import Args, State, Time
from ._base import AbstractFlowMap, as_time_range, check_times


class FlowMap(AbstractFlowMap):
    r"""The residual form $X_{s,t}(x) = x + (t - s)\,v_{s,t}(x)$, with $v$ a network.

    Nothing is lost by this form, $X_{s,s} = \mathrm{id}$ holds exactly, and the
    network on its diagonal, $v_{t,t}$, is the velocity field of the flow.

    **Arguments:**

    - `net`: any callable `net(s, t, x, args) -> v`, usually an `eqx.Module`, that
      returns the average velocity: like `x` in structure, shapes and dtypes.
    - `time_range`: the interval the network is trained on, as `(low, high)`; `None`
      checks nothing.

    **Raises:** when it is called, `ValueError` or `TypeError` if the network's output
    is not like `x`, and `ValueError` for concrete times outside `time_range`.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), equation (9).
    """

    net: Callable
    time_range: tuple[float, float] | None = eqx.field(
        static=True, converter=as_time_range, default=None
    )

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, x, args)")

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        check_times(self, s, t)
        s, t = times_like(x, s, t)
        return add_scaled(x, t - s, self.average_velocity(s, t, x, args))

    def velocity(self, t: Time, x: State, args: Args = None) -> State:
        return self.average_velocity(t, t, x, args)

    def average_velocity(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        s, t = times_like(x, s, t)
        return check_like(self.net(s, t, x, args), x, "`FlowMap.net`")
