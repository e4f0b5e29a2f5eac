from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float

from .._time import time_dtype, times_like
from .._tree import add_scaled, freeze, num_rows, scale, subtract
from .._types import Args, State, Time
from ._base import InterpolantPath
from ._rows import centred_rows, same_label


class Shared(eqx.Module):
    """Arrays that all rows of a batch share, which a loss must not map over."""

    tree: Any


def is_shared(node: object) -> bool:
    return isinstance(node, Shared)


class PlugInPath(diffrax.AbstractPath):
    r"""A path whose rate is the plug-in velocity of its batch.

    The rate $\dot I_t$ of a single pair is a noisy sample of the velocity
    $b_t(x) = E[\dot I_t \mid I_t = x]$. The plug-in velocity averages over all data
    points $x_1^j$ of the batch that the pair could have had,

    $$\hat b_t(I_t) = \sum_j w_j\, E[\dot I_t \mid I_t, x_1^j], \qquad
    w_j \propto \mathcal N(I_t;\, \alpha_t m + \beta_t x_1^j,\,
    (\alpha_t^2 \sigma^2 + \gamma_t^2) I),$$

    where $m$ and $\sigma$ are the mean and the standard deviation of the base. It is the
    exact velocity of a flow to the data points of the batch.

    The pair's own data point is among them. Hence $\hat b_t$ is the mean of $\dot I_t$
    given $I_t$ and the data points of the batch. It is **unbiased for every batch size**:
    given $I_t$ alone, its mean is $b_t(I_t)$ exactly, and its variance at most that of
    $\dot I_t$. If the pair's own data point were left out, the mean would be off by
    $O(1/n)$ in a batch of $n$. All rows of a batch use the same data points, so that
    their errors are not independent.

    An objective whose gradient is linear in the rate, such as `FlowMatching`, `MeanFlow`
    or the diagonal of self-distillation, keeps its mean gradient, unless its weight
    depends on the error. `AlphaFlow` and `NaiveEulerian` are not linear in the rate:
    their gradient approaches that along the velocity as the batch grows.

    [`flowdiffrax.data.InterpolantBatches`][] makes these paths with `plug_in=True`. To
    evaluate a loss on them, use [`flowdiffrax.objectives.batch_loss`][]: all rows of a
    batch share its data points, so that a plain `jax.vmap` over the paths does not work.

    !!! info "Numerics"

        The weights are normalised in the logarithm, and computed from the noise of the
        pair rather than from $I_t$, so that nothing cancels near the data. Each rate
        takes two products of the batch's points with a vector, and a batch of $n$ keeps
        $n^2$ squared distances.

    **Attributes:**

    - `path`: the path of the pair itself, from which the states come.
    - `mean`, `std`: the mean and the standard deviation of the Gaussian base.
    - `squared_distances`: from the pair's data point to each of the batch, of shape
      `(batch,)`; infinite for data points with another condition, which get no weight.
    - `points`: the data points of the batch.

    ??? cite "Reference"

        ESC, [arXiv:2512.11831](https://arxiv.org/abs/2512.11831). Its code uses the
        plug-in velocity on a fifth of the rows, and does not look at conditions.
    """

    path: InterpolantPath
    mean: State
    std: Float[Array, "*rows"]
    squared_distances: Float[Array, "*rows batch"]
    points: Shared
    t0 = 0.0
    t1 = 1.0

    def evaluate(self, t0: Time, t1: Time | None = None, left: bool = True) -> State:
        r"""$I_{t_0}$ of the pair, or the increment $I_{t_1} - I_{t_0}$."""
        return self.path.evaluate(t0, t1, left)

    def derivative(self, t: Time, left: bool = True) -> State:
        r"""The plug-in velocity $\hat b_t(I_t)$. It is held fixed."""
        return self.through(t).derivative(t, left)

    def through(self, t: Time) -> InterpolantPath:
        r"""The mean of all paths to the batch that pass through $I_t$ at time $t$.

        Its ends, and its latent if there is one, are the means of $x_0$, $x_1$ and $z$
        given $I_t$ and the batch. It passes through $I_t$ as well, where its rate is the
        plug-in velocity.

        **Raises:** `ValueError` if the data points of the batch were mapped over.
        """
        x0, x1, z = self.path.x0, self.path.x1, self.path.z
        self._check_shared()
        dtype = time_dtype(x1)
        (t,) = times_like(x1, t)
        alpha, beta, gamma = self.path.interpolant.coefficients(t)
        std = self.std.astype(dtype)
        # What the base and the latent add is a standard normal vector times `size`, which
        # vanishes at the data.
        size = jnp.maximum(jnp.hypot(alpha * std, gamma), jnp.finfo(dtype).tiny)
        of_base, of_latent, ratio = alpha / size, gamma / size, beta / size
        noise = scale(of_base, subtract(x0, self.mean))
        if z is not None:
            noise = add_scaled(noise, of_latent, z)

        # log w_j = -|noise + ratio (x1 - x1_j)|^2 / 2, up to the part common to all j.
        products = _products(x1, noise, dtype) - _products(self.points.tree, noise, dtype)
        distances = jnp.sqrt(self.squared_distances).astype(dtype)
        logits = -ratio * products - (ratio * distances) ** 2 / 2
        # At time 0, `ratio` is zero, and its product with infinity is NaN.
        weights = jax.nn.softmax(jnp.where(jnp.isinf(distances), -jnp.inf, logits))

        def mean(points):
            total = jnp.tensordot(weights, points.astype(dtype), 1, precision="highest")
            return total.astype(points.dtype)

        x1_mean = jtu.tree_map(mean, self.points.tree)
        noise = add_scaled(noise, ratio, subtract(x1, x1_mean))
        x0_mean = add_scaled(self.mean, of_base * std**2, noise)
        z_mean = None if z is None else scale(of_latent, noise)
        return freeze(InterpolantPath(self.path.interpolant, x0_mean, x1_mean, z_mean))

    def _check_shared(self) -> None:
        own, points = map(jtu.tree_leaves, (self.path.x1, self.points.tree))
        if any(a.ndim + 1 != b.ndim for a, b in zip(own, points, strict=True)):
            raise ValueError(
                "The rows of a batch of `PlugInPath` share its data points, over which "
                "`jax.vmap` must not map. Use `objectives.batch_loss`."
            )


