import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, Key

from .._custom_types import AbstractVar, Args, Scalar, State, Time
from .._flow_map import AbstractFlowMap
from .._misc import check_shares, num_rows, split_by_shares, squared_norm
from .._times import AbstractTimes
from .weight import AbstractWeight


class StopGradient(enum.Enum):
    r"""What an objective holds fixed when it is differentiated.

    Each holds fixed what the one before does, and more. With everything that depends on
    the map free, the gradient is that of the loss as written; all the others are
    *semigradients*, which vanish at the same map but belong to no loss.

    **Attributes:**

    - `NONE`: nothing; gradients flow through the teacher too, where it has any.
    - `TEACHER`: the teacher's value.
    - `TRANSPORT`: also $\nabla X_{s,t}\,b_s$, the derivative in space, so that no
      gradient is taken of it. Only Eulerian objectives have one.
    - `DERIVATIVE`: also every derivative of the map, so that only the leading
      $v_{s,t}$ is trained, and nothing is differentiated twice.
    """

    NONE = "none"
    TEACHER = "teacher"
    TRANSPORT = "transport"
    DERIVATIVE = "derivative"


def stop_gradient_field(default: StopGradient) -> Any:
    """A field for it, which takes the name of a choice too, such as `"teacher"`."""
    return eqx.field(static=True, default=default, converter=StopGradient)


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
    # Whether it learns its velocity on the diagonal only.
    needs_diagonal = False

    def __check_init__(self):
        if not isinstance(self.times, AbstractTimes):
            raise TypeError(
                "`times` must be a law such as `UniformTriangle()`; got "
                f"{type(self.times).__name__}."
            )
        if isinstance(self.weight, AbstractTimes) or not callable(self.weight):
            raise TypeError(
                "`weight` must be a callable such as `NoWeight()`; got "
                f"{type(self.weight).__name__}."
            )

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

    def on_diagonal(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        t: Time,
        args: Args = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Scalar:
        """The loss of one example that its law of times puts on the diagonal.

        For rows that are known to have `s == t`, [`flowdiffrax.batch_loss`][] calls it
        in the place of the loss itself. Self-distillation learns its velocity there, and
        other objectives save themselves a derivative.

        Arguments as for the loss.
        """
        return self(flow_map, teacher, path, t, t, args, key=key)


class AbstractResidualObjective(AbstractObjective):
    """An objective that is the weighted squared norm of a residual."""

    @abc.abstractmethod
    def residual(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        s: Time,
        t: Time,
        args: Args,
        key: Key[Array, ""] | None,
    ) -> State:
        """What should vanish, with gradients where the objective wants them.

        Arguments as for the loss.
        """

    def diagonal_residual(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        t: Time,
        args: Args,
        key: Key[Array, ""] | None,
    ) -> State:
        """What should vanish where `s == t`; the residual itself, unless overridden."""
        return self.residual(flow_map, teacher, path, t, t, args, key)

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
        error = self.residual(flow_map, teacher, path, s, t, args, key)
        return self._weighted(s, t, error)

    def on_diagonal(
        self,
        flow_map: AbstractFlowMap,
        teacher: Any,
        path: diffrax.AbstractPath,
        t: Time,
        args: Args = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Scalar:
        error = self.diagonal_residual(flow_map, teacher, path, t, args, key)
        return self._weighted(t, t, error)

    def _weighted(self, s: Time, t: Time, error: State) -> Scalar:
        loss = self.weight(s, t, squared_norm(error))
        if jnp.shape(loss) != ():
            raise ValueError(
                "`weight` must return a scalar, the loss of one example; got shape "
                f"{jnp.shape(loss)}."
            )
        return loss


class Mixture(eqx.Module):
    """Several objectives, each on its own share of every batch.

    The shares are counts, fixed when the step is compiled: no example pays for an
    objective that it does not serve. The loss is the weighted sum of the objectives'
    mean losses.

    **Arguments:**

    - `objectives`: the objectives.
    - `shares`: their shares of the batch, positive; they are divided by their sum.
    - `weights`: the factors of their mean losses, which may be arrays; `None` for the
      shares, which makes the loss the mean over the batch.

    **Raises:** `ValueError` for shares that are not positive, or for a number of shares
    or weights that is not that of the objectives; `TypeError` for what is no objective.
    """

    objectives: tuple[AbstractObjective, ...]
    shares: tuple[float, ...] = eqx.field(static=True)
    weights: tuple[ArrayLike, ...]

    def __init__(
        self,
        objectives: Sequence[AbstractObjective],
        shares: Sequence[float],
        weights: Sequence[ArrayLike] | None = None,
    ):
        self.objectives = tuple(objectives)
        self.shares = tuple(map(float, shares))
        check_shares(self.shares, len(self.objectives), "objectives")
        if weights is None:
            weights = [share / sum(self.shares) for share in self.shares]
        self.weights = tuple(weights)

    def __check_init__(self):
        for objective in self.objectives:
            if not isinstance(objective, AbstractObjective):
                raise TypeError(
                    "A mixture is of objectives such as `FlowMatching()`; got "
                    f"{objective!r}. Put schedules around the mixture."
                )
        if len(self.weights) != len(self.objectives):
            raise ValueError(
                "There must be one weight for each of the objectives; got "
                f"{len(self.objectives)} objectives and {len(self.weights)} weights."
            )


class Scheduled(eqx.Module):
    """An objective whose settings change along training.

    For everything that papers anneal: the longest jump, the tangent warm-up of Align
    Your Flow, the step of consistency training, the weights of a mixture. Optax's
    schedules serve inside:

    ```python
    rise = optax.linear_schedule(0.05, 1.0, 10_000)
    Scheduled(lambda step: FlowMapMatching(UniformSquare(max_gap=rise(step))))
    ```

    **Arguments:**

    - `objective`: a function of the step's number, a traced integer, that returns an
      objective or a [`flowdiffrax.Mixture`][]. Values may depend on the step, structure
      and static fields may not.
    """

    objective: Callable[[Int[Array, ""]], AbstractObjective | Mixture]

    def __check_init__(self):
        if isinstance(self.objective, AbstractObjective | Mixture):
            raise TypeError(
                "`Scheduled` takes a function of the step that returns an objective; got "
                f"the objective {type(self.objective).__name__} itself."
            )

    def at(self, step: Int[Array, ""]) -> AbstractObjective | Mixture:
        """The objective of one step."""
        return self.objective(step)


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
    - `flow_map`, `teacher`: passed on to the objective. For a mixture whose objectives
      learn from different teachers, a tuple with one for each.
    - `paths`: paths with a leading batch axis on every leaf.
    - `args`: conditions with the same leading axis, or `None`.
    - `key`: for the times, and for objectives that draw.

    **Returns:** the loss, and the mean loss of each objective by its name. Where an
    objective has rows on the diagonal besides others, their mean is a term of its own,
    under the name with `_diagonal`.

    **Raises:** `ValueError` if the batch is too small for the shares of a mixture, for
    conditions with another number of rows than the paths, for a tuple of teachers that is
    not one for each objective, and for self-distillation with nothing on the diagonal to
    learn from; `TypeError` for a map that is no flow map.
    """
    mixture = as_mixture(objective)
    parts = example_losses(mixture, flow_map, teacher, paths, args, key=key)
    total: Any = 0.0
    terms: dict[str, Scalar] = {}
    for index, (part, examples) in enumerate(zip(mixture.objectives, parts, strict=True)):
        losses = [rows.loss for rows in examples]
        name = type(part).__name__
        # Two objectives of one class stay two terms.
        name = name if name not in terms else f"{name}_{index}"
        terms[name] = jnp.mean(losses[0])
        if len(losses) == 2:
            terms[f"{name}_diagonal"] = jnp.mean(losses[1])
        mean: Any = sum(map(jnp.sum, losses)) / sum(map(len, losses))
        total = total + jnp.asarray(mixture.weights[index], mean.dtype) * mean
    return total, terms


def as_mixture(objective: AbstractObjective | Mixture) -> Mixture:
    """The objective itself, or a mixture of it alone."""
    return objective if isinstance(objective, Mixture) else Mixture((objective,), (1.0,))


class ExampleLosses(NamedTuple):
    """The losses of some examples, and the times that were drawn for them."""

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
) -> list[list[ExampleLosses]]:
    """The losses that [`flowdiffrax.batch_loss`][] takes the mean of.

    Arguments and errors as there.

    **Returns:** for each objective, the examples off the diagonal, then those on it, as
    far as there are any.
    """
    if not isinstance(flow_map, AbstractFlowMap):
        raise TypeError(
            f"Objectives train a flow map; got {type(flow_map).__name__}. Wrap a network "
            "as `FlowMap(net)`."
        )
    only_arrays = eqx.filter((paths, args), eqx.is_array)
    batch_size = num_rows(only_arrays, "Paths and conditions")
    slices = split_by_shares(batch_size, mixture.shares)
    num_parts = len(mixture.objectives)
    sizes = [rows.stop - rows.start for rows in slices]
    if all(
        part.needs_diagonal and part.times.num_diagonal(size) == 0
        for part, size in zip(mixture.objectives, sizes, strict=True)
    ):
        raise ValueError(
            "Self-distillation learns its velocity on the diagonal, and the law of times "
            "puts no row there. Use `DiagonalMixture(times)` in a batch of at least two, "
            "or mix it with `FlowMatching`."
        )
    teachers = teacher if isinstance(teacher, tuple) else (teacher,) * num_parts
    if len(teachers) != num_parts:
        raise ValueError(
            "A tuple of teachers has one for each objective; got "
            f"{len(teachers)} teachers and {num_parts} objectives."
        )
    return [
        _losses(
            part,
            flow_map,
            teachers[index],
            _rows(paths, rows),
            _rows(args, rows),
            rows.stop - rows.start,
            jr.fold_in(key, index),
        )
        for index, (part, rows) in enumerate(zip(mixture.objectives, slices, strict=True))
    ]


def _losses(objective, flow_map, teacher, paths, args, batch_size, key):
    """The losses of the rows off the diagonal, then of those on it, if there are any."""
    times_key, draw_key = jr.split(key)
    s, t = objective.times(times_key, batch_size)
    cut = objective.times.num_diagonal(batch_size)
    rows = (paths, s, t, args, jr.split(draw_key, batch_size))

    def on_diagonal(path, s, t, args, key):
        del s
        return objective.on_diagonal(flow_map, teacher, path, t, args, key=key)

    def off_diagonal(path, s, t, args, key):
        return objective(flow_map, teacher, path, s, t, args, key=key)

    axes = eqx.if_array(0)
    over_rows = lambda one: eqx.filter_vmap(one, in_axes=(axes, 0, 0, axes, 0))
    parts = []
    if cut < batch_size:
        off = _rows(rows, slice(cut, None))
        parts.append(ExampleLosses(off[1], off[2], over_rows(off_diagonal)(*off)))
    if cut > 0:
        on = _rows(rows, slice(0, cut))
        parts.append(ExampleLosses(on[1], on[2], over_rows(on_diagonal)(*on)))
    return parts


def _rows(tree, rows):
    cut = lambda leaf: leaf[rows] if eqx.is_array(leaf) else leaf
    return jtu.tree_map(cut, tree)
