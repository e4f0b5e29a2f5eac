import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Key

from .._custom_types import AbstractVar, Args, Scalar, State, Time
from .._flow_map import AbstractFlowMap
from .._misc import check_shares, squared_norm
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

    - `times`: the distribution from which training draws `(s, t)`.
    - `weight`: maps the squared error to the loss.
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
