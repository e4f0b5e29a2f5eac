import equinox as eqx
import jax.numpy as jnp
from jax import lax

from .._time import times_like
from .._types import Args, State, Time, TwoTimeMap
from ._base import AbstractFlowMap, check_times
from ._inverse import check_composable


class ComposedFlowMap(AbstractFlowMap):
    r"""A flow map that takes `num_jumps` equal jumps of another instead of one.

    $X_{t_{K-1},t} \circ \dots \circ X_{s,t_1}$ with $t_k = s + \tfrac kK (t - s)$. For an
    exact map it changes nothing; a learned one is mostly better in short jumps.

    **Arguments:**

    - `flow_map`: the map to compose.
    - `num_jumps`: the number of jumps $K$, at least 1, and of evaluations.

    **Raises:** `ValueError` if `num_jumps` is below 1.
    """

    flow_map: TwoTimeMap
    num_jumps: int = eqx.field(static=True)

    def __check_init__(self):
        check_composable(self.flow_map)
        if self.num_jumps < 1:
            raise ValueError(f"`num_jumps` must be at least 1; got {self.num_jumps}.")

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        check_times(self, s, t)
        s, t = times_like(x, s, t)
        fractions = jnp.arange(self.num_jumps + 1, dtype=s.dtype) / self.num_jumps
        # A convex combination ends at `t` to the last bit, where s + K (t - s)/K may not.
        ts = (1 - fractions) * s + fractions * t
        jump = lambda x, ends: (self.flow_map(ends[0], ends[1], x, args), None)
        out, _ = lax.scan(jump, x, (ts[:-1], ts[1:]))
        return out
