import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Key

from .._check import check_bools, check_count, check_key, check_positive
from ..data import InterpolantBatches
from ..flow_maps._base import AbstractFlowMap
from ..objectives import FlowMatching, LagrangianMapDistillation
from ..paths import LinearInterpolant
from ..times import Diagonal, DiagonalMixture, Stratified, UniformTriangle
from ..train import muon_and_adam
from ._learn_solver import Progress
from ._posterior import LearnedPosterior, PosteriorNetwork, log_density
from ._posterior_units import PosteriorUnits, find_units
from ._simulations import Simulations, read_simulations
from ._train_posterior import Training, adam, mean_map

_HELD_OUT = 0.1
# The velocity is the mean of several networks, whose errors differ. Small ones are
# learned by heart last; from more simulations than this, larger ones learn more in the
# same time. So they do from sets, whose rows take most of the time.
_MANY = 30_000
# The share of the time until the velocity is learned, if it does not stop earlier, and
# until everything is but the last look.
_VELOCITY_SHARE, _MAP_SHARE = 0.5, 0.92
# Pairs at which the loss is looked at, and simulations whose density is.
_NUM_PAIRS, _NUM_LOOKED_AT = 4096, 512
_JUMPS = 1, 2, 4


def learn_posterior(
    thetas: ArrayLike,
    xs: ArrayLike | Sequence[ArrayLike],
    *,
    mask: ArrayLike | None = None,
    bounds: Any = None,
    minutes: float = 3.0,
    key: Key[Array, ""] | None = None,
    width: int | None = None,
    depth: int | None = None,
    batch_size: int | None = None,
    num_steps: int | None = None,
    progress: bool = True,
) -> LearnedPosterior:
    """Learns the posterior of parameters from simulations alone, for any observation.

    ```python
    posterior = fd.learn.learn_posterior(thetas, xs, bounds=(-1.0, 1.0), minutes=2)
    samples = posterior.sample(jr.key(0), x, 10_000, num_jumps=4)
    ```

    Parameters are brought to units in which the posterior is about standard normal:
    bounded ones are transformed, and a linear regression on the observation is taken
    away, see [`flowdiffrax.learn.PosteriorUnits`][]. Then flow matching learns a
    velocity, until its loss on simulations that are held out no longer falls, and
    Lagrangian distillation learns the flow map of this velocity. A tenth of the
    simulations is held out.

    **Arguments:**

    - `thetas`: the parameters, drawn from the prior, of shape `(simulations, size)`.
    - `xs`: what was simulated with them, of shape `(simulations, x_size)`; or if an
      observation is a set of rows in any order, of shape `(simulations, rows, x_size)`,
      or a list of arrays of shape `(rows, x_size)` with any number of rows. Simulations
      that are not finite are dropped.
    - `mask`: for sets given as one array, true for the rows that are there, of shape
      `(simulations, rows)`; `None` for all.
    - `bounds`: a pair `(low, high)` of numbers, or arrays with one for each parameter,
      outside of which the prior is zero. They may be infinite. `None` for no bounds.
    - `minutes`: the time for everything, positive.
    - `key`: a random key; `None` uses `jax.random.key(0)`.
    - `width`, `depth`: the width and the number of hidden layers of the network.
    - `batch_size`: of both trainings.
    - `num_steps`: the steps of the distillation. The velocity, each step of which takes a
      third of the time, makes up to three times as many.
    - `progress`: whether to print choices and progress, to standard error.

    **Returns:** a [`flowdiffrax.learn.LearnedPosterior`][].

    **Raises:** `ValueError` for shapes that do not match, fewer than 50 simulations that
    are finite, parameters that never vary or lie outside of the bounds, or too little
    time to train; `TypeError` for values that are not real numbers.

    ??? cite "Reference"

        Flow matching for posteriors: [arXiv:2305.17161](https://arxiv.org/abs/2305.17161);
        the distillation: [arXiv:2406.07507](https://arxiv.org/abs/2406.07507). For the
        regression, see [arXiv:1711.01861](https://arxiv.org/abs/1711.01861), which
        contrasts it with learned densities.
    """
    begin = time.perf_counter()
    check_positive(minutes, "minutes")
    check_bools(progress=progress)
    key = jr.key(0) if key is None else key
    check_key(key)
    given = {"width": width, "depth": depth}
    given |= {"batch_size": batch_size, "num_steps": num_steps}
    for name, value in given.items():
        check_count(value, 1, name, or_none=True)
    say = Progress(begin, 60 * minutes, progress)
    simulations = read_simulations(thetas, xs, mask)
    split_key, net_key, velocity_key, map_key = jr.split(key, 4)
    order = np.asarray(jr.permutation(split_key, len(simulations.thetas)))
    held_out, rest = np.split(order, [int(np.ceil(_HELD_OUT * len(order)))])
    learned_from, fresh = simulations.take(rest), simulations.take(held_out)
    units = find_units(learned_from, fresh, bounds)
    network = PosteriorNetwork(
        size=units.size,
        x_size=units.x_size,
        is_set=units.row_counts is not None,
        width=width or 128,
        depth=depth or 5,
    )
    batch_size = batch_size or min(256, len(rest))
    say(_describe(units, network, simulations, batch_size))
    member_key, map_net_key = jr.split(net_key)
    member, num_members = _member(network, len(order))
    members = eqx.filter_vmap(member.build)(jr.split(member_key, num_members))
    end_of = lambda share: begin + 60 * minutes * share
    history: list[dict[str, Any]] = []

    # Stage 1: the velocity, the mean of several networks.
    objective = FlowMatching(Stratified(Diagonal()))
    batches = _batches(units, learned_from, batch_size)
    # Few simulations are repeated, with other times and noise.
    rows = np.resize(np.arange(len(held_out)), max(len(held_out), _NUM_PAIRS))
    pairs = _batches(units, fresh.take(rows), len(rows), draw=False)
    training = Training(objective, batches, adam, velocity_key, say, history, True)
    end = end_of(_VELOCITY_SHARE)
    most = None if num_steps is None else 3 * num_steps
    teacher = mean_map(training(members, None, end, most, pairs)).velocity

    # Stage 2: the jumps of this velocity.
    objective = LagrangianMapDistillation(
        DiagonalMixture(Stratified(UniformTriangle()), 0.25)
    )
    batches = _batches(units, simulations, batch_size)
    training = Training(objective, batches, muon_and_adam, map_key, say, history)
    flow_map = network.build(map_net_key)
    flow_map = training(flow_map, teacher, end_of(_MAP_SHARE), num_steps)

    some = fresh.take(slice(_NUM_LOOKED_AT))
    looks = {num_jumps: _look(flow_map, units, some, num_jumps) for num_jumps in _JUMPS}
    learned = LearnedPosterior(
        flow_map=flow_map,
        units=units,
        network=network,
        num_simulations=len(order),
        num_dropped=simulations.num_dropped,
        held_out=looks,
        minutes=(time.perf_counter() - begin) / 60,
        history=tuple(history),
    )
    say(f"done\n{learned}")
    return learned


