from .._check import check_like
from .._time import times_like
from .._tree import scale
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..identities import end_and_residual, semigroup_residual
from ._base import AbstractErrorEstimate


class SemigroupDefect(AbstractErrorEstimate):
    r"""The gap between two jumps and one, $X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)$, $u$ midway.

    It takes two more evaluations of the map and none of the teacher. It measures whether
    the map is self-consistent, and does not detect a map that follows a wrong ODE
    consistently.
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
    ) -> tuple[State, State]:
        del teacher
        s, t = times_like(x, s, t)
        # The jump is also part of the defect: the compiler evaluates it once.
        X_st = check_like(flow_map(s, t, x, args), x, "`flow_map`")
        return X_st, semigroup_residual(flow_map, s, s + (t - s) / 2, t, x, args)


class LagrangianDefect(AbstractErrorEstimate):
    r"""The residual at the end, $(t - s)\,(\partial_t X_{s,t}(x) - b_t(X_{s,t}(x)))$.

    It takes one forward-mode pass through the map and one call of the teacher.
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
    ) -> tuple[State, State]:
        s, t = times_like(x, s, t)
        X_st, residual = end_and_residual(flow_map, teacher, s, t, x, args)
        return X_st, scale(t - s, residual)
