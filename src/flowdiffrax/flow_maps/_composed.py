import equinox as eqx
import jax.numpy as jnp
from jax import lax

from .._check import check_count
from .._types import Args, Scalar, State, TwoTimeMap
from ._base import AbstractFlowMap
from ._inverse import check_composable


class ComposedFlowMap(AbstractFlowMap):
    r"""Takes `num_jumps` equal jumps of another flow map instead of one.

    $X_{t_{K-1},t} \circ \dots \circ X_{s,t_1}$ with $t_k = s + \tfrac kK (t - s)$. This
    changes nothing for an exact map. Learned maps are usually more accurate in short
    jumps.

    **Arguments:**

    - `flow_map`: the map to compose.
    - `num_jumps`: the number of jumps $K$, which is also the number of evaluations; at
      least 1.

    **Raises:** `ValueError` if `num_jumps` is below 1.
    """

    flow_map: TwoTimeMap
    num_jumps: int = eqx.field(static=True)

    def __check_init__(self):
        check_composable(self.flow_map)
        check_count(self.num_jumps, 1, "num_jumps")

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Takes equal jumps, one after the other."""
        fractions = jnp.arange(self.num_jumps + 1, dtype=s.dtype) / self.num_jumps
        # A convex combination ends at exactly `t`; s + K (t - s)/K may not.
        ts = (1 - fractions) * s + fractions * t
        jump = lambda x, ends: (self.flow_map(ends[0], ends[1], x, args), None)
        out, _ = lax.scan(jump, x, (ts[:-1], ts[1:]))
        return out
