from .._check import check_flow_map
from .._types import Args, State, Time, TwoTimeMap
from ._base import AbstractFlowMap


class InverseFlowMap(AbstractFlowMap):
    r"""The inverse of each map, $(s, t) \mapsto X_{s,t}^{-1}$.

    For a flow map that is $X_{t,s}$, a single evaluation with the times swapped:
    `InverseFlowMap(X)(s, t, .)` undoes `X(s, t, .)` as far as `X` is consistent, see
    [`flowdiffrax.inverse_residual`][].

    Inverses are for one jump. They do not compose in the order of their times, so that
    the solver, `sample` and `ComposedFlowMap` refuse them: to go back in several jumps,
    run the map itself from `t1` to `t0`.

    **Arguments:**

    - `flow_map`: the map to invert; it must be trained in both directions of time.
    """

    flow_map: TwoTimeMap

    def __check_init__(self):
        check_flow_map(self.flow_map)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        return self.flow_map(t, s, x, args)


def check_composable(flow_map: object) -> None:
    """**Raises:** `TypeError` for what is no map, or does not compose, as an inverse."""
    check_flow_map(flow_map)
    if isinstance(flow_map, InverseFlowMap):
        raise TypeError(
            "An `InverseFlowMap` is for one jump: inverses do not compose in the order "
            "of their times. To go back, run the map itself from `t1` to `t0`."
        )
