"""How objectives read velocities from data, from a teacher and from the map itself."""

from collections.abc import Callable
from typing import Any

import diffrax

from .._check import check_callable, check_like
from .._tree import freeze, subtract
from .._types import Args, GuidanceArgs, State, Time, VectorField
from ..flow_maps._base import AbstractFlowMap
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


def check_velocity(teacher: object) -> None:
    """**Raises:** `TypeError` if the teacher is not a velocity."""
    if isinstance(teacher, AbstractFlowMap):
        raise TypeError(
            "The teacher of this objective is a velocity `teacher(t, x, args)`; got "
            f"the flow map {type(teacher).__name__}. Pass its `.velocity`. (A moving "
            "average by `teacher_decay` is for self-distillation only.)"
        )
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
    if teacher is not None and not isinstance(teacher, AbstractFlowMap):
        raise TypeError(
            "Self-distillation learns from the map itself, `teacher=None`, or from a "
            f"flow map such as its moving average; got {type(teacher).__name__}. To "
            "learn from a velocity, use a distillation objective."
        )
    # The trained map is not frozen here: what is held fixed is the objective's choice.
    return flow_map if teacher is None else freeze(teacher)


def own_velocity(
    flow_map: AbstractFlowMap, teacher: Any, guidance: GuidanceRule | None
) -> VectorField:
    """The velocity that self-distillation follows, guided if there is a rule.

    **Raises:** `TypeError` if the teacher is neither `None` nor a flow map, or if the
    rule is for rates of the data. The velocity raises `ValueError` if it is called with
    a guidance scale but has no rule.
    """
    if isinstance(guidance, MeanFlowGuidance):
        raise TypeError(
            "Self-distillation is guided by a rule for velocities, such as "
            "`ClassifierFreeGuidance`; got `MeanFlowGuidance`, a rule for the rate of "
            "the data."
        )
    own = own_map(flow_map, teacher).velocity
    if guidance is not None:
        return GuidedVelocity(own, guidance)

    def velocity(t, x, args):
        check_unguided(args)
        return own(t, x, args)

    return velocity


def check_unguided(args: Args) -> None:
    """**Raises:** `ValueError` if `args` has a guidance scale.

    Data teach the diagonal at scale 1 only. At other scales, jumps need a rule to follow.
    """
    if isinstance(args, GuidanceArgs):
        raise ValueError(
            "The conditions have a guidance scale (`GuidanceArgs`), but this objective "
            "has no rule that gives it a meaning: set `guidance=ClassifierFreeGuidance"
            "(...)` if the objective has that field, or train without scales."
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
    if isinstance(guidance, ClassifierFreeGuidance):
        raise TypeError(
            "This objective is guided by a rule for the rate of the data, such as "
            "`MeanFlowGuidance`; got `ClassifierFreeGuidance`, a rule for velocities."
        )
    # The guided rate depends on the map, but it is a target and is held fixed.
    guided = guidance(flow_map.velocity, dI_t, t, I_t, args)
    return freeze(check_like(guided, I_t, "`guidance`"))
