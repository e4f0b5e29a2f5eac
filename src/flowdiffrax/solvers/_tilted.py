"""Samples of a distribution tilted by a reward, steered by the map's look-ahead."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Key, Real

from .._check import (
    check_between,
    check_callable,
    check_instance,
    check_key,
    check_like,
    check_positive,
    check_scalar,
)
from .._time import time_dtype
from .._tree import is_concrete, num_rows, ravel
from .._types import Args, Scalar, State
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._inverse import check_composable
from ..paths._base import AbstractInterpolant, Coefficient
from ._sample import check_finite_state, check_grid, make_grid


def _quadratic(t: Array) -> Array:
    return t**2


class TiltedSamples(NamedTuple):
    r"""Weighted samples from [`flowdiffrax.solvers.sample_tilted`][].

    For draws of equal weight, use
    `jax.random.choice(key, x, (n,), p=jax.nn.softmax(log_weights))`.

    **Attributes:**

    - `x`: the samples at time 1, like `x0`.
    - `log_weights`: their log-weights. The mean of $e^w f(x)$ estimates
      $E_{p_1}[e^r f]$; divided by the mean of $e^w$, it estimates the tilted expectation.
    - `log_normaliser`: the logarithm of the mean of $e^w$, which estimates
      $\log E_{p_1}[e^r]$.
    - `effective_sizes`: the effective number of samples, $(\sum e^w)^2 / \sum e^{2w}$,
      after each jump and before resampling. The last one belongs to `log_weights`. A
      small number on the way means that few of the samples had descendants.
    - `acceptance`: the share of Langevin moves that were accepted, after each jump but
      the last.
    """

    x: State
    log_weights: Float[Array, " particles"]
    log_normaliser: Scalar
    effective_sizes: Float[Array, " jumps"]
    acceptance: Float[Array, " moves"]


class _Particle(NamedTuple):
    """A state at time t as a vector, and what a Langevin move needs at it."""

    x: Float[Array, " size"]
    reward: Scalar  # r(X_{t,1}(x))
    gradient: Float[Array, " size"]  # of that in x
    signal: Float[Array, " size"]  # the mean of beta_t x_1, given I_t = x


class _Level(NamedTuple):
    """The scalars of a Langevin move at time t."""

    tilt: Scalar
    noise_std: Scalar  # the standard deviation of I_t, given x_1
    share: Scalar  # of that variance, how much a move draws anew


def sample_tilted(
    flow_map: AbstractFlowMap,
    interpolant: AbstractInterpolant,
    reward: Callable[[State, Args], Scalar],
    x0: State,
    ts: int | np.integer | Real[ArrayLike, " times"],
    args: Args = None,
    *,
    key: Key[Array, ""],
    noise: ArrayLike = 1.0,
    tilt: Coefficient = _quadratic,
    resample_below: ArrayLike = 0.5,
    base_std: ArrayLike = 1.0,
) -> TiltedSamples:
    r"""Samples $\tilde p(x) \propto p_1(x)\,e^{r(x)}$, where the map samples $p_1$.

    The reward $r$ can be the log-likelihood of a measurement, so that $\tilde p$ is the
    posterior with $p_1$ as the prior. Nothing is trained.

    Many particles pass through the densities
    $q_t \propto p_t(x)\,e^{\lambda_t r(X_{t,1}(x))}$, in which the map looks ahead to
    the data. After each jump, the change of $\lambda_t r(X_{t,1}(x))$ is added to the
    log-weights, particles are resampled if the weights are uneven, and each takes a
    Langevin move in $q_t$ along the score and the gradient of the reward.

    !!! info "Numerics"

        The score $\nabla \log p_t$ comes from the map's velocity. A move is accepted or
        rejected by the trapezoidal rule for $\log p_t$ and the exact change of the
        reward, and is shorter where the gradient is large. The error that remains falls
        with the number of jumps, and is zero if all $p_t$ are Gaussian. A jump costs
        three map evaluations, two of them with a gradient, and two velocities.

    **Arguments:**

    - `flow_map`: the map, over [0, 1]. It needs a correct velocity and correct jumps to
      the data.
    - `interpolant`: the interpolant that the map was trained with, between a Gaussian
      base and independent data. A latent is allowed.
    - `reward`: a differentiable function `(x1, args) -> r`, finite everywhere.
    - `x0`: draws of the base, with a leading axis.
    - `ts`: the number of equal jumps, or a grid of times that rises from 0 to 1.
    - `args`: passed to the map and the reward, the same for all particles.
    - `key`: a random key.
    - `noise`: the rate of the Langevin moves, positive. With 1, they draw as much noise
      as a diffusion model does between the same times.
    - `tilt`: the schedule $\lambda$, a function of a scalar time with $\lambda_0 = 0$ and
      $\lambda_1 = 1$. The default, $t^2$, tilts most near the data, where moves change
      the look-ahead little.
    - `resample_below`: resample if the effective number of particles is below this share
      of their number. 0 never resamples.
    - `base_std`: the standard deviation of the base.

    **Returns:** [`flowdiffrax.solvers.TiltedSamples`][].

    **Raises:** `TypeError` if `flow_map` or `interpolant` is not one, or for complex
    states or rewards; `RuntimeError` at run time if a reward is not finite; `ValueError`
    if the reward is not a scalar, `x0` is not finite, the times do not rise from 0 to 1,
    `tilt` has other values at the ends, or a setting is out of range. Traced times and
    settings are checked at run time.

    ??? cite "Reference"

        Flow map trajectory tilting, [arXiv:2511.22688](https://arxiv.org/abs/2511.22688).
        The weights are those of annealed importance sampling, which resampling turns
        into sequential Monte Carlo, and the moves are Metropolis-adjusted Langevin.
    """
    check_composable(flow_map)
    what = "an `AbstractFlowMap`, whose velocity gives the score"
    check_instance(flow_map, AbstractFlowMap, "flow_map", what)
    check_instance(interpolant, AbstractInterpolant, "interpolant")
    check_callable(reward, "reward", "reward(x, args)")
    check_callable(tilt, "tilt", "tilt(t)")
    check_key(key)
    for name, number in (("noise", noise), ("base_std", base_std)):
        check_scalar(number, name)
        check_positive(number, name)
    check_between(resample_below, 0, 1, "resample_below")
    number = num_rows(x0, "`x0`")
    x0 = jtu.tree_map(jnp.asarray, x0)
    check_finite_state(x0)
    grid = _rising_grid(flow_map, ts)
    resample_below = _traced(
        resample_below,
        lambda share: (share >= 0) & (share <= 1),
        "`resample_below` must be in [0, 1].",
    )
    noise, base_std = (
        _traced(number, lambda number: number > 0, f"`{name}` must be positive.")
        for name, number in (("noise", noise), ("base_std", base_std))
    )

    # States are vectors here, in the precision of the times.
    dtype = time_dtype(x0)
    flatten = lambda x: ravel(x, "`sample_tilted`")[0]
    own, unravel = ravel(jtu.tree_map(lambda leaf: leaf[0], x0), "`sample_tilted`")
    as_vector = lambda x: flatten(x).astype(dtype)
    as_state = lambda x: unravel(x.astype(own.dtype))
    grid = _with_tilt_checked(jnp.asarray(grid, dtype), tilt)
    noise, base_std = jnp.asarray(noise, dtype), jnp.asarray(base_std, dtype)

    def jump(s, t, x):
        x = as_state(x)
        return as_vector(check_like(flow_map(s, t, x, args), x, "`flow_map`"))

    def reward_of(x):
        return _as_reward(reward(as_state(x), args)).astype(dtype)

    def noise_and_beta(t):
        alpha, beta, gamma = interpolant.coefficients(t)
        return jnp.sqrt((alpha * base_std) ** 2 + gamma**2), beta

    def look_ahead(t, x):
        ahead = lambda x: reward_of(jump(t, jnp.ones_like(t), x))
        value, gradient = jax.value_and_grad(ahead)(x)
        b = as_vector(flow_map.velocity(t, as_state(x), args))
        # Two equations: x = beta eta + (x - beta eta), and b = d_beta eta +
        # d_std / std (x - beta eta), for the denoiser eta.
        (std, beta), (d_std, d_beta) = jax.jvp(noise_and_beta, (t,), (jnp.ones_like(t),))
        eta = (std * b - d_std * x) / (std * d_beta - d_std * beta)
        return _Particle(x, value, gradient, beta * eta)

    def step(carry, inputs):
        x, potential, log_weights = carry
        s, t, key = inputs
        keys = jr.split(key, 3)
        particles = jax.vmap(look_ahead, (None, 0))(
            t, jax.vmap(jump, (None, None, 0))(s, t, x)
        )
        level = _level(noise_and_beta, s, t, noise, jnp.asarray(tilt(t), dtype))
        log_weights = log_weights + level.tilt * particles.reward - potential
        size = effective_size(log_weights)
        uneven = size < resample_below * number
        index, log_weights = _resample(keys[0], log_weights, uneven)
        particles = jtu.tree_map(lambda leaf: leaf[index], particles)
        move = lambda particle, z, e: _move(
            particle, level, z, e, lambda x: look_ahead(t, x)
        )
        z = jr.normal(keys[1], x.shape, dtype)
        e = jr.exponential(keys[2], (number,), dtype)
        particles, accepted = jax.vmap(move)(particles, z, e)
        carry = particles.x, level.tilt * particles.reward, log_weights
        return carry, (size, jnp.mean(accepted, dtype=dtype))

    x, zeros = jax.vmap(as_vector)(x0), jnp.zeros(number, dtype)
    keys = jr.split(key, grid.shape[0] - 2)
    (x, potential, log_weights), (sizes, acceptance) = lax.scan(
        step, (x, zeros, zeros), (grid[:-2], grid[1:-1], keys)
    )
    # At the data nothing is ahead, and there is no noise left to move in.
    x = jax.vmap(jump, (None, None, 0))(grid[-2], grid[-1], x)
    log_weights = log_weights + jax.vmap(reward_of)(x) - potential
    log_weights = eqx.error_if(
        log_weights,
        ~jnp.isfinite(log_weights).all(),
        "`reward` was not finite at a look-ahead. Replace a hard constraint by a steep "
        "penalty, and look for NaNs in `x0` and in the map.",
    )
    sizes = jnp.append(sizes, effective_size(log_weights))
    log_normaliser = log_mean_exp(log_weights)
    x = jax.vmap(as_state)(x)
    return TiltedSamples(x, log_weights, log_normaliser, sizes, acceptance)


def _level(
    noise_and_beta: Callable, s: Scalar, t: Scalar, noise: Scalar, tilt: Scalar
) -> _Level:
    (std_s, beta_s), (std, beta) = noise_and_beta(s), noise_and_beta(t)
    # The move draws as much noise as the diffusion would from s to t. At the base, where
    # `beta_s` is zero, that is all of it.
    kept = jnp.minimum((std * beta_s) / (std_s * beta), 1)
    return _Level(tilt, std, 1 - kept ** (2 * noise))


def _move(
    start: _Particle,
    level: _Level,
    z: Float[Array, " size"],
    e: Scalar,
    look_ahead: Callable[[Array], _Particle],
) -> tuple[_Particle, Bool[Array, ""]]:
    """One Langevin move in the tilted density, accepted or rejected.

    `z` is a standard normal draw, and `e` an exponential one.
    """
    variance, size = level.noise_std**2, start.x.size

    def proposal(at: _Particle):
        # Given the signal, x - signal is noise, and relaxes as an Ornstein-Uhlenbeck
        # process: stable for any share.
        drift = level.tilt * at.gradient
        # Where the drift is longer than the noise, move less.
        steep = level.share * variance * jnp.sum(drift**2) / size
        share = level.share / (1 + steep)
        kept = jnp.sqrt(1 - share)
        mean = kept * at.x + (1 - kept) * (at.signal + variance * drift)
        return mean, level.noise_std * jnp.sqrt(share)

    def log_kernel(at: _Particle, x):
        mean, std = proposal(at)
        return -jnp.sum(((x - mean) / std) ** 2) / 2 - size * jnp.log(std)

    mean, std = proposal(start)
    end = look_ahead(mean + std * z)
    # The trapezoidal rule for the change of log p_t.
    scores = (start.signal - start.x + end.signal - end.x) / variance
    log_ratio = jnp.dot(scores, end.x - start.x) / 2
    log_ratio = log_ratio + level.tilt * (end.reward - start.reward)
    log_ratio = log_ratio + log_kernel(end, start.x) - log_kernel(start, end.x)
    # False for NaN, so that a move of no length is rejected.
    accepted = -e <= log_ratio
    select = lambda new, old: jnp.where(accepted, new, old)
    return jtu.tree_map(select, end, start), accepted


def log_mean_exp(log_weights: Float[Array, " particles"]) -> Scalar:
    """The logarithm of the mean weight."""
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.size)


def effective_size(log_weights: Float[Array, " particles"]) -> Scalar:
    """The number of equal weights with the same variance of a mean."""
    total = jax.nn.logsumexp(log_weights)
    return jnp.exp(2 * total - jax.nn.logsumexp(2 * log_weights))


def _resample(
    key: Key[Array, ""], log_weights: Float[Array, " particles"], uneven: Bool[Array, ""]
) -> tuple[Array, Float[Array, " particles"]]:
    """Systematic resampling, if the weights are uneven. It keeps their mean."""
    number = log_weights.size
    own = jnp.arange(number)
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights))
    points = own.astype(cumulative.dtype) + jr.uniform(key, (), cumulative.dtype)
    drawn = jnp.searchsorted(cumulative, points / number * cumulative[-1])
    index = jnp.where(uneven, jnp.minimum(drawn, number - 1).astype(own.dtype), own)
    return index, jnp.where(uneven, log_mean_exp(log_weights), log_weights)


def _as_reward(value: ArrayLike) -> Array:
    check_scalar(value, "reward(x, args)")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`reward` must return a real floating-point number; got {value.dtype}."
        )
    return value


def _traced(value: Any, is_right: Callable[[Array], Array], message: str) -> Any:
    """`value`, with an error at run time if it is traced and not right."""
    return value if is_concrete(value) else eqx.error_if(value, ~is_right(value), message)


def _with_tilt_checked(
    grid: Float[Array, " times"], tilt: Coefficient
) -> Float[Array, " times"]:
    """**Raises:** `TypeError` or `ValueError` unless `tilt` is a number, from 0 to 1."""
    with jax.ensure_compile_time_eval():
        ends = [tilt(jnp.asarray(0.0)), tilt(jnp.asarray(1.0))]
    for end in ends:
        check_scalar(end, "tilt(t)")
    message = "`tilt` must be 0 at t = 0 and 1 at t = 1"
    if is_concrete(ends):
        if not np.allclose(np.asarray(ends), [0, 1], atol=1e-5):
            raise ValueError(f"{message}; got {ends[0]:g} and {ends[1]:g}.")
        return grid
    is_right = (jnp.abs(ends[0]) <= 1e-5) & (jnp.abs(ends[1] - 1) <= 1e-5)
    return eqx.error_if(grid, ~is_right, f"{message}.")


def _rising_grid(flow_map: AbstractFlowMap, ts) -> Real[ArrayLike, " times"]:
    grid = make_grid(flow_map, ts)
    message = "`ts` must rise from 0 to 1, from the base to the data"
    if is_concrete(grid):
        known = np.asarray(grid)
        check_grid(flow_map, known)
        if not np.allclose(known[[0, -1]], [0, 1], atol=1e-6):
            raise ValueError(f"{message}; got {known[0]:g} to {known[-1]:g}.")
        return grid

    check_grid(flow_map, np.asarray([0.0, 1.0]))

    def is_right(grid):
        rises = jnp.all(jnp.diff(grid) > 0)
        return rises & (jnp.abs(grid[0]) <= 1e-6) & (jnp.abs(grid[-1] - 1) <= 1e-6)

    return _traced(grid, is_right, f"{message}.")
