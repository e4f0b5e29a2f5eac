"""How far a map is from exact solutions, and what a jump costs beside a solve."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ..nn._log_units import LEAST_SPREAD
from ._problem import Domain

# The quantiles of errors that are reported.
QUANTILES = 0.5, 0.9, 1.0


class Jumps:
    """Evaluates maps on batches of vectors in NumPy."""

    def __init__(self, domain: Domain):
        self._domain = domain

        def run(flow_map, times, x, args):
            one = lambda s, t, x, args: flow_map(s, t, x, args)
            jump = jax.vmap(one, (0, 0, 0, None if args is None else 0))
            move = lambda x, ends: (jump(ends[0], ends[1], x, args), None)
            return jax.lax.scan(move, x, (times[:-1], times[1:]))[0]

        self._run = eqx.filter_jit(run)

    def __call__(self, flow_map: Any, times: Any, x0: Any, args: Any) -> np.ndarray:
        """The states at the last of the times, jumping from each to the next.

        Times are the same for all states, or have one column for each.
        """
        user = self._domain.to_user(x0, args)
        columns = np.reshape(times, (len(times), -1))
        times = np.broadcast_to(columns, (len(times), len(x0)))
        ends = self._run(flow_map, jnp.asarray(times, jnp.float32), *user)
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(ends)]
        return np.concatenate([leaf.reshape(len(x0), -1) for leaf in leaves], axis=1)


def scaled_errors(
    ys: Float[np.ndarray, "rows size"],
    exact: Float[np.ndarray, "rows size"],
    is_positive: Bool[np.ndarray, " size"],
    scale: Float[np.ndarray, " size"],
    std: Float[np.ndarray, " size"],
    noise: Any = 0.0,
) -> Float[np.ndarray, "rows size"]:
    """Relative errors of positive entries, and others in standard deviations.

    Errors of positive entries that vary little are relative to ten standard deviations.
    With `noise`, errors are relative to no less than this.
    """
    size = np.abs(exact) + 1e-10 * scale
    # An entry that does not vary at all cannot be known better than to single precision.
    least = np.maximum(std, 1e-5 * scale) / LEAST_SPREAD
    varies_little = np.nanmin(np.abs(exact), 0, initial=np.inf) > 0.5 * scale
    size = np.where(varies_little, np.minimum(size, least), size)
    size = np.where(is_positive, size + noise, std)
    return np.nan_to_num(np.abs(ys - exact) / size, nan=np.inf)


def seconds_of(call: Callable[[], Any], at_least: float = 0.2, most: int = 50) -> float:
    """The shortest of several times that a call takes, after one that compiles."""
    call()
    return timed(call, at_least, most)[1]


def timed(
    call: Callable[[], Any], at_least: float = 0.2, most: int = 50
) -> tuple[Any, float]:
    """What a call returns, and the shortest of several times that it takes.

    There is one only if that takes `at_least` so many seconds.
    """
    best, spent, count, result = np.inf, 0.0, 0, None
    while spent < at_least and count < most:
        begin = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - begin)
        spent, count = spent + time.perf_counter() - begin, count + 1
    return result, float(best)


def flops_of(function: Callable, *given: Any) -> float:
    """The floating-point operations of a call, as XLA counts them."""
    dynamic, static = eqx.partition((function, given), eqx.is_array)

    def call(dynamic):
        function, given = eqx.combine(dynamic, static)
        return function(*given)

    analysis = jax.jit(call).lower(dynamic).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", float("nan")))
