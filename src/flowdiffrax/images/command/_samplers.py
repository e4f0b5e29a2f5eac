"""Samplers to compare: jumps, jumps with restarts, and a solve of the velocity.

A sampler maps a batch of starting points, labels or `None`, and a key to samples and the
number of evaluations for each.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from ..._types import TwoTimeMap, VectorField
from ...data import GaussianBase
from ...flow_maps._base import AbstractFlowMap
from ...paths._base import AbstractInterpolant
from ...solvers._sample import sample_with_restarts
from ...velocities import ClassifierFreeGuidance, GuidedFlowMap, GuidedVelocity
from .._device import to_uint8
from .._recipe import Recipe
from .._sampling import in_blocks, in_jumps
from ..sets._images import Images
from ._options import Options

Batch: TypeAlias = Float[Array, " batch *image"]
Labels: TypeAlias = Int[Array, " batch"] | None
Sampler: TypeAlias = Callable[
    [Batch, Labels, Key[Array, ""] | None], tuple[Batch, int | Int[Array, ""]]
]


def noise(recipe: Recipe, number: int, images: Images, seed: int) -> tuple[Batch, Labels]:
    """Starting points, with the classes in turn."""
    shape = images.images.shape[1:]
    x0 = recipe.base_std * jr.normal(jr.key(seed + 1000), (number, *shape))
    labels = jnp.arange(number) % (images.num_classes or 1)
    return x0, None if recipe.num_classes is None else labels


def by_jumps(flow_map: TwoTimeMap, num_jumps: int) -> Sampler:
    """A sampler that uses one compiled jump for all numbers of jumps."""

    def draw(x0, labels, key):
        del key
        return in_jumps(flow_map, num_jumps, x0, labels), num_jumps

    return draw


def by_restarts(flow_map: TwoTimeMap, recipe: Recipe, times: Sequence[float]) -> Sampler:
    """A sampler that jumps to the end, and goes back to earlier times by adding noise."""
    base = GaussianBase(recipe.base_std)

    def draw(x0, labels, key):
        keys = jr.split(key, len(x0))
        ts = jnp.asarray(times)
        x1 = _restart(flow_map, recipe.interpolant, base, ts, x0, labels, keys)
        return x1, 1 + len(times)

    return draw


@eqx.filter_jit
def _restart(
    flow_map: TwoTimeMap,
    interpolant: AbstractInterpolant,
    base: GaussianBase,
    times: Float[Array, " restarts"],
    x0: Batch,
    labels: Labels,
    keys: Key[Array, " batch"],
) -> Batch:
    one = lambda x, label, key: sample_with_restarts(
        flow_map, interpolant, x, times, label, base=base, key=key
    )
    return jax.vmap(one)(x0, labels, keys)


def by_tsit5(velocity: VectorField, tolerance: float) -> Sampler:
    """A sampler that integrates the probability flow."""

    def draw(x0, labels, key):
        del key
        return _integrate(velocity, x0, labels, tolerance)

    return draw


@eqx.filter_jit
def _integrate(
    velocity: VectorField, x0: Batch, labels: Labels, tolerance: float
) -> tuple[Batch, Int[Array, ""]]:
    """One Tsit5 solve of the whole batch, and its number of evaluations."""
    field = lambda t, x, args: jax.vmap(lambda x, label: velocity(t, x, label))(x, args)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 1.0, None, x0, labels,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )  # fmt: skip
    assert solution.ys is not None
    return solution.ys[-1], 6 * solution.stats["num_steps"]


def samplers(
    recipe: Recipe,
    options: Options,
    flow_map: AbstractFlowMap,
    teacher: AbstractFlowMap | None,
) -> dict[str, Sampler]:
    """The samplers to compare, by name."""
    guided, velocity = flow_map, (teacher or flow_map).velocity
    if options.guidance != 1.0:
        rule = ClassifierFreeGuidance(recipe.num_classes, options.guidance)
        guided = GuidedFlowMap(flow_map, rule)
        velocity = GuidedVelocity(velocity, rule)
    named = {}
    if options.ode is not None:
        whose = "its own velocity" if teacher is None else "the teacher"
        named[f"Tsit5 on {whose}"] = by_tsit5(velocity, options.ode)
    for number in options.jumps:
        named[f"{number} jump{'s' * (number > 1)}"] = by_jumps(guided, number)
    if options.restarts:
        name = f"1 jump, restarts at {', '.join(map(str, options.restarts))}"
        named[name] = by_restarts(guided, recipe, options.restarts)
    return named


def draw_all(
    draw: Sampler,
    x0: Batch,
    labels: Labels,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[UInt8[np.ndarray, " number *image"], float, float]:
    """Samples as 8-bit images, evaluations per sample, and seconds for 1,000 samples.

    The first batch is also drawn once before timing, to compile. `sharding` is where the
    map is.
    """

    def batches(evaluations):
        def draw_next(x0, labels):
            x1, number = draw(x0, labels, jr.key(len(evaluations)))
            evaluations.append(number)
            return x1

        return in_blocks(draw_next, (x0, labels), len(x0), batch_size, sharding)

    next(batches([]))
    start, evaluations = time.perf_counter(), []
    images = np.concatenate([to_uint8(batch) for batch in batches(evaluations)])
    seconds = (time.perf_counter() - start) / len(x0) * 1000
    return images, float(np.mean(evaluations)), seconds
