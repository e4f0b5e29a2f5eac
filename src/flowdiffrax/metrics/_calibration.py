import dataclasses
from collections.abc import Callable
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Key

from .._check import check_callable, check_count

# Below this probability, a deviation is reported.
_RARE = 0.01


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of [`flowdiffrax.metrics.calibrate`][].

    **Attributes:**

    - `ranks`: for each simulation and parameter, how many samples are below the truth.
    - `num_samples`: how many samples there were for each simulation.
    - `shares`: for each simulation, the share of the samples that are closer to a random
      point than the truth is (TARP). The share of simulations below $c$ is the coverage
      of regions with the probability $c$.
    - `p_values`: for each parameter, the probability that ranks of an exact posterior are
      as far from uniform.
    - `tarp_p_value`: the same for `shares`.
    - `predicted`: for each entry of an observation, the share of simulations for which it
      lies within the central 90 % of what is predicted from the samples; `None` without
      a simulator. An exact posterior has about 90 % or more, since it has seen the
      observation.
    """

    ranks: Integer[np.ndarray, "simulations size"]
    num_samples: int
    shares: Float[np.ndarray, " simulations"]
    p_values: Float[np.ndarray, " size"]
    tarp_p_value: float
    predicted: Float[np.ndarray, " x_size"] | None

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing was noticed, at a level of 1 % for all tests together."""
        p_values = np.append(self.p_values, self.tarp_p_value)
        return bool(p_values.min() * len(p_values) > _RARE)

    def coverage(self, level: float) -> float:
        """The share of simulations whose truth is in the region of this probability.

        **Arguments:**

        - `level`: the probability of the regions, which are balls around random points.
        """
        return float(np.mean(self.shares < level))

    def __str__(self) -> str:
        u = as_shares(self.ranks, self.num_samples)
        lines = ["parameter  p-value  mean rank  spread  posterior is"]
        # Of uniform numbers, the variances of the mean and of the variance.
        num = len(u)
        shift = (u.mean(0) - 0.5) * np.sqrt(12 * num)
        width = (u.var(0) * 12 - 1) / np.sqrt(0.8 / num)
        for index, p_value in enumerate(self.p_values):
            words = []
            if p_value * (len(self.p_values) + 1) <= _RARE:
                if abs(shift[index]) > 3:
                    words.append("too low" if shift[index] > 0 else "too high")
                if abs(width[index]) > 3:
                    words.append("too narrow" if width[index] > 0 else "too wide")
                words = words or ["of another shape"]
            spread = np.sqrt(12 * u[:, index].var())
            numbers = f"{p_value:>8.3f} {u[:, index].mean():>10.3f} {spread:>7.3f}"
            lines.append(f"{index:>9} {numbers}  {', '.join(words) or 'calibrated'}")
        covered = ", ".join(f"{c:.0%}: {self.coverage(c):.1%}" for c in (0.5, 0.9))
        lines.append(f"TARP p-value {self.tarp_p_value:.3f}; coverage of {covered}")
        if self.predicted is not None:
            low = self.predicted.min()
            lines.append(f"observed within 90 % of predictions: at least {low:.1%}")
        return "\n".join(lines)


