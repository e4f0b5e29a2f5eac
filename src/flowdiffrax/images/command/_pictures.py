"""Pictures: samples of every sampler, and images taken to noise and back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import ArrayLike, Real

from ..._io import write_whole
from ..._types import TwoTimeMap
from ...flow_maps._base import AbstractFlowMap
from ...likelihood import Inversion, invert
from .._device import from_uint8
from .._grid import picture
from .._recipe import Recipe
from .._sampling import jump
from ..sets._images import Images
from ._options import Options
from ._samplers import Batch, Labels, by_jumps, noise, samplers


def grid(
    recipe: Recipe,
    options: Options,
    flow_map: AbstractFlowMap,
    teacher: AbstractFlowMap | None,
    images: Images,
    number: int = 20,
) -> None:
    """Draws the same noise with every sampler, a row for each."""
    x0, labels = noise(recipe, number, images, options.seed)
    named = samplers(recipe, options, flow_map, teacher)
    rows = [draw(x0, labels, jr.key(options.seed))[0] for draw in named.values()]
    write_whole(options.picture("samples"), picture(rows, [*named]))


def inversion(
    recipe: Recipe,
    options: Options,
    flow_map: AbstractFlowMap,
    images: Images,
    number: int = 8,
    num_jumps: int = 16,
) -> float:
    """Takes images to noise and back, and interpolates: saves a picture, prints errors.

    It goes back with the map itself if the map learned to, and otherwise solves for the
    start of each jump. Short jumps are easier to solve for.
    """
    x1 = from_uint8(jnp.asarray(images.images[:number]))
    labels = None
    if recipe.num_classes is not None:
        labels = jnp.asarray(images.labels)[:number]
    times = np.linspace(1.0, 0.0, num_jumps + 1, dtype=np.float32)
    x0, contraction, solved = x1, 0.0, jnp.ones(number, bool)
    for t, s in zip(times[:-1], times[1:], strict=True):
        if options.both_directions:
            x0 = jump(flow_map, t, s, x0, labels)
        else:
            found = _solve_for_start(flow_map, s, t, x0, labels)
            x0, solved = found.x, solved & found.success
            contraction = max(contraction, float(jnp.max(found.contraction)))
    draw = by_jumps(flow_map, num_jumps)
    back, _ = draw(x0, labels, None)
    before = jnp.roll(x0, 1, axis=0)
    half_way, _ = draw((x0 + before) / jnp.sqrt(2.0), labels, None)
    rows = {
        "images": x1,
        "their noise": x0 / recipe.base_std / 2,
        "and back": back,
        "half way to the one before": half_way,
    }
    write_whole(options.picture("inversion"), picture([*rows.values()], [*rows]))
    error = float(jnp.sqrt(jnp.mean((back - x1) ** 2)))
    how = "the backward map" if options.both_directions else "a solve for each"
    print(f"{num_jumps} jumps back by {how}, and forth: rms error {error:.2g}")
    if not options.both_directions:
        print(
            f"{int(jnp.sum(solved))} of {number} images were solved for at every jump; "
            f"(t - s) Lip(v) is up to {contraction:.2f}, and below 1 that always works"
        )
    return error


@eqx.filter_jit
def _solve_for_start(
    flow_map: TwoTimeMap,
    s: Real[ArrayLike, ""],
    t: Real[ArrayLike, ""],
    y: Batch,
    labels: Labels,
) -> Inversion:
    one = lambda y, label: invert(flow_map, s, t, y, label, max_steps=128, throw=False)
    return jax.vmap(one)(y, labels)
