from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from .._check import check_between, check_callable
from .._tree import num_rows
from .._types import GuidanceArgs
from ..times._base import check_batch_size
from ..velocities._null import null_like
from ._batches import Batch, _as_jax


class ConditionDropout(eqx.Module):
    """Batches in which some conditions are replaced by the null condition.

    A network that is trained on them learns both the conditional and the unconditional
    velocity, as guidance requires.

    **Arguments:**

    - `batches`: a callable `key -> (paths, conditions)`, such as
      [`flowdiffrax.data.InterpolantBatches`][] with `args`.
    - `null`: the null condition, with the structure and shape of the condition of one
      example. For labels, this is usually the number of classes.
    - `rate`: the probability that an example loses its condition, in [0, 1],
      independently of the others.
    - `scale`: a callable `(key, batch_size) -> scales` of shape `(batch_size,)`, such as
      [`flowdiffrax.data.PowerLawScale`][], for a network that takes the guidance scale as
      an input. The conditions are then [`flowdiffrax.velocities.GuidanceArgs`][], whose
      scale is 1 for examples without a condition.

    **Raises:** `ValueError` for a rate outside [0, 1]; `TypeError` if `batches` or
    `scale` is not callable. When called, `ValueError` or `TypeError` if `null` does not
    match the conditions, and `ValueError` for scales of another shape.

    ??? cite "Reference"

        [arXiv:2207.12598](https://arxiv.org/abs/2207.12598), algorithm 1.
    """

    batches: Callable[[Key[Array, ""]], Batch]
    null: PyTree = eqx.field(converter=_as_jax)
    rate: ArrayLike = 0.1
    scale: Callable[[Key[Array, ""], int], Array] | None = None

    def __check_init__(self):
        check_callable(self.batches, "batches", "batches(key)")
        if self.scale is not None:
            check_callable(self.scale, "scale", "scale(key, batch_size)")
        check_between(self.rate, 0, 1, "rate")

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draws a batch: its paths and conditions, every array with the batch axis."""
        batch_key, drop_key, scale_key = jr.split(key, 3)
        paths, conditions = self.batches(batch_key)
        batch_size = num_rows(conditions, "Conditions")
        dropped = jr.uniform(drop_key, (batch_size,)) < jnp.asarray(self.rate, float)

        def drop(dropped, condition):
            null = null_like(self.null, condition)
            choose = lambda null, given: jnp.where(dropped, null, given)
            return jtu.tree_map(choose, null, condition)

        conditions = jax.vmap(drop)(dropped, conditions)
        if self.scale is None:
            return paths, conditions
        scales = self.scale(scale_key, batch_size)
        if jnp.shape(scales) != (batch_size,):
            shapes = f"{(batch_size,)}; got shape {jnp.shape(scales)}"
            raise ValueError(f"`scale` must return one scale per example, {shapes}.")
        return paths, GuidanceArgs(conditions, jnp.where(dropped, 1, scales))


class PowerLawScale(eqx.Module):
    r"""Guidance scales with density $p(a) \propto a^{-\text{power}}$ on an interval.

    **Arguments:**

    - `low`, `high`: the interval, $0 < \text{low} \le \text{high}$.
    - `power`: the exponent. With 1, the logarithm of the scale is uniform; with 0, the
      scale itself is uniform.
    - `dtype`: the dtype of the scales; `None` for JAX's default.

    **Raises:** `ValueError` for any other interval.

    ??? cite "Reference"

        Improved MeanFlow, [arXiv:2512.02012](https://arxiv.org/abs/2512.02012).
    """

    low: float = 1.0
    high: float = 8.0
    power: float = eqx.field(static=True, default=1.0)
    dtype: jnp.dtype | type | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not 0 < self.low <= self.high:
            raise ValueError("`low` and `high` must be positive and rise.")

    def __call__(
        self, key: Key[Array, ""], batch_size: int
    ) -> Float[Array, " batch_size"]:
        """Draws `batch_size` scales, at least 1."""
        check_batch_size(batch_size)
        dtype = jnp.result_type(float) if self.dtype is None else self.dtype
        u = jr.uniform(key, (batch_size,), dtype)
        # y = log(a / low) has a density proportional to exp(q y) on [0, length]. Invert
        # its distribution function, without cancellation for small q.
        length = jnp.log(jnp.asarray(self.high / self.low, dtype))
        q = 1 - self.power
        y = u * length if q == 0 else jnp.log1p(u * jnp.expm1(q * length)) / q
        return self.low * jnp.exp(y)
