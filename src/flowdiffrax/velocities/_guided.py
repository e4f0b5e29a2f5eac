import equinox as eqx
from jaxtyping import ArrayLike

from .._check import check_callable
from .._tree import add_scaled, subtract
from .._types import Args, Scalar, State, Time, VectorField
from ..flow_maps._autonomous import check_inner
from ..flow_maps._base import AbstractChordFlowMap, AbstractFlowMap
from ._guidance import GuidanceRule, as_jax, as_scalar, split_args


class GuidedVelocity(eqx.Module):
    """A velocity with a guidance rule applied, which can be used as a teacher.

    **Arguments:**

    - `velocity`: a callable `(t, x, args) -> v`, for example a conditional network, or
      `flow_map.velocity`.
    - `guidance`: a rule `(velocity, t, x, args) -> v`, such as
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][].

    **Raises:** `TypeError` if either is not callable.
    """

    velocity: VectorField
    guidance: GuidanceRule

    def __check_init__(self):
        check_callable(self.velocity, "velocity", "velocity(t, x, args)")
        check_callable(self.guidance, "guidance", "guidance(velocity, t, x, args)")

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        return self.guidance(self.velocity, t, x, args)


class AutoguidedVelocity(eqx.Module):
    r"""A velocity guided by a weaker version of itself, which can be used as a teacher.

    The velocity is $a\,b^{\text{strong}}_t(x) + (1 - a)\,b^{\text{weak}}_t(x)$, which
    moves away from mistakes that the weak velocity makes more often. No condition is
    needed.

    **Arguments:**

    - `strong`, `weak`: callables `(t, x, args) -> v`. The weak one should be smaller or
      less trained, and otherwise the same.
    - `scale`: the scale $a$, a number or a scalar array; 1 gives the strong velocity
      alone. `None` reads it from `args`, which must be
      [`flowdiffrax.velocities.GuidanceArgs`][]; both velocities then receive only the
      condition.

    **Raises:** `TypeError` if either velocity is not callable. When called, `TypeError`
    if `args` lacks the scale that is read from it, and `ValueError` if the scale is not a
    scalar.

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
    r"""A flow map guided during sampling: the rule is applied to average velocities.

    $X_{s,t}(x) = x + (t - s)\,q_{s,t}(x)$, where $q_{s,t}$ is the rule applied to the
    average velocities $v_{s,t}(x; c)$ at the start time $s$. On the diagonal it is the
    guided velocity.

    This is not the flow map of the guided velocity, unless average velocities are affine
    in the condition: it extrapolates two maps that followed different trajectories. For
    short jumps it is close to that map. For long ones, distil a
    [`flowdiffrax.velocities.GuidedVelocity`][].

    **Arguments:**

    - `flow_map`: the conditional map.
    - `guidance`: a rule `(velocity, t, x, args) -> v`.
      [`flowdiffrax.velocities.ClassifierFreeGuidance`][] costs two average velocities per
      jump.

    **Raises:** `TypeError` if `flow_map` is not a flow map, or `guidance` is not
    callable.
    """

    flow_map: AbstractFlowMap
    guidance: GuidanceRule

    def __check_init__(self):
        check_inner(self.flow_map)
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
