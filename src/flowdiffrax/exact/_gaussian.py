import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._check import check_positive
from .._time import times_like
from .._types import Args, Numbers, Scalar, State, Time
from ..flow_maps._base import AbstractFlowMap
from ..paths._base import AbstractInterpolant
from ..paths._interpolants import LinearInterpolant


class GaussianFlowMap(AbstractFlowMap):
    r"""The exact flow map of an interpolant between two Gaussians.

    With mean $m_t = \alpha_t m_0 + \beta_t m_1$ and covariance
    $\Sigma_t = \alpha_t^2 C_0 + \beta_t^2 C_1 + \gamma_t^2 I$, the map is
    $X_{s,t}(x) = m_t + \Sigma_t^{1/2} \Sigma_s^{-1/2} (x - m_s)$. This holds if the end
    points are independent and the covariances commute.

    **Arguments:**

    - `interpolant`: any interpolant.
    - `base_std`, `target_std`: standard deviations, scalars or arrays that broadcast to
      the state.
    - `base_mean`, `target_mean`: means, scalars or arrays that broadcast to the state.
    - `base_cov`, `target_cov`: full covariance matrices instead, of shape `(d, d)` for a
      state of shape `(d,)`. If only one is given, the other end uses its standard
      deviation.

    **Raises:** `ValueError` if a covariance is not symmetric positive semi-definite, or
    if the two do not commute.
    """

    interpolant: AbstractInterpolant
    means: tuple[Array, Array]
    variances: tuple[Array, Array]
    basis: Array | None
    time_range = (0.0, 1.0)

    def __init__(
        self,
        interpolant: AbstractInterpolant = LinearInterpolant(),
        *,
        base_std: Numbers = 1.0,
        target_std: Numbers = 1.0,
        base_mean: Numbers = 0.0,
        target_mean: Numbers = 0.0,
        base_cov: Numbers | None = None,
        target_cov: Numbers | None = None,
    ):
        self.interpolant = interpolant
        self.means = (jnp.asarray(base_mean, float), jnp.asarray(target_mean, float))
        if base_cov is None and target_cov is None:
            stds = (jnp.asarray(base_std, float), jnp.asarray(target_std, float))
            self.variances = (stds[0] ** 2, stds[1] ** 2)
            self.basis = None
        else:
            variances, basis = _diagonalise(
                _covariance("base", base_std, base_cov, target_cov),
                _covariance("target", target_std, target_cov, base_cov),
            )
            self.variances = (jnp.asarray(variances[0]), jnp.asarray(variances[1]))
            self.basis = jnp.asarray(basis)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The affine map between the two Gaussians."""
        del args
        cast = lambda value: value.astype(x.dtype)
        mean_s, variance_s = self._moments(s, x.shape)
        mean_t, variance_t = self._moments(t, x.shape)
        centred = x - cast(mean_s)
        growth = cast(jnp.sqrt(variance_t / variance_s))
        if self.basis is None:
            return cast(mean_t) + growth * centred
        basis = cast(self.basis)
        return cast(mean_t) + basis @ (growth * (basis.T @ centred))

    def _moments(self, t, shape):
        alpha, beta, gamma = self.interpolant.coefficients(t)
        cast = lambda value: jnp.broadcast_to(value.astype(t.dtype), shape)
        m0, m1 = map(cast, self.means)
        c0, c1 = map(cast, self.variances)
        return alpha * m0 + beta * m1, alpha**2 * c0 + beta**2 * c1 + gamma**2


def _covariance(name, std, cov, other_cov) -> np.ndarray:
    if cov is None:
        return np.diag(np.broadcast_to(np.asarray(std, float) ** 2, len(other_cov)))
    cov = np.asarray(cov, float)
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"`{name}_cov` must be symmetric; got shape {cov.shape}.")
    _check_symmetric(cov, f"{name}_cov")
    return cov


def _check_symmetric(covs: np.ndarray, name: str) -> None:
    """**Raises:** `ValueError` if not; NumPy would use one triangle without a word."""
    if not np.allclose(covs, np.swapaxes(covs, -1, -2)):
        raise ValueError(f"`{name}` must be symmetric; got {covs.tolist()}.")


def _diagonalise(c0: np.ndarray, c1: np.ndarray):
    """Returns both spectra in a common eigenbasis, and the basis."""
    scale = np.abs(c0).max() * np.abs(c1).max()
    if c0.shape != c1.shape or np.abs(c0 @ c1 - c1 @ c0).max() > 1e-6 * scale:
        raise ValueError(
            "`base_cov` and `target_cov` must have the same shape and commute. If they "
            "do not, integrate `GaussianMixtureVelocity` with `ODEFlowMap`."
        )
    # A generic combination separates eigenspaces that one matrix alone may merge.
    _, basis = np.linalg.eigh(c0 / np.abs(c0).max() + np.pi * c1 / np.abs(c1).max())
    spectra = tuple(np.einsum("ij,ik,kj->j", basis, c, basis) for c in (c0, c1))
    if min(spectrum.min() for spectrum in spectra) < -1e-8:
        raise ValueError("Covariances must be positive semi-definite.")
    return tuple(np.maximum(spectrum, 0) for spectrum in spectra), basis


class GaussianMixtureVelocity(eqx.Module):
    r"""The exact velocity from a Gaussian base to a mixture of Gaussians.

    $b_t(x) = \sum_k r_k(x)\,[\dot\beta m_k + (\alpha\dot\alpha\sigma_0^2 + \beta\dot\beta
    C_k + \gamma\dot\gamma)\,S_k^{-1}(x - \beta m_k)]$ with $S_k = \alpha^2\sigma_0^2 +
    \beta^2 C_k + \gamma^2$ and $r_k(x) \propto \pi_k \mathcal N(x; \beta m_k, S_k)$.

    **Arguments:**

    - `weights`: the weights $\pi_k$, positive, of shape `(components,)`. They are
      divided by their sum.
    - `means`: the means $m_k$, of shape `(components, d)`.
    - `covariances`: the covariances $C_k$, of shape `(components, d, d)`, or
      `(components,)` for the variances of isotropic components.
    - `interpolant`: any interpolant.
    - `base_std`: the standard deviation $\sigma_0$ of the base, positive.

    **Raises:** `ValueError` if the shapes do not match, a weight or `base_std` is not
    positive, or a covariance is not symmetric positive semi-definite.
    """

    log_weights: Array
    means: Array
    spectra: Array
    bases: Array
    interpolant: AbstractInterpolant
    base_std: Array

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        covariances: Numbers,
        interpolant: AbstractInterpolant = LinearInterpolant(),
        base_std: Numbers = 1.0,
    ):
        weights = np.asarray(weights, float)
        means, covariances = np.asarray(means, float), np.asarray(covariances, float)
        check_positive(base_std, "base_std")
        if means.ndim != 2:
            raise ValueError(
                f"`means` must have shape (components, d); got {means.shape}."
            )
        components, size = means.shape
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * np.eye(size)
        if weights.shape != (components,) or not weights.min() > 0:
            raise ValueError(f"Expected {components} positive weights; got {weights}.")
        if covariances.shape != (components, size, size):
            raise ValueError(
                f"`covariances` must be {(components, size, size)} or {(components,)}; "
                f"got {covariances.shape}."
            )
        _check_symmetric(covariances, "covariances")
        # The base is isotropic, so each component keeps the axes of its target.
        spectra, bases = np.linalg.eigh(covariances)
        if spectra.min() < -1e-8 * np.abs(spectra).max():
            raise ValueError("Covariances must be positive semi-definite.")
        self.log_weights = jnp.asarray(np.log(weights / weights.sum()))
        self.means = jnp.asarray(means)
        self.spectra = jnp.asarray(np.maximum(spectra, 0))
        self.bases = jnp.asarray(bases)
        self.interpolant = interpolant
        self.base_std = jnp.asarray(base_std, float)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        del args
        (t,) = times_like(x, t)
        cast = lambda value: value.astype(x.dtype)
        alpha, beta, gamma = map(cast, self.interpolant.coefficients(t))
        d_alpha, d_beta, d_gamma = map(cast, self.interpolant.rates(t))
        means, spectra, bases = cast(self.means), cast(self.spectra), cast(self.bases)
        variance = cast(self.base_std) ** 2

        spread = alpha**2 * variance + gamma**2 + beta**2 * spectra
        growth = alpha * d_alpha * variance + gamma * d_gamma + beta * d_beta * spectra
        # Along the axes of each component.
        centred = jnp.einsum("kji,kj->ki", bases, x[None] - beta * means)
        log_density = -jnp.sum(centred**2 / spread + jnp.log(spread), axis=-1) / 2
        responsibility = jax.nn.softmax(cast(self.log_weights) + log_density)
        moved = jnp.einsum("kij,kj->ki", bases, growth * centred / spread)
        return responsibility @ (d_beta * means + moved)
