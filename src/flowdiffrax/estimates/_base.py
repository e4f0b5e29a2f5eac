import abc

import equinox as eqx

from .._types import Args, State, Time, TwoTimeMap, VectorField


class AbstractErrorEstimate(eqx.Module):
    """An estimate of the error of a single jump, computed without the truth.

    What [`flowdiffrax.AdaptiveFlowMapSolver`][] and [`flowdiffrax.HybridSolver`][] ask
    before they trust a jump.

    **Attributes:**

    - `order`: the power of the jump's length at which the estimate vanishes.
    """

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """The power of the jump's length."""

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
        """The jump `flow_map(s, t, x, args)`, and its estimated error.

        The two come together because most estimates have the jump in them. Both are
        like `x`; the error's sign has no meaning.
        """


def check_estimate(estimate: object) -> None:
    """**Raises:** `TypeError` for what is no error estimate."""
    if not isinstance(estimate, AbstractErrorEstimate):
        raise TypeError(
            "`estimate` must be an instance such as `ResidualIntegral()`; got "
            f"{estimate!r}."
        )
