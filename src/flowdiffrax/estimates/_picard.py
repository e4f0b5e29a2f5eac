from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._collocation import (
    AbstractCollocationEstimate,
    at_nodes,
    largest,
    picard_defects,
    quadrature_gap,
)
from ._quadrature import last


class PicardDefect(AbstractCollocationEstimate):
    r"""The defect of the integral form, $|\hat X_{s,u}(x) - x - \int_s^u b(\hat X)|$: the
    largest along the jump, entry by entry.

    It ignores whether the ODE amplifies or damps an error, as classical solvers do when
    they estimate the error of a step.

    It takes `num_nodes + 1` evaluations of the map, which include the jump, and
    `num_nodes + 2` of the teacher.

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` if `num_nodes` is less than 1.
    """

    def errors(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State, State]:
        """Returns the jump, its largest defect, and how wrong the quadrature may be."""
        nodes = at_nodes(flow_map, teacher, s, t, x, args, self.num_nodes)
        defects = largest(picard_defects(nodes))
        return last(nodes.states), defects, quadrature_gap(nodes)
