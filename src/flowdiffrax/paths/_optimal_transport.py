from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, Key

from .._check import check_at_least, check_between, check_bools
from .._io import import_extra
from .._time import time_dtype
from .._tree import num_rows
from .._types import Args, Scalar, State
from ._coupling import AbstractCoupling
from ._rows import centred_rows, same_label


class OptimalTransportCoupling(AbstractCoupling):
    r"""Mini-batch optimal transport: pairs base draws with nearby data points.

    It takes the permutation $\sigma$ of the batch that minimises
    $\sum_i |x_0^{\sigma(i)} - x_1^i|^2$. The paths of a batch then rarely cross, and the
    trajectories of the learned velocity are straighter. Every base draw is used once, so
    the distributions of base and data do not change. The coupling is not the optimal
    transport between them, but approaches it as the batch grows.

    It requires ott-jax: `pip install "flowdiffrax[ot]"`.

    !!! info "Numerics"

        Exact up to rounding, in float32 or better. On two CPU cores, a batch of 256
        points takes 0.01 s and one of 1024 takes 0.2 s, in 2 dimensions as in 64. Twice
        the batch takes four to six times as long. If a batch has an entry that is not
        finite, the order is arbitrary, but draws stay within their labels.

    !!! warning

        The base is no longer independent of the data, so the conversions between
        velocity, score, noise and denoiser do not hold for the learned velocity.

    **Arguments:**

    - `within_labels`: whether base draws are re-ordered only among data points with the
      same label, that is with equal conditions: integers, or vectors such as those of
      `jax.nn.one_hot`. If false, the base given the label is skewed: each label takes the
      base draws closest to it, while sampling uses the same base for all labels. A batch
      without conditions has one label. If each label has few points in a batch, there is
      little to re-order; if all conditions differ, there is nothing.

    **Raises:** `ImportError` without ott-jax; when called, `ValueError` for conditions
    without the batch axis, unless `within_labels` is false.

    ??? cite "Reference"

        Mini-batch optimal transport: [arXiv:2302.00482](https://arxiv.org/abs/2302.00482)
        and [arXiv:2304.14772](https://arxiv.org/abs/2304.14772). The skew between
        labels: [arXiv:2503.10636](https://arxiv.org/abs/2503.10636).
    """

    within_labels: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_bools(within_labels=self.within_labels)
        # Import early, rather than first while a batch is traced.
        _import_ott()

    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        del key
        size = num_rows((x0, x1), "Base draws and data points")
        cost, _ = _cost(x0, x1)
        if self.within_labels and args is not None:
            num_rows((x0, args), "Base draws and conditions")
            cost = jnp.where(same_label(args, size), cost, jnp.inf)
        return _take(x0, _assign(cost))


class ConditionalOptimalTransportCoupling(AbstractCoupling):
    r"""C²OT: mini-batch optimal transport between examples with similar conditions.

    Every base draw starts with the condition of the data point it was drawn with. The
    coupling takes the permutation $\sigma$ of the batch that minimises
    $\sum_i |x_0^{\sigma(i)} - x_1^i|^2 + w\,d(c_{\sigma(i)}, c_i)$, so that a base draw
    moves to a data point only if their conditions are close. The distribution of the base
    given the condition then stays close to that of the base, as sampling assumes; plain
    transport skews it. The larger $w$, the smaller the skew, and the less is re-ordered.

    The distance $d$ of two conditions is the sum, over their arrays, of the squared
    distance of the entries; for integers, which are labels, it is 1 if they differ. A
    condition that is not finite is infinitely far from all others, so its base draw stays
    where it is. Scale conditions in different units to a common one. For labels alone,
    use [`flowdiffrax.paths.OptimalTransportCoupling`][], which is the limit of a large
    $w$.

    It requires ott-jax: `pip install "flowdiffrax[ot]"`. Cost, precision and the warning
    are as there.

    **Arguments:**

    - `share`: chooses $w$ for each batch: the share of base draws, in (0, 1), that cost
      no more than a data point's own, which is one of them, on average over the data
      points. If those with an equal condition are enough, base draws move among these
      only. A small share means a large $w$; below 1 over the batch size, nothing moves.
    - `weight`: a fixed $w$ instead, not negative, in squared units of the data by units
      of $d$; or `None`.

    **Raises:** `ImportError` without ott-jax; `ValueError` for a `share` outside (0, 1)
    or a negative `weight`. When called, `ValueError` for conditions without the batch
    axis, or without conditions.

    ??? cite "Reference"

        [arXiv:2503.10636](https://arxiv.org/abs/2503.10636). The default share is that of
        the authors' example in the plane.
    """

    share: float = 0.05
    weight: ArrayLike | None = None

    def __check_init__(self):
        check_between(self.share, 0, 1, "share", "()")
        check_at_least(self.weight, 0, "weight", or_none=True)
        _import_ott("ConditionalOptimalTransportCoupling")

    def __call__(
        self, key: Key[Array, ""], x0: State, x1: State, args: Args = None
    ) -> State:
        del key
        size = num_rows((x0, x1), "Base draws and data points")
        if args is None:
            raise ValueError(
                "`ConditionalOptimalTransportCoupling` needs conditions, for example "
                "`InterpolantBatches(..., args=conditions)`. Without any, use "
                "`OptimalTransportCoupling`."
            )
        num_rows((x0, args), "Base draws and conditions")
        cost, unit = _cost(x0, x1)
        distances = _condition_distances(args, size, cost.dtype)
        if self.weight is None:
            weight = _adaptive_weight(x0, cost, unit, distances, self.share)
        else:
            # `_cost` is half the squared distance, up to terms of one point.
            weight = jnp.asarray(self.weight, cost.dtype) / (2 * unit)
        # Both may be infinite, and the product with zero is NaN.
        penalty = jnp.where(distances > 0, weight * distances, 0)
        penalty = jnp.where(jnp.isinf(distances), jnp.inf, penalty)
        return _take(x0, _assign(cost + penalty))