def plug_in_paths(
    paths: InterpolantPath, args: Args, mean: State, std: ArrayLike
) -> PlugInPath:
    """A batch of paths with the plug-in velocity of the batch.

    **Arguments:**

    - `paths`: a batch of independent pairs, each with its arrays of the interpolant.
    - `args`: the conditions of the batch, or `None`.
    - `mean`, `std`: the moments of the Gaussian base; `mean` is like `paths.x1`.

    **Raises:** `TypeError` for complex data.
    """
    x1 = paths.x1
    if any(jnp.iscomplexobj(leaf) for leaf in jtu.tree_leaves(x1)):
        raise TypeError(
            "The plug-in velocity takes real data. Carry the real and the imaginary part "
            "as two leaves."
        )
    size, dtype = num_rows(x1, "Data points"), time_dtype(x1)
    rows = centred_rows(x1, dtype)
    squares = jnp.sum(rows**2, axis=1)
    products = jnp.matmul(rows, rows.T, precision="highest")
    distances = jnp.maximum(squares[:, None] + squares[None] - 2 * products, 0)
    # Rounding must not move a pair away from its own data point.
    distances = jnp.where(jnp.eye(size, dtype=bool), 0, distances)
    if args is not None:
        num_rows((x1, args), "Data points and conditions")
        distances = jnp.where(same_label(args, size), distances, jnp.inf)
    stds = jnp.broadcast_to(jnp.asarray(std, dtype), (size,))
    return PlugInPath(paths, mean, stds, distances, Shared(x1))


def _products(points: State, x: State, dtype: jnp.dtype) -> Float[Array, "*batch"]:
    """The inner product of `x` with one point, or with each of a batch of points."""
    pairs = zip(jtu.tree_leaves(points), jtu.tree_leaves(x), strict=True)
    return sum(
        (
            jnp.tensordot(a.astype(dtype), b.astype(dtype), b.ndim, precision="highest")
            for a, b in pairs
        ),
        jnp.zeros((), dtype),
    )
