import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Key

from .._types import Args, State, Time
from ..data import InterpolantBatches
from ..flow_maps._base import AbstractFlowMap
from ..flow_maps._residual import FlowMap
from ..objectives._base import AbstractObjective
from ..objectives._batch import batch_loss
from ..train import TrainState, make_step
from ._learn_solver import Progress
from ._training import steps_until

# How many times a loss is looked at, and how often in a row it may fail to fall.
_NUM_LOOKS, _PATIENCE = 40, 8
_MOST_STEPS = 20_000
_EMA_DECAY = 0.995


def adam(flow_map: AbstractFlowMap, num_steps: int) -> optax.GradientTransformation:
    """Adam, whose rate rises over a fiftieth of the steps, then falls along a cosine."""
    del flow_map
    warmup = max(num_steps // 50, 1)
    decay = max(num_steps, warmup + 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, warmup, decay)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


class MeanNet(eqx.Module):
    """The mean of several networks, whose weights have one more axis in front."""

    nets: Callable

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        each = eqx.filter_vmap(lambda net: net(s, t, x, args))(self.nets)
        return jnp.mean(each, axis=0)


def mean_map(flow_maps: FlowMap) -> FlowMap:
    """The mean of several maps, whose weights have one more axis in front."""
    return FlowMap(MeanNet(flow_maps.net), time_range=flow_maps.time_range)


@dataclasses.dataclass(frozen=True)
class Training:
    """Trains until a time, or until the loss on pairs held out no longer falls.

    With `is_ensemble`, the weights of the map have one more axis in front, and each of
    the maps is trained by itself. The loss held out is that of their mean.
    """

    objective: AbstractObjective
    batches: InterpolantBatches
    make_optim: Callable[[AbstractFlowMap, int], optax.GradientTransformation]
    key: Key[Array, ""]
    say: Progress
    history: list[dict[str, Any]]
    is_ensemble: bool = False

    def __call__(
        self,
        flow_map: FlowMap,
        teacher: Any,
        end: float,
        num_steps: int | None,
        held_out: InterpolantBatches | None = None,
    ) -> FlowMap:
        """Returns the average of the weights, where the loss is least if it is known."""
        if num_steps is None:
            step, state = self._start(flow_map, 1000)
            cure = "`width` or `batch_size`"
            batches = itertools.repeat(self.batches)
            fit = steps_until(end, step, state, batches, teacher, cure)
            num_steps = min(fit, _MOST_STEPS)
        step, state = self._start(flow_map, num_steps)
        every = max(num_steps // _NUM_LOOKS, 50)
        best, least, failures, losses = flow_map, np.inf, 0, []
        for index in range(1, num_steps + 1):
            state, info = step(state, self.batches, teacher)
            losses.append(info.loss)
            if index % every > 0 and index < num_steps:
                continue
            # The next step uses the memory of this state.
            average: Any = jtu.tree_map(
                lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, state.ema_map
            )
            row = {"step": index, "loss": float(np.mean(losses))}
            losses = []
            if held_out is not None:
                mean = mean_map(average) if self.is_ensemble else average
                row["held_out"] = float(_loss(self.objective, mean, held_out))
            self.history.append({"stage": type(self.objective).__name__} | row)
            seen = row.get("held_out", -np.inf)
            failures = failures + 1 if seen >= least and held_out is not None else 0
            if failures == 0:
                best, least = average, seen
            is_last = failures >= _PATIENCE or index == num_steps
            if len(self.history) % 10 == 0 or is_last:
                self._say(num_steps)
            if is_last and held_out is not None:
                self.say(f"the least loss held out was {least:.4f}")
            if is_last:
                break
        return best

    def _say(self, num_steps: int) -> None:
        row = self.history[-1]
        text = f"{row['stage']}, step {row['step']:,} of {num_steps:,}, "
        text += f"loss {row['loss']:.4f}"
        if "held_out" in row:
            text += f", held out {row['held_out']:.4f}"
        self.say(text)

    def _start(self, flow_map: FlowMap, num_steps: int) -> tuple[Any, TrainState]:
        optim = self.make_optim(flow_map, num_steps)
        decay = min(_EMA_DECAY, 1 - 10 / max(num_steps, 20))
        step = make_step(self.objective, optim, ema_decay=decay)
        create = lambda flow_map, key: TrainState.create(
            flow_map, optim, key=key, ema_decay=decay
        )
        if not self.is_ensemble:
            return step, create(flow_map, self.key)
        keys = jr.split(self.key, _num_members(flow_map))
        axes = eqx.if_array(0), None, None
        together = eqx.filter_jit(eqx.filter_vmap(step, in_axes=axes))
        return together, eqx.filter_vmap(create)(flow_map, keys)


def _num_members(flow_maps: FlowMap) -> int:
    arrays = eqx.filter(flow_maps, eqx.is_array)
    return len(jtu.tree_leaves(arrays)[0])


@eqx.filter_jit
def _loss(
    objective: AbstractObjective, flow_map: AbstractFlowMap, pairs: InterpolantBatches
) -> Array:
    """The loss at times and noise that are always the same."""
    paths, args = pairs(jr.key(0))
    return batch_loss(objective, flow_map, None, paths, args, key=jr.key(1))[0]
