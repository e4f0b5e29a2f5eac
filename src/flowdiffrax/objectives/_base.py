import abc
import enum
from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Key

from .._check import as_member, check_callable, check_instance, check_scalar
from .._tree import squared_norm
from .._types import AbstractVar, Args, Scalar, State, Time
from ..flow_maps._base import AbstractFlowMap
from ..times._base import AbstractTimes
from ..weights._base import AbstractWeight


class StopGradient(enum.Enum):
    r"""What an objective holds fixed when it is differentiated.

    Each choice holds fixed what the previous one does, and more. If nothing that depends
    on the map is held fixed, the gradient is that of the loss as written. Otherwise it is
    a *semigradient*: it vanishes at the same map, but is not the gradient of any loss.

    **Attributes:**

    - `NONE`: nothing. Gradients flow through the teacher too, if its value depends on
      the map.
    - `TEACHER`: the teacher's value.
    - `TRANSPORT`: also the derivative in space, $\nabla X_{s,t}\,b_s$. Only Eulerian
      objectives have this term.
    - `DERIVATIVE`: also every derivative of the map. Only the leading $v_{s,t}$ is
      trained, and nothing is differentiated twice.
    """

    NONE = "none"
    TEACHER = "teacher"
    TRANSPORT = "transport"
    DERIVATIVE = "derivative"


def check_stop_gradient(choice: StopGradient, *allowed: StopGradient) -> None:
    """**Raises:** `ValueError` if a method is not meant for a choice."""
    if choice not in allowed:
        names = " or ".join(f"`{each}`" for each in allowed)
        raise ValueError(f"`stop_gradient` must be {names} here; got `{choice}`.")


def stop_gradient_field(default: StopGradient) -> Any:
    """A field for a `StopGradient`, which also accepts a name such as `"teacher"`."""
    # Static, because it decides in Python which terms are traced.
    as_choice = lambda choice: as_member(choice, StopGradient, "stop_gradient")
    return eqx.field(static=True, default=default, converter=as_choice)


class AbstractObjective(eqx.Module):
    """A training objective: the loss of one example, as the papers state it.

    An objective receives one path and one pair of times; it knows nothing of the batch.
    Its fields set where gradients stop, how errors are weighted and which times are
    drawn. The defaults are the paper's unless the docstring says otherwise.

    **Attributes:**

    - `times`: the distribution from which training draws `(s, t)`.
    - `weight`: maps the squared error to the loss.
    """

    times: AbstractVar[AbstractTimes]
    weight: AbstractVar[AbstractWeight]
    # Whether the velocity is learned on the diagonal only, so that a batch needs rows
    # there.
    needs_diagonal = False
    # Whether the teacher is a map rather than a velocity.
    teacher_is_map = False
    # Whether a network has dropout in rows off the diagonal too. The default is not to:
    # these rows compare several evaluations of the map, or a derivative with a value.
    has_dropout_off_diagonal = False

    def __check_init__(self):
        check_instance(self.times, AbstractTimes, "times")
        check_callable(self.weight, "weight", "weight(s, t, squared_error)")

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

        - `flow_map`: the map to train.
        - `teacher`: what the map learns from. Each objective documents what it accepts,
          and whether `None` is allowed.
        - `path`: supplies the states as `path.evaluate(t)`. Objectives that learn from
          data also call `path.derivative(t)`.
        - `s`, `t`: a pair of times.
        - `args`: the example's condition, passed to the map and the teacher.
        - `key`: a random key, for objectives that draw random numbers.
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
        """The loss of one example whose times are on the diagonal, `s == t`.

        [`flowdiffrax.objectives.batch_loss`][] calls this instead of `__call__` for the
        rows that `times` is known to put there. Self-distillation learns its velocity
        from these rows; other objectives save a derivative.

        **Arguments:** as for `__call__`.
        """
        return self(flow_map, teacher, path, t, t, args, key=key)

    def _weighted(self, s: Time, t: Time, error: State) -> Scalar:
        loss = self.weight(s, t, squared_norm(error))
        check_scalar(loss, "weight(s, t, squared_error)")
        return loss


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
        """The residual to minimise, with its gradients stopped as the method requires.

        **Arguments:** as for `__call__`.
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
        """The residual where `s == t`; calls `residual` unless overridden."""
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
