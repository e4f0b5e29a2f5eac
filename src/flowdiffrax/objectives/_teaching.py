"""How objectives read velocities from data, from a teacher and from the map itself."""

from collections.abc import Callable
from typing import Any

import diffrax

from .._check import check_callable, check_instance, check_like
from .._tree import freeze, subtract
from .._types import Args, GuidanceArgs, State, Time, VectorField
from ..flow_maps._base import AbstractFlowMap
from ..paths._plug_in import PlugInPath
from ..velocities._guidance import (
    ClassifierFreeGuidance,
    GuidanceRule,
    MeanFlowGuidance,
    at_scale_one,
)
from ..velocities._guided import GuidedVelocity


def data_residual(
    flow_map: AbstractFlowMap, path: diffrax.AbstractPath, t: Time, args: Args
) -> State:
    r"""Flow matching: $v_{t,t}(I_t) - \dot I_t$.

    A map that is conditioned on a guidance scale learns the velocity of the data at
    scale 1.
    """
    if isinstance(args, GuidanceArgs):
        args = at_scale_one(args.condition, args)
    I_t = path.evaluate(t)
    dI_t = check_like(path.derivative(t), I_t, "`path.derivative`")
    return subtract(flow_map.velocity(t, I_t, args), dI_t)


def data_neighbour(path: diffrax.AbstractPath, s: Time, u: Time) -> State:
    r"""The state at time $u$ of the path through $I_s$: of its pair, or of the mean path.

    With a [`flowdiffrax.paths.PlugInPath`][], this is a step of the plug-in velocity.
    """
    through = path.through(s) if isinstance(path, PlugInPath) else path
    return through.evaluate(u)


def check_velocity(teacher: object) -> None:
    """**Raises:** `TypeError` if the teacher is not a velocity."""
    check_callable(teacher, "teacher", "teacher(t, x, args)")


def teacher_velocity(teacher: Any, t: Time, x: State, args: Args) -> State:
    """Evaluates a teacher and checks its value.

    **Raises:** `TypeError` if the teacher is not a velocity.
    """
    check_velocity(teacher)
    return check_like(teacher(t, x, args), x, "`teacher`")


def own_map(flow_map: AbstractFlowMap, teacher: Any) -> AbstractFlowMap:
    """The map that self-distillation learns from: the trained map, or a given average.

    **Raises:** `TypeError` if the teacher is neither `None` nor a flow map.
    """
    if teacher is None:
        # Not frozen here: what is held fixed is the objective's choice.
        return flow_map
    check_instance(teacher, AbstractFlowMap, "teacher")
    return freeze(teacher)


def own_velocity(
    flow_map: AbstractFlowMap, teacher: Any, guidance: GuidanceRule | None
) -> VectorField:
    """The velocity that self-distillation follows, guided if there is a rule.

    **Raises:** `TypeError` if the teacher is neither `None` nor a flow map, or if the
    rule is for rates of the data. The velocity raises `ValueError` if it is called with
    a guidance scale but has no rule.
    """
    _check_rule(guidance, ClassifierFreeGuidance, MeanFlowGuidance)
    own = own_map(flow_map, teacher).velocity
    if guidance is not None:
        return GuidedVelocity(own, guidance)

    def velocity(t, x, args):
        check_unguided(args)
        return own(t, x, args)

    return velocity


def _check_rule(guidance: object, right: type, wrong: type) -> None:
    # One rule is for velocities, the other for rates of the data.
    if isinstance(guidance, wrong):
        raise TypeError(
            f"`guidance` must be a `{right.__name__}`; got `{wrong.__name__}`."
        )


def check_unguided(args: Args) -> None:
    """**Raises:** `ValueError` if `args` has a guidance scale.

    Data teach the diagonal at scale 1 only. At other scales, jumps need a rule to follow.
    """
    if isinstance(args, GuidanceArgs):
        raise ValueError(
            "For `GuidanceArgs`, this objective has no rule that gives the scale a "
            "meaning: set its `guidance`, if it has that field, or pass no scale."
        )


def data_direction(
    flow_map: AbstractFlowMap,
    path: diffrax.AbstractPath,
    t: Time,
    args: Args,
    guidance: Callable | None,
) -> State:
    r"""The rate $\dot I_t$ of the data, guided by the map's velocity if asked."""
    I_t = path.evaluate(t)
    dI_t = check_like(path.derivative(t), I_t, "`path.derivative`")
    if guidance is None:
        return dI_t
    _check_rule(guidance, MeanFlowGuidance, ClassifierFreeGuidance)
    # The guided rate depends on the map, but it is a target and is held fixed.
    guided = guidance(flow_map.velocity, dI_t, t, I_t, args)
    return freeze(check_like(guided, I_t, "`guidance`"))
