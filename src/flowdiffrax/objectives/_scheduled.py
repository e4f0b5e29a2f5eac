from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Int

from ._base import AbstractObjective
from ._mixture import Mixture


class Scheduled(eqx.Module):
    """An objective whose settings change during training.

    Use it for whatever a paper anneals: the longest jump, the tangent warm-up of Align
    Your Flow, the step of consistency training, the weights of a mixture. It works with
    Optax's schedules:

    ```python
    rise = optax.linear_schedule(0.05, 1.0, 10_000)
    Scheduled(lambda step: FlowMapMatching(UniformSquare(max_gap=rise(step))))
    ```

    **Arguments:**

    - `objective`: a function that takes the step number, a traced integer, and returns
      an objective or a [`flowdiffrax.objectives.Mixture`][]. Array values may depend on
      the step; the structure and static fields may not.
    """

    objective: Callable[[Int[Array, ""]], AbstractObjective | Mixture]

    def at(self, step: Int[Array, ""]) -> AbstractObjective | Mixture:
        """Returns the objective at a step."""
        return self.objective(step)
