import dataclasses
import functools
import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.stats as jss
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key

from .._check import check_count, check_key
from .._types import Scalar
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._residual import FlowMap
from ..likelihood import Inversion, invert, log_prob
from ..nn import MLP, SetEncoder, Summarised
from ..solvers._sample import sample
from ..train import load, save
from ._posterior_units import PosteriorUnits


@dataclasses.dataclass(frozen=True)
class PosteriorNetwork:
    """The network of a posterior.

    **Attributes:**

    - `size`: the number of parameters.
    - `x_size`: the length of an observation, or of a row of a set.
    - `is_set`: whether observations are sets of rows.
    - `width`, `depth`: the width and the number of hidden layers.
    """

    size: int
    x_size: int
    is_set: bool
    width: int
    depth: int

    def build(self, key: Key[Array, ""]) -> FlowMap:
        """The map before training."""
        net_key, summary_key = jr.split(key)
        # A summary of a set has to hold about as much as the parameters.
        summary_size = max(16, 4 * self.size)
        args_size = summary_size if self.is_set else self.x_size
        net: Any = MLP(
            self.size, self.width, self.depth, args_size=args_size, key=net_key
        )
        if self.is_set:
            each = SetEncoder(self.x_size, summary_size, self.width // 2, key=summary_key)
            net = Summarised(net, each)
        # Training gains nothing from float64.
        single = lambda leaf: (
            leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf
        )
        return FlowMap(jax.tree_util.tree_map(single, net), time_range=(0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class LearnedPosterior:
    """A learned posterior of parameters, for any observation.

    It is the result of [`flowdiffrax.learn.learn_posterior`][].

    **Attributes:**

    - `flow_map`: the flow map, from the standard normal base at time 0 to the posterior
      at time 1, in the units of `units`. Its `args` are `units.args(x)`.
    - `units`: a [`flowdiffrax.learn.PosteriorUnits`][].
    - `network`: a [`flowdiffrax.learn.PosteriorNetwork`][].
    - `num_simulations`, `num_dropped`: how many simulations were used, and how many were
      dropped because they had failed.
    - `held_out`: for each of 1, 2 and 4 jumps, the mean log-density of the parameters of
      simulations that were held out, in nats, and the share of them for which a jump
      could not be inverted, which are left out of the mean.
    - `minutes`: the time that everything took.
    - `history`: the losses during the training.
    """

    flow_map: AbstractFlowMap
    units: PosteriorUnits
    network: PosteriorNetwork
    num_simulations: int
    num_dropped: int
    held_out: dict[int, tuple[float, float]]
    minutes: float
    history: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        lines = ["jumps  log-density, held out  not inverted"]
        for num_jumps, (mean, share) in self.held_out.items():
            lines.append(f"{num_jumps:>5} {mean:>22.3f} {share:>13.1%}")
        dropped = f", {self.num_dropped:,} dropped" * (self.num_dropped > 0)
        lines.append(
            f"learned from {self.num_simulations:,} simulations in {self.minutes:.1f} "
            f"minutes{dropped}"
        )
        return "\n".join(lines)

    def sample(
        self,
        key: Key[Array, ""],
        x: ArrayLike,
        num_samples: int,
        num_jumps: int = 4,
        *,
        mask: ArrayLike | None = None,
    ) -> Float[Array, "samples size"]:
        """Draws parameters from the posterior of one observation.

        **Arguments:**

        - `key`: a random key.
        - `x`: the observation, of the same shape as in the simulations; a set may have
          any number of rows.
        - `num_samples`: how many samples to draw, at least 1.
        - `num_jumps`: how many equal jumps to make for each, at least 1.
        - `mask`: which rows of a set are there; `None` for all.

        **Returns:** the parameters, within the bounds of the prior.

        **Raises:** `ValueError` for an observation of another shape or one that is not
        finite. It warns of an observation that is further from the mean of the simulated
        ones than all of them, since the map extrapolates there.
        """
        check_key(key)
        check_count(num_samples, 1, "num_samples")
        check_count(num_jumps, 1, "num_jumps")
        x = self._checked(x, mask)
        z = jr.normal(key, (num_samples, self.units.size), jnp.float32)
        return _samples(self.flow_map, self.units, z, x, mask, num_jumps)

    def log_prob(
        self,
        theta: ArrayLike,
        x: ArrayLike,
        num_jumps: int = 4,
        *,
        mask: ArrayLike | None = None,
    ) -> Float[Array, "*batch"]:
        """The log-density of parameters in the posterior of one observation, in nats.

        It is the exact density of what `sample` draws with as many jumps, wherever these
        are one-to-one: each jump is inverted by Newton's method. Few long jumps of an
        inaccurate map may not be one-to-one. If one cannot be inverted, the value is NaN;
        then use more jumps.

        **Arguments:**

        - `theta`: the parameters, of shape `(size,)` or `(samples, size)`.
        - `x`, `num_jumps`, `mask`: as for `sample`.

        **Returns:** one number for each row. Outside of the bounds it is `-inf`.

        **Raises:** `ValueError` as `sample`, and for parameters of another shape.
        """
        check_count(num_jumps, 1, "num_jumps")
        x, size = self._checked(x, mask), self.units.size
        theta = jnp.asarray(theta, jnp.result_type(float))
        if theta.shape not in ((size,), theta.shape[:1] + (size,)):
            raise ValueError(
                f"`theta` has shape ({size},) or (samples, {size}); got {theta.shape}."
            )
        rows = jnp.atleast_2d(theta)
        values = _log_probs(self.flow_map, self.units, rows, x, mask, num_jumps)
        return values.reshape(theta.shape[:-1])

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything to one file, in the format of [`flowdiffrax.train.save`][].

        **Arguments:**

        - `path`: the file, such as `posterior.safetensors`.
        """
        names = "num_simulations", "num_dropped", "minutes", "history"
        config = {name: getattr(self, name) for name in names}
        config |= {"posterior": dataclasses.asdict(self.network)}
        config |= {"held_out": list(self.held_out.items())}
        config |= {"row_counts": self.units.row_counts}
        save(path, config, (self.flow_map, self.units))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LearnedPosterior":
        """Reads what `save` wrote, with the same setting of `jax_enable_x64`.

        **Arguments:**

        - `path`: the file.

        **Raises:** as [`flowdiffrax.train.load`][].
        """

        def make(config: dict[str, Any]) -> Any:
            if "posterior" not in config:
                raise ValueError(
                    f"{path} is a checkpoint, but not one of a learned posterior. Read "
                    "it with `flowdiffrax.train.load`."
                )
            network = PosteriorNetwork(**config["posterior"])
            units = PosteriorUnits.empty(network.size, network.x_size, _counts(config))
            return network.build(jr.key(0)), units

        config, (flow_map, units) = load(path, make)
        return cls(
            flow_map=flow_map,
            units=units,
            network=PosteriorNetwork(**config["posterior"]),
            num_simulations=config["num_simulations"],
            num_dropped=config["num_dropped"],
            held_out={jumps: tuple(pair) for jumps, pair in config["held_out"]},
            minutes=config["minutes"],
            history=tuple(config["history"]),
        )

    def _checked(self, x: ArrayLike, mask: Any) -> Array:
        """The observation as an array of the right shape; warns if it is unusual."""
        x = jnp.asarray(x, jnp.result_type(float))
        distance = float(_distance(self.units, x, mask))
        if not np.isfinite(distance):
            raise ValueError(f"The observation must be finite; got {x}.")
        counts = self.units.row_counts
        if counts is not None:
            count = len(x) if mask is None else int(np.sum(np.asarray(mask)))
            if not counts[0] <= count <= counts[1]:
                warnings.warn(
                    f"The observation has {count} rows, and the simulated ones had from "
                    f"{counts[0]} to {counts[1]}. The map extrapolates: simulate such "
                    "observations as well.",
                    stacklevel=3,
                )
        limit = float(self.units.x_limit)
        if distance > limit * (1 + 1e-4):
            warnings.warn(
                f"The observation is {distance:.1f} standard deviations from the mean of "
                f"the simulated ones, and none of these was further than {limit:.1f}. "
                "The map extrapolates, and its posterior cannot be trusted: look for an "
                "error in the model or in the units, or widen the prior.",
                stacklevel=3,
            )
        return x


def _counts(config: dict[str, Any]) -> tuple[int, int] | None:
    counts = config["row_counts"]
    return None if counts is None else tuple(counts)


def base_log_prob(z: Float[Array, " size"]) -> Scalar:
    """The log-density of a standard normal vector."""
    return jnp.sum(jss.norm.logpdf(z))


def invert_jump(flow_map: Any, s: Any, t: Any, y: Any, args: Any) -> Inversion:
    """Inverts a forward jump, from a guess along the velocity at its end."""
    guess = y + (s - t).astype(y.dtype) * flow_map.velocity(t, y, args)
    return invert(flow_map, s, t, y, args, guess=guess, throw=False, num_iterations=1)


@eqx.filter_jit
def _distance(units: PosteriorUnits, x: Any, mask: Any) -> Scalar:
    return units.distance(x, mask)


@eqx.filter_jit
def _samples(
    flow_map: Any, units: PosteriorUnits, z: Array, x: Any, mask: Any, num_jumps: int
) -> Float[Array, "samples size"]:
    args = units.args(x, mask)
    draw = lambda z: units.to_theta(sample(flow_map, z, num_jumps, args), x, mask)
    return jax.vmap(draw)(z)


@eqx.filter_jit
def _log_probs(
    flow_map: Any, units: PosteriorUnits, thetas: Array, x: Any, mask: Any, num_jumps: int
) -> Float[Array, " samples"]:
    each = functools.partial(log_density, flow_map, units, num_jumps=num_jumps)
    return jax.vmap(lambda theta: each(theta, x, mask))(thetas)


def log_density(
    flow_map: Any, units: PosteriorUnits, theta: Array, x: Any, mask: Any, num_jumps: int
) -> Scalar:
    """The log-density of the parameters `theta`, given `x`."""
    args = units.args(x, mask)
    z, log_rate = units.to_state(theta, x, mask)
    outside = jnp.isneginf(log_rate)
    # Where there is no density there is no way back either.
    z = jnp.where(outside, 0, z).astype(jnp.float32)
    value = log_prob(flow_map, base_log_prob, z, num_jumps, args, inverse=invert_jump)
    total = value.astype(log_rate.dtype) + log_rate
    return jnp.where(outside, -jnp.inf, total)
