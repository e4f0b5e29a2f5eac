from collections.abc import Sequence

import equinox as eqx
from jaxtyping import ArrayLike

from ..times._shares import check_shares
from ._base import AbstractObjective


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
