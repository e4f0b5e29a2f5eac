from .._types import State
from ..identities import inverse_residual
from ..times._base import AbstractTimes
from ..times._uniform import UniformSquare
from ..weights._base import AbstractWeight, NoWeight
from ._base import AbstractResidualObjective


class CycleConsistency(AbstractResidualObjective):
    r"""A round trip must end where it began, $|X_{t,s}(X_{s,t}(I_s)) - I_s|^2$.

    This makes a map invertible, so that its samples have the densities that
    [`flowdiffrax.likelihood.sample_log_prob`][] computes, and that `log_prob` finds its
    way back to. The identity has no loss either: use it in a
    [`flowdiffrax.objectives.Mixture`][] with an objective that learns the flow. No
    derivative of the map is taken and nothing is held fixed, so both jumps are trained.

    **Arguments:**

    - `times`: the distribution of times. By default, round trips begin with either
      direction of time. The other objective has to learn both directions too, or the
      way back is known from round trips alone.
    - `weight`: maps the squared error to the loss.

    The teacher is not used, and any path will do.

    ??? cite "Reference"

        FALCON, [arXiv:2512.09914](https://arxiv.org/abs/2512.09914), as a regulariser of
        mean flows.
    """

    times: AbstractTimes = UniformSquare()
    weight: AbstractWeight = NoWeight()

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del teacher, key
        return inverse_residual(flow_map, s, t, path.evaluate(s), args)
