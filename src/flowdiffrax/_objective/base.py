import abc

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Key

from .._custom_types import Args, Scalar, Time
from .._flow_map import AbstractFlowMap
from .._times import AbstractTimes
from .weight import AbstractWeight


class AbstractObjective(eqx.Module):
    """A training objective: the loss of one example, as the papers state it.

    An objective sees one path, one pair of times and no batch. Its choices, where
    gradients stop, how errors are weighted and which times are drawn, are fields with
    the paper's values as defaults.

    **Attributes:**

    - `times`: the law from which training draws `(s, t)`.
    - `weight`: what is made of the squared error.
    """

    times: eqx.AbstractVar[AbstractTimes]
    weight: eqx.AbstractVar[AbstractWeight]

    @abc.abstractmethod
    def __call__(
        self,
        flow_map: AbstractFlowMap,
        teacher: object,
        path: diffrax.AbstractPath,
        s: Time,
        t: Time,
        args: Args = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Scalar:
        """The loss of one example.

        **Arguments:**

        - `flow_map`: the map that is trained.
        - `teacher`: what it learns from; each objective says what it takes, and whether
          `None` will do.
        - `path`: where its states come from: `path.evaluate(t)`, and
          `path.derivative(t)` for objectives that learn from data.
        - `s`, `t`: a pair of times.
        - `args`: the example's condition, passed on to map and teacher.
        - `key`: for objectives that draw something of their own.
        """


class Mixture(eqx.Module):
    """Several objectives, each on its own share of every batch.

    The shares are counts, fixed when the step is compiled: no example pays for an
    objective that it does not serve. The loss is the sum of each objective's mean loss
    times its share, which is the mean over the batch.

    **Arguments:**

    - `objectives`: the objectives.
    - `shares`: their shares of the batch, positive; they are divided by their sum.

    **Raises:** `ValueError` for shares that are not positive or not one an objective.
    """

    objectives: tuple[AbstractObjective, ...]
    shares: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, objectives, shares):
        self.objectives = tuple(objectives)
        self.shares = tuple(float(share) for share in shares)

    def __check_init__(self):
        if len(self.objectives) != len(self.shares) or len(self.shares) == 0:
            raise ValueError(
                "A mixture needs one share for each objective, and at least one; got "
                f"{len(self.objectives)} objectives and {len(self.shares)} shares."
            )
        if min(self.shares) <= 0:
            raise ValueError(f"`shares` must be positive; got {self.shares}.")


def batch_loss(
    objective: AbstractObjective | Mixture,
    flow_map: AbstractFlowMap,
    teacher: object,
    paths: diffrax.AbstractPath,
    args: Args = None,
    *,
    key: Key[Array, ""],
) -> tuple[Scalar, dict[str, Scalar]]:
    """The mean loss over a batch of paths, with times drawn by the objective.

    **Arguments:**

    - `objective`: an objective, or a [`flowdiffrax.Mixture`][] of several.
    - `flow_map`, `teacher`: passed on to the objective.
    - `paths`: paths with a leading batch axis on every leaf.
    - `args`: conditions with the same leading axis, or `None`.
    - `key`: for the times, and for objectives that draw.

    **Returns:** the loss, and the mean loss of each objective by its name.

    **Raises:** `ValueError` if the batch is too small for the shares of a mixture.
    """
    batch_size = jtu.tree_leaves(eqx.filter(paths, eqx.is_array))[0].shape[0]
    if isinstance(objective, Mixture):
        parts = objective.objectives
        shares = objective.shares
    else:
        parts, shares = (objective,), (1.0,)
    bounds = [
        round(batch_size * sum(shares[:i]) / sum(shares)) for i in range(len(shares))
    ]
    bounds.append(batch_size)
    total, terms = jnp.zeros(()), {}
    for index, part in enumerate(parts):
        low, high = bounds[index], bounds[index + 1]
        if high == low:
            raise ValueError(
                f"A batch of {batch_size} leaves nothing for share {index} of {shares}."
            )
        losses = _losses(
            part,
            flow_map,
            teacher,
            _rows(paths, low, high),
            _rows(args, low, high),
            high - low,
            jr.fold_in(key, index),
        )
        mean = jnp.mean(losses)
        name = type(part).__name__
        # Two objectives of one class stay two terms.
        terms[name if name not in terms else f"{name}_{index}"] = mean
        total = total + mean * ((high - low) / batch_size)
    return total, terms


def _losses(objective, flow_map, teacher, paths, args, batch_size, key):
    times_key, draw_key = jr.split(key)
    s, t = objective.times(times_key, batch_size)
    one = lambda path, s, t, args, key: objective(
        flow_map, teacher, path, s, t, args, key=key
    )
    axes = eqx.if_array(0)
    return eqx.filter_vmap(one, in_axes=(axes, 0, 0, axes, 0))(
        paths, s, t, args, jr.split(draw_key, batch_size)
    )


def _rows(tree, low, high):
    cut = lambda leaf: leaf[low:high] if eqx.is_array(leaf) else leaf
    return jtu.tree_map(cut, tree)


def freeze(tree):
    """Every array of a PyTree with its gradient stopped; the rest as it is."""
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
    return jtu.tree_map(stop, tree)
