from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._types import Scalar
from ..solvers._tilted import effective_size, log_mean_exp


class ImportanceWeights(NamedTuple):
    r"""The result of [`flowdiffrax.likelihood.importance_weights`][].

    With $w_i = p(x_i) / q(x_i)$, the mean of $w_i f(x_i)$ over the mean of $w_i$
    estimates $E_p[f]$. For draws of equal weight, use
    `jax.random.choice(key, x, (n,), p=jax.nn.softmax(log_weights))`.

    **Attributes:**

    - `log_weights`: $\log w_i$, for each sample.
    - `log_normaliser`: the logarithm of the mean of $w_i$, which estimates the logarithm
      of the integral of $p$: the log-evidence, if $p$ is a prior times a likelihood.
    - `log_normaliser_error`: its standard error, in nats. It is too small if the samples
      miss a part of the target.
    - `effective_size`: the effective number of samples, $(\sum w)^2 / \sum w^2$.
    - `num_lost`: the number of samples whose proposal density was NaN. They have weight
      zero, which biases all of the above if there are many.
    """

    log_weights: Float[Array, " samples"]
    log_normaliser: Scalar
    log_normaliser_error: Scalar
    effective_size: Scalar
    num_lost: Int[Array, ""]


def importance_weights(
    log_target: Float[ArrayLike, " samples"], log_proposal: Float[ArrayLike, " samples"]
) -> ImportanceWeights:
    r"""Weighs samples of a map so that they represent another density.

    The weights are those of self-normalised importance sampling. They remove the map's
    error, if `log_proposal` is the density of the samples as they were drawn
    ([`flowdiffrax.likelihood.sample_log_prob`][] with
    [`flowdiffrax.likelihood.ExactJacobian`][]), and if the map is one-to-one and its
    samples cover the target.

    **Arguments:**

    - `log_target`: the log-density of the target at the samples, up to a constant. It is
      minus infinity where the target is zero.
    - `log_proposal`: the log-density of the samples. It is NaN where the map is not
      one-to-one, and these samples get no weight.

    **Returns:** [`flowdiffrax.likelihood.ImportanceWeights`][]. If no sample has a
    weight, its sizes are zero or not finite.

    **Raises:** `ValueError` if the shapes differ, are not `(samples,)`, or are empty;
    `TypeError` if they are complex.

    ??? cite "Reference"

        As Boltzmann generators, [arXiv:1812.01729](https://arxiv.org/abs/1812.01729).
    """
    log_target, log_proposal = jnp.asarray(log_target), jnp.asarray(log_proposal)
    shapes = log_target.shape, log_proposal.shape
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(
            "`log_target` and `log_proposal` must have one entry for each sample; got "
            f"shapes {shapes[0]} and {shapes[1]}."
        )
    if jnp.iscomplexobj(log_target) or jnp.iscomplexobj(log_proposal):
        raise TypeError("`log_target` and `log_proposal` must be real.")
    is_lost = jnp.isnan(log_proposal)
    # NaN in the target is a mistake of the caller, and stays.
    log_weights = jnp.where(is_lost, -jnp.inf, log_target - log_proposal)
    size = effective_size(log_weights)
    # The variance of the mean of w, relative to its square.
    variance = jnp.maximum(1 / size - 1 / log_weights.size, 0)
    return ImportanceWeights(
        log_weights=log_weights,
        log_normaliser=log_mean_exp(log_weights),
        log_normaliser_error=jnp.sqrt(variance),
        effective_size=size,
        num_lost=jnp.sum(is_lost),
    )
