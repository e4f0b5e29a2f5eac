"""Embeddings of two times."""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree

from .._check import check_bools, check_positive
from .._time import as_times, at_least_float32
from .._types import Time
from ._layers import Linear
from ._magnitude import ForcedLinear

_Tree = TypeVar("_Tree", bound=PyTree)


class TwoTimeEmbedding(eqx.Module):
    r"""A vector embedding of two times that is smooth in both.

    It is $W_2\,\sigma(W_0\,\phi(s) + W_1\,\phi(t - s) + c_0) + c_1$, where $\sigma$ is
    SiLU and $\phi(\tau)_k = \sqrt2\,(\cos \omega_k \tau, \sin \omega_k \tau)$ are the
    features.

    !!! info "Numerics"

        Many objectives contain time derivatives, and each frequency multiplies them:
        $|\phi'|^2 = 2 \sum_k \omega_k^2$. The frequencies decrease from `max_frequency`,
        by default one radian per unit of time, to 1/10,000 of it. (Diffusion models
        usually multiply times by 1000 first.) The embedding is computed in the precision
        of the times, and at least in float32.

    **Arguments:**

    - `size`: the length of the vector.
    - `num_features`: the length of $\phi$, rounded up to an even number; `None` for
      `size`.
    - `max_frequency`: the largest $\omega_k$. For times in [0, 5], use 1/5, for example.
    - `two_times`: `False` to embed the start time only, for a network that represents a
      velocity. [`flowdiffrax.nn.two_times`][] adds the end time later.
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` for a `max_frequency` that is not positive.
    """

    start: Linear
    gap: Linear | None
    last: Linear
    num_features: int = eqx.field(static=True)
    max_frequency: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        num_features: int | None = None,
        *,
        max_frequency: float = 1.0,
        two_times: bool = True,
        key: Key[Array, ""],
    ):
        check_positive(max_frequency, "max_frequency")
        check_bools(two_times=two_times)
        num_features = _even(size if num_features is None else num_features)
        start_key, gap_key, last_key = jr.split(key, 3)
        self.start = Linear(num_features, size, key=start_key)
        gap = Linear(num_features, size, bias=False, key=gap_key)
        self.gap = gap if two_times else None
        self.last = Linear(size, size, key=last_key)
        self.num_features = num_features
        self.max_frequency = float(max_frequency)

    def __call__(self, s: Time, t: Time) -> Float[Array, " size"]:
        s, t = _precise(s, t)
        h = self.start(waves(s, self.num_features, self.max_frequency))
        if self.gap is not None:
            h = h + self.gap(waves(t - s, self.num_features, self.max_frequency))
        return self.last(jax.nn.silu(h))

    def with_two_times(self, key: Key[Array, ""]) -> "TwoTimeEmbedding":
        """See [`flowdiffrax.nn.two_times`][]."""
        del key
        # With zero weights, the map ignores the end time until training begins. Their
        # gradient is not zero, so they learn from the first step.
        gap = Linear(*self.start.weight.shape, bias=False, key=None)
        gap = _like(gap, self.start)
        return eqx.tree_at(lambda e: e.gap, self, gap, is_leaf=lambda leaf: leaf is None)


