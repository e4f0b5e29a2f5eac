import jax.numpy as jnp

from .._tree import ravel
from .._types import Args, Scalar, State, Time
from ._autonomous import check_inner
from ._base import AbstractFlowMap, times_as_given


class RavelledFlowMap(AbstractFlowMap):
    """Uses a map of vectors for states that are PyTrees.

    All entries of a state become one vector, in the order of `jax.tree_util`, and so do
    those of `args`.

    **Arguments:**

    - `flow_map`: the map of vectors. Its `args`, if any, are a vector as well.

    **Raises:** `TypeError` for an inner map that is not a
    [`flowdiffrax.AbstractFlowMap`][]; when called, `TypeError` for complex states.
    """

    flow_map: AbstractFlowMap

    def __check_init__(self):
        check_inner(self.flow_map)

    @property
    def time_range(self):
        return self.flow_map.time_range

    def _times(self, s: Time, t: Time, x: State) -> tuple[Scalar, Scalar]:
        return times_as_given(self, s, t)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Jumps with the inner map."""
        vector, unravel = ravel(x, "`RavelledFlowMap`")
        return unravel(self.flow_map(s, t, vector, _ravel_args(args, vector)))

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity of the inner map."""
        vector, unravel = ravel(x, "`RavelledFlowMap`")
        args = _ravel_args(args, vector)
        return unravel(self.flow_map.average_velocity(s, t, vector, args))

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity of the inner map."""
        vector, unravel = ravel(x, "`RavelledFlowMap`")
        return unravel(self.flow_map.velocity(t, vector, _ravel_args(args, vector)))


def _ravel_args(args, vector):
    if args is None:
        return None
    return ravel(args, "`RavelledFlowMap`")[0].astype(jnp.result_type(vector))
