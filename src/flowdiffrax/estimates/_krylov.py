"""Newton steps for the equations of collocation, without matrices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.sparse.linalg import bicgstab
from jaxtyping import Array, Float

from .._check import (
    check_between,
    check_callable,
    check_count,
    check_instance,
    check_like,
)
from .._tree import freeze, ravel
from .._types import Args, State, VectorField
from ._collocation import Miss, Nodes
from ._quadrature import radau

_NAME = "A Newton step"
# The error of a quadrature need not be known as well as that of a jump.
_ROUGH = 0.1
# Derivatives are solved for more accurately than a step that is followed by a check.
_FINE = 0.01


class Krylov(eqx.Module):
    r"""Solves the equations of a Newton step by BiCGStab, with products of the Jacobian.

    With it, [`flowdiffrax.estimates.LinearisedError`][] and
    [`flowdiffrax.HybridSolver`][] serve states of many entries, such as fields on grids.
    The unknowns are the errors at all nodes at once. A product multiplies all of them by
    the Jacobians of the vector field at their nodes, by one batched forward-mode pass;
    no matrix is formed.

    If the vector field is not stiff, ten to twenty products are enough. With diffusion on
    a fine grid, their number grows with the largest rate times the length of the jump,
    to hundreds. Then pass `stiff_solve`, and ten to twenty are enough again.

    ```python
    def stiff_solve(h, r, args):  # of u' = D u'' + f(u), on a periodic grid
        return jnp.fft.irfft(jnp.fft.rfft(r) / (1 + h * D * waves**2), n=r.size)

    fd.estimates.LinearisedError(8, linear_solver=fd.estimates.Krylov(stiff_solve))
    ```

    An estimate whose equations are not solved to `rtol` is infinite, so that solvers
    refuse the jump; a derivative is then NaN. JAX must be able to transpose the
    derivative of the vector field, as for gradients: there may be no `lax.while_loop` in
    it.

    **Arguments:**

    - `stiff_solve`: a callable `(h, r, args)` that returns the solution $e$ of $e - h L e
      = r$, as an implicit Euler step with the stiff linear part $L$ of the vector field
      does. It must be linear in `r`. It only makes the iterations converge, so it may be
      inexact. `None` without one.
    - `rtol`: the residual of the equations, relative to that of no error, in (0, 1).
    - `max_products`: the most products in each of the two solves of a step, one for the
      error and one for that of the quadrature, at least 2.

    **Raises:** `TypeError` if `stiff_solve` is not callable, `ValueError` for numbers out
    of range.

    ??? cite "Reference"

        van der Vorst: Bi-CGSTAB. SIAM J. Sci. Stat. Comput. 13, 1992. Weiser: Faster SDC
        convergence on non-equidistant grids by DIRK sweeps. BIT 55, 2015, for the
        triangular systems of `stiff_solve`.
    """

    stiff_solve: Callable[[Array, State, Args], State] | None = None
    rtol: float = eqx.field(static=True, default=1e-3)
    max_products: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        if self.stiff_solve is not None:
            check_callable(self.stiff_solve, "stiff_solve", "stiff_solve(h, r, args)")
        check_between(self.rtol, 0, 1, "rtol", "()")
        check_count(self.max_products, 2, "max_products")

    def linearise(
        self, nodes: Nodes, teacher: VectorField, args: Args
    ) -> "KrylovLinearised":
        """Linearises the vector field at the nodes."""
        shares = radau(nodes.num_nodes).nodes
        _, unravel = ravel(nodes.start, _NAME)

        def rates(rows):
            slope = lambda u, y: ravel(teacher(u, unravel(y), args), _NAME)[0]
            return jax.vmap(slope)(nodes.us, rows)

        states = jax.vmap(lambda y: ravel(y, _NAME)[0])(nodes.states)
        _, product = jax.linearize(rates, states)
        product = freeze(eqx.filter_closure_convert(product, states))
        paces = nodes.clock.paces(shares).astype(states.dtype)
        call, stiff_solve = self.stiff_solve, None
        if call is not None:

            def solve(h, r):
                right = unravel(r)
                out = check_like(call(h, right, args), right, "`stiff_solve`")
                return ravel(out, _NAME)[0]

            stiff_solve = freeze(eqx.filter_closure_convert(solve, paces[0], states[0]))
        how = self.rtol, self.max_products
        return KrylovLinearised(*how, product, paces, stiff_solve)


def check_linear_solver(solver: object) -> None:
    """**Raises:** `TypeError` if `solver` is neither `None` nor a `Krylov`."""
    what = "`None` or an instance such as `estimates.Krylov()`"
    check_instance(solver, Krylov | None, "linear_solver", what)


class KrylovLinearised(NamedTuple):
    """The vector field along a path, to first order, as products of its Jacobians.

    It does what `Linearised` does.

    **Attributes:**

    - `product`: of the Jacobians at the nodes and vectors there.
    - `paces`: the derivatives of the time in the share of the jump.
    - `stiff_solve`: a function of `h` and a vector, or `None`.
    """

    rtol: float
    max_products: int
    product: Callable[[Array], Array]
    paces: Float[Array, " nodes"]
    stiff_solve: Callable[[Array, Array], Array] | None

    def errors(
        self, defects: Float[Array, "nodes size"], gaps: Float[Array, "nodes size"]
    ) -> tuple[Float[Array, "nodes size"], Float[Array, "nodes size"]]:
        """Returns the errors at the nodes of both; infinite if they were not found."""
        rights, rtols = jnp.stack([defects, gaps]), jnp.array([self.rtol, _ROUGH])
        found = lax.map(lambda given: self._solve(*given), (rights, rtols))
        errors, gaps = jnp.where(jnp.isnan(found), jnp.inf, found)
        return errors, gaps

    def fine_errors(
        self, defects: Float[Array, "nodes size"]
    ) -> Float[Array, "nodes size"]:
        """Returns the errors at the nodes more accurately, with derivatives."""
        return self._solve(defects, self.rtol * _FINE)

    def damped(
        self, miss: Miss, *rates: Float[Array, " size"]
    ) -> list[Float[Array, " size"]]:
        """Returns what is missing at the end of an interval, of each rate.

        Only the stiff part is damped here. The equations do so with the rest.
        """
        width = miss.width.astype(self.paces.dtype)
        if self.stiff_solve is None:
            return [width * rate for rate in rates]
        h = width * self.paces[miss.node]
        return [self.stiff_solve(h, width * rate) for rate in rates]

    def _solve(self, right, rtol):
        matrix = jnp.asarray(radau(len(right)).from_start, right.dtype)

        def equations(errors):
            slopes = self.paces[:, None] * self.product(errors)
            return self._sweep(errors - matrix @ slopes)

        def checked(equations, right):
            # The first guess costs no product more than zero does.
            how = {"tol": rtol, "maxiter": self.max_products // 2}
            errors, _ = bicgstab(equations, right, right, **how)
            rest = jnp.linalg.norm(right - equations(errors))
            is_solved = rest <= 2 * rtol * jnp.linalg.norm(right)
            return jnp.where(is_solved, errors, jnp.nan)

        right = self._sweep(right)
        return lax.custom_linear_solve(equations, right, checked, checked)

    def _sweep(self, right):
        """Solves the equations of the stiff part in triangular form, node by node."""
        if self.stiff_solve is None:
            return right
        solve = self.stiff_solve
        matrix = jnp.asarray(_triangular(len(right)), right.dtype)
        scales = jnp.diagonal(matrix)

        def to_next(slopes, given):
            right, row, scale, pace, index = given
            right = right + row @ slopes
            error = solve(scale * pace, right)
            return slopes.at[index].set((error - right) / scale), error

        nodes = jnp.arange(len(right))
        given = right, jnp.tril(matrix, -1), scales, self.paces, nodes
        return lax.scan(to_next, jnp.zeros_like(right), given)[1]


@functools.cache
def _triangular(num_nodes: int) -> Float[np.ndarray, "nodes nodes"]:
    """The factor L of the weights from the start, L U with ones on U's diagonal.

    With it in place of the weights, infinitely stiff equations are solved by as many
    sweeps as there are nodes.
    """
    lower = np.array(radau(num_nodes).from_start)
    for k in range(num_nodes):
        row = lower[k, k + 1 :] / lower[k, k]
        lower[:, k + 1 :] -= lower[:, k : k + 1] * row
    return lower
