from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import check_callable, check_count, check_like
from .._time import at_least_float32
from .._tree import Frozen, ravel
from .._types import Args, Scalar, State, Time
from ._autonomous import check_inner
from ._base import AbstractFlowMap, times_as_given


class ProjectedFlowMap(AbstractFlowMap):
    r"""A flow map with a correction after each jump: $P(x, X_{s,t}(x))$.

    Use it for quantities that the exact flow conserves and a learned map conserves only
    approximately: energy, momentum, mass or a norm. The correction is part of the map, so
    every objective, solver and metric sees it. You can train through it or add it to a
    trained map.

    **Arguments:**

    - `flow_map`: the map whose jumps are corrected.
    - `projection`: a callable `(x_start, x_end, args) -> x_end`, such as
      [`flowdiffrax.ConserveInvariants`][]. It should not change `x_end` if that equals
      `x_start`; otherwise the map is not the identity at `s == t`.

    **Raises:** `TypeError` if `flow_map` is not a [`flowdiffrax.AbstractFlowMap`][] or
    `projection` is not callable; when called, `ValueError` or `TypeError` if the
    projection's output is not like the state.
    """

    flow_map: AbstractFlowMap
    projection: Callable[[State, State, Args], State]

    def __check_init__(self):
        check_inner(self.flow_map)
        signature = "projection(x_start, x_end, args)"
        check_callable(self.projection, "projection", signature)

    @property
    def time_range(self):
        return self.flow_map.time_range

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        return times_as_given(self, s, t)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Jumps with the inner map, and corrects the end."""
        X_st = self.flow_map(s, t, x, args)
        return check_like(self.projection(x, X_st, args), x, "`projection`")

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity of the inner map, projected."""
        # To first order in the jump, the inner map moves along its own velocity.
        v_tt = self.flow_map.velocity(t, x, args)
        _, v = jax.jvp(lambda end: self.projection(x, end, args), (x,), (v_tt,))
        return v


class ConserveInvariants(eqx.Module):
    r"""Moves the end of a jump to where the invariants have their values at the start.

    With the invariants $g$ and their Jacobian $J$ at $y$, it takes Gauss-Newton steps
    towards the level set of the start $x$,

    $$y \leftarrow y - J^\top (J J^\top)^{-1} (g(y) - g(x)).$$

    To first order in the error, the result is the nearest point in the units of the
    state. If leaves differ in size, project in the units of
    [`flowdiffrax.Normalisation`][]. The number of correct digits doubles with each step.

    !!! info "Numerics"

        Each invariant is scaled by the norm of its gradient, so its units do not matter.
        Invariants that depend on one another share the correction. An invariant whose
        gradient vanishes, such as an energy at an equilibrium, is ignored. The start lies
        on the level set, so a correction as long as the jump is always enough. No step is
        longer than twice the jump, so nothing overflows far from the level set. At
        `s == t` the state does not change by a single bit.

    **Arguments:**

    - `invariants`: a smooth function `(x, args)` that returns a number, an array or a
      PyTree of them. It may depend on `args` but not on time. Its arrays are held fixed
      in training, as in [`flowdiffrax.HypersolverFlowMap`][].
    - `num_iterations`: the number of steps, at least 1. Three reduce an error of one per
      cent to about the last digit of float64.

    **Raises:** `TypeError` if `invariants` is not callable, `ValueError` if
    `num_iterations` is less than 1; when called, `TypeError` for a complex state.

    ??? cite "Reference"

        Hairer, Lubich and Wanner, *Geometric Numerical Integration*, section IV.4: the
        standard projection method.
    """

    frozen_invariants: Frozen
    num_iterations: int = eqx.field(static=True)

    def __init__(
        self, invariants: Callable[[State, Args], State], num_iterations: int = 3
    ):
        check_callable(invariants, "invariants", "invariants(x, args)")
        check_count(num_iterations, 1, "num_iterations")
        self.frozen_invariants = Frozen(invariants)
        self.num_iterations = num_iterations

    @property
    def invariants(self) -> Callable[[State, Args], State]:
        """The invariants, with their arrays held fixed."""
        return self.frozen_invariants.thaw()

    def __call__(self, x_start: State, x_end: State, args: Args = None) -> State:
        invariants = self.invariants
        x, unravel = ravel(x_start, "`ConserveInvariants`")
        y, _ = ravel(x_end, "`ConserveInvariants`")
        g = lambda y: ravel(invariants(unravel(y), args), "`ConserveInvariants`")[0]
        target = g(x)
        # Twice the length of the jump: a correction exactly as long as the jump, such as
        # any in a state of one number, must keep its derivatives.
        longest = 2 * _norm(y - x)
        for _ in range(self.num_iterations):
            step = _newton_step(jax.jacrev(g)(y), g(y) - target)
            length = _norm(step)
            too_long = length > longest
            factor = jnp.where(too_long, longest / jnp.where(too_long, length, 1), 1)
            y = y - (factor * step).astype(y.dtype)
        return unravel(y)


def _newton_step(
    jacobian: Float[Array, "invariants size"], error: Float[Array, " invariants"]
) -> Float[Array, " size"]:
    # JAX has no factorisations in less than float32.
    dtype = at_least_float32(jacobian.dtype)
    jacobian, error = jacobian.astype(dtype), error.astype(dtype)
    square = jnp.sum(jacobian**2, axis=1)
    vanishes = square == 0
    inverse = jnp.where(vanishes, 0, 1 / jnp.sqrt(jnp.where(vanishes, 1, square)))
    jacobian, error = inverse[:, None] * jacobian, inverse * error
    # The diagonal is one. A small addition to it covers rows that are zero or dependent.
    tiny = 10 * jnp.finfo(dtype).eps * jnp.eye(error.size, dtype=dtype)
    return jacobian.T @ jnp.linalg.solve(jacobian @ jacobian.T + tiny, error)


def _norm(x: Float[Array, " size"]) -> Float[Array, ""]:
    # The inner `where` avoids the square root's derivative at zero, which is infinite.
    dtype = at_least_float32(x.dtype)
    square = jnp.sum(x.astype(dtype) ** 2)
    vanishes = square == 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, square)))
