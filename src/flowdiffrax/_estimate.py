import abc

import equinox as eqx

from ._custom_types import Args, State, Time, TwoTimeMap, VectorField
from ._identities import lagrangian_residual, semigroup_residual
from ._misc import scale, times_like


class AbstractErrorEstimate(eqx.Module):
    """An estimate of the error of a single jump, computed without the truth.

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
    ) -> State:
        """The estimated error of `flow_map(s, t, x, args)`, a state like `x`."""


class SemigroupDefect(AbstractErrorEstimate):
    r"""The gap between one jump and two, $X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)$, $u$ midway.

    Two more evaluations of the map, none of the teacher. It measures how consistent the
    map is with itself, and is blind to one that follows a wrong ODE consistently.
    """

    @property
    def order(self) -> int:
        return 2

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> State:
        del teacher
        s, t = times_like(x, s, t)
        return semigroup_residual(flow_map, s, s + (t - s) / 2, t, x, args)


class LagrangianDefect(AbstractErrorEstimate):
    r"""The teacher's verdict, $(t - s)\,(\partial_t X_{s,t}(x) - b_t(X_{s,t}(x)))$.

    One forward-mode pass through the map and one call of the teacher.
    """

    @property
    def order(self) -> int:
        return 1

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> State:
        s, t = times_like(x, s, t)
        return scale(t - s, lagrangian_residual(flow_map, teacher, s, t, x, args))
