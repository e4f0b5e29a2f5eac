"""Times of a jump by a clock that may be slow at the start."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._time import times_like
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ._quadrature import between

# Within a decade and a half of time, even nodes are as good.
_LEAST_GRADE, _LARGEST_GRADE = 3.5, 30.0
# An entry slows down if its rate falls by this factor.
_SLOWS = 5
# By how much the logarithm of the first times is less than that of the time resolved.
_BEFORE = 2.5


class Clock(NamedTuple):
    r"""The times of a jump, as a function of a share in [0, 1].

    With a grade $g$, the time of a share $c$ is $s + (t - s) (e^{g c} - 1) / (e^g - 1)$.
    A solution that slows down over many decades of time is then smooth in the share.

    **Attributes:**

    - `start`, `end`: the times of the jump.
    - `grade`: the logarithm of how much faster time passes at the end than at the start;
      0 or `None` for equally fast.
    """

    start: Time
    end: Time
    grade: Float[Array, ""] | None = None

    @property
    def length(self) -> Time:
        """The length of the jump in time, with its sign."""
        return self.end - self.start

    def times(self, shares: np.ndarray | Array) -> Float[Array, " shares"]:
        """Returns the times of shares."""
        if self.grade is not None:
            shares = jnp.asarray(shares, self.end.dtype)
            safe = jnp.where(self.grade > 0, self.grade, 1)
            graded = jnp.expm1(safe * shares) / jnp.expm1(safe)
            shares = jnp.where(self.grade > 0, graded, shares)
        return between(self.start, self.end, shares)

    def share(self, time: Time) -> Float[Array, ""]:
        """Returns the share of a time."""
        # A jump of length zero has only one point, so the share does not matter.
        length = jnp.where(self.length == 0, 1, self.length)
        share = (time - self.start) / length
        if self.grade is None:
            return share
        safe = jnp.where(self.grade > 0, self.grade, 1)
        return jnp.where(self.grade > 0, jnp.log1p(share * jnp.expm1(safe)) / safe, share)

    def paces(self, shares: np.ndarray | Array) -> Float[Array, " shares"]:
        """Returns the derivative of the time in the share."""
        shares = jnp.asarray(shares, self.end.dtype)
        if self.grade is None:
            return jnp.broadcast_to(self.length, shares.shape)
        safe = jnp.where(self.grade > 0, self.grade, 1)
        graded = safe * jnp.exp(safe * shares) / jnp.expm1(safe)
        return self.length * jnp.where(self.grade > 0, graded, 1)

    def rates(
        self,
        shares: np.ndarray | Array,
        states: State,
        vector_field: VectorField,
        args: Args,
    ) -> State:
        """Returns the derivatives in the share of solutions through states at shares."""

        def rate(u, pace, y):
            slope = vector_field(u, y, args)
            return jtu.tree_map(lambda leaf: leaf * pace.astype(leaf.dtype), slope)

        return jax.vmap(rate)(self.times(shares), self.paces(shares), states)


def grade_of(
    flow_map: TwoTimeMap,
    vector_field: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    share: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the grade of a clock for a solution that slows down along a jump.

    The vector field at the start is compared with that at the map's state at one share.
    The clock resolves the first times of the entries whose rates fall.
    """
    s, t = times_like(x, s, t)
    (u,) = between(s, t, share[None])
    y = flow_map(s, u, x, args)
    rates = vector_field(s, x, args), vector_field(u, y, args)

    def speed(x, y, first, later):
        """The inverse of the time that the slowing entries take at their first rate."""
        moved = jnp.maximum(jnp.abs(y - x), 1e-3 * jnp.maximum(jnp.abs(x), jnp.abs(y)))
        slows = jnp.abs(first) > _SLOWS * jnp.abs(later)
        speeds = jnp.abs(first) / jnp.where(moved > 0, moved, 1)
        return jnp.max(jnp.where(slows & (moved > 0), speeds, 0), initial=0)

    speeds = jtu.tree_leaves(jtu.tree_map(speed, x, y, *rates))
    fastest = functools.reduce(jnp.maximum, speeds).astype(t.dtype)
    grade = jnp.log(jnp.abs(t - s) * fastest) + _BEFORE
    # Times that are not different numbers resolve nothing.
    eps = jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(s), jnp.finfo(t.dtype).tiny)
    resolved = jnp.log(jnp.maximum(jnp.abs(t - s) / (4 * eps), 1))
    grade = jnp.minimum(grade, jnp.minimum(resolved, _LARGEST_GRADE))
    # A NaN compares as false.
    return lax.stop_gradient(jnp.where(grade > _LEAST_GRADE, grade, 0))