def _member(
    network: PosteriorNetwork, num_simulations: int
) -> tuple[PosteriorNetwork, int]:
    """One of the networks that make up the velocity, and how many there are."""
    if network.is_set:
        return network, 2
    if num_simulations > _MANY:
        return network, 4
    return dataclasses.replace(network, width=max(network.width // 2, 1)), 8


def _describe(
    units: PosteriorUnits, network: PosteriorNetwork, simulations: Simulations, batch: int
) -> str:
    bounded = int(np.isfinite(np.asarray([units.low, units.high])).any(0).sum())
    if units.row_counts is None:
        seen = f"vectors of {units.x_size}"
    else:
        low, high = units.row_counts
        seen = f"sets of {low} to {high} rows of {units.x_size}"
    text = f"{len(simulations.thetas):,} simulations, observations are {seen}"
    if simulations.num_dropped > 0:
        text += f"; dropped {simulations.num_dropped:,} that are not finite"
    return (
        f"{text}\nchosen: {units.size} parameters, {bounded} of them with bounds; "
        f"width {network.width}, depth {network.depth}, batches of {batch}"
    )


def _batches(
    units: PosteriorUnits, simulations: Simulations, batch_size: int, draw: bool = True
) -> InterpolantBatches:
    """Batches of paths from the base to parameters, in the units of the map."""
    axes = 0, 0, None if simulations.mask is None else 0
    convert = lambda theta, *x: (units.to_state(theta, *x)[0], units.args(*x))
    given = simulations.thetas, simulations.xs, simulations.mask
    z, args = jax.jit(jax.vmap(convert, axes))(*given)
    z = z.astype(jnp.float32)
    path = LinearInterpolant()
    return InterpolantBatches(path, z, batch_size, args=args, draw=draw)


def _look(
    flow_map: AbstractFlowMap, units: PosteriorUnits, fresh: Simulations, num_jumps: int
) -> tuple[float, float]:
    """The mean log-density of simulations, and the share that could not be inverted."""
    axes = 0, 0, None if fresh.mask is None else 0

    @eqx.filter_jit
    def each(flow_map: AbstractFlowMap, *given: Any) -> Array:
        one = lambda theta, x, mask: log_density(
            flow_map, units, theta, x, mask, num_jumps
        )
        return jax.vmap(one, axes)(*given)

    given = fresh.thetas, fresh.xs, fresh.mask
    values = np.asarray(each(flow_map, *given))
    failed = np.isnan(values)
    mean = float(values[~failed].mean()) if not failed.all() else float("nan")
    return mean, float(failed.mean())
