"""The loss of a batch, whole or in several parts, from the losses of its examples."""

import functools
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .._check import check_flow_map
from .._tree import num_rows
from .._types import Args, Scalar
from ..flow_maps._base import AbstractFlowMap
from ..nn._dropout import has_dropout, with_dropout
from ..paths._plug_in import is_shared
from ..times._shares import split_by_shares
from ._base import AbstractObjective
from ._mixture import Mixture


def batch_loss(
    objective: AbstractObjective | Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
    paths: diffrax.AbstractPath,
    args: Args = None,
    *,
    key: Key[Array, ""],
) -> tuple[Scalar, dict[str, Scalar]]:
    """The mean loss over a batch of paths, at times drawn by the objective.

    **Arguments:**

    - `objective`: an objective, or a [`flowdiffrax.objectives.Mixture`][] of several.
    - `flow_map`, `teacher`: passed to the objective. If the objectives of a mixture
      learn from different teachers, pass a tuple with one teacher for each.
    - `paths`: paths with a leading batch axis on every leaf.
    - `args`: conditions with the same leading axis, or `None`.
    - `key`: for the times, for objectives that draw random numbers, and for networks with
      dropout. The teacher has no dropout.

    **Returns:** the loss, and a dictionary with the mean loss of each objective under
    its name. If an objective has rows both on and off the diagonal, the mean over the
    diagonal is a separate term, whose name ends in `_diagonal`.

    **Raises:** `ValueError` if the batch is too small for the shares of a mixture or of
    the diagonal; if `args` and `paths` have different numbers of rows; if a tuple of
    teachers does not have one for each objective; or if self-distillation has no rows on
    the diagonal to learn from. `TypeError` if `flow_map` is not a flow map.
    """
    mixture = as_mixture(objective)
    examples = example_losses(
        mixture, flow_map, teacher, paths, args, key=key, dropout=True
    )
    segments = segments_of(mixture, sum(len(rows.loss) for rows in examples))
    return summed(mixture, segments, segments, examples)


def as_mixture(objective: AbstractObjective | Mixture) -> Mixture:
    """Returns a mixture: `objective` if it is one, else a mixture of it alone."""
    return objective if isinstance(objective, Mixture) else Mixture((objective,), (1.0,))


class Segment(NamedTuple):
    """Consecutive rows of a batch that share one form of the loss."""

    objective: int  # its index in the mixture
    on_diagonal: bool
    num_rows: int


def segments_of(mixture: Mixture, batch_size: int) -> list[Segment]:
    """Divides a batch by objective, with the rows on the diagonal first in each.

    **Raises:** `ValueError` if the batch is too small, or if self-distillation has no
    rows on the diagonal, as [`flowdiffrax.objectives.batch_loss`][].
    """
    slices = split_by_shares(batch_size, mixture.shares)
    segments = []
    for index, (part, rows) in enumerate(zip(mixture.objectives, slices, strict=True)):
        size = rows.stop - rows.start
        cut = part.times.num_diagonal(size)
        counts = ((True, cut), (False, size - cut))
        segments += [Segment(index, on, count) for on, count in counts if count > 0]
    if all(part.needs_diagonal for part in mixture.objectives) and not any(
        segment.on_diagonal for segment in segments
    ):
        raise ValueError(
            "Self-distillation learns on the diagonal too, and `times` puts no row there."
            " Use `DiagonalMixture(times)`, or mix it with `FlowMatching`."
        )
    return segments


def objective_sizes(segments: list[Segment]) -> Counter[int]:
    """The number of rows of each objective, by its index in the mixture."""
    sizes: Counter[int] = Counter()
    for segment in segments:
        sizes[segment.objective] += segment.num_rows
    return sizes


class DrawnTimes(NamedTuple):
    """The times of each row of a batch, and its row number within its objective."""

    s: Float[Array, " batch"]
    t: Float[Array, " batch"]
    row: Int[Array, " batch"]


def draw_times(mixture: Mixture, batch_size: int, key: Key[Array, ""]) -> DrawnTimes:
    """The times of a whole batch, in the order of its segments."""
    drawn = []
    slices = split_by_shares(batch_size, mixture.shares)
    for index, (part, rows) in enumerate(zip(mixture.objectives, slices, strict=True)):
        size = rows.stop - rows.start
        times_key, *_ = _keys(key, index)
        drawn.append((*part.times(times_key, size), jnp.arange(size)))
    return DrawnTimes(*map(jnp.concatenate, zip(*drawn, strict=True)))


def _keys(key: Key[Array, ""], index: int) -> Key[Array, " 3"]:
    """Keys for the times of an objective, and for the draws and dropout of its rows."""
    return jr.split(jr.fold_in(key, index), 3)


def deal(segments: list[Segment], num_parts: int) -> list[list[Segment]]:
    """The segments of each part of a batch that is split with a stride.

    Row `r` goes to part `r % num_parts`. All parts then have the same size and use about
    the same memory, while the shares hold over the whole batch.
    """
    kinds = np.repeat(
        np.arange(len(segments)), [segment.num_rows for segment in segments]
    )
    parts = []
    for part in range(num_parts):
        counts = np.bincount(kinds[part::num_parts], minlength=len(segments))
        sized = zip(segments, counts.tolist(), strict=True)
        parts.append([one._replace(num_rows=count) for one, count in sized if count > 0])
    return parts


def dealt(drawn: DrawnTimes, part: int, num_parts: int) -> DrawnTimes:
    """The times of one part of a batch that is split as in `deal`."""
    return DrawnTimes(*(leaf[part::num_parts] for leaf in drawn))


