import equinox as eqx

from .._check import check_callable, check_count
from .._tree import subtract
from .._types import Args, Scalar, State, TwoTimeMap, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._inverse import check_composable
from ._alekseev_groebner import AlekseevGroebner


class DefectCorrectedFlowMap(AbstractFlowMap):
    r"""A map minus its own estimated error, which is more accurate if that is small.

    The jump is $\hat X_{s,t}(x) - \hat e$ with the estimate $\hat e$ of
    [`flowdiffrax.estimates.AlekseevGroebner`][]. This is one Newton step towards the
    solution of the ODE, so its error is quadratic in that of the map. A jump costs that
    estimate. The velocity is the teacher.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field that it should follow.
    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `TypeError` for a map or a teacher that is not callable, `ValueError` if
    `num_nodes` is less than 1.
    """

    flow_map: TwoTimeMap
    teacher: VectorField
    num_nodes: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_composable(self.flow_map)
        check_callable(self.teacher, "teacher", "teacher(t, x, args)")
        check_count(self.num_nodes, 1, "num_nodes")

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the jump minus its estimated error."""
        estimate = AlekseevGroebner(self.num_nodes)
        X_st, error, _ = estimate.errors(self.flow_map, self.teacher, s, t, x, args)
        return subtract(X_st, error)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Evaluates the teacher."""
        return self.teacher(t, x, args)