def _adaptive_weight(
    x0: State,
    cost: Float[Array, "batch batch"],
    unit: Scalar,
    distances: Float[Array, "batch batch"],
    share: float,
) -> Scalar:
    """The weight at which `share` of all pairs cost no more than those of the diagonal.

    Each pair does so up to a weight of its own, which is infinite for equal conditions.
    Hence the weight sought is a quantile, and needs no search.
    """
    rows = centred_rows(jax.lax.stop_gradient(x0), cost.dtype)
    # With this term of the base draw, costs compare within a column.
    full = cost + jnp.sum(rows**2, axis=1, keepdims=True) / (2 * unit)
    saved = jnp.diagonal(full)[None] - full
    limits = jnp.where(
        distances > 0,
        saved / jnp.where(distances > 0, distances, 1),
        jnp.where(saved >= 0, jnp.inf, 0),
    )
    # The comparison leaves no NaN, from values that are not finite.
    limits = jnp.where(limits > 0, limits, 0)
    return _nth_largest(limits, max(round(share * limits.size), 1))


def _nth_largest(values: Float[Array, "*shape"], n: int) -> Scalar:
    """The `n`-th largest of some numbers, none of which is negative.

    Their bits, read as integers, have the same order. Bisection finds the largest integer
    that `n` of them reach, which is much faster than sorting on a CPU.
    """
    size = jnp.finfo(values.dtype).bits
    bits = jax.lax.bitcast_convert_type(values, f"int{size}")
    one = jnp.ones((), bits.dtype)

    def add_bit(index, found):
        tried = found | (one << (size - 2 - index).astype(bits.dtype))
        return jnp.where(jnp.sum(bits >= tried) >= n, tried, found)

    found = jax.lax.fori_loop(0, size - 1, add_bit, 0 * one)
    return jax.lax.bitcast_convert_type(found, values.dtype)


def _condition_distances(
    args: Args, size: int, dtype: jnp.dtype
) -> Float[Array, "batch batch"]:
    distances = jnp.zeros((size, size), dtype)
    for leaf in jtu.tree_leaves(args):
        rows = jnp.reshape(leaf, (size, -1))
        if jnp.issubdtype(rows.dtype, jnp.inexact):
            difference = rows[:, None] - rows[None]
            squares = jnp.sum(jnp.abs(difference) ** 2, axis=-1)
            distances = distances + squares.astype(dtype)
        else:
            distances = distances + (~same_label(rows, size)).astype(dtype)
    # The distance to a NaN is NaN, which would cost nothing.
    distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
    return jnp.where(jnp.eye(size, dtype=bool), 0, distances)


def _import_ott(name: str = "OptimalTransportCoupling") -> tuple[Any, Any, Any]:
    modules = "ott.geometry.geometry", "ott.solvers.linear", "ott.tools.unreg"
    geometry, linear, unreg = (import_extra(module, "ot", name) for module in modules)
    return geometry.Geometry, linear.solve, unreg.hungarian


def _cost(x0: State, x1: State) -> tuple[Float[Array, "batch batch"], Scalar]:
    """Half the squared distances, up to terms of one point, and the unit they are in.

    Terms that depend on one point only do not affect the order. For the same reason the
    rows may be centred, which saves digits.
    """
    dtype = time_dtype((x0, x1))
    rows = [centred_rows(jax.lax.stop_gradient(x), dtype) for x in (x0, x1)]
    cost = -jnp.matmul(rows[0], rows[1].T, precision="highest")
    rms = jnp.sqrt(jnp.mean(cost**2))
    unit = jnp.where(rms > 0, rms, 1)
    cost = cost / unit
    # NaNs could move points across labels. The loss reports values that are not finite.
    return jnp.where(jnp.isfinite(cost), cost, 0), unit


def _take(x0: State, order: Int[Array, " batch"]) -> State:
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[order], x0)


@jax.jit
def _assign(cost: Float[Array, "batch batch"]) -> Int[Array, " batch"]:
    """For each column, its row in the assignment of least cost."""
    geometry, sinkhorn, hungarian = _import_ott()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # Subtracting a constant from a row or column does not change the optimum.
        # Subtracting Sinkhorn's potentials makes the search ten times faster for 1024
        # points in the plane. For costs with an rms of 1, an epsilon of 0.1 was fastest
        # or close to it among 0.02 to 0.2, for points in the plane and for images.
        smooth = sinkhorn(geometry(cost_matrix=cost, epsilon=0.1), max_iterations=100)
        reduced = cost - smooth.f[:, None] - smooth.g[None, :]
        _, assignment = hungarian(geometry(cost_matrix=reduced))
    rows, columns = assignment.paired_indices
    return rows[jnp.argsort(columns)]
