"""Traces of Jacobians, computed from products with vectors."""

import abc
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Key

from .._check import check_count, check_like
from .._time import at_least_float32, times_like
from .._tree import ravel, vary_like
from .._types import Args, Scalar, State, Time, VectorField

# `z -> A z` for a square matrix `A`.
Product: TypeAlias = Callable[[Float[Array, " d"]], Float[Array, " d"]]


class AbstractTrace(eqx.Module):
    """How to compute the trace of a square matrix from its products with vectors."""

    @abc.abstractmethod
    def __call__(
        self, product: Product, like: Float[Array, " d"], key: Key[Array, ""] | None
    ) -> Scalar:
        r"""The trace of $A$, or an unbiased estimate of it, in float32 at least.

        **Arguments:**

        - `product`: the linear function $z \mapsto A z$.
        - `like`: a vector with the size and dtype of `z`.
        - `key`: a random key; `None` if none is needed.

        **Raises:** `ValueError` if a key is needed but not given.
        """


class ExactTrace(AbstractTrace):
    """The exact trace, from one product per dimension."""

    def __call__(self, product, like, key) -> Scalar:
        del key
        basis = vary_like(jnp.eye(like.size, dtype=like.dtype), like)
        return jnp.trace(_widen(jax.vmap(product)(basis)))


class Hutchinson(AbstractTrace):
    r"""The mean of $z^\top A z$ over random signs $z$, an unbiased estimate.

    With $n$ probes its variance is
    $\tfrac2n \sum_{i \ne j} (\tfrac12 (A_{ij} + A_{ji}))^2$: zero for a diagonal matrix,
    whatever the dimension.

    **Arguments:**

    - `num_probes`: the number of probes $n$, and so of products, at least 1.

    **Raises:** `ValueError` if `num_probes` is below 1.

    ??? cite "Reference"

        Hutchinson, *A stochastic estimator of the trace of the influence matrix for
        Laplacian smoothing splines*, 1989. For flows,
        [arXiv:1810.01367](https://arxiv.org/abs/1810.01367).
    """

    num_probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count(self.num_probes, 1, "num_probes")

    def __call__(self, product, like, key) -> Scalar:
        z = _signs(key, self.num_probes, like)
        return jnp.sum(_widen(z) * _widen(jax.vmap(product)(z))) / self.num_probes


class HutchPlusPlus(AbstractTrace):
    r"""Exact on the range of a random sketch of $A$, and Hutchinson's estimate beyond it.

    With $Q$ an orthonormal basis of $A S$ for random signs $S$, and $P = I - Q Q^\top$,
    $\operatorname{tr} A = \operatorname{tr} Q^\top A Q + \operatorname{tr} P A P$. The
    second term is small if $A$ is nearly of low rank. The estimate is unbiased.

    !!! info "Numerics"

        No gradient flows through $Q$: the derivative of a QR factorisation is infinite
        if the rank of $A$ is below that of the sketch. The value and its gradient are
        unbiased for any basis.

    **Arguments:**

    - `num_probes`: the number of products, a positive multiple of 3: a third each for
      the sketch, its range and the probes. Above three times the dimension the result is
      exact, and [`flowdiffrax.likelihood.ExactTrace`][] is cheaper.

    **Raises:** `ValueError` if `num_probes` is not a positive multiple of 3.

    ??? cite "Reference"

        [arXiv:2010.09649](https://arxiv.org/abs/2010.09649), algorithm 1.
    """

    num_probes: int = eqx.field(static=True, default=6)

    def __check_init__(self):
        if self.num_probes < 3 or self.num_probes % 3 != 0:
            raise ValueError(f"`num_probes` must be 3, 6, 9, ...; got {self.num_probes}.")

    def __call__(self, product, like, key) -> Scalar:
        third = self.num_probes // 3
        signs = _signs(key, 2 * third, like)
        products = lambda rows: _widen(jax.vmap(product)(rows.astype(like.dtype)))
        sketch = lax.stop_gradient(products(signs[:third]))
        basis = jnp.linalg.qr(sketch.T)[0].T
        probes = _widen(signs[third:])
        probes = probes - (probes @ basis.T) @ basis
        on_range = jnp.sum(basis * products(basis))
        return on_range + jnp.sum(probes * products(probes)) / third


def divergence(
    vector_field: VectorField,
    t: Time,
    x: State,
    args: Args = None,
    *,
    trace: AbstractTrace = ExactTrace(),
    key: Key[Array, ""] | None = None,
) -> tuple[State, Scalar]:
    r"""A velocity and its divergence, $b_t(x)$ and $\nabla \cdot b_t(x)$.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `t`: a time.
    - `x`: one state, of floating-point numbers; use `jax.vmap` for a batch.
    - `args`: passed to the vector field.
    - `trace`: how to compute the trace of $\nabla b_t$.
    - `key`: a random key, if the trace needs one.

    **Returns:** the velocity, like `x`, and the divergence, in float32 at least.

    **Raises:** `ValueError` if a key is missing or the velocity is not like `x`,
    `TypeError` if the state is complex.
    """
    (t,) = times_like(x, t)
    vector, unravel = ravel_floats(x)

    def rate(vector):
        b_t = check_like(vector_field(t, unravel(vector), args), x, "`vector_field`")
        return ravel_floats(b_t)[0]

    b_t, product = jax.linearize(rate, vector)
    return unravel(b_t), trace(product, vector, key)


def ravel_floats(x: State) -> tuple[Float[Array, " d"], Callable[[Array], State]]:
    """Returns a state as one vector, and a function from such vectors to states."""
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    if not dtypes or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise TypeError(
            f"Densities and inverses need floating-point states; got dtypes {dtypes}. A "
            "complex state can be two real leaves."
        )
    return ravel(x, "A density")


def _signs(key: Key[Array, ""] | None, number: int, like: Array) -> Array:
    if key is None:
        raise ValueError("Random probes need a key: pass `key=jax.random.key(...)`.")
    return vary_like(jr.rademacher(key, (number, like.size), like.dtype), like)


def _widen(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))
