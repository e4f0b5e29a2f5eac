import equinox as eqx

from .._check import check_bools
from .._time import times_like
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._clock import grade_of
from ._collocation import AbstractCollocationEstimate, at_nodes, probe_share
from ._krylov import Krylov, check_linear_solver
from ._newton import check_real, linearise, newton_step
from ._quadrature import last


class LinearisedError(AbstractCollocationEstimate):
    r"""Estimates the error to first order, with the Jacobian of the ODE.

    This is one Newton step for the equations of collocation, from the map's states $\hat
    X_k$ at the Radau nodes: with the Picard defects $d_k$ and the Jacobians $J_k = \nabla
    b(\hat X_k)$, the errors solve $e_k - h \sum_j A_{kj} J_j e_j = d_k$. The linearised
    ODE transports the defects, so that directions in which all errors decay at once are
    damped correctly. Use it for stiff systems, with `is_graded` for jumps over several
    decades of time. For small systems it is the sharpest estimate: unlike
    [`flowdiffrax.estimates.AlekseevGroebner`][], it is also right about maps whose own
    Jacobian is wrong. It underestimates growth that is too fast for the nodes, as
    implicit solvers do.

    !!! info "Numerics"

        It takes `num_nodes + 1` evaluations of the map, `num_nodes + 2` calls of the
        teacher, `num_nodes` Jacobians of the teacher, and for each node a linear solve
        for twice as many unknowns as entries. It is therefore meant for states of
        few entries. For large ones, pass a `linear_solver`, which takes products of the
        Jacobians instead: see [`flowdiffrax.estimates.Krylov`][].

    **Arguments:**

    - `num_nodes`: the number of nodes of the Radau quadrature, at least 1.
    - `is_graded`: whether nodes are dense at the start if the vector field is faster
      there than later along the jump, as after the start of a chemical reaction. It
      takes one more evaluation of the map, and two of the teacher.
    - `linear_solver`: a [`flowdiffrax.estimates.Krylov`][] for states of many entries;
      `None` for Jacobians as matrices.

    **Raises:** `ValueError` if `num_nodes` is less than 1, `TypeError` for another kind
    of `linear_solver`; when called, `TypeError` for a complex state.

    ??? cite "Reference"

        Hairer, Wanner: Solving Ordinary Differential Equations II, section
        IV.5.
    """

    is_graded: bool = eqx.field(static=True, default=False)
    linear_solver: Krylov | None = None

    def __check_init__(self):
        check_bools(is_graded=self.is_graded)
        check_linear_solver(self.linear_solver)

    def errors(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State, State]:
        """Returns the jump, its estimated error, and how wrong the quadrature may be."""
        check_real(x)
        grade = None
        if self.is_graded:
            share = probe_share(*times_like(x, s, t))
            grade = grade_of(flow_map, teacher, s, t, x, args, share)
        nodes = at_nodes(flow_map, teacher, s, t, x, args, self.num_nodes, grade)
        found = newton_step(nodes, linearise(nodes, teacher, args, self.linear_solver))
        return last(nodes.states), last(found.errors), found.gap
