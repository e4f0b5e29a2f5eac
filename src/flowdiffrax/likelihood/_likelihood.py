"""Log-densities under generative flow maps, in one jump or several."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Real

from .._check import check_callable
from .._time import time_dtype
from .._tree import is_concrete, num_rows, subtract
from .._types import Args, Scalar, State, TwoTimeMap, VectorField
from ..flow_maps._base import out_of_range_message, times_out_of_range
from ..flow_maps._inverse import check_composable
from ..flow_maps._ode import ODEFlowMap
from ..solvers._sample import check_grid, make_grid
from ._inversion import Inversion, largest_entry
from ._log_density import LogDensityVelocity
from ._log_det import AbstractLogDet, ExactJacobian, log_det


class PullBack(NamedTuple):
    r"""The result of [`flowdiffrax.likelihood.pull_back`][].

    **Attributes:**

    - `x0`: the state at the first time.
    - `log_det`: $\log |\det \nabla X_{1,0}(x_1)|$ for the way back.
    - `error`: the round-trip error: the largest entry, by magnitude, of
      $X_{0,1}(x_0) - x_1$, where the way forward takes the same jumps.
    """

    x0: State
    log_det: Scalar
    error: Scalar


def log_prob(
    flow_map: TwoTimeMap,
    base_log_prob: Callable[[State], Scalar],
    x1: State,
    ts: int | np.integer | Real[ArrayLike, " times"] = 1,
    args: Args = None,
    *,
    method: AbstractLogDet = ExactJacobian(),
    inverse: Callable[..., Inversion] | None = None,
    key: Key[Array, ""] | None = None,
) -> Scalar:
    r"""The log-density of a data point under a generative flow map.

    $\log \rho_1(x_1) = \log \rho_0(X_{1,0}(x_1)) + \log |\det \nabla X_{1,0}(x_1)|$, in
    one jump or several. It is differentiable in the map's parameters, `x1` and `args`.

    The density integrates to one if the map back is one-to-one and onto, as it is for a
    flow. For a learned map, check the round trip: [`flowdiffrax.likelihood.pull_back`][]
    returns its error along with the terms of the log-density.

    **Arguments:**

    - `flow_map`: a map that goes in both directions of time; with `inverse`, a map that
      goes forwards is enough.
    - `base_log_prob`: the log-density of the base, a function of one state.
    - `x1`: one data point; use `jax.vmap` for a batch.
    - `ts`: the times from base to data, as for [`flowdiffrax.sample`][]: a grid, or a
      number of equal jumps. The way back visits them from the last to the first.
    - `args`: passed to the map.
    - `method`: how to compute the log-determinant of each jump; see
      [`flowdiffrax.likelihood.log_det`][].
    - `inverse`: `None` to use the map's own jumps backwards; or a function that inverts
      the forward jumps: [`flowdiffrax.likelihood.invert`][], or `functools.partial` of it
      with settings. Then use several jumps: short ones contract, and their end is a good
      initial guess. If a jump cannot be inverted and `inverse` does not raise, the
      density is NaN.
    - `key`: a random key, if the method has a stochastic trace. Use a different key for
      each example.

    **Returns:** the log-density, in float32 at least.

    **Raises:** the errors of [`flowdiffrax.likelihood.log_det`][] and, for times, of
    [`flowdiffrax.sample`][]; `ValueError` if `base_log_prob` does not return a scalar.
    """
    there = pull_back(flow_map, x1, ts, args, method=method, inverse=inverse, key=key)
    return _density(base_log_prob, there.x0) + there.log_det


def pull_back(
    flow_map: TwoTimeMap,
    x1: State,
    ts: int | np.integer | Real[ArrayLike, " times"] = 1,
    args: Args = None,
    *,
    method: AbstractLogDet = ExactJacobian(),
    inverse: Callable[..., Inversion] | None = None,
    key: Key[Array, ""] | None = None,
) -> PullBack:
    """Takes a data point to the base, and measures the error of the round trip.

    The log-density is the base's at `x0` plus `log_det`, as in
    [`flowdiffrax.likelihood.log_prob`][]. The error costs one more evaluation per jump;
    inside `jit` it costs nothing if it is not used.

    **Arguments:** as for [`flowdiffrax.likelihood.log_prob`][], with the same errors.

    **Returns:** a [`flowdiffrax.likelihood.PullBack`][].
    """

    def jump(t, s, x, key):
        if inverse is None:
            return log_det(flow_map, t, s, x, args, method=method, key=key)
        inversion = inverse(flow_map, s, t, x, args)
        _, forward = log_det(flow_map, s, t, inversion.x, args, method=method, key=key)
        return inversion.x, jnp.where(inversion.success, -forward, jnp.nan)

    x1 = jtu.tree_map(jnp.asarray, x1)
    x1, grid = _checked(flow_map, x1, ts)
    x0, total = _jumps(jump, grid[::-1], x1, key)
    forth = lambda s, t, x, key: (flow_map(s, t, x, args), jnp.zeros_like(total))
    again, _ = _jumps(forth, grid, x0, None)
    return PullBack(x0, total, largest_entry(subtract(again, x1)))


def sample_log_prob(
    flow_map: TwoTimeMap,
    base_log_prob: Callable[[State], Scalar],
    x0: State,
    ts: int | np.integer | Real[ArrayLike, " times"] = 1,
    args: Args = None,
    *,
    method: AbstractLogDet = ExactJacobian(),
    key: Key[Array, ""] | None = None,
) -> tuple[State, Scalar]:
    r"""A sample and its log-density, $\log \rho_1(x_1)$ at $x_1 = X_{0,1}(x_0)$.

    The log-density is $\log \rho_0(x_0) - \log |\det \nabla X_{0,1}(x_0)|$, computed on
    the way forward, so the map need not go backwards. If the map is one-to-one, it is the
    exact density of the map's own samples, and can be used to weight them.

    **Arguments:** as for [`flowdiffrax.likelihood.log_prob`][], except

    - `x0`: one draw from the base.

    **Returns:** the pair of the state at the last time, as [`flowdiffrax.sample`][]
    returns it, and its log-density.

    **Raises:** the errors of [`flowdiffrax.likelihood.log_det`][] and, for times, of
    [`flowdiffrax.sample`][].
    """

    def jump(s, t, x, key):
        return log_det(flow_map, s, t, x, args, method=method, key=key)

    x0 = jtu.tree_map(jnp.asarray, x0)
    x0, grid = _checked(flow_map, x0, ts)
    x1, total = _jumps(jump, grid, x0, key)
    return x1, _density(base_log_prob, x0) - total


def log_prob_errors(
    flow_map: TwoTimeMap,
    vector_field: VectorField,
    base_log_prob: Callable[[State], Scalar],
    x1: State,
    ts: int | np.integer | Real[ArrayLike, " times"] = 1,
    args: Args = None,
    *,
    method: AbstractLogDet = ExactJacobian(),
    inverse: Callable[..., Inversion] | None = None,
    key: Key[Array, ""] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Float[Array, " points"]:
    r"""The errors of a map's log-densities in nats, against the continuous flow.

    The log-density of the map minus that of the ODE, for each of a batch of data points.
    Diffrax integrates the ODE together with its exact divergence
    ([`flowdiffrax.likelihood.LogDensityVelocity`][]), which costs a derivative for each
    dimension, at each of its steps.

    **Arguments:** as for [`flowdiffrax.likelihood.log_prob`][], except

    - `vector_field`: the velocity of the flow, `(t, x, args) -> dx/dt`.
    - `x1`: a batch of data points, with a leading axis. `args` is the same for all.
    - `key`: one random key for the batch, if the method has a stochastic trace.
    - `rtol`, `atol`: the tolerances of Diffrax; `None` for those of
      [`flowdiffrax.ODEFlowMap`][].

    **Returns:** the errors, which are NaN where the map's log-density is. Report the mean
    of their magnitudes and the number of NaNs.

    **Raises:** the errors of [`flowdiffrax.likelihood.log_prob`][]; `RuntimeError` at run
    time if Diffrax needs more steps than `ODEFlowMap` allows.
    """
    check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
    exact = ODEFlowMap(LogDensityVelocity(vector_field), rtol=rtol, atol=atol)
    x1, grid = _checked(flow_map, x1, ts)

    def error(x1, index):
        point_key = None if key is None else jr.fold_in(key, index)
        settings = {"method": method, "inverse": inverse, "key": point_key}
        by_map = log_prob(flow_map, base_log_prob, x1, ts, args, **settings)
        start = x1, jnp.zeros_like(by_map)
        x0, change = exact(grid[-1], grid[0], start, args)
        return by_map - (_density(base_log_prob, x0) - change)

    return jax.vmap(error)(x1, jnp.arange(num_rows(x1, "`x1`")))


def _density(base_log_prob: Callable[[State], Scalar], x0: State) -> Scalar:
    check_callable(base_log_prob, "base_log_prob", "base_log_prob(x)")
    log_prob = base_log_prob(x0)
    if jnp.shape(log_prob) != ():
        raise ValueError(
            "`base_log_prob` must return one number for one state; got shape "
            f"{jnp.shape(log_prob)}. Of independent entries, sum."
        )
    return log_prob


def _checked(flow_map: TwoTimeMap, x: State, ts) -> tuple[State, Array]:
    """Checks the grid of times, and casts it to the precision of the state."""
    check_composable(flow_map)
    grid = make_grid(flow_map, ts)
    if is_concrete(grid):
        check_grid(flow_map, np.asarray(grid))
    else:
        outside = times_out_of_range(flow_map, jnp.min(grid), jnp.max(grid))
        if outside is not None:
            x = eqx.error_if(x, outside, out_of_range_message(flow_map))
    return x, jnp.asarray(grid, time_dtype(x))


def _jumps(jump: Callable, grid: Array, x: State, key) -> tuple[State, Scalar]:
    """Returns the last state and the sum of the log-determinants."""

    def turn(x, inputs):
        start, end, index = inputs
        return jump(start, end, x, None if key is None else jr.fold_in(key, index))

    inputs = grid[:-1], grid[1:], jnp.arange(grid.size - 1)
    if grid.size == 2:  # a scan would compile a loop
        return turn(x, jax.tree_util.tree_map(lambda leaf: leaf[0], inputs))
    x, gains = lax.scan(turn, x, inputs)
    return x, jnp.sum(gains)
