import jax.numpy as jnp
import jax.tree_util as jtu
import optax

from ..nn._magnitude import normalise_weights


def decayed_radam(
    learning_rate: float, *, constant_steps: int = 35_000, max_norm: float = 1.0
) -> optax.GradientTransformation:
    r"""RAdam with the settings used to train magnitude-preserving networks.

    The learning rate is constant up to step $k_0$, and then falls as $\sqrt{k_0 / k}$.
    Gradients are clipped, and [`flowdiffrax.nn.normalise_weights`][] is applied after
    each step, which does nothing to other networks.

    **Arguments:**

    - `learning_rate`: the initial learning rate.
    - `constant_steps`: $k_0$, positive.
    - `max_norm`: the largest norm of the whole gradient, to which it is clipped.

    **Raises:** `ValueError` if `constant_steps` is not positive.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696);
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), table 2.
    """
    if constant_steps <= 0:
        raise ValueError(f"`constant_steps` must be positive; got {constant_steps}.")
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.radam(_square_root_decay(learning_rate, constant_steps)),
        optax.stateless(_to_length),
    )


def adam_to_zero(learning_rate: float, *, num_steps: int) -> optax.GradientTransformation:
    """Adam with a learning rate that rises, and then falls to zero along a cosine.

    It rises during the first twentieth of the run. Gradients are clipped to norm 1.

    **Arguments:**

    - `learning_rate`: the largest learning rate.
    - `num_steps`: the number of steps of the run.
    """
    warm_up = num_steps // 20
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


def _square_root_decay(learning_rate: float, constant_steps: int) -> optax.Schedule:
    return lambda step: learning_rate / jnp.sqrt(jnp.maximum(step / constant_steps, 1))


def _to_length(updates, weights):
    new = normalise_weights(optax.apply_updates(weights, updates))
    return jtu.tree_map(lambda new, old: new - old, new, weights)
