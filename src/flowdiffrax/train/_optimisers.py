from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax

from .._check import check_instance, check_positive
from ..flow_maps._base import AbstractFlowMap


def muon_and_adam(
    flow_map: AbstractFlowMap,
    num_steps: int,
    *,
    muon_rate: float = 0.03,
    adam_rate: float = 2e-3,
    max_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Muon for the hidden matrices of a map, and Adam for everything else.

    Both rates rise over the first fiftieth of the steps, and then fall to zero along a
    cosine. On small networks that regress exact trajectories, this reaches a lower error
    than Adam alone in the same time.

    **Arguments:**

    - `flow_map`: the map to train. Hidden matrices are the weights of its square
      `equinox.nn.Linear` layers.
    - `num_steps`: the number of training steps, at least 1.
    - `muon_rate`, `adam_rate`: the highest learning rates.
    - `max_norm`: the norm to which gradients are clipped.

    **Returns:** an Optax optimiser for this map.

    ??? cite "Reference"

        Muon: Jordan and others, 2024, as `optax.contrib.muon`.
    """
    check_instance(flow_map, AbstractFlowMap, "flow_map")
    check_positive(muon_rate, "muon_rate")
    check_positive(adam_rate, "adam_rate")
    warmup = max(num_steps // 50, 1)

    def schedule(rate: float) -> optax.Schedule:
        decay = max(num_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, decay)

    def labels(params: Any) -> Any:
        is_hidden = [_is_square_weight(path, leaf) for path, leaf in leaves]
        names = ["muon" if hidden else "adam" for hidden in is_hidden]
        return jtu.tree_structure(params).unflatten(names)

    leaves = jtu.tree_leaves_with_path(eqx.filter(flow_map, eqx.is_inexact_array))
    each: dict[Any, optax.GradientTransformation] = {
        "muon": optax.contrib.muon(schedule(muon_rate)),
        "adam": optax.adam(schedule(adam_rate)),
    }
    optim = optax.chain(
        optax.clip_by_global_norm(max_norm), optax.multi_transform(each, labels)
    )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # Optax's Muon mixes dtypes, which the strict setting of JAX forbids.
        with jax.numpy_dtype_promotion("standard"):
            return optim.update(updates, state, params)

    return optax.GradientTransformation(optim.init, update)


def _is_square_weight(path: Any, leaf: Any) -> bool:
    is_weight = getattr(path[-1], "name", None) == "weight"
    return is_weight and leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1]
