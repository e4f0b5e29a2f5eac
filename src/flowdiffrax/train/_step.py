from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Int, Key, PyTree

from .._custom_types import Args, Scalar
from .._flow_map import AbstractFlowMap
from .._misc import all_finite, squared_norm
from .._objective import AbstractObjective, Mixture, batch_loss


class TrainState(eqx.Module):
    """All that a training run carries from step to step.

    A run that is continued from its state is the same run: the randomness of a step is
    a function of the root key and of the step's number.

    **Attributes:**

    - `flow_map`: the map that is trained.
    - `ema_map`: the same map with the exponential moving average of the weights, the one
      to evaluate and to sample from.
    - `opt_state`: the optimiser's state.
    - `step`: how many steps have been made.
    - `skipped`: how many of them were skipped, because something was not finite.
    - `key_data`, `key_impl`: the root key's numbers, and what kind of key they are of.
    """

    flow_map: AbstractFlowMap
    ema_map: AbstractFlowMap
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    key_data: Array
    key_impl: Hashable = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        flow_map: AbstractFlowMap,
        optim: optax.GradientTransformation,
        *,
        key: Key[Array, ""],
    ) -> "TrainState":
        """The state before the first step.

        **Arguments:**

        - `flow_map`: the map to train. It is copied, so that the caller's stays intact
          when steps reuse the memory of the state.
        - `optim`: an Optax optimiser.
        - `key`: the root key of the run.
        """
        copy = lambda tree: jtu.tree_map(
            lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, tree
        )
        with jax.numpy_dtype_promotion("standard"):
            opt_state = optim.init(eqx.filter(flow_map, eqx.is_inexact_array))
        return cls(
            flow_map=copy(flow_map),
            # A true copy of the weights, not zeros, so that there is nothing to debias.
            ema_map=copy(flow_map),
            opt_state=copy(opt_state),
            step=jnp.zeros((), int),
            skipped=jnp.zeros((), int),
            # A copy too, or the first step would take the caller's key with it.
            key_data=copy(jr.key_data(key)),
            key_impl=jr.key_impl(key),
        )


class StepInfo(eqx.Module):
    """What a step reports.

    **Attributes:**

    - `loss`: the loss before the step.
    - `terms`: the mean loss of each objective, by name.
    - `grad_norm`: the norm of the whole gradient before the optimiser saw it.
    - `is_finite`: whether loss, gradient and new weights were finite. If not, the step
      was skipped: weights, average and optimiser are those of the step before.
    """

    loss: Scalar
    terms: dict[str, Scalar]
    grad_norm: Scalar
    is_finite: Array


def make_step(
    objective: AbstractObjective | Mixture,
    optim: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """One jitted training step: draw, loss, gradient, optimiser, moving average.

    **Arguments:**

    - `objective`: an objective, or a [`flowdiffrax.Mixture`][] of several.
    - `optim`: an Optax optimiser.
    - `ema_decay`: decay of the moving average a step, in [0, 1). Step $n$ uses at most
      $(1 + n)/(10 + n)$, so that a young average does not hang on to the initial weights.

    **Returns:** a function `step(state, batches, teacher=None) -> (state, info)`.
    `batches` is called with a key, inside the compiled step, and returns paths and
    conditions with a leading batch axis: [`flowdiffrax.data.InterpolantBatches`][],
    [`flowdiffrax.data.TrajectoryBatches`][], or your own. The memory of `state` is
    reused: go on with the one returned.

    **Raises:** `ValueError` for a decay outside [0, 1).
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"`ema_decay` must be in [0, 1); got {ema_decay}.")

    @eqx.filter_jit(donate="all-except-first")
    def step(
        inputs: tuple[Any, Any, AbstractObjective | Mixture], state: TrainState
    ) -> tuple[TrainState, StepInfo]:
        batches, teacher, objective = inputs
        root_key = jr.wrap_key_data(state.key_data, impl=state.key_impl)
        batch_key, loss_key = jr.split(jr.fold_in(root_key, state.step))
        paths, args = batches(batch_key)
        return update(
            state,
            objective,
            optim,
            teacher,
            paths,
            args,
            key=loss_key,
            ema_decay=ema_decay,
        )

    def public_step(
        state: TrainState, batches: Callable, teacher: Any = None
    ) -> tuple[TrainState, StepInfo]:
        return step((batches, teacher, objective), state)

    return public_step


def update(
    state: TrainState,
    objective: AbstractObjective | Mixture,
    optim: optax.GradientTransformation,
    teacher: Any,
    paths: Any,
    args: Args,
    *,
    key: Key[Array, ""],
    ema_decay: float,
) -> tuple[TrainState, StepInfo]:
    """The mathematics of one step on a given batch, for loops of your own.

    Not jitted. Arguments as for [`flowdiffrax.train.make_step`][].
    """

    def loss_fn(flow_map):
        return batch_loss(objective, flow_map, teacher, paths, args, key=key)

    (loss, terms), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
        state.flow_map
    )
    weights, rest = eqx.partition(state.flow_map, eqx.is_inexact_array)
    # Optax relies on promotion between Python numbers' and weights' dtypes.
    with jax.numpy_dtype_promotion("standard"):
        grad_norm = jnp.sqrt(squared_norm(grads))
        updates, opt_state = optim.update(grads, state.opt_state, weights)
        new_weights = optax.apply_updates(weights, updates)
        ema_weights = eqx.filter(state.ema_map, eqx.is_inexact_array)
        # A young average forgets faster: a fixed decay would keep a share of the initial
        # weights that a run of a few thousand steps never loses.
        warm_decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema_weights = jtu.tree_map(
            lambda new, old: old + (1 - warm_decay).astype(old.dtype) * (new - old),
            new_weights,
            ema_weights,
        )
    is_finite = jnp.isfinite(loss) & all_finite(grads) & all_finite(new_weights)
    keep = lambda new, old: jnp.where(is_finite, new, old) if eqx.is_array(new) else new
    combine: Any = eqx.combine
    proposed = TrainState(
        flow_map=combine(new_weights, rest),
        ema_map=combine(ema_weights, rest),
        opt_state=opt_state,
        step=state.step,
        skipped=state.skipped,
        key_data=state.key_data,
        key_impl=state.key_impl,
    )
    new_state = jtu.tree_map(keep, proposed, state)
    counts = state.step + 1, state.skipped + (~is_finite).astype(int)
    new_state = eqx.tree_at(lambda s: (s.step, s.skipped), new_state, counts)
    return new_state, StepInfo(loss, terms, grad_norm, is_finite)
