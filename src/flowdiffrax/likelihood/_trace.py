"""Traces of Jacobians that are known by their products with vectors."""

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

from .._check import check_like
from .._time import at_least_float32, times_like
from .._tree import ravel, vary_like
from .._types import Args, Scalar, State, Time, VectorField

# `z -> A z` for a square matrix `A`.
Product: TypeAlias = Callable[[Float[Array, " d"]], Float[Array, " d"]]


class AbstractTrace(eqx.Module):
    """How the trace of a square matrix is found from its products with vectors."""

    @abc.abstractmethod
    def __call__(
        self, product: Product, like: Float[Array, " d"], key: Key[Array, ""] | None
    ) -> Scalar:
        r"""The trace of $A$, or an unbiased estimate of it, in float32 at least.

        **Arguments:**

        - `product`: the function $z \mapsto A z$, linear.
        - `like`: a vector of the size and dtype of `z`.
        - `key`: a random key, `None` where none is needed.

        **Raises:** `ValueError` if a key is needed and there is none.
        """


class ExactTrace(AbstractTrace):
    """The trace itself, from one product for each dimension."""

    def __call__(self, product, like, key) -> Scalar:
        del key
        basis = vary_like(jnp.eye(like.size, dtype=like.dtype), like)
        return jnp.trace(_widen(jax.vmap(product)(basis)))


class Hutchinson(AbstractTrace):
    r"""The mean of $z^\top A z$ over random signs $z$, unbiased.

    With $n$ probes its variance is
    $\tfrac2n \sum_{i \ne j} (\tfrac12 (A_{ij} + A_{ji}))^2$: zero for a diagonal matrix,
    whatever the dimension.

    **Arguments:**

    - `num_probes`: the number of probes $n$, and of products, at least 1.

    **Raises:** `ValueError` if `num_probes` is below 1.

    ??? cite "Reference"

        Hutchinson, *A stochastic estimator of the trace of the influence matrix for
        Laplacian smoothing splines*, 1989. For flows,
        [arXiv:1810.01367](https://arxiv.org/abs/1810.01367).
    """

    num_probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1; got {self.num_probes}.")

    def __call__(self, product, like, key) -> Scalar:
        z = _signs(key, self.num_probes, like)
        return jnp.sum(_widen(z) * _widen(jax.vmap(product)(z))) / self.num_probes


class HutchPlusPlus(AbstractTrace):
    r"""Exact on the range of a random sketch of $A$, and Hutchinson's estimate beyond it.

    With $Q$ an orthonormal basis of $A S$ for random signs $S$, and $P = I - Q Q^\top$,
    $\operatorname{tr} A = \operatorname{tr} Q^\top A Q + \operatorname{tr} P A P$. The
    second term is small where $A$ is nearly of low rank. Unbiased.

    !!! info "Numerics"

        No gradient flows through $Q$. Whatever the basis, the value and its gradient are
        unbiased, and the derivative of a QR factorisation is infinite where $A$ has a
        rank below that of the sketch.

    **Arguments:**

    - `num_probes`: the number of products: a third for the sketch, a third on its
      range, a third for probes. A multiple of 3; above three times the dimension it is
      exact, and [`flowdiffrax.likelihood.ExactTrace`][] is cheaper.

    **Raises:** `ValueError` if `num_probes` is no positive multiple of 3.

    ??? cite "Reference"

        [arXiv:2010.09649](https://arxiv.org/abs/2010.09649), algorithm 1.
    """

    num_probes: int = eqx.field(static=True, default=6)

    def __check_init__(self):
        if self.num_probes < 3 or self.num_probes % 3 != 0:
            raise ValueError(
                "`num_probes` must be a positive multiple of 3: sketch, range and probes "
                f"have a third each; got {self.num_probes}."
            )

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
    - `args`: passed on to the vector field.
    - `trace`: how the trace of $\nabla b_t$ is found.
    - `key`: a random key, if the trace needs one.

    **Returns:** the velocity, like `x`, and the divergence, in float32 at least.

    **Raises:** `ValueError` for a missing key or a velocity not like `x`, `TypeError` for
    complex states.
    """
    (t,) = times_like(x, t)
    vector, unravel = ravel_floats(x)

    def rate(vector):
        b_t = check_like(vector_field(t, unravel(vector), args), x, "`vector_field`")
        return ravel_floats(b_t)[0]

    b_t, product = jax.linearize(rate, vector)
    return unravel(b_t), trace(product, vector, key)


def ravel_floats(x: State) -> tuple[Float[Array, " d"], Callable[[Array], State]]:
    """A state as one vector, and the function that makes a state of a vector."""
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    if not dtypes or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise TypeError(
            "Densities and inverses are for states of floating-point numbers; got dtypes "
            f"{dtypes}. Convert integers with `.astype(float)`, and give the real and "
            "the imaginary part of a complex state as two leaves."
        )
    return ravel(x, "A density")


def _signs(key: Key[Array, ""] | None, number: int, like: Array) -> Array:
    if key is None:
        raise ValueError(
            "A stochastic trace draws random probes: pass `key=jax.random.key(...)`, "
            "another for each example."
        )
    return vary_like(jr.rademacher(key, (number, like.size), like.dtype), like)


def _widen(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))
