import equinox as eqx

from .._check import check_callable
from .._tree import subtract
from .._types import Args, Scalar, State, TwoTimeMap, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._inverse import check_composable
from ._alekseev_groebner import end_and_error
from ._quadrature import check_num_nodes


class DefectCorrectedFlowMap(AbstractFlowMap):
    r"""A map less its own estimated error: better where the estimate is small already.

    $\hat X_{s,t}(x) - \hat e$ with $\hat e$ of
    [`flowdiffrax.estimates.AlekseevGroebner`][]: one Newton step towards the
    solution of the ODE, whose error is quadratic in that of the map. It needs the
    teacher, at `num_nodes` calls a jump, and `2 * num_nodes` forward-mode passes through
    the map. Its velocity is the teacher.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field it should follow.
    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `TypeError` for a map or a teacher that is not callable, `ValueError` for
    fewer nodes than one.
    """

    flow_map: TwoTimeMap
    teacher: VectorField
    num_nodes: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        check_composable(self.flow_map)
        check_callable(self.teacher, "teacher", "teacher(t, x, args)")
        check_num_nodes(self.num_nodes)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The jump less its estimated error."""
        X_st, error = end_and_error(
            self.flow_map, self.teacher, s, t, x, args, self.num_nodes
        )
        return subtract(X_st, error)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """The teacher."""
        return self.teacher(t, x, args)
