from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._tree import num_rows, squared_norm
from .._types import Args, State, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..identities import (
    eulerian_residual,
    inverse_residual,
    lagrangian_residual,
    semigroup_residual,
    tangent_residual,
)


class Defects(NamedTuple):
    """Root mean squares of the residuals of a flow map's identities.

    **Attributes:**

    - `lagrangian`, `eulerian`: the residuals against the teacher, in units of velocity.
    - `semigroup`: the difference between two jumps through the midpoint and one jump, in
      units of the state.
    - `tangent`: the difference between the diagonal and the teacher, at the end times.
    - `inverse`: the error of a round trip. It is large for maps that were trained in one
      direction of time only.
    """

    lagrangian: float
    eulerian: float
    semigroup: float
    tangent: float
    inverse: float


def defects(
    flow_map: AbstractFlowMap,
    teacher: VectorField,
    s: Float[Array, " batch"],
    t: Float[Array, " batch"],
    x_s: State,
    x_t: State,
    args: Args = None,
) -> Defects:
    r"""Measures how far a map is from satisfying each identity, on a batch of jumps.

    **Arguments:**

    - `flow_map`: the map.
    - `teacher`: the velocity that it should follow, `(t, x, args) -> dx/dt`.
    - `s`, `t`: start and end times.
    - `x_s`, `x_t`: states of the flow at these times, every leaf with the batch axis.
      `x_t` is used for the tangent condition.
    - `args`: conditions with the batch axis, or `None`.

    **Returns:** the root mean square of each residual over the batch. Squares are summed
    over the entries of a state.

    **Raises:** `ValueError` if the batch is empty or its leading axes differ.
    """

    num_rows((s, t, x_s, x_t, args), "Times, states and conditions")
    rms = _rms(flow_map, teacher, s, t, x_s, x_t, args)
    return Defects(*map(float, rms))


@eqx.filter_jit
def _rms(flow_map, teacher, s, t, x_s, x_t, args):
    def one(s, t, x_s, x_t, args):
        residuals = (
            lagrangian_residual(flow_map, teacher, s, t, x_s, args),
            eulerian_residual(flow_map, teacher, s, t, x_s, args),
            semigroup_residual(flow_map, s, (s + t) / 2, t, x_s, args),
            tangent_residual(flow_map, teacher, t, x_t, args),
            inverse_residual(flow_map, s, t, x_s, args),
        )
        return tuple(map(squared_norm, residuals))

    axes = eqx.if_array(0)
    each = eqx.filter_vmap(one, in_axes=(0, 0, axes, axes, axes))(s, t, x_s, x_t, args)
    return jax.tree_util.tree_map(lambda leaf: jnp.sqrt(jnp.mean(leaf)), each)
