from collections.abc import Callable

import equinox as eqx

from .._check import check_callable, check_like
from .._types import Args, Scalar, State
from ._base import AbstractChordFlowMap, as_time_range


class FlowMap(AbstractChordFlowMap):
    r"""The residual form $X_{s,t}(x) = x + (t - s)\,v_{s,t}(x)$, with $v$ a network.

    Every flow map has this form. $X_{s,s} = \mathrm{id}$ holds exactly, and the network
    on its diagonal, $v_{t,t}$, is the velocity field of the flow.

    **Arguments:**

    - `net`: any callable `net(s, t, x, args) -> v`, usually an `eqx.Module`. It returns
      the average velocity, like `x` in structure, shapes and dtypes.
    - `time_range`: the interval `(low, high)` that the network is trained on; `None` for
      no check.

    **Raises:** when called, `ValueError` or `TypeError` if the network's output is not
    like `x`, and `ValueError` for concrete times outside `time_range`.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), equation (9).
    """

    net: Callable
    time_range: tuple[float, float] | None = eqx.field(
        static=True, converter=as_time_range, default=None
    )

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, x, args)")

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the network's output."""
        return check_like(self.net(s, t, x, args), x, "`FlowMap.net`")
