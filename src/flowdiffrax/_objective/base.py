import abc
from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Key

from .._custom_types import AbstractVar, Args, Scalar, Time
from .._flow_map import AbstractFlowMap
from .._misc import check_shares, split_by_shares
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

    times: AbstractVar[AbstractTimes]
    weight: AbstractVar[AbstractWeight]

    @abc.abstractmethod
    def __call__(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
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
    objective that it does not serve. The loss is the weighted sum of the objectives'
    mean losses.

    **Arguments:**

    - `objectives`: the objectives.
    - `shares`: their shares of the batch, positive; they are divided by their sum.
    - `weights`: the factors of their mean losses; `None` for the shares, which makes the
      loss the mean over the batch.

    **Raises:** `ValueError` for shares that are not positive, or for a number of shares
    or weights that is not that of the objectives.
    """

    objectives: tuple[AbstractObjective, ...]
    shares: tuple[float, ...] = eqx.field(static=True)
    weights: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        objectives: Sequence[AbstractObjective],
        shares: Sequence[float],
        weights: Sequence[float] | None = None,
    ):
        self.objectives = tuple(objectives)
        self.shares = tuple(map(float, shares))
        check_shares(self.shares, len(self.objectives), "objectives")
        if weights is None:
            weights = [share / sum(self.shares) for share in self.shares]
        self.weights = tuple(map(float, weights))

    def __check_init__(self):
        if len(self.weights) != len(self.objectives):
            raise ValueError(
                "There must be one weight for each of the objectives; got "
                f"{len(self.objectives)} objectives and {len(self.weights)} weights."
            )


def batch_loss(
    objective: AbstractObjective | Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
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
    mixture = (
        objective if isinstance(objective, Mixture) else Mixture((objective,), (1.0,))
    )
    slices = split_by_shares(batch_size, mixture.shares)
    total: Any = 0.0
    terms: dict[str, Scalar] = {}
    for index, (part, rows) in enumerate(zip(mixture.objectives, slices, strict=True)):
        losses = _losses(
            part,
            flow_map,
            teacher,
            _rows(paths, rows),
            _rows(args, rows),
            rows.stop - rows.start,
            jr.fold_in(key, index),
        )
        mean = jnp.mean(losses)
        name = type(part).__name__
        # Two objectives of one class stay two terms.
        terms[name if name not in terms else f"{name}_{index}"] = mean
        total = total + mixture.weights[index] * mean
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


def _rows(tree, rows):
    cut = lambda leaf: leaf[rows] if eqx.is_array(leaf) else leaf
    return jtu.tree_map(cut, tree)


def freeze(tree):
    """Every array of a PyTree with its gradient stopped; the rest as it is."""
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
    return jtu.tree_map(stop, tree)