class MagnitudePreservingEmbedding(eqx.Module):
    r"""A vector embedding of two times whose entries start with mean square 1.

    It is $(W_0\,\phi(s) + g\,W_1\,\phi(t - s)) / \sqrt{1 + g^2}$, where the rows of both
    matrices have norm 1 and $g$ is a learned number that starts at 1. The features $\phi$
    and all arguments are as for [`flowdiffrax.nn.TwoTimeEmbedding`][].

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), where $g$ is 1. The layers
        are those of EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696).
    """

    start: ForcedLinear
    gap: ForcedLinear | None
    gain: Float[Array, ""] | None
    num_features: int = eqx.field(static=True)
    max_frequency: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        num_features: int | None = None,
        *,
        max_frequency: float = 1.0,
        two_times: bool = True,
        key: Key[Array, ""],
    ):
        check_positive(max_frequency, "max_frequency")
        check_bools(two_times=two_times)
        num_features = _even(size if num_features is None else num_features)
        start_key, gap_key = jr.split(key)
        self.start = ForcedLinear(num_features, size, key=start_key)
        self.gap = ForcedLinear(num_features, size, key=gap_key) if two_times else None
        self.gain = jnp.ones(()) if two_times else None
        self.num_features = num_features
        self.max_frequency = float(max_frequency)

    def __call__(self, s: Time, t: Time) -> Float[Array, " size"]:
        s, t = _precise(s, t)
        h = self.start(waves(s, self.num_features, self.max_frequency))
        if self.gap is None or self.gain is None:
            return h
        gain = self.gain.astype(h.dtype)
        gap = self.gap(waves(t - s, self.num_features, self.max_frequency))
        return (h + gain * gap) / jnp.sqrt(1 + gain * gain)

    def with_two_times(self, key: Key[Array, ""]) -> "MagnitudePreservingEmbedding":
        """See [`flowdiffrax.nn.two_times`][]."""
        size = self.start.weight.value.shape[-1]
        # These weights are normalised and cannot be zero, so set the gain to zero.
        new = ForcedLinear(self.num_features, size, key=key), jnp.zeros(())
        new = _like(new, self.start)
        is_none = lambda leaf: leaf is None
        return eqx.tree_at(lambda e: (e.gap, e.gain), self, new, is_leaf=is_none)


def two_times(tree: _Tree, *, key: Key[Array, ""]) -> _Tree:
    r"""Converts a network that was trained as a velocity into a network of two times.

    Every embedding of one time gets an additional part for $t - s$, which initially
    contributes nothing. So the new network returns the same values as the old one, bit
    for bit, on the diagonal and off it: $v_{s,t} = b_s$, and a
    [`flowdiffrax.FlowMap`][] of it makes Euler steps. The new part can then be trained
    like any other.

    **Arguments:**

    - `tree`: a network made with `two_times=False`, a map of it, or any PyTree with
      embeddings of one time.
    - `key`: a random key for weights that cannot be zero. Their gain is zero instead.

    **Raises:** `ValueError` if `tree` has no embedding of one time.
    """
    kinds = (TwoTimeEmbedding, MagnitudePreservingEmbedding)
    is_single = lambda node: isinstance(node, kinds) and node.gap is None
    nodes, structure = jtu.tree_flatten(tree, is_leaf=is_single)
    places = [index for index, node in enumerate(nodes) if is_single(node)]
    if len(places) == 0:
        raise ValueError(
            "There is no embedding of one time to extend. Make the network of the "
            "velocity with `two_times=False`."
        )
    for place in places:
        nodes[place] = nodes[place].with_two_times(jr.fold_in(key, place))
    return jtu.tree_unflatten(structure, nodes)


def waves(
    value: Float[Array, ""], number: int, max_frequency: float = 1.0
) -> Float[Array, " number"]:
    """Cosines and sines of low frequencies, with mean square 1."""
    falling = jnp.arange(number // 2, dtype=value.dtype) / (number // 2)
    # As in "Attention is all you need", the longest period is 10,000 times the shortest.
    angles = value * (max_frequency * 10_000**-falling)
    return math.sqrt(2) * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def _like(new: _Tree, old: PyTree) -> _Tree:
    """Casts new weights to the dtype of the old ones."""
    dtype = jtu.tree_leaves(old)[0].dtype
    return jtu.tree_map(lambda leaf: leaf.astype(dtype), new)


def _precise(*times: Time) -> tuple[Float[Array, ""], ...]:
    times = as_times(*times)
    return tuple(time.astype(at_least_float32(time.dtype)) for time in times)


def _even(number: int) -> int:
    # Half are cosines, half sines.
    return number + number % 2
