"""Hypothesis strategies for times, states, vector fields and flows."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._io import import_extra
from .._types import State
from ..exact._gaussian import GaussianFlowMap
from ..paths._base import AbstractInterpolant
from ..paths._interpolants import (
    LinearInterpolant,
    TrigonometricInterpolant,
    VariancePreservingInterpolant,
)
from ..paths._latents import SineSquaredLatent
from ._fields import KnownField

# A `hypothesis.strategies.SearchStrategy`; Hypothesis is an optional dependency.
Strategy: TypeAlias = Any


def hypothesis_module(name: str = "") -> Any:
    """A module of Hypothesis.

    **Raises:** `ImportError`, which names the extra to install.
    """
    return import_extra(f"hypothesis{name}", "testing", "flowdiffrax.testing")


def times(t0: float = 0.0, t1: float = 1.0) -> Strategy:
    """Times in an interval, both ends included.

    Most are thousandths of the interval, so that counterexamples are easy to read. The
    others are arbitrary floats.

    **Arguments:**

    - `t0`, `t1`: the interval, `t0 < t1`.

    **Raises:** `ImportError` without Hypothesis, as for all strategies.
    """
    return _time_tuples(1, t0, t1).map(lambda drawn: drawn[0])


def time_pairs(
    t0: float = 0.0, t1: float = 1.0, *, ordered: bool | None = None, gap: float = 0.0
) -> Strategy:
    """Pairs `(s, t)` of start and end: far apart, equal, and nearly equal.

    **Arguments:**

    - `t0`, `t1`: the interval, `t0 < t1`.
    - `ordered`: `True` for `s <= t`, `False` for `s >= t`, `None` for either.
    - `gap`: the smallest distance between them, which "equal" pairs then have.

    **Raises:** `ValueError` for an empty interval, or a gap that does not fit in it.
    """
    st = hypothesis_module(".strategies")
    if not 0 <= gap < t1 - t0:
        raise ValueError(f"`gap` must fit in the interval [{t0}, {t1}]; got {gap}.")
    # Draw pairs without the gap, which `arrange` adds.
    last = t1 - gap
    nearby = st.sampled_from([1e-2, 1e-4, 1e-6]).map(lambda share: share * (t1 - t0))
    time = times(t0, last)
    close = st.tuples(time, nearby).map(lambda p: (p[0], min(p[0] + p[1], last)))
    # Hypothesis draws all branches equally often. Two of four give half of all pairs.
    apart, far_apart = _time_tuples(2, t0, last), _time_tuples(2, t0, last)
    both = apart | far_apart | time.map(lambda t: (t, t)) | close
    falls = st.just(ordered is False) if ordered is not None else st.booleans()

    def arrange(drawn: tuple[tuple[float, float], bool]) -> tuple[float, float]:
        pair, falling = drawn
        low, high = min(pair), min(max(pair) + gap, t1)
        return (high, low) if falling else (low, high)

    return st.tuples(both, falls).map(arrange)


def time_triples(
    t0: float = 0.0, t1: float = 1.0, *, ordered: bool | None = None, gap: float = 0.0
) -> Strategy:
    """Triples `(s, u, t)` of start, intermediate time and end.

    **Arguments:** as for [`flowdiffrax.testing.time_pairs`][], which draws start and end.
    If `ordered` is not `None`, the intermediate time is between them. Otherwise, it is
    any time in the interval. Often it equals the start or the end.

    **Raises:** `ValueError` as for [`flowdiffrax.testing.time_pairs`][].
    """
    st = hypothesis_module(".strategies")
    pairs = time_pairs(t0, t1, ordered=ordered, gap=gap)

    def between(drawn: tuple[tuple[float, float], float]) -> tuple[float, float, float]:
        (s, t), share = drawn
        u = drop_rounding(s + share * (t - s), min(s, t), max(s, t))
        return s, u, t

    inside = st.tuples(pairs, st.integers(0, 10).map(lambda k: k / 10)).map(between)
    if ordered is not None:
        return inside
    anywhere = st.tuples(pairs, times(t0, t1)).map(lambda p: (p[0][0], p[1], p[0][1]))
    return inside | anywhere


def dtypes() -> Strategy:
    """The floating-point and complex dtypes of JAX, with 64-bit ones if enabled.

    **Raises:** `ImportError` without Hypothesis.
    """
    st = hypothesis_module(".strategies")
    found = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
    if jax.config.jax_enable_x64:  # pyright: ignore
        found += [jnp.float64, jnp.complex128]
    return st.sampled_from([jnp.dtype(dtype) for dtype in found])


def states(
    shape: int | Sequence[int] | Strategy = None,
    dtype: Any = None,
    *,
    bound: float = 2.0,
) -> Strategy:
    """States that are arrays.

    Most entries are tenths, so that counterexamples are easy to read. The others are
    arbitrary floats of single precision.

    **Arguments:**

    - `shape`: the shape, or a strategy of shapes. `None` draws shapes with at most three
      axes and at most three entries along each, including scalars and empty arrays. The
      tested code compiles again for each shape.
    - `dtype`: the dtype, or a strategy of dtypes such as
      [`flowdiffrax.testing.dtypes`][]; `None` for JAX's default.
    - `bound`: the largest magnitude of an entry, or of its real and imaginary parts.

    **Raises:** `ImportError` without Hypothesis.
    """
    st = hypothesis_module(".strategies")
    hnp = hypothesis_module(".extra.numpy")
    if shape is None:
        shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    if isinstance(shape, int):
        shape = (shape,)
    shape = st.just(tuple(shape)) if isinstance(shape, Sequence) else shape
    dtype = dtype if isinstance(dtype, st.SearchStrategy) else st.just(dtype)

    def arrays(drawn: tuple) -> Strategy:
        dtype, shape = drawn
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return _numbers(shape, bound).map(lambda x: jnp.asarray(x, dtype))
        parts = st.tuples(_numbers(shape, bound), _numbers(shape, bound))
        return parts.map(lambda x: jnp.asarray(x[0] + 1j * x[1], dtype))

    return st.tuples(dtype, shape).flatmap(arrays)


def states_like(example: State, *, bound: float = 2.0) -> Strategy:
    """States with the structure, shapes and dtypes of an example.

    **Arguments:**

    - `example`: an array, a `jax.ShapeDtypeStruct`, or a PyTree of them.
    - `bound`: as for [`flowdiffrax.testing.states`][].

    **Raises:** `ImportError` without Hypothesis.
    """
    st = hypothesis_module(".strategies")
    like = jax.eval_shape(lambda x: jtu.tree_map(jnp.asarray, x), example)
    leaves, structure = jtu.tree_flatten(like)
    draws = [states(leaf.shape, leaf.dtype, bound=bound) for leaf in leaves]
    return st.tuples(*draws).map(lambda leaves: jtu.tree_unflatten(structure, leaves))


def pytrees(dtype: Any = None, *, bound: float = 2.0, max_leaves: int = 4) -> Strategy:
    """States of any structure: lists, tuples and dictionaries of small arrays.

    **Arguments:**

    - `dtype`, `bound`: as for [`flowdiffrax.testing.states`][]. A strategy of dtypes is
      drawn from separately for each leaf.
    - `max_leaves`: the maximum number of arrays.

    **Raises:** `ImportError` without Hypothesis.
    """
    st = hypothesis_module(".strategies")

    def containers(children: Strategy) -> Strategy:
        lists = st.lists(children, min_size=1, max_size=3)
        by_name = st.dictionaries(st.sampled_from("abc"), children, min_size=1)
        return lists | lists.map(tuple) | by_name

    leaf = states(dtype=dtype, bound=bound)
    return st.recursive(leaf, containers, max_leaves=max_leaves)


def vector_fields(shape: int | Sequence[int] = (2,)) -> Strategy:
    """Smooth random vector fields with a known flow.

    Each is a [`flowdiffrax.testing.KnownField`][]: `field(t, x, args)` is the velocity,
    and `field.flow_map(s, t, x)` its flow. All have the same structure, so a jitted
    function that takes the field as an argument compiles once.

    **Arguments:**

    - `shape`: the shape of the states.

    **Raises:** `ImportError` without Hypothesis.
    """
    st = hypothesis_module(".strategies")
    size = math.prod((shape,) if isinstance(shape, int) else shape)
    number = st.integers(-10, 10).map(lambda k: k / 10)
    numbers = st.lists(number, min_size=size, max_size=size)
    small = st.integers(-5, 5).map(lambda k: k / 10)
    return st.builds(KnownField, numbers, numbers, shear=number, warp=small)


def gaussian_flows(
    shape: int | Sequence[int] = (2,),
    interpolants: Sequence[AbstractInterpolant] | None = None,
) -> Strategy:
    """Exact flow maps from one random Gaussian to another.

    Each is a [`flowdiffrax.exact.GaussianFlowMap`][], with a mean and a standard
    deviation for each entry; its `velocity` is the vector field.

    **Arguments:**

    - `shape`: the shape of the states.
    - `interpolants`: the interpolants to draw from; `None` for the linear, the
      trigonometric and the variance-preserving one, and the linear one with a latent.

    **Raises:** `ImportError` without Hypothesis.
    """
    if interpolants is None:
        interpolants = (
            LinearInterpolant(),
            TrigonometricInterpolant(),
            VariancePreservingInterpolant(),
            LinearInterpolant(latent=SineSquaredLatent(0.5)),
        )
    st = hypothesis_module(".strategies")
    hnp = hypothesis_module(".extra.numpy")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)

    def arrays(low: int, high: int) -> Strategy:
        tenths = st.integers(low, high).map(lambda k: k / 10)
        return hnp.arrays(np.float64, shape, elements=tenths)

    return st.builds(
        GaussianFlowMap,
        st.sampled_from(list(interpolants)),
        base_std=arrays(5, 15),
        target_std=arrays(3, 20),
        base_mean=arrays(-10, 10),
        target_mean=arrays(-10, 10),
    )


# Hypothesis often repeats an earlier draw of the same kind. If times or entries were
# drawn one by one, most would be equal. Decoding them from one byte string avoids this,
# and they still shrink one by one.


def _time_tuples(number: int, t0: float, t1: float) -> Strategy:
    """Tuples of `number` independent times in an interval."""
    st = hypothesis_module(".strategies")

    def decode(drawn: bytes) -> tuple:
        shares = np.frombuffer(drawn, ">u2") * (1000 / 65535)
        thousandths = np.round(shares) / 1000
        times = (t0 + (t1 - t0) * thousandths).tolist()
        return tuple(drop_rounding(time, t0, t1) for time in times)

    # Hypothesis likes numbers such as 1e-234, which are zero for all purposes here.
    snap = lambda time: t0 if time - t0 < 1e-12 * (t1 - t0) else time
    size = 2 * number
    tidy = st.binary(min_size=size, max_size=size).map(decode)
    any_float = st.floats(t0, t1, allow_subnormal=False).map(snap)
    return tidy | st.tuples(*[any_float] * number)


def _numbers(shape: tuple, bound: float) -> Strategy:
    """Arrays of float64."""
    st = hypothesis_module(".strategies")
    hnp = hypothesis_module(".extra.numpy")

    def decode(drawn: bytes) -> np.ndarray:
        codes = np.frombuffer(drawn, np.uint8).astype(int)
        # Zero first, then the positive ones, then the negative ones.
        tenths = np.floor((codes % 128) * (10 * bound / 127)) / 10
        return np.where(codes < 128, tenths, -tenths).reshape(shape)

    size = math.prod(shape)
    limit = np.float32(bound)
    limit = float(limit if limit <= bound else np.nextafter(limit, np.float32(0)))
    any_float = st.floats(-limit, limit, width=32, allow_subnormal=False)
    tidy = st.binary(min_size=size, max_size=size).map(decode)
    return tidy | hnp.arrays(np.float64, shape, elements=any_float)


def drop_rounding(time: float, low: float, high: float) -> float:
    """Drops the last digits, which are rounding: 0.3 and not 0.30000000000000004."""
    return min(max(float(f"{time:.12g}"), low), high)
