import abc
import enum
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Key

from .._tree import squared_norm
from .._types import AbstractVar, Args, Scalar, State, Time
from ..flow_maps._base import AbstractFlowMap
from ..times._base import AbstractTimes
from ..weights._base import AbstractWeight


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

        For rows that are known to have `s == t`, [`flowdiffrax.objectives.batch_loss`][]
        calls it in the place of the loss itself. Self-distillation learns its velocity
        there, and other objectives save themselves a derivative.

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
