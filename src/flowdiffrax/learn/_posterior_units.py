from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
import jax.scipy.stats as jss
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._types import Scalar
from ..nn._sets import check_set, mean_of_rows
from ._simulations import Simulations, read_simulations

# Of the regression, in units of the number of simulations; the last leaves the mean only.
_PENALTIES = 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf


class PosteriorUnits(eqx.Module):
    r"""Units in which a posterior is about standard normal, and how observations enter.

    A parameter with two finite bounds becomes $w = \Phi^{-1}((\theta - a) / (b - a))$,
    with one bound its logarithm; a uniform prior is then normal. What a linear regression
    on the observation predicts is taken away, and the rest is whitened:
    $z = L^{-1}(w - C^\top f(x))$. The features $f$ are the entries of $x$ in units of
    their standard deviation; for a set, the mean of its rows, and the logarithm of one
    plus their number. If all is linear and Gaussian, $z$ is standard normal and
    independent of $x$, and there is nothing left to learn.

    Methods take one example; use `jax.vmap` for a batch.

    **Attributes:**

    - `low`, `high`: the bounds of each parameter, which may be infinite.
    - `coefficients`: $C$, whose first row is the constant.
    - `cholesky`: $L$.
    - `x_mean`, `x_std`: of each entry of an observation, or of a row of a set.
    - `x_whitening`: the inverse of the Cholesky factor of the features' covariance.
    - `x_limit`: the largest distance of a simulated observation from their mean.
    - `row_counts`: the least and the largest number of rows of a set; `None` for vectors.
    """

    low: Float[Array, " size"]
    high: Float[Array, " size"]
    coefficients: Float[Array, "features size"]
    cholesky: Float[Array, "size size"]
    x_mean: Float[Array, " x_size"]
    x_std: Float[Array, " x_size"]
    x_whitening: Float[Array, "x_features x_features"]
    x_centre: Float[Array, " x_features"]
    x_limit: Float[Array, ""]
    row_counts: tuple[int, int] | None = eqx.field(static=True)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return len(self.low)

    @property
    def x_size(self) -> int:
        """The length of an observation, or of a row of a set."""
        return len(self.x_mean)

    def args(self, x: Any, mask: Any = None) -> Any:
        """An observation as the `args` of the flow map, in float32.

        **Arguments:**

        - `x`: an observation: a vector, or a set of shape `(rows, size)`.
        - `mask`: which rows of a set are there; `None` for all.

        **Returns:** a vector, or for sets the pair of rows and mask.

        **Raises:** `ValueError` for an observation of another shape.
        """
        standard, mask = self._standardised(x, mask)
        standard = standard.astype(jnp.float32)
        return standard if self.row_counts is None else (standard, mask)

    def to_state(
        self, theta: Float[ArrayLike, " size"], x: Any, mask: Any = None
    ) -> tuple[Float[Array, " size"], Scalar]:
        r"""Returns $z$, and $\log |\det \partial z / \partial \theta|$.

        **Arguments:**

        - `theta`: the parameters. The logarithm is $-\infty$ outside of the bounds.
        - `x`, `mask`: as for `args`.
        """
        theta = jnp.asarray(theta, self.low.dtype)
        w, log_rates = _unbounded(theta, self.low, self.high)
        z = jax.scipy.linalg.solve_triangular(
            self.cholesky, w - self._predicted(x, mask), lower=True
        )
        log_scale = jnp.sum(jnp.log(jnp.diagonal(self.cholesky)))
        return z, jnp.sum(log_rates) - log_scale

    def to_theta(
        self, z: Float[ArrayLike, " size"], x: Any, mask: Any = None
    ) -> Float[Array, " size"]:
        """The parameters of a state.

        **Arguments:**

        - `z`: the state.
        - `x`, `mask`: as for `args`.
        """
        z = jnp.asarray(z, self.low.dtype)
        w = self.cholesky @ z + self._predicted(x, mask)
        return _bounded(w, self.low, self.high)

    def distance(self, x: Any, mask: Any = None) -> Scalar:
        """How far an observation is from the mean of those simulated.

        It is the Mahalanobis distance of its features. `x_limit` is the largest among
        the simulations.

        **Arguments:**

        - `x`, `mask`: as for `args`.
        """
        features = self._features(x, mask)[1:]
        return jnp.linalg.norm(self.x_whitening @ (features - self.x_centre))

    def _predicted(self, x: Any, mask: Any) -> Float[Array, " size"]:
        return self._features(x, mask) @ self.coefficients

    def _features(self, x: Any, mask: Any) -> Float[Array, " features"]:
        standard, mask = self._standardised(x, mask)
        if self.row_counts is not None:
            standard = jnp.append(*mean_of_rows(standard, mask))
        return jnp.append(jnp.ones(1, standard.dtype), standard)

    def _standardised(self, x: Any, mask: Any) -> tuple[Array, Any]:
        x = jnp.asarray(x, self.x_mean.dtype)
        if self.row_counts is not None:
            x, mask = check_set(x, mask, self.x_size)
            mean, std = self.x_mean[None], self.x_std[None]
            return jnp.where(mask[:, None], (x - mean) / std, 0), mask
        if x.shape != (self.x_size,):
            raise ValueError(
                f"An observation has shape ({self.x_size},), as in the simulations; got "
                f"{x.shape}. For several observations, use `jax.vmap` or a loop."
            )
        return (x - self.x_mean) / self.x_std, None

    @classmethod
    def of(
        cls, thetas: ArrayLike, xs: Any, mask: Any = None, bounds: Any = None
    ) -> "PosteriorUnits":
        """Finds units from simulations.

        How much the regression is shrunk is what predicts a tenth of them best, which is
        held out.

        **Arguments:** `thetas`, `xs`, `mask` and `bounds` as for
        [`flowdiffrax.learn.learn_posterior`][], with the same errors.
        """
        simulations = read_simulations(thetas, xs, mask)
        cut = len(simulations.thetas) // 10
        held_out, rest = (simulations.take(s) for s in (slice(cut), slice(cut, None)))
        return find_units(rest, held_out, bounds)

    @classmethod
    def empty(
        cls, size: int, x_size: int, row_counts: tuple[int, int] | None
    ) -> "PosteriorUnits":
        num = x_size + (row_counts is not None)
        dtype = jnp.result_type(float)
        zeros, eye = (lambda *shape: jnp.zeros(shape, dtype)), jnp.eye
        return cls(
            zeros(size),
            zeros(size),
            zeros(num + 1, size),
            eye(size, dtype=dtype),
            zeros(x_size),
            zeros(x_size),
            eye(num, dtype=dtype),
            zeros(num),
            zeros(),
            row_counts,
        )

    def _pairs(self, simulations: Simulations) -> tuple[np.ndarray, np.ndarray]:
        """The features and the unbounded parameters of each simulation."""
        w = lambda theta: _unbounded(theta, self.low, self.high)[0]
        thetas = jnp.asarray(simulations.thetas, self.low.dtype)
        given = simulations.xs, simulations.mask
        axes = 0, None if simulations.mask is None else 0
        features = jax.jit(jax.vmap(self._features, axes))(*given)
        return np.asarray(features, float), np.asarray(
            jax.jit(jax.vmap(w))(thetas), float
        )


