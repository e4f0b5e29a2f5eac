import equinox as eqx
from jaxtyping import ArrayLike

from .._check import check_callable
from .._tree import add_scaled, subtract
from .._types import Args, Scalar, State, Time, VectorField
from ..flow_maps._base import AbstractChordFlowMap, AbstractFlowMap
from ..flow_maps._inverse import check_composable
from ._guidance import GuidanceRule, as_jax, as_scalar, split_args


class GuidedVelocity(eqx.Module):
    """A velocity with a guidance rule: again a velocity, and so a teacher.

    **Arguments:**

    - `velocity`: a callable `(t, x, args) -> v`, for example a conditional network, or
      `flow_map.velocity`.
    - `guidance`: a rule `(velocity, t, x, args) -> v`, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][].

    **Raises:** `TypeError` if one of them cannot be called.
    """

    velocity: VectorField
    guidance: GuidanceRule

    def __check_init__(self):
        check_callable(self.velocity, "velocity", "velocity(t, x, args)")
        check_callable(self.guidance, "guidance", "guidance(velocity, t, x, args)")

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        return self.guidance(self.velocity, t, x, args)


class AutoguidedVelocity(eqx.Module):
    r"""A velocity guided by a worse version of itself: again a teacher.

    $a\,b^{\text{strong}}_t(x) + (1 - a)\,b^{\text{weak}}_t(x)$, away from the mistakes
    that the weak velocity makes more of. No condition is needed.

    **Arguments:**

    - `strong`, `weak`: callables `(t, x, args) -> v`. The weak one is smaller or less
      trained, and otherwise the same.
    - `scale`: the scale $a$, 1 for the strong velocity alone; it may be an array. `None`
      to read it from `args`, which are [`flowdiffrax.velocities.GuidanceArgs`][]: both
      velocities receive the condition alone.

    **Raises:** `TypeError` if one of them cannot be called. When it is called,
    `TypeError` for `args` without a scale that is read from them, and `ValueError` for a
    scale that is no scalar.

    ??? cite "Reference"

        [arXiv:2406.02507](https://arxiv.org/abs/2406.02507); as the teacher of a flow
        map, [arXiv:2506.14603](https://arxiv.org/abs/2506.14603).
    """

    strong: VectorField
    weak: VectorField
    scale: ArrayLike | None = eqx.field(converter=as_jax, default=None)

    def __check_init__(self):
        check_callable(self.strong, "strong", "strong(t, x, args)")
        check_callable(self.weak, "weak", "weak(t, x, args)")

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        condition, factor = split_args(args, self.scale, "AutoguidedVelocity")
        strong, weak = self.strong(t, x, condition), self.weak(t, x, condition)
        excess = as_scalar(factor, "scale", x) - 1
        return add_scaled(strong, excess, subtract(strong, weak))


class GuidedFlowMap(AbstractChordFlowMap):
    r"""A flow map guided as it is sampled: the rule on its average velocities.

    $X_{s,t}(x) = x + (t - s)\,q_{s,t}(x)$ with $q_{s,t}$ the rule's value for the average
    velocities $v_{s,t}(x; c)$, at the start time $s$. On the diagonal it is the guided
    velocity.

    It is not the flow map of the guided velocity, except where average velocities are
    affine in the condition: two maps are extrapolated that went different ways. In short
    jumps it comes close to that map. For long ones, distil a
    [`flowdiffrax.velocities.GuidedVelocity`][].

    **Arguments:**

    - `flow_map`: the conditional map.
    - `guidance`: a rule `(velocity, t, x, args) -> v`. One
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][] costs two average velocities a
      jump.

    **Raises:** `TypeError` for what is no flow map or no rule.
    """

    flow_map: AbstractFlowMap
    guidance: GuidanceRule

    def __check_init__(self):
        check_composable(self.flow_map)
        if not isinstance(self.flow_map, AbstractFlowMap):
            raise TypeError(
                "`flow_map` must be an `AbstractFlowMap`, whose average velocities are "
                f"guided; got {type(self.flow_map).__name__}. Make `FlowMap(net)` of a "
                "network, or subclass `AbstractFlowMap` and define `jump`."
            )
        check_callable(self.guidance, "guidance", "guidance(velocity, t, x, args)")

    @property
    def time_range(self):
        return self.flow_map.time_range

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """The guided velocity."""
        return self.guidance(self.flow_map.velocity, t, x, args)

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The guided average velocity."""
        chord = lambda s, x, args: self.flow_map.average_velocity(s, t, x, args)
        return self.guidance(chord, s, x, args)
