import abc
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._time import as_times, times_like
from .._tree import add_scaled, scale, subtract
from .._types import Scalar, State, Time

Coefficient = Callable[[Array], Array]


class AbstractInterpolant(eqx.Module):
    r"""A stochastic interpolant $I_t = \alpha_t x_0 + \beta_t x_1 + \gamma_t z$.

    Time 0 is the base $x_0$, time 1 the data $x_1$, and $z$ a standard normal latent.
    Calling an interpolant with the end points returns the path between them, a
    `diffrax.AbstractPath`: `path.evaluate(t)` is $I_t$ and `path.derivative(t)` is
    $\dot I_t$.

    **Attributes:**

    - `has_latent`: whether $\gamma$ is not identically zero. If so, `z` is required.

    ??? cite "Reference"

        [arXiv:2303.08797](https://arxiv.org/abs/2303.08797), definition 2.1.
    """

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        r"""The weight $\alpha_t$ of the base point."""

    @abc.abstractmethod
    def beta(self, t: Array) -> Array:
        r"""The weight $\beta_t$ of the data point."""

    @abc.abstractmethod
    def gamma(self, t: Array) -> Array:
        r"""The weight $\gamma_t$ of the latent, zero without a latent."""

    @property
    @abc.abstractmethod
    def has_latent(self) -> bool:
        r"""Whether the interpolant has a latent."""

    def __call__(self, x0: State, x1: State, z: State | None = None) -> "InterpolantPath":
        """The path from `x0` to `x1`.

        **Arguments:**

        - `x0`, `x1`: a base point and a data point, with the same structure and shapes.
        - `z`: a draw of the latent, like `x0`. Required if the interpolant has a latent,
          and not allowed otherwise.

        **Raises:** `ValueError` if structures or shapes differ, or if `z` is missing or
        not allowed.
        """
        return InterpolantPath(self, x0, x1, z)

    def coefficients(self, t: Time) -> tuple[Scalar, Scalar, Scalar]:
        r"""The triple $(\alpha_t, \beta_t, \gamma_t)$."""
        (t,) = as_times(t)
        return self.alpha(t), self.beta(t), self.gamma(t)

    def rates(self, t: Time) -> tuple[Scalar, Scalar, Scalar]:
        r"""The triple $(\dot\alpha_t, \dot\beta_t, \dot\gamma_t)$."""
        (t,) = as_times(t)
        _, rates = jax.jvp(self.coefficients, (t,), (jnp.ones_like(t),))
        return rates


class InterpolantPath(diffrax.AbstractPath):
    """One realisation of an [`flowdiffrax.paths.AbstractInterpolant`][]."""

    interpolant: AbstractInterpolant
    x0: State
    x1: State
    z: State | None
    t0 = 0.0
    t1 = 1.0

    def __check_init__(self):
        has_latent = self.interpolant.has_latent
        if has_latent != (self.z is not None):
            kind, z = ("a", ", z") if has_latent else ("no", "")
            raise ValueError(
                f"{type(self.interpolant).__name__} has {kind} latent: call it as "
                f"`interpolant(x0, x1{z})`."
            )
        points = {"x1": self.x1} | ({} if self.z is None else {"z": self.z})
        for name, point in points.items():
            if _shapes(point) != _shapes(self.x0):
                raise ValueError(
                    f"`{name}` must be like `x0` in structure and shapes, "
                    f"{_shapes(self.x0)}; got {_shapes(point)}."
                )

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        r"""$I_{t_0}$, or the increment $I_{t_1} - I_{t_0}$ if `t1` is given."""
        del left
        if t1 is not None:
            return subtract(self.evaluate(t1), self.evaluate(t0))
        (t,) = times_like(self.x0, t0)
        return self._combine(self.interpolant.coefficients(t))

    def derivative(self, t: Time, left: bool = True) -> State:
        r"""$\dot I_t$."""
        del left
        (t,) = times_like(self.x0, t)
        return self._combine(self.interpolant.rates(t))

    def _combine(self, weights: tuple[Scalar, Scalar, Scalar]) -> State:
        alpha, beta, gamma = weights
        total = add_scaled(scale(alpha, self.x0), beta, self.x1)
        return total if self.z is None else add_scaled(total, gamma, self.z)


def check_no_latent(interpolant: AbstractInterpolant) -> None:
    """**Raises:** `ValueError` if the interpolant has a latent."""
    if interpolant.has_latent:
        name = type(interpolant).__name__
        raise ValueError(f"Expected an interpolant without latent; got {name} with one.")


def _shapes(x: State):
    return jtu.tree_map(jnp.shape, x)