def calibrate(
    draw: Callable[[Key[Array, ""], Any, int], ArrayLike],
    thetas: ArrayLike,
    xs: Any,
    *,
    key: Key[Array, ""],
    num_samples: int = 200,
    simulate: Callable[[np.ndarray], ArrayLike] | None = None,
) -> Calibration:
    r"""Compares a posterior with simulations that it was not learned from.

    If parameters come from the prior, and observations from these, the parameters are
    distributed as a sample of the posterior of their observation. Three checks follow:

    - **ranks** (simulation-based calibration): the rank of the true parameter among the
      samples is uniform. Ranks at both ends mean that the posterior is too narrow, and
      ranks in the middle that it is too wide.
    - **coverage** (TARP): the share of samples closer to a random point than the truth is
      uniform, for all parameters at once. Ranks of single parameters cannot see a wrong
      correlation; coverage can, with enough simulations.
    - **predictions**, if there is a simulator: observations made from the samples are
      like the one that the samples are for.

    Deviations from uniform are found by the test of Kolmogorov and Smirnov. None of the
    checks can see that a posterior ignores its observation: that of the prior passes.

    **Arguments:**

    - `draw`: a function `(key, x, num_samples) -> thetas`, such as
      [`flowdiffrax.learn.LearnedPosterior.sample`][].
    - `thetas`: the parameters of the simulations, of shape `(simulations, size)`.
    - `xs`: their observations: an array with a leading axis, or a list.
    - `key`: a random key.
    - `num_samples`: how many samples to draw for each simulation, at least 2.
    - `simulate`: a function from parameters, of shape `(samples, size)`, to observations,
      of shape `(samples, x_size)`; `None` to make no predictions.

    **Returns:** a [`flowdiffrax.metrics.Calibration`][]; print it, or draw it with
    [`flowdiffrax.plot.calibration`][].

    **Raises:** `ValueError` for fewer than 20 simulations, parameters and observations of
    different numbers, samples of another shape, or samples that are not finite.

    ??? cite "Reference"

        Ranks: [arXiv:1804.06788](https://arxiv.org/abs/1804.06788); coverage:
        [arXiv:2302.03026](https://arxiv.org/abs/2302.03026).
    """
    check_callable(draw, "draw", "draw(key, x, num_samples)")
    check_count(num_samples, 2, "num_samples")
    thetas = np.asarray(thetas, float)
    if thetas.ndim != 2 or len(thetas) < 20 or len(thetas) != len(xs):
        raise ValueError(
            "At least 20 simulations are needed, each with a row of `thetas` and an "
            f"entry of `xs`; got shape {thetas.shape} and {len(xs)} entries."
        )
    draw_key, point_key, tie_key = jr.split(key, 3)
    scale = thetas.std(0)
    # A point that is drawn for each simulation anew, from the range of the parameters.
    uniform = np.asarray(jr.uniform(point_key, thetas.shape), float)
    points = thetas.min(0) + np.ptp(thetas, axis=0) * uniform
    ranks = np.zeros(thetas.shape, int)
    shares, within = np.zeros(len(thetas)), []
    for index, (theta, x) in enumerate(zip(thetas, xs, strict=True)):
        samples = np.asarray(draw(jr.fold_in(draw_key, index), x, num_samples), float)
        if samples.shape != (num_samples, len(theta)) or not np.isfinite(samples).all():
            raise ValueError(
                f"`draw` must return finite samples of shape {(num_samples, len(theta))};"
                f" got shape {samples.shape}, {np.isnan(samples).any(-1).sum()} with NaN."
            )
        ranks[index] = np.sum(samples < theta, axis=0)
        distance = lambda row, index=index: np.linalg.norm(
            (row - points[index]) / scale, axis=-1
        )
        shares[index] = np.mean(distance(samples) < distance(theta))
        if simulate is not None:
            low, high = np.quantile(np.asarray(simulate(samples)), (0.05, 0.95), axis=0)
            within.append((low <= np.asarray(x)) & (np.asarray(x) <= high))
    # Ties of ranks are broken at random, so that an exact posterior is exactly uniform.
    ties = np.asarray(jr.uniform(tie_key, (len(thetas), thetas.shape[1] + 1)), float)
    u = (np.append(ranks, shares[:, None] * num_samples, axis=1) + ties) / (
        num_samples + 1
    )
    *p_values, tarp_p_value = map(_uniform_p_value, u.T)
    return Calibration(
        ranks=ranks,
        num_samples=num_samples,
        shares=shares,
        p_values=np.asarray(p_values),
        tarp_p_value=tarp_p_value,
        predicted=np.mean(within, axis=0) if within else None,
    )


def as_shares(ranks: np.ndarray, num_samples: int) -> Float[np.ndarray, "..."]:
    """Ranks on a scale from 0 to 1."""
    return (ranks + 0.5) / (num_samples + 1)


def _uniform_p_value(u: np.ndarray) -> float:
    """The probability of a larger distance from the uniform distribution."""
    num, u = len(u), np.sort(u)
    above = np.max(np.arange(1, num + 1) / num - u)
    below = np.max(u - np.arange(num) / num)
    # Stephens' correction of the limit for many numbers.
    distance = max(above, below) * (np.sqrt(num) + 0.12 + 0.11 / np.sqrt(num))
    k = np.arange(1, 101)
    value = 2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * distance) ** 2))
    return float(np.clip(value, 0, 1))
