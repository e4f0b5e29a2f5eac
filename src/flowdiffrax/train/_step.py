import functools
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import wadler_lindig as wl
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from .._check import (
    check_between,
    check_callable,
    check_count,
    check_instance,
    check_key,
    check_optimiser,
)
from .._time import at_least_float32
from .._tree import all_finite, is_concrete, squared_norm
from .._types import Args, Scalar
from ..flow_maps._base import AbstractFlowMap
from ..objectives._base import AbstractObjective
from ..objectives._batch import (
    DrawnTimes,
    Segment,
    as_mixture,
    deal,
    dealt,
    draw_times,
    losses_of,
    num_examples,
    segments_of,
    summed,
)
from ..objectives._mixture import Mixture
from ..objectives._scheduled import Scheduled
from ..weights._learned import AbstractLearnedWeight
from ._parallel import DataParallel
from ._power_average import PowerAverage

_Decays: TypeAlias = float | PowerAverage | Sequence[float | PowerAverage]


class TrainState(eqx.Module):
    """Everything that a training run carries from step to step.

    A run that continues from a saved state gives the same result as one that was never
    interrupted, because the randomness of a step depends only on the root key and the
    number of the step.

    **Attributes:**

    - `flow_map`: the map that is trained.
    - `averages`: copies of the map with moving averages of the weights, one for each
      entry of `ema_decay`. They have at least float32 precision, because in a lower
      precision an average would not move.
    - `teacher_average`: a further average that serves as the teacher, or `None`.
    - `ema_maps`, `teacher_map`: the averages in the precision of the map itself.
    - `ema_map`: the first of the averages, the one to evaluate and to sample from.
    - `learned`: the learned weights of the objective, in order; often empty.
    - `opt_state`: the optimiser's state.
    - `step`: how many steps have been made.
    - `skipped`: how many of them were skipped because something was not finite.
    - `key_data`, `key_impl`: the data of the root key, and its PRNG implementation.
    - `ema_decay`, `teacher_decay`: what the averages are. A step with others is refused.
    """

    flow_map: AbstractFlowMap
    averages: tuple[AbstractFlowMap, ...]
    teacher_average: AbstractFlowMap | None
    learned: tuple[AbstractLearnedWeight, ...]
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    key_data: Array
    key_impl: Hashable = eqx.field(static=True)
    ema_decay: tuple[float | PowerAverage, ...] = eqx.field(static=True)
    teacher_decay: float | PowerAverage | None = eqx.field(static=True)

    @classmethod
    def create(
        cls,
        flow_map: AbstractFlowMap,
        optim: optax.GradientTransformation,
        *,
        key: Key[Array, ""],
        objective: AbstractObjective | Mixture | Scheduled | None = None,
        ema_decay: float | PowerAverage | Sequence[float | PowerAverage] = 0.999,
        teacher_decay: float | None = None,
    ) -> "TrainState":
        """Creates the state before the first step.

        **Arguments:**

        - `flow_map`: the map to train. It is copied, since steps reuse the memory of the
          state.
        - `optim`: an Optax optimiser. If the objective has learned weights, it sees a
          pair: the map, and the tuple of learned weights.
        - `key`: the root key of the run.
        - `objective`: the objective of the run; needed if it has learned weights.
        - `ema_decay`, `teacher_decay`: as for [`flowdiffrax.train.make_step`][].

        **Raises:** `TypeError` if `optim` is not an optimiser, `key` is not a key, or a
        decay is not a number; `ValueError` for an array of several keys, or a decay
        outside [0, 1).
        """
        check_optimiser(optim)
        check_key(key)
        decays, of_teacher = decays_of(ema_decay), teacher_decay_of(teacher_decay)
        copy = lambda tree: jtu.tree_map(
            lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, tree
        )
        start = jnp.zeros((), int)
        learned = () if objective is None else learned_of(at_step(objective, start))
        trained = (flow_map, learned) if learned else flow_map
        with jax.numpy_dtype_promotion("standard"):
            opt_state = optim.init(eqx.filter(trained, eqx.is_inexact_array))
        return cls(
            flow_map=copy(flow_map),
            # Start from the weights, not from zeros, so that no debiasing is needed.
            averages=tuple(precise(flow_map) for _ in decays),
            teacher_average=None if of_teacher is None else precise(flow_map),
            learned=copy(learned),
            opt_state=copy(opt_state),
            step=start,
            skipped=jnp.zeros((), int),
            # Copy the key too, or the first step would donate the caller's.
            key_data=copy(jr.key_data(key)),
            key_impl=jr.key_impl(key),
            ema_decay=decays,
            teacher_decay=of_teacher,
        )

    def __pdoc__(self, **kwargs):
        is_known = lambda count: eqx.is_array(count) and is_concrete(count)
        number = lambda count: int(count) if is_known(count) else count
        shown = [
            ("step", number(self.step)),
            ("skipped", number(self.skipped)),
            ("flow_map", self.flow_map),
        ]
        return wl.bracketed(
            begin=wl.TextDoc("TrainState("),
            docs=wl.named_objs(shown, **kwargs),
            sep=wl.comma,
            end=wl.TextDoc(")"),
            indent=kwargs["indent"],
        )

    @property
    def ema_maps(self) -> tuple[AbstractFlowMap, ...]:
        """The averages in the precision of the map."""
        return tuple(in_precision_of(self.flow_map, one) for one in self.averages)

    @property
    def ema_map(self) -> AbstractFlowMap:
        """The first of the averages."""
        return in_precision_of(self.flow_map, self.averages[0])

    @property
    def teacher_map(self) -> AbstractFlowMap | None:
        """The average that serves as the teacher."""
        if self.teacher_average is None:
            return None
        return in_precision_of(self.flow_map, self.teacher_average)


