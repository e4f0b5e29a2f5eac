"""Embeddings of two times."""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree

from .._time import as_times, at_least_float32
from .._types import Time
from ._layers import Linear
from ._magnitude import ForcedLinear

_Tree = TypeVar("_Tree", bound=PyTree)


class TwoTimeEmbedding(eqx.Module):
    r"""A vector for two times, smooth in both.

    $W_2\,\sigma(W_0\,\phi(s) + W_1\,\phi(t - s) + c_0) + c_1$ with $\sigma$ SiLU and the
    features $\phi(\tau)_k = \sqrt2\,(\cos \omega_k \tau, \sin \omega_k \tau)$.

    !!! info "Numerics"

        Each frequency multiplies time derivatives, which are part of many objectives:
        $|\phi'|^2 = 2 \sum_k \omega_k^2$. The frequencies fall from `max_frequency`, one
        radian a unit of time, to 1/10,000 of it. (Diffusion models usually multiply
        times by 1000 first.) All is computed in the precision of the times, and in
        float32 at least.

    **Arguments:**

    - `size`: length of the vector.
    - `num_features`: length of $\phi$, even; `None` for `size`.
    - `max_frequency`: the largest $\omega_k$. For times in [0, 5], say, 1/5.
    - `two_times`: `False` for the start time alone, as in a network that is to be a
      velocity. [`flowdiffrax.nn.two_times`][] adds the other one.
    - `key`: for the initial weights.

    **Raises:** `ValueError` for a size below 1, an odd number of features, or a frequency
    that is not positive.
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
        num_features = _check_features(size, num_features, max_frequency)
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
        # Zeros learn at once here, and leave a map that ignores the end time until then.
        gap = Linear(*self.start.weight.shape, bias=False, key=None)
        gap = _like(gap, self.start)
        return eqx.tree_at(lambda e: e.gap, self, gap, is_leaf=lambda leaf: leaf is None)


class MagnitudePreservingEmbedding(eqx.Module):
    r"""A vector for two times, with entries of mean square 1 from the start.

    $(W_0\,\phi(s) + g\,W_1\,\phi(t - s)) / \sqrt{1 + g^2}$, where the rows of both
    matrices have norm 1, $g$ is a learned number that starts at 1, and $\phi$ are the
    features of [`flowdiffrax.nn.TwoTimeEmbedding`][], as are all arguments.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), where $g$ is 1; the layers
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
        num_features = _check_features(size, num_features, max_frequency)
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
        # These weights cannot be zero, so it is the gain that is.
        new = ForcedLinear(self.num_features, size, key=key), jnp.zeros(())
        new = _like(new, self.start)
        is_none = lambda leaf: leaf is None
        return eqx.tree_at(lambda e: (e.gap, e.gain), self, new, is_leaf=is_none)


def two_times(tree: _Tree, *, key: Key[Array, ""]) -> _Tree:
    r"""Makes a network of two times from one that was trained as a velocity.

    Every embedding of one time gets a part for $t - s$ that counts for nothing yet. So
    the new network is the old one, bit for bit, on the diagonal and off it:
    $v_{s,t} = b_s$, and [`flowdiffrax.FlowMap`][] of it makes Euler steps. From there
    on, the new part learns like any other.

    **Arguments:**

    - `tree`: a network made with `two_times=False`, a map of it, or any PyTree with
      embeddings of one time.
    - `key`: for weights that cannot be zero, and so start with a gain of zero.

    **Raises:** `ValueError` where there is no embedding of one time.
    """
    kinds = (TwoTimeEmbedding, MagnitudePreservingEmbedding)
    is_single = lambda node: isinstance(node, kinds) and node.gap is None
    nodes, structure = jtu.tree_flatten(tree, is_leaf=is_single)
    places = [index for index, node in enumerate(nodes) if is_single(node)]
    if len(places) == 0:
        raise ValueError(
            "There is no embedding of one time to add the other to. Make the velocity's "
            "network with `two_times=False`; one of two times serves as it is, trained "
            "at `s == t`."
        )
    for place in places:
        nodes[place] = nodes[place].with_two_times(jr.fold_in(key, place))
    return jtu.tree_unflatten(structure, nodes)


def waves(
    value: Float[Array, ""], number: int, max_frequency: float = 1.0
) -> Float[Array, " number"]:
    """Cosines and sines of low frequencies, of mean square 1."""
    falling = jnp.arange(number // 2, dtype=value.dtype) / (number // 2)
    # From the paper on attention: the longest period is 10,000 times the shortest.
    angles = value * (max_frequency * 10_000**-falling)
    return math.sqrt(2) * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def _like(new: _Tree, old: PyTree) -> _Tree:
    """With weights of the dtype of the old ones."""
    dtype = jtu.tree_leaves(old)[0].dtype
    return jtu.tree_map(lambda leaf: leaf.astype(dtype), new)


def _precise(*times: Time) -> tuple[Float[Array, ""], ...]:
    times = as_times(*times)
    return tuple(time.astype(at_least_float32(time.dtype)) for time in times)


def _check_features(size: int, number: int | None, max_frequency: float) -> int:
    number = size if number is None else number
    if size < 1 or number < 2 or number % 2 != 0:
        raise ValueError(
            "`size` must be at least 1, and `num_features` (by default `size`) even: "
            f"cosines and sines; got {size} and {number}."
        )
    if max_frequency <= 0:
        raise ValueError(f"`max_frequency` must be positive; got {max_frequency}.")
    return number