def find_units(
    simulations: Simulations, held_out: Simulations, bounds: Any
) -> PosteriorUnits:
    """Finds units from simulations, shrunk to what predicts those held out best.

    **Raises:** `ValueError` for bounds that do not rise, or simulations outside.
    """
    size = simulations.thetas.shape[1]
    low, high = _as_bounds(bounds, simulations.thetas)
    xs, mask = simulations.xs, simulations.mask
    rows = xs if mask is None else xs[mask]
    std = rows.std(0)
    # An entry that never varies tells nothing.
    std = np.where(std > 1e-12 * np.abs(rows.mean(0)), std, 1)
    counts = None
    if mask is not None:
        counts = int(mask.sum(1).min()), int(mask.sum(1).max())
    units = PosteriorUnits.empty(size, xs.shape[-1], counts)
    first = {"low": low, "high": high, "x_mean": rows.mean(0), "x_std": std}
    units = _replace(units, first)
    features, ws = units._pairs(simulations)
    coefficients = _regression(features, ws, *units._pairs(held_out))
    rest = ws - features @ coefficients
    covariance = rest.T @ rest / len(rest)
    # Parameters that an observation shows almost exactly may have no spread left.
    floor = 1e-8 * np.diag(ws.var(0))
    cholesky = np.linalg.cholesky(covariance + floor)
    centre = features[:, 1:].mean(0)
    num = features.shape[1] - 1
    covariance = np.cov(features[:, 1:].T, ddof=0).reshape(num, num)
    # Entries that depend on others almost exactly are not trusted to the last digit.
    whitening = np.linalg.inv(np.linalg.cholesky(covariance + 1e-4 * np.eye(num)))
    limit = np.linalg.norm((features[:, 1:] - centre) @ whitening.T, axis=1).max()
    found = {"coefficients": coefficients, "cholesky": cholesky}
    found |= {"x_whitening": whitening, "x_centre": centre, "x_limit": limit}
    return _replace(units, found)


