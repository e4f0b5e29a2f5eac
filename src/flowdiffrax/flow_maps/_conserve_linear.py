from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._check import check_count
from .._time import at_least_float32
from .._tree import Frozen
from .._types import Args

_LARGEST_WRITTEN_OUT = 8


class ConserveLinear(eqx.Module):
    r"""Restores linear invariants of a positive state, and keeps it positive.

    The invariants are $C x$ with a constant matrix: the number of atoms of each element
    in a chemical mechanism, the number of sites of a catalyst, a charge. The end $y$ of a
    jump from $x$ becomes

    $$y'_i = y_i \exp\Bigl(\sum_k C_{ki} \mu_k\Bigr) \quad\text{with}\quad C y' = C x.$$

    Of all positive states with the right invariants, this is the one nearest to $y$ in
    relative entropy. Entries that are zero stay zero. Use it with
    [`flowdiffrax.ProjectedFlowMap`][].

    !!! info "Numerics"

        Newton's method on a convex function finds the multipliers $\mu$. Its steps change
        no entry by more than a factor of $e$. From an error of one per cent, three steps
        reach the rounding error of float64. At $s = t$ the state does not change by a
        single bit.

    **Arguments:**

    - `matrix`: the matrix $C$, of shape `(invariants, size)`. Dependent rows are allowed.
      Its entries for signed parts of the state, such as a temperature, must be zero.
    - `num_iterations`: the number of Newton steps, at least 1.

    **Raises:** `ValueError` if `matrix` is not a matrix, or `num_iterations` is below 1.
    """

    frozen_matrix: Frozen
    num_iterations: int = eqx.field(static=True)

    def __init__(self, matrix: Array | np.ndarray, num_iterations: int = 4):
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2:
            raise ValueError(
                "`matrix` must have shape (invariants, size), a row for each invariant; "
                f"got {matrix.shape}."
            )
        check_count(num_iterations, 1, "num_iterations")
        # Rows that are combinations of others would make the equations singular.
        _, values, rows = np.linalg.svd(np.asarray(matrix, np.float64))
        rank = int(np.sum(values > 1e-10 * np.max(values, initial=1e-300)))
        self.frozen_matrix = Frozen(jnp.asarray(rows[:rank], jnp.result_type(float)))
        self.num_iterations = num_iterations

    @property
    def matrix(self) -> Float[Array, "invariants size"]:
        """Independent combinations of the invariants, which are held fixed."""
        return self.frozen_matrix.thaw()

    def __call__(
        self,
        x_start: Float[Array, " size"],
        x_end: Float[Array, " size"],
        args: Args = None,
    ) -> Float[Array, " size"]:
        del args
        dtype = at_least_float32(x_end.dtype)
        matrix = self.matrix.astype(dtype)
        y, start = x_end.astype(dtype), x_start.astype(dtype)
        # The sum of differences has the rounding error of the change, not of the total.
        missing = matrix @ (start - y)

        def newton(carry: Any, _: Any):
            z, missing = carry
            hessian = (matrix * jnp.abs(z)[None]) @ matrix.T
            tiny = 10 * jnp.finfo(dtype).eps * jnp.trace(hessian) / len(matrix)
            tiny = jnp.where(tiny > 0, tiny, 1)
            hessian = hessian + tiny * jnp.eye(len(matrix), dtype=dtype)
            power = _solve(hessian, missing) @ matrix
            power = power / jnp.maximum(1, jnp.max(jnp.abs(power)))
            change = z * jnp.expm1(power)
            return (z + change, missing - matrix @ change), None

        (z, _), _ = lax.scan(newton, (y, missing), length=self.num_iterations)
        return z.astype(x_end.dtype)


def _solve(
    matrix: Float[Array, "size size"], vector: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Solves a positive definite system, by Cholesky's method written out if small.

    A batch of small systems takes LAPACK a microsecond each, which is more than a jump.
    """
    size = len(vector)
    if size > _LARGEST_WRITTEN_OUT:
        return jnp.linalg.solve(matrix, vector)
    lower, y = [[]] * size, []
    for i in range(size):
        row = []
        for j in range(i):
            dot = sum((a * b for a, b in zip(row, lower[j], strict=False)), 0 * vector[0])
            row.append((matrix[i, j] - dot) / lower[j][j])
        squares = sum((a * a for a in row), 0 * vector[0])
        lower[i] = [*row, jnp.sqrt(matrix[i, i] - squares)]
        dot = sum((a * b for a, b in zip(row, y, strict=True)), 0 * vector[0])
        y.append((vector[i] - dot) / lower[i][i])
    x = [vector[0]] * size
    for i in reversed(range(size)):
        later = range(i + 1, size)
        dot = sum((lower[j][i] * x[j] for j in later), 0 * vector[0])
        x[i] = (y[i] - dot) / lower[i][i]
    return jnp.stack(x)


def find_linear_invariants(
    rates: Float[Array, "states size"] | np.ndarray, tolerance: float = 1e-9
) -> Float[np.ndarray, "invariants size"]:
    r"""Finds the vectors $c$ with $c \cdot b_t(x) = 0$ for all of the given rates.

    These are the linear invariants of an ODE, such as the elements of a mechanism, up to
    a change of basis.

    **Arguments:**

    - `rates`: values of the vector field, many more than the state has entries, in
      float64. Evaluate it at scattered states rather than on a trajectory, where slow
      combinations look constant.
    - `tolerance`: how far the products may be from zero, relative to their terms.

    **Returns:** an orthonormal basis, with a row for each invariant.

    **Raises:** `ValueError` if there are fewer states than entries.
    """
    rates = np.asarray(rates, np.float64)
    if len(rates) < rates.shape[1]:
        raise ValueError(
            f"`rates` must have more rows than the state has entries; got {rates.shape}."
        )
    # Each entry in its own units: rates of radicals are tiny beside those of others.
    size = np.sqrt(np.mean(rates**2, axis=0))
    size = np.where(size > 0, size, 1.0)
    _, values, rows = np.linalg.svd(rates / size, full_matrices=False)
    found = rows[values <= tolerance * values[0]] / size
    return np.linalg.qr(found.T)[0].T
