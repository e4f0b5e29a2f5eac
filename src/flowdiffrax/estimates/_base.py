import abc

import equinox as eqx

from .._check import check_instance
from .._types import Args, State, Time, TwoTimeMap, VectorField


class AbstractErrorEstimate(eqx.Module):
    """An estimate of the error of a single jump, computed without the true solution.

    [`flowdiffrax.AdaptiveFlowMapSolver`][] uses it to decide whether to accept a jump.

    **Attributes:**

    - `order`: the power of the jump's length with which the estimate vanishes.
    """

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """The power of the jump's length with which the estimate vanishes."""

    @abc.abstractmethod
    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State]:
        """Returns the jump `flow_map(s, t, x, args)`, and its estimated error.

        It returns both because most estimates compute the jump anyway. Both are like `x`.
        The sign of the error has no meaning.
        """


def check_estimate(estimate: object) -> None:
    """**Raises:** `TypeError` if `estimate` is not an `AbstractErrorEstimate`."""
    what = "an instance such as `PicardDefect()`"
    check_instance(estimate, AbstractErrorEstimate, "estimate", what)
