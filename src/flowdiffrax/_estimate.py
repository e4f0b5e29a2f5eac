import abc

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._a_posteriori import (
    check_num_nodes,
    end_and_error,
    integral,
    last,
    path_and_errors,
    path_residuals,
    radau,
    start_error,
)
from ._custom_types import Args, State, Time, TwoTimeMap, VectorField
from ._identities import end_and_residual, semigroup_residual
from ._misc import add_scaled, check_like, scale, times_like


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
    ) -> tuple[State, State]:
        del teacher
        s, t = times_like(x, s, t)
        # The jump is part of the defect: compilers evaluate it once.
        X_st = check_like(flow_map(s, t, x, args), x, "`flow_map`")
        return X_st, semigroup_residual(flow_map, s, s + (t - s) / 2, t, x, args)


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
    ) -> tuple[State, State]:
        s, t = times_like(x, s, t)
        X_st, residual = end_and_residual(flow_map, teacher, s, t, x, args)
        return X_st, scale(t - s, residual)


class _AbstractAtNodes(AbstractErrorEstimate):
    """An estimate from residuals at the nodes of a quadrature over the jump."""

    num_nodes: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        check_num_nodes(self.num_nodes)

    @property
    def order(self) -> int:
        return 1


class ResidualIntegral(_AbstractAtNodes):
    r"""The residuals along the whole jump, $\int_s^t |\partial_u X_{s,u}(x) -
    b_u(X_{s,u}(x))|\,du$, entry by entry.

    [`flowdiffrax.lagrangian_bound`][] without growth: what the ODE itself makes of an
    error, for better or worse, is left out, as it is when a classical solver
    estimates the error of a step. Unlike [`flowdiffrax.LagrangianDefect`][] it cannot be
    deceived by a map that is right at the end of the jump alone.

    `num_nodes + 1` forward-mode passes through the map and calls of the teacher, with the
    jump among them. The one at the start shows a fast layer there.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one.
    """

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
        _, path, residuals = path_residuals(
            flow_map, teacher, s, t, x, args, self.num_nodes
        )
        start = start_error(flow_map, teacher, s, t, x, args, residuals, self.num_nodes)
        size = lambda tree: jtu.tree_map(lambda r: jnp.abs(r).astype(r.dtype), tree)
        whole = integral(size(residuals), radau(self.num_nodes)[1])
        return last(path), add_scaled(size(start), jnp.abs(t - s), whole)


class AlekseevGroebner(_AbstractAtNodes):
    """The error to first order, [`flowdiffrax.alekseev_groebner_error`][].

    The sharpest estimate, as far as the map's own Jacobian can be trusted.
    `2 * num_nodes` forward-mode passes through the map, `num_nodes` calls of the teacher.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one.
    """

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State]:
        return end_and_error(flow_map, teacher, s, t, x, args, self.num_nodes)


class LinearisedError(_AbstractAtNodes):
    """The error to first order by the ODE's own Jacobian,
    [`flowdiffrax.linearised_error`][].

    The estimate for stiff systems, and for small ones the sharpest: it knows what the ODE
    makes of a residual. `num_nodes + 1` forward-mode passes through the map and calls of
    the teacher, `num_nodes` Jacobians of the teacher, and a linear solve for
    `num_nodes * entries` unknowns.

    **Arguments:**

    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `ValueError` for fewer nodes than one; when called, `TypeError` for a
    complex state.
    """

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State]:
        path, errors = path_and_errors(flow_map, teacher, s, t, x, args, self.num_nodes)
        return last(path), last(errors)


def check_estimate(estimate: object) -> None:
    """**Raises:** `TypeError` for what is no error estimate."""
    if not isinstance(estimate, AbstractErrorEstimate):
        raise TypeError(
            "`estimate` must be an instance such as `ResidualIntegral()`; got "
            f"{estimate!r}."
        )