class StepInfo(eqx.Module):
    """Information about one training step.

    **Attributes:**

    - `loss`: the loss before the step.
    - `terms`: the mean loss of each objective, by name.
    - `grad_norm`: the norm of the whole gradient, before the optimiser transforms it.
    - `is_finite`: whether the loss, gradient and new weights were finite. If not, the
      step was skipped: weights, averages and optimiser state are unchanged.
    """

    loss: Scalar
    terms: dict[str, Scalar]
    grad_norm: Scalar
    is_finite: Array


def make_step(
    objective: AbstractObjective | Mixture | Scheduled,
    optim: optax.GradientTransformation,
    *,
    ema_decay: float | PowerAverage | Sequence[float | PowerAverage] = 0.999,
    teacher_decay: float | None = None,
    accumulate: int = 1,
    parallel: DataParallel | None = None,
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Makes a jitted training step: draw, loss, gradient, optimiser, moving average.

    **Arguments:**

    - `objective`: an objective, a [`flowdiffrax.objectives.Mixture`][] of several, or a
      [`flowdiffrax.objectives.Scheduled`][] one.
    - `optim`: an Optax optimiser.
    - `ema_decay`: the decay per step of the moving average, in [0, 1). Step $n$ uses at
      most $(1 + n)/(10 + n)$, so that a new average soon forgets the initial weights.
      Or a [`flowdiffrax.train.PowerAverage`][], whose width is a share of the run.
      Several of either kind keep several averages. The state must be created with the
      same.
    - `teacher_decay`: if given, the decay of a further average of the map, which is the
      teacher. Use it for self-distillation from an average.
    - `accumulate`: the number of batches per step, at least 1. Their gradients are
      averaged, which gives a large batch with the memory of a small one.
    - `parallel`: the devices to train on; `None` for JAX's default device.

    **Returns:** a function `step(state, batches, teacher=None) -> (state, info)`.
    `batches` is a function of a key that is called inside the compiled step. It returns
    paths and conditions with a leading batch axis. Use
    [`flowdiffrax.data.InterpolantBatches`][], [`flowdiffrax.data.TrajectoryBatches`][],
    your own function, or a tuple of `accumulate` such functions with the same PyTree
    structure. The memory of `state` is donated, so use only the returned state.

    **Raises:** `ValueError` for a decay outside [0, 1) or `accumulate` below 1;
    `TypeError` if `objective` is not an objective, `optim` is not an optimiser, or a
    decay is not a number. When called, `ValueError` if the state was created without what
    the objective needs or with other decays, or if a batch does not divide among the
    devices; `TypeError` if `batches` is not callable or does not return a pair of paths
    and conditions.
    """
    check_objective(objective)
    check_optimiser(optim)
    decays = decays_of(ema_decay), teacher_decay_of(teacher_decay)
    check_count(accumulate, 1, "accumulate")

    @eqx.filter_jit(donate="all-except-first")
    def step(
        inputs: tuple[Any, Any, AbstractObjective | Mixture | Scheduled],
        state: TrainState,
    ) -> tuple[TrainState, StepInfo]:
        batches, teacher, objective = inputs
        root_key = jr.wrap_key_data(state.key_data, impl=state.key_impl)
        key = jr.fold_in(root_key, state.step)

        mixture, teacher = _prepare(state, objective, teacher, *decays)

        def draw_part(batches, key):
            drawn = draw(batches, key)
            return drawn if parallel is None else parallel.split(drawn)

        if accumulate == 1:
            batch_key, loss_key = jr.split(key)
            paths, args = draw_part(batches, batch_key)
            means = _gradients(state, mixture, teacher, paths, args, loss_key)
        else:
            means = _accumulated_gradients(
                state, mixture, teacher, draw_part, batches, key, accumulate
            )
        state, info = _apply(state, optim, means)
        if parallel is not None:
            state, info = parallel.place(state), parallel.replicate(info)
        return state, info

    def public_step(
        state: TrainState,
        batches: Callable | tuple[Callable, ...],
        teacher: Any = None,
    ) -> tuple[TrainState, StepInfo]:
        return step((batches, teacher, objective), state)

    return public_step


def update(
    state: TrainState,
    objective: AbstractObjective | Mixture | Scheduled,
    optim: optax.GradientTransformation,
    teacher: Any,
    paths: Any,
    args: Args,
    *,
    key: Key[Array, ""],
    ema_decay: float | PowerAverage | Sequence[float | PowerAverage],
    teacher_decay: float | None = None,
) -> tuple[TrainState, StepInfo]:
    """Makes one training step on a given batch, for use in a custom training loop.

    It is not jitted. Arguments are as for [`flowdiffrax.train.make_step`][].
    """
    decays = decays_of(ema_decay), teacher_decay_of(teacher_decay)
    mixture, teacher = _prepare(state, objective, teacher, *decays)
    means = _gradients(state, mixture, teacher, paths, args, key)
    return _apply(state, optim, means)


# The loss, its terms, and its gradient.
_Means = tuple[Scalar, dict[str, Scalar], PyTree]


def _prepare(
    state: TrainState,
    objective: AbstractObjective | Mixture | Scheduled,
    teacher: Any,
    ema_decay: tuple[float | PowerAverage, ...],
    teacher_decay: float | PowerAverage | None,
) -> tuple[Mixture, Any]:
    """The objective and the teacher of this step.

    **Raises:** `ValueError` if the state was created with other settings.
    """
    objective = at_step(objective, state.step)
    num_learned = f"{len(learned_of(objective))} learned weights"
    for argument, of_step, of_state in (
        ("objective", num_learned, f"{len(state.learned)} learned weights"),
        ("ema_decay", ema_decay, state.ema_decay),
        ("teacher_decay", teacher_decay, state.teacher_decay),
    ):
        if of_step != of_state:
            raise ValueError(
                f"`{argument}` differs: {of_step} in the step, and {of_state} in the "
                f"state. Create it with `TrainState.create(..., {argument}={argument})`."
            )
    if state.teacher_map is not None and filled(teacher, state) is teacher:
        raise ValueError(
            "With `teacher_decay` the teacher is an average, but another one was given; "
            "in a tuple of teachers, use `None` for the average."
        )
    return as_mixture(objective), filled(teacher, state.teacher_map)


def _part_gradients(
    state: TrainState,
    mixture: Mixture,
    teacher: Any,
    paths: Any,
    args: Args,
    drawn: DrawnTimes,
    whole: list[Segment],
    part: list[Segment],
    key: Key[Array, ""],
) -> _Means:
    """The contribution of one part of the batch to the means over the whole batch."""

    def loss_fn(trained):
        flow_map, learned = trained if state.learned else (trained, ())
        own = with_learned(mixture, learned)
        examples = losses_of(
            own, flow_map, teacher, paths, args, drawn, part, key=key, dropout=True
        )
        return summed(own, whole, part, examples)

    value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (loss, terms), grads = value_and_grad(_trained(state))
    return loss, terms, grads


def _gradients(
    state: TrainState,
    mixture: Mixture,
    teacher: Any,
    paths: Any,
    args: Args,
    key: Key[Array, ""],
) -> _Means:
    """The means over a batch that is evaluated all at once."""
    batch_size = num_examples(paths, args)
    whole = segments_of(mixture, batch_size)
    drawn = draw_times(mixture, batch_size, key)
    return _part_gradients(state, mixture, teacher, paths, args, drawn, whole, whole, key)


def _accumulated_gradients(
    state: TrainState,
    mixture: Mixture,
    teacher: Any,
    draw_part: Callable[[Any, Key[Array, ""]], tuple[Any, Args]],
    batches: Any,
    key: Key[Array, ""],
    num_parts: int,
) -> _Means:
    """The means over a batch that is evaluated in several parts, one after another."""
    batch_key, loss_key = jr.split(key)
    arrays: Sequence[Any] = [None] * num_parts
    source = lambda _: batches
    if isinstance(batches, tuple):
        if len(batches) != num_parts:
            raise ValueError(
                f"`batches` must be one function or {num_parts}; got {len(batches)}."
            )
        halves = [eqx.partition(one, eqx.is_array) for one in batches]
        arrays, rests = zip(*halves, strict=True)
        source = lambda arrays: eqx.combine(arrays, rests[0])
    shapes = eqx.filter_eval_shape(draw_part, source(arrays[0]), batch_key)
    batch_size = num_parts * num_examples(*shapes)
    # Split the whole batch by shares: rounding in each part would change the shares.
    whole = segments_of(mixture, batch_size)
    drawn = draw_times(mixture, batch_size, loss_key)

    def part_gradients(part, arrays, index, drawn):
        paths, args = draw_part(source(arrays), jr.fold_in(batch_key, index))
        return _part_gradients(
            state, mixture, teacher, paths, args, drawn, whole, list(part), loss_key
        )

    # Parts with the same numbers of rows share one compiled loop.
    groups: dict[tuple[Segment, ...], list[int]] = {}
    for index, part in enumerate(deal(whole, num_parts)):
        groups.setdefault(tuple(part), []).append(index)
    total: Any = None
    for part, members in groups.items():
        rows = [
            (arrays[index], jnp.asarray(index), dealt(drawn, index, num_parts))
            for index in members
        ]
        stacked = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *rows)
        one = functools.partial(part_gradients, part)
        if total is None:
            shape = jax.eval_shape(one, *rows[0])
            total = jtu.tree_map(jnp.zeros_like, shape)
        add = lambda total, row, one=one: (
            jtu.tree_map(jnp.add, total, one(*row)),
            None,
        )
        total, _ = lax.scan(add, total, stacked)
    return total


def _apply(
    state: TrainState,
    optim: optax.GradientTransformation,
    means: _Means,
) -> tuple[TrainState, StepInfo]:
    """Updates weights and averages, unless something is not finite."""
    loss, terms, grads = means
    weights, rest = eqx.partition(_trained(state), eqx.is_inexact_array)
    # Optax relies on promotion between the dtypes of Python numbers and weights.
    with jax.numpy_dtype_promotion("standard"):
        grad_norm = jnp.sqrt(squared_norm(grads))
        updates, opt_state = optim.update(grads, state.opt_state, weights)
        new_weights: Any = optax.apply_updates(weights, updates)
    is_finite = jnp.isfinite(loss) & all_finite(grads) & all_finite(new_weights)
    keep = lambda new, old: jnp.where(is_finite, new, old) if eqx.is_array(new) else new
    new: Any = eqx.combine(new_weights, rest)
    flow_map, learned = new if state.learned else (new, ())
    average = lambda old, decay: _average(old, flow_map, decay, state)
    proposed = TrainState(
        flow_map=flow_map,
        averages=tuple(map(average, state.averages, state.ema_decay)),
        teacher_average=average(state.teacher_average, state.teacher_decay),
        learned=learned,
        opt_state=opt_state,
        step=state.step,
        skipped=state.skipped,
        key_data=state.key_data,
        key_impl=state.key_impl,
        ema_decay=state.ema_decay,
        teacher_decay=state.teacher_decay,
    )
    new_state = jtu.tree_map(keep, proposed, state)
    counts = state.step + 1, state.skipped + (~is_finite).astype(int)
    new_state = eqx.tree_at(lambda s: (s.step, s.skipped), new_state, counts)
    return new_state, StepInfo(loss, terms, grad_norm, is_finite)


def _trained(state: TrainState) -> Any:
    """The tree to optimise: the map, and the learned weights if there are any."""
    return (state.flow_map, state.learned) if state.learned else state.flow_map


def decays_of(ema_decay: _Decays | None) -> tuple[float | PowerAverage, ...]:
    """**Raises:** `ValueError` for no decay, and as `_decay_of` for each."""
    given: Any = () if ema_decay is None else ema_decay
    decays = tuple(given) if np.ndim(given) > 0 else (given,)
    if len(decays) == 0:
        raise ValueError(
            "`ema_decay` must be a decay or more, or a `PowerAverage`; 0 keeps the last "
            "weights."
        )
    return tuple(_decay_of(decay, "ema_decay") for decay in decays)


def teacher_decay_of(decay: float | PowerAverage | None) -> float | PowerAverage | None:
    """**Raises:** as `_decay_of`."""
    return None if decay is None else _decay_of(decay, "teacher_decay")


def _decay_of(decay: Any, name: str) -> float | PowerAverage:
    """**Raises:** `TypeError` unless it is a decay, `ValueError` outside [0, 1)."""
    if isinstance(decay, PowerAverage):
        return decay
    what = "a number, or an instance such as `PowerAverage(0.05)`"
    check_instance(decay, numbers.Real | jax.Array | np.ndarray, name, what)
    check_between(decay, 0, 1, name, "[)")
    return float(decay)


def draw(batches: Any, key: Key[Array, ""]) -> tuple[diffrax.AbstractPath, Args]:
    check_callable(batches, "batches", "batches(key)")
    drawn = batches(key)
    if isinstance(drawn, tuple) and len(drawn) == 2:
        if isinstance(drawn[0], diffrax.AbstractPath):
            return drawn
    raise TypeError(
        "`batches(key)` must return a pair: paths (a `diffrax.AbstractPath`) and "
        f"conditions (or `None`); got {type(drawn).__name__}."
    )


def _average(
    old: Any,
    flow_map: AbstractFlowMap,
    decay: float | PowerAverage | None,
    state: TrainState,
):
    if decay is None:
        return old
    step = state.step.astype(float)
    if isinstance(decay, PowerAverage):
        rate = decay.rate(state.step - state.skipped + 1)
    else:
        # Use a smaller decay early on: with a fixed decay, a run of a few thousand steps
        # would never forget the initial weights.
        rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))

    def move(old, new):
        if not eqx.is_inexact_array(old):
            return new
        return old + rate.astype(old.dtype) * (new.astype(old.dtype) - old)

    return jtu.tree_map(move, old, flow_map)


def precise(flow_map: AbstractFlowMap) -> AbstractFlowMap:
    """A copy whose weights have at least float32 precision."""

    def copy(leaf):
        if not eqx.is_array(leaf):
            return leaf
        is_weight = eqx.is_inexact_array(leaf)
        return jnp.array(leaf, at_least_float32(leaf.dtype) if is_weight else None)

    return jtu.tree_map(copy, flow_map)


def in_precision_of(flow_map: AbstractFlowMap, average: Any) -> AbstractFlowMap:
    cast = lambda leaf, like: (
        leaf.astype(like.dtype) if eqx.is_inexact_array(leaf) else leaf
    )
    return jtu.tree_map(cast, average, flow_map)


def filled(teacher: Any, average: Any) -> Any:
    """Replaces a missing teacher, or those missing in a tuple, by the average."""
    if isinstance(teacher, tuple) and None in teacher:
        return tuple(average if one is None else one for one in teacher)
    return average if teacher is None else teacher


def at_step(objective: AbstractObjective | Mixture | Scheduled, step: Array):
    return objective.at(step) if isinstance(objective, Scheduled) else objective


def _is_learned(node: Any) -> bool:
    return isinstance(node, AbstractLearnedWeight)


def learned_of(
    objective: AbstractObjective | Mixture,
) -> tuple[AbstractLearnedWeight, ...]:
    return tuple(filter(_is_learned, jtu.tree_leaves(objective, is_leaf=_is_learned)))


def with_learned(objective: Any, learned: tuple[AbstractLearnedWeight, ...]) -> Any:
    remaining = iter(learned)
    put = lambda node: next(remaining) if _is_learned(node) else node
    return jtu.tree_map(put, objective, is_leaf=_is_learned)


def check_objective(objective: object) -> None:
    """**Raises:** `TypeError` if `objective` is not one, for example its class."""
    kinds = AbstractObjective | Mixture | Scheduled
    what = "an instance such as `FlowMatching()`"
    check_instance(objective, kinds, "objective", what)
