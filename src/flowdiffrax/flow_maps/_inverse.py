from .._check import check_flow_map
from .._types import Args, Scalar, State, TwoTimeMap
from ._base import AbstractFlowMap


class InverseFlowMap(AbstractFlowMap):
    r"""The inverse of each map, $(s, t) \mapsto X_{s,t}^{-1}$.

    The inverse of a flow map is $X_{t,s}$: one evaluation with the times swapped.
    `InverseFlowMap(X)(s, t, .)` undoes `X(s, t, .)` as far as `X` is consistent, see
    [`flowdiffrax.inverse_residual`][].

    An inverse is for one jump. Inverses do not compose in the order of their times, so
    solvers, `sample` and `ComposedFlowMap` refuse them. To go back in several jumps, run
    the map itself from `t1` to `t0`.

    **Arguments:**

    - `flow_map`: the map to invert. It must be trained in both directions of time.
    """

    flow_map: TwoTimeMap

    def __check_init__(self):
        check_flow_map(self.flow_map)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Jumps back from `t` to `s`."""
        return self.flow_map(t, s, x, args)


def check_composable(flow_map: object) -> None:
    """**Raises:** `TypeError` unless it is a map that composes, which inverses do not."""
    check_flow_map(flow_map)
    if isinstance(flow_map, InverseFlowMap):
        raise TypeError(
            "An `InverseFlowMap` is for one jump: inverses do not compose in the order "
            "of their times. To go back, run the map itself from `t1` to `t0`."
        )
