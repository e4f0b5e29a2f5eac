"""The inverse of one jump, by root finding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Int

from .._check import check_bools, check_flow_map, check_instance, check_like
from .._time import real_dtype, time_dtype, times_like
from .._tree import subtract, vary_like
from .._types import Args, Scalar, State, Time, TwoTimeMap
from ._trace import ravel_floats


class Inversion(NamedTuple):
    r"""The result of [`flowdiffrax.likelihood.invert`][].

    **Attributes:**

    - `x`: the state with $X_{s,t}(x) = y$.
    - `error`: the round-trip error: the largest entry, by magnitude, of
      $X_{s,t}(x) - y$.
    - `contraction`: a lower estimate of the largest singular value of
      $\nabla X_{s,t} - I$ at `x`, which is $(t - s)$ times the local Lipschitz constant
      of $v_{s,t}$. If it is below 1, the jump is invertible around `x`, and fixed-point
      iteration from a nearby guess finds `x`. If it is below 1 everywhere, `x` is the
      only solution.
    - `num_steps`: the number of steps taken.
    - `result`: `optimistix.RESULTS.successful`, or the reason for the failure.
    """

    x: State
    error: Scalar
    contraction: Scalar
    num_steps: Int[Array, ""]
    result: optx.RESULTS

    @property
    def success(self) -> Bool[Array, "*batch"]:
        """Whether the solver converged."""
        return self.result == optx.RESULTS.successful


def invert(
    flow_map: TwoTimeMap,
    s: Time,
    t: Time,
    y: State,
    args: Args = None,
    *,
    solver: optx.AbstractRootFinder
    | optx.AbstractFixedPointSolver
    | optx.AbstractLeastSquaresSolver
    | None = None,
    guess: State | None = None,
    max_steps: int = 64,
    num_iterations: int = 20,
    throw: bool = True,
) -> Inversion:
    r"""Inverts a jump: finds the $x$ with $X_{s,t}(x) = y$.

    Use it for maps that were trained forwards only. A map that goes in both directions
    of time gives its inverse in one evaluation, $X_{t,s}(y)$.

    A jump $x + (t - s) v_{s,t}(x)$ is one-to-one if $(t - s) \operatorname{Lip}(v) < 1$.
    A short jump satisfies this; a long one may not. The result contains an estimate of
    the left-hand side at the solution.

    !!! info "Numerics"

        A fixed-point solver iterates $x \leftarrow y - (t - s) v_{s,t}(x)$, with one
        evaluation per step, and converges if this iteration contracts. A root finder
        solves $X_{s,t}(x) = y$. Each step of Newton's method takes one Jacobian-vector
        product per dimension, all at once, which needs gigabytes for an image of
        32x32x3. Derivatives with respect to `y`, `args` and the map's parameters come
        from the implicit function theorem, whatever the solver.

    **Arguments:**

    - `flow_map`: a [`flowdiffrax.AbstractFlowMap`][] or any callable
      `(s, t, x, args) -> x_t`.
    - `s`, `t`: start and end of the jump, in either order.
    - `y`: one state at time `t`, of floating-point numbers; use `jax.vmap` for a batch.
    - `args`: passed to the map.
    - `solver`: an Optimistix solver with its tolerances, such as
      `optimistix.FixedPointIteration(rtol, atol)` or `optimistix.Newton(rtol, atol)`.
      `None` selects `optimistix.Dogleg`, a Newton method with a trust region, with a
      tolerance of 1e-9 in float64, and `optimistix.Newton` with 1e-5 in float32 and 3e-2
      in half precision. For states of more than 1,000 entries, whose Jacobian may not
      fit in memory, it selects `optimistix.FixedPointIteration` with the same
      tolerances.
    - `guess`: the initial guess; `None` for `y`.
    - `max_steps`: the maximum number of steps.
    - `num_iterations`: the number of power iterations for `contraction`. Each takes one
      forward-mode and one reverse-mode pass.
    - `throw`: whether to raise an error if the solver does not converge. If false, check
      `result`.

    **Returns:** an [`flowdiffrax.likelihood.Inversion`][].

    **Raises:** `ValueError` if the guess or the map's output is not like `y`, `TypeError`
    if `solver` is not an Optimistix solver or the state is complex, `RuntimeError` at run
    time if the solver does not converge and `throw` is true.
    """
    check_flow_map(flow_map)
    check_bools(throw=throw)
    kinds = optx.AbstractFixedPointSolver | optx.AbstractRootFinder
    kinds |= optx.AbstractLeastSquaresSolver | None
    what = "an Optimistix fixed-point, root-finding or least-squares solver"
    check_instance(solver, kinds, "solver", what)
    y = jtu.tree_map(jnp.asarray, y)
    s, t = times_like(y, s, t)
    guess = y if guess is None else jtu.tree_map(jnp.asarray, guess)
    check_like(guess, y, "`guess`")
    vector, unravel = ravel_floats(y)
    # Optimistix keeps its norms in the default dtype, so it needs vectors of that dtype.
    widen = lambda x: ravel_floats(x)[0].astype(jnp.result_type(float))
    jump = lambda x: check_like(flow_map(s, t, x, args), y, "`flow_map`")
    if solver is None:
        tol = {64: 1e-9, 32: 1e-5, 16: 3e-2}[jnp.finfo(real_dtype(y)).bits]
        # In low precision a trust region mistakes rounding for a step that fails.
        kind = optx.Dogleg if tol < 1e-8 else optx.Newton
        kind = kind if vector.size <= 1000 else optx.FixedPointIteration
        solver = kind(rtol=tol, atol=tol)

    def residual(x, _=None):
        return widen(jump(unravel(x.astype(vector.dtype)))) - widen(y)

    start = widen(guess)
    options = {"max_steps": max_steps, "throw": throw}
    if isinstance(solver, optx.AbstractFixedPointSolver):
        solution = optx.fixed_point(
            lambda x, _: x - residual(x), solver, start, **options
        )
    else:
        solution = optx.root_find(residual, solver, start, **options)
    x = unravel(solution.value.astype(vector.dtype))
    # Diagnostics carry no gradient.
    error = lax.stop_gradient(largest_entry(subtract(jump(x), y)))
    increment = lambda x: residual(x) - x
    contraction = _largest_singular_value(increment, solution.value, num_iterations)
    return Inversion(
        x,
        error,
        contraction.astype(error.dtype),
        jnp.asarray(solution.stats["num_steps"]),
        solution.result,
    )


def largest_entry(x: State) -> Scalar:
    """The largest entry of all leaves, by magnitude."""
    dtype = time_dtype(x)
    leaves = [
        jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jtu.tree_leaves(x)
    ]
    return jnp.max(jnp.stack(leaves))


def _largest_singular_value(fn, x: Array, num_iterations: int) -> Scalar:
    """A lower estimate for the Jacobian of `fn` at `x`, by power iteration."""
    _, forward = jax.linearize(fn, lax.stop_gradient(x))
    backward = jax.linear_transpose(forward, x)

    def normalise(z):
        size = jnp.linalg.norm(z)
        return z / jnp.where(size == 0, 1, size)

    # Any start that is not orthogonal to the singular vector will do.
    z = normalise(vary_like(jr.normal(jr.key(0), x.shape, x.dtype), x))
    turn = lambda _, z: normalise(backward(forward(z))[0])
    z = lax.fori_loop(0, num_iterations, turn, z)
    return lax.stop_gradient(jnp.linalg.norm(forward(z)))