def _replace(units: PosteriorUnits, values: dict[str, Any]) -> PosteriorUnits:
    where = lambda units: [getattr(units, name) for name in values]
    dtype = jnp.result_type(float)
    return eqx.tree_at(where, units, [jnp.asarray(v, dtype) for v in values.values()])


def _regression(
    features: np.ndarray, ws: np.ndarray, test_features: np.ndarray, test_ws: np.ndarray
) -> np.ndarray:
    """Ridge regression, with the penalty of least error in the tests for each entry."""
    mean = ws.mean(0)
    rows = features[:, 1:]
    centre = rows.mean(0)
    gram = (rows - centre).T @ (rows - centre) / len(rows)
    moment = (rows - centre).T @ (ws - mean) / len(rows)
    found, errors = [], []
    for penalty in _PENALTIES:
        slopes = np.zeros_like(moment)
        if np.isfinite(penalty):
            slopes = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
        found.append(np.concatenate([[mean - centre @ slopes], slopes]))
        errors.append(((test_ws - test_features @ found[-1]) ** 2).mean(0))
    best = np.argmin(errors, axis=0)
    return np.stack([found[index][:, entry] for entry, index in enumerate(best)], axis=1)


def _as_bounds(bounds: Any, thetas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = thetas.shape[1]
    bounds = (-np.inf, np.inf) if bounds is None else bounds
    try:
        low, high = (np.asarray(each, float) for each in bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`bounds` must be a pair `(low, high)` of numbers or arrays; got {bounds!r}."
        ) from error
    if {low.shape, high.shape} - {(), (size,)}:
        raise ValueError(
            f"Bounds are numbers, or arrays with one for each of the {size} parameters; "
            f"got shapes {low.shape} and {high.shape}."
        )
    low, high = np.broadcast_to(low, (size,)), np.broadcast_to(high, (size,))
    if not (low < high).all():
        raise ValueError(f"`bounds` must rise; got {low} and {high}.")
    outside = ((thetas < low) | (thetas > high)).any(1)
    if outside.any():
        raise ValueError(
            f"{outside.sum():,} of {len(thetas):,} simulations have parameters outside "
            f"of `bounds`, such as {thetas[outside][0]}. Pass the bounds of the prior "
            "that they were drawn from."
        )
    return low, high


def _kinds(low: Array, high: Array) -> tuple[Bool[Array, " size"], ...]:
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    return has_low & has_high, has_low & ~has_high, ~has_low & has_high


def _unbounded(theta: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Parameters without bounds, and the logarithm of their rate; -inf outside."""
    eps = jnp.finfo(theta.dtype).eps
    both, below, above = _kinds(low, high)
    width = jnp.where(both, high - low, 1)
    share = jnp.where(both, (theta - low) / width, 0.5)
    # Simulations may lie on the bound itself.
    normal = jsp.ndtri(jnp.clip(share, eps, 1 - eps))
    distance = jnp.where(below, theta - low, jnp.where(above, high - theta, 1))
    logarithm = jnp.log(jnp.maximum(distance, jnp.finfo(theta.dtype).tiny))
    one_sided = jnp.where(above, -logarithm, logarithm)
    w = jnp.where(both, normal, jnp.where(below | above, one_sided, theta))
    rate = jnp.where(both, -jss.norm.logpdf(normal) - jnp.log(width), -logarithm)
    rate = jnp.where((theta < low) | (theta > high), -jnp.inf, rate)
    return w, rate


def _bounded(w: Array, low: Array, high: Array) -> Array:
    both, below, above = _kinds(low, high)
    finite = lambda bound: jnp.where(jnp.isfinite(bound), bound, 0)
    inside = finite(low) + (finite(high) - finite(low)) * jsp.ndtr(w)
    grown = jnp.exp(jnp.where(below, w, jnp.where(above, -w, 0)))
    one_sided = jnp.where(above, finite(high) - grown, finite(low) + grown)
    return jnp.where(both, inside, jnp.where(below | above, one_sided, w))