class ExampleLosses(NamedTuple):
    """The losses of the examples of one segment, and their times."""

    s: Float[Array, " batch"]
    t: Float[Array, " batch"]
    loss: Float[Array, " batch"]


def example_losses(
    mixture: Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
    paths: diffrax.AbstractPath,
    args: Args,
    *,
    key: Key[Array, ""],
    dropout: bool = False,
) -> list[ExampleLosses]:
    """The losses that [`flowdiffrax.objectives.batch_loss`][] averages, by segment.

    **Arguments:** as there, and `dropout`: whether networks drop entries, as in training.
    **Raises:** as there.
    """
    batch_size = num_examples(paths, args)
    segments = segments_of(mixture, batch_size)
    drawn = draw_times(mixture, batch_size, key)
    return losses_of(
        mixture, flow_map, teacher, paths, args, drawn, segments, key=key, dropout=dropout
    )


def num_examples(paths: diffrax.AbstractPath, args: Args) -> int:
    """The number of rows of a batch."""
    has_rows = lambda leaf: eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    return num_rows(eqx.filter((paths, args), has_rows), "Paths and conditions")


def losses_of(
    mixture: Mixture,
    flow_map: AbstractFlowMap,
    teacher: Any,
    paths: diffrax.AbstractPath,
    args: Args,
    drawn: DrawnTimes,
    segments: list[Segment],
    *,
    key: Key[Array, ""],
    dropout: bool,
) -> list[ExampleLosses]:
    """The losses of a batch, or of a part of it, at times that are already drawn.

    `segments` and `drawn` describe the rows that are passed, in their order. `key` is the
    key of the whole batch.
    """
    check_flow_map(flow_map)
    num_objectives = len(mixture.objectives)
    teachers = teacher if isinstance(teacher, tuple) else (teacher,) * num_objectives
    if len(teachers) != num_objectives:
        raise ValueError(
            f"There are {len(teachers)} teachers and {num_objectives} objectives."
        )
    dropout = dropout and has_dropout(flow_map)
    examples, start = [], 0
    for index, on_diagonal, size in segments:
        rows = slice(start, start + size)
        start += size
        form = _on_diagonal if on_diagonal else _off_diagonal
        objective = mixture.objectives[index]
        one = functools.partial(form, objective, flow_map, teachers[index])
        s, t, row = _rows(drawn, rows)
        _, draw_key, dropout_key = _keys(key, index)
        # By row number, so that a row draws the same in any part as in the whole batch.
        by_row = jax.vmap(jr.fold_in, (None, 0))
        drops = dropout and (on_diagonal or objective.has_dropout_off_diagonal)
        dropout_keys = by_row(dropout_key, row) if drops else None
        axes = _axes(paths), 0, 0, _axes(args), 0, eqx.if_array(0)
        losses = eqx.filter_vmap(one, in_axes=axes)(
            _rows(paths, rows),
            s,
            t,
            _rows(args, rows),
            by_row(draw_key, row),
            dropout_keys,
        )
        examples.append(ExampleLosses(s, t, losses))
    return examples


def _off_diagonal(objective, flow_map, teacher, path, s, t, args, key, dropout_key):
    flow_map = _dropping(flow_map, dropout_key)
    return objective(flow_map, teacher, path, s, t, args, key=key)


def _on_diagonal(objective, flow_map, teacher, path, s, t, args, key, dropout_key):
    del s
    flow_map = _dropping(flow_map, dropout_key)
    return objective.on_diagonal(flow_map, teacher, path, t, args, key=key)


def _dropping(flow_map, key):
    # One key for all evaluations of an example, so that they are of one function.
    return flow_map if key is None else with_dropout(flow_map, key)


def summed(
    mixture: Mixture,
    whole: list[Segment],
    part: list[Segment],
    examples: list[ExampleLosses],
) -> tuple[Scalar, dict[str, Scalar]]:
    """The contribution of a part of a batch to the loss of the whole and to its terms.

    If the part is the whole batch, these are the loss and the terms themselves.
    """
    counts = {segment[:2]: segment.num_rows for segment in whole}
    sizes = objective_sizes(whole)
    names = _term_names(mixture, counts)
    loss: Any = 0.0
    terms: dict[str, Scalar] = {}
    for segment, rows in zip(part, examples, strict=True):
        kind, total = segment[:2], jnp.sum(rows.loss)
        terms[names[kind]] = total / counts[kind]
        weight = jnp.asarray(mixture.weights[segment.objective], total.dtype)
        loss = loss + weight * (total / sizes[segment.objective])
    for name in names.values():
        terms.setdefault(name, jnp.zeros_like(loss))
    return loss, terms


def _term_names(
    mixture: Mixture, kinds: Collection[tuple[int, bool]]
) -> dict[tuple[int, bool], str]:
    """The name of the mean loss of each objective, on and off the diagonal."""
    classes: list[str] = []
    for index, objective in enumerate(mixture.objectives):
        name = type(objective).__name__
        # Keep the terms of two objectives of the same class apart.
        classes.append(name if name not in classes else f"{name}_{index}")
    # An objective whose rows are all on the diagonal has one term, without the suffix.
    is_second = lambda index, on_diagonal: on_diagonal and (index, False) in kinds
    return {
        kind: classes[kind[0]] + ("_diagonal" if is_second(*kind) else "")
        for kind in kinds
    }


def _rows(tree, rows):
    cut = lambda leaf: leaf[rows] if eqx.is_array(leaf) else leaf
    return jtu.tree_map(cut, tree, is_leaf=is_shared)


def _axes(tree):
    """The axis to map over: the first of all arrays, except those that rows share."""
    of_leaf = lambda leaf: 0 if eqx.is_array(leaf) else None
    return jtu.tree_map(of_leaf, tree, is_leaf=is_shared)
