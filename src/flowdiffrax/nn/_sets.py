from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from .._check import check_callable, check_count, check_key
from .._types import Args, State, Time
from ._describe import describe


class SetEncoder(eqx.Module):
    r"""Summarises any number of rows in one vector, whatever their order.

    Each row goes through a network $\phi$. The mean of the results over the rows, with
    the logarithm of their number, goes through another network $\rho$. Rows that are
    masked out change nothing, even if they are not finite. A set without rows has a
    summary as well.

    **Arguments:**

    - `row_size`: the length of one row.
    - `size`: the length of the summary.
    - `width`: the width of the hidden layers, of which $\phi$ has two and $\rho$ one.
    - `key`: a random key for the initial weights.

    **Raises:** `ValueError` for a size or width below 1. When called, `ValueError` for
    rows of another length, or a mask that does not match the rows.

    ??? cite "Reference"

        Deep Sets, [arXiv:1703.06114](https://arxiv.org/abs/1703.06114), theorem 2.
    """

    each: eqx.nn.MLP
    together: eqx.nn.MLP
    row_size: int = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, row_size: int, size: int, width: int = 64, *, key: Key[Array, ""]):
        check_count(row_size, 1, "row_size")
        check_count(size, 1, "size")
        check_count(width, 1, "width")
        check_key(key)
        each_key, together_key = jr.split(key)
        gelu = jax.nn.gelu
        self.each = eqx.nn.MLP(row_size, width, width, 2, gelu, key=each_key)
        self.together = eqx.nn.MLP(width + 1, size, width, 1, gelu, key=together_key)
        self.row_size, self.size = row_size, size

    def __call__(self, rows: ArrayLike, mask: Any = None) -> Float[Array, " size"]:
        """Summarises one set.

        **Arguments:**

        - `rows`: the rows, of shape `(rows, row_size)`.
        - `mask`: true for the rows that are there; `None` for all.
        """
        rows, mask = check_set(rows, mask, self.row_size)
        h = jax.vmap(self.each)(rows)
        return self.together(jnp.append(*mean_of_rows(h, mask)))

    def __pdoc__(self, **kwargs):
        width = self.each.width_size
        return describe(self, f"{self.row_size}, {self.size}, width={width}")


def check_set(
    rows: Any, mask: Any, row_size: int
) -> tuple[Float[Array, "rows row_size"], Bool[Array, " rows"]]:
    """The rows, with zeros for those that are not there, and the mask.

    **Raises:** `ValueError` for rows of another length, or a mask that does not match.
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != row_size:
        raise ValueError(
            f"A set is an array of shape (rows, {row_size}); got {rows.shape}. For a "
            "batch of sets, use `jax.vmap`."
        )
    mask = jnp.ones(len(rows), bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != rows.shape[:1]:
        raise ValueError(
            f"`mask` has one entry for each of the {len(rows)} rows; got {mask.shape}."
        )
    # Replaced before they enter the network: a masked NaN has a NaN gradient.
    return jnp.where(mask[:, None], rows, 0), mask


def mean_of_rows(
    rows: Float[Array, "rows size"], mask: Bool[Array, " rows"]
) -> tuple[Float[Array, " size"], Float[Array, ""]]:
    """The mean of the rows that are there, and the logarithm of one plus their number."""
    count = jnp.sum(mask).astype(rows.dtype)
    total = jnp.sum(jnp.where(mask[:, None], rows, 0), axis=0)
    return total / jnp.maximum(count, 1), jnp.log1p(count)


class Summarised(eqx.Module):
    """Wraps a network, so that it sees a summary of `args` instead.

    The summary is trained with the network.

    **Arguments:**

    - `net`: a callable `net(s, t, x, summary)`, such as [`flowdiffrax.nn.MLP`][].
    - `summary`: a callable `summary(*args)` if `args` is a tuple, such as
      [`flowdiffrax.nn.SetEncoder`][] for `args = (rows, mask)`; else `summary(args)`.

    **Raises:** `TypeError` if one of them is not callable.
    """

    is_network: ClassVar[bool] = True

    net: Callable
    summary: Callable

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, x, summary)")
        check_callable(self.summary, "summary", "summary(args)", "summary(rows, mask)")

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        given = args if isinstance(args, tuple) else (args,)
        return self.net(s, t, x, self.summary(*given))
