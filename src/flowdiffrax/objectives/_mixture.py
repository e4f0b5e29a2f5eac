from collections.abc import Sequence

import equinox as eqx
from jaxtyping import ArrayLike

from .._check import check_instance
from ..times._shares import check_one_each, check_shares
from ._base import AbstractObjective


class Mixture(eqx.Module):
    """Several objectives, each on a fixed share of every batch.

    The shares become numbers of rows when the step is compiled, so each example computes
    one objective only. The loss is the weighted sum of the objectives' mean losses.

    **Arguments:**

    - `objectives`: the objectives.
    - `shares`: their shares of the batch, positive. They are normalised to sum to one.
    - `weights`: the factors of their mean losses, which may be arrays. `None` uses the
      shares, which makes the loss the mean over the batch.

    **Raises:** `ValueError` if a share is not positive, or if there is not one share and
    one weight for each objective; `TypeError` if an entry of `objectives` is not an
    objective.
    """

    objectives: tuple[AbstractObjective, ...]
    # Static, because array shapes depend on them; the weights may be traced.
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
        check_shares(self.shares, self.objectives)
        if weights is None:
            weights = [share / sum(self.shares) for share in self.shares]
        self.weights = tuple(weights)

    def __check_init__(self):
        for objective in self.objectives:
            # A schedule goes around the mixture.
            check_instance(objective, AbstractObjective, "objectives")
        check_one_each("weight", self.weights, self.objectives)
