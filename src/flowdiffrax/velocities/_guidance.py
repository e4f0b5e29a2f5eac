"""Guidance: samples that follow a condition more closely than the data do.

A guidance rule is a callable `guidance(velocity, t, x, args) -> v` that evaluates a
velocity more than once and extrapolates. It turns a velocity into a guided teacher
([`flowdiffrax.velocities.GuidedVelocity`][]), or guides a map during sampling
([`flowdiffrax.velocities.GuidedFlowMap`][]). A map distilled from a guided teacher no
longer needs a rule, and takes one evaluation.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree

from .._check import check_scalar
from .._time import times_like
from .._tree import add_scaled, scale, subtract
from .._types import Args, GuidanceArgs, Scalar, State, Time, VectorField
from ._null import null_like

GuidanceRule: TypeAlias = Callable[[VectorField, Time, State, Args], State]


def as_jax(tree: PyTree) -> PyTree:
    # Equinox treats NumPy arrays as constants, which `jit` would compile in.
    cast = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    return jtu.tree_map(cast, tree)


class ClassifierFreeGuidance(eqx.Module):
    r"""A rule that extrapolates from the unconditional to the conditional velocity.

    $q_t(x) = b_t(x; \varnothing) + a\,(b_t(x; c) - b_t(x; \varnothing))$ with the scale
    $a$. Scale 0 ignores the condition, scale 1 gives the conditional velocity, and larger
    scales exaggerate the condition. Outside the interval of times,
    $q_t(x) = b_t(x; c)$.

    Every call evaluates the velocity twice, even outside the interval.

    With `scale=None` the scale is read from `args`, which must be
    [`flowdiffrax.velocities.GuidanceArgs`][]. The velocity then takes `GuidanceArgs` too,
    and both evaluations use scale 1: the rule guides the unguided network. The network
    can learn its values at other scales from this rule.

    **Arguments:**

    - `null`: the condition $\varnothing$ that means "unconditional", in the form of one
      example's condition.
    - `scale`: the scale $a$, a number or a scalar array. `None` reads it from `args`.
    - `interval`: the times `(low, high)` at which to guide, both included. For an ODE
      outside [0, 1], give its times.

    **Raises:** `ValueError` if `interval` has `low > high`. When called, `ValueError` or
    `TypeError` if `null` is not like the condition, the scale is not a scalar, or
    `args` lacks the scale that is read from it.

    ??? cite "Reference"

        [arXiv:2207.12598](https://arxiv.org/abs/2207.12598), equation (6), whose $w$ is
        $a - 1$; the interval from [arXiv:2404.07724](https://arxiv.org/abs/2404.07724);
        the scale as an input as in
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), appendix F.5.
    """

    null: PyTree = eqx.field(converter=as_jax)
    scale: ArrayLike | None = eqx.field(converter=as_jax, default=None)
    interval: tuple[ArrayLike, ArrayLike] = (0.0, 1.0)

    def __check_init__(self):
        _check_interval(self.interval)

    def __call__(
        self, velocity: VectorField, t: Time, x: State, args: Args = None
    ) -> State:
        condition, factor = split_args(args, self.scale, "ClassifierFreeGuidance")
        null = null_like(self.null, condition)
        if self.scale is None:
            condition, null = at_scale_one(condition, args), at_scale_one(null, args)
        v_c, v_null = velocity(t, x, condition), velocity(t, x, null)
        # Start from `v_c`, so that scale 1 and times outside the interval are exact.
        excess = as_scalar(factor, "scale", x) - 1
        excess = jnp.where(_within(self.interval, t, x), excess, 0)
        return add_scaled(v_c, excess, subtract(v_c, v_null))


class MeanFlowGuidance(eqx.Module):
    r"""Guidance during training: the velocity that a MeanFlow objective learns from.

    The interpolant's rate $\dot I_t$ is replaced by
    $\omega \dot I_t + \kappa\,v_{t,t}(I_t; c) + (1 - \omega - \kappa)\,
    v_{t,t}(I_t; \varnothing)$, so that a single network learns the guided flow and needs
    one evaluation when sampled. This target contains the network's own velocity. Once
    the network has learnt it, the result is classifier-free guidance of the plain
    velocities at the scale $\omega / (1 - \kappa)$. Examples whose condition is `null`,
    and examples outside the interval, learn from $\dot I_t$ itself.

    Every call evaluates the velocity twice. It stops no gradients: the objective does
    that, usually for the whole target.

    With `kappa=None` the scale $a$ is read from `args`, which must be
    [`flowdiffrax.velocities.GuidanceArgs`][], and $\kappa = 1 - \omega / a$. The network
    takes `GuidanceArgs` too, and learns the guided flow for every scale that it is
    trained on. It is evaluated at that scale with the condition, and at scale 1 without
    it: there is nothing to guide then, and [`flowdiffrax.data.ConditionDropout`][] trains
    it there.

    **Arguments:**

    - `null`: the condition $\varnothing$ that means "unconditional", in the form of one
      example's condition.
    - `omega`: the factor $\omega$ of the data, a number or a scalar array.
    - `kappa`: the factor $\kappa$ of the network's own conditional velocity, below 1, a
      number or a scalar array. `None` reads the scale, which must be positive, from
      `args`.
    - `interval`: the times `(low, high)` at which to guide, both included.

    **Raises:** `ValueError` if a number `kappa` is not below 1, or if `interval` has
    `low > high`. When called, `ValueError` or `TypeError` if `null` is not like the
    condition, a factor is not a scalar, or `args` lacks the scale that is read from it.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447); with the scale as
        an input, and $\omega = 1$, improved MeanFlow,
        [arXiv:2512.02012](https://arxiv.org/abs/2512.02012). Their time is $1 - t$.
    """

    null: PyTree = eqx.field(converter=as_jax)
    omega: ArrayLike = eqx.field(converter=as_jax, default=1.0)
    kappa: ArrayLike | None = eqx.field(converter=as_jax, default=0.5)
    interval: tuple[ArrayLike, ArrayLike] = (0.0, 1.0)

    def __check_init__(self):
        _check_interval(self.interval)
        if isinstance(self.kappa, float | int) and self.kappa >= 1:
            raise ValueError(f"`kappa` must be below 1; got {self.kappa}.")

    @property
    def effective_scale(self) -> Any:
        r"""The scale $\omega / (1 - \kappa)$, or `None` if it comes from `args`."""
        return None if self.kappa is None else self.omega / (1 - self.kappa)

    def __call__(
        self, velocity: VectorField, dI: State, t: Time, x: State, args: Args = None
    ) -> State:
        """The velocity to learn from in place of `dI`.

        **Arguments:**

        - `velocity`: the network's own velocity `(t, x, args) -> v`, such as
          `flow_map.velocity`.
        - `dI`: the interpolant's rate at time `t` and state `x`.
        - `t`, `x`, `args`: the time, the state and the condition of one example.

        **Returns:** a state like `dI`.
        """
        omega = as_scalar(self.omega, "omega", x)
        condition, given = split_args(args, self.kappa, "MeanFlowGuidance", "kappa")
        null = null_like(self.null, condition)
        if self.kappa is None:
            kappa = 1 - omega / as_scalar(given, "scale", x)
            null_args = at_scale_one(null, args)
        else:
            kappa, null_args = as_scalar(given, "kappa", x), null
        guided = _within(self.interval, t, x) & ~_equal(condition, null)
        omega, kappa = jnp.where(guided, omega, 1), jnp.where(guided, kappa, 0)
        target = add_scaled(scale(omega, dI), kappa, velocity(t, x, args))
        return add_scaled(target, 1 - omega - kappa, velocity(t, x, null_args))


def split_args(
    args: Args, own: ArrayLike | None, owner: str, field: str = "scale"
) -> tuple[Args, ArrayLike]:
    """Returns the condition and the scale; the scale is `own`, or read from `args`."""
    if own is not None:
        return args, own
    if not isinstance(args, GuidanceArgs):
        raise TypeError(
            f"`{owner}` with `{field}=None` takes `args` that are "
            f"`GuidanceArgs(condition, scale)`; got {type(args).__name__}."
        )
    return args.condition, args.scale


def at_scale_one(condition: Args, args: GuidanceArgs) -> GuidanceArgs:
    # A number stays a number, and an array keeps its dtype, so the network does not
    # see a new type.
    one = jnp.ones_like(args.scale) if eqx.is_array(args.scale) else 1.0
    return GuidanceArgs(condition, one)


def as_scalar(factor: ArrayLike, name: str, x: State) -> Scalar:
    check_scalar(factor, name)
    (factor,) = times_like(x, factor)
    return factor


def _within(interval: tuple[ArrayLike, ArrayLike], t: Time, x: State) -> Bool[Array, ""]:
    t, low, high = times_like(x, t, *interval)
    # Evenly spaced times are rounded: 3 * 0.1 > 0.3. If a solver lost the guidance in
    # its last stage, it would reject the step.
    slack = 1e-6 * (high - low)
    return (t >= low - slack) & (t <= high + slack)


def _equal(condition: PyTree, null: PyTree) -> Bool[Array, ""]:
    equal = jnp.asarray(True)
    for pair in zip(jtu.tree_leaves(condition), jtu.tree_leaves(null), strict=True):
        equal = equal & jnp.all(pair[0] == pair[1])
    return equal


def _check_interval(interval: tuple[ArrayLike, ArrayLike]) -> None:
    low, high = interval
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"`interval` must have low <= high; got {interval}.")
