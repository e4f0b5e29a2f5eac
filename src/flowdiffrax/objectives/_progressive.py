import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Key

from .._check import (
    check_between,
    check_bools,
    check_callable,
    check_count,
    check_positive,
)
from .._time import times_like
from .._tree import freeze, scale, subtract
from .._types import State
from ..flow_maps._composed import ComposedFlowMap
from ..identities import two_piece_target
from ..times._base import AbstractTimes
from ..times._grids import Dyadic
from ..times._mixtures import DiagonalMixture
from ..times._uniform import UniformTriangle
from ..weights._base import AbstractWeight, NoWeight
from ._base import (
    AbstractResidualObjective,
    StopGradient,
    check_stop_gradient,
    stop_gradient_field,
)
from ._teaching import check_unguided, data_residual, own_map


class ProgressiveFlowMapMatching(AbstractResidualObjective):
    r"""PFMM: one jump must equal `num_jumps` jumps of a frozen teacher map.

    The loss is
    $|X_{s,t}(I_s) - \bar X_{t_{K-1},t} \circ \dots \circ \bar X_{s,t_1}(I_s)|^2$, with
    the whole composition held fixed. No derivative of any map is taken.

    Train on $|t - s| \le \tau$ (`UniformTriangle(max_gap=...)`), with $\tau$ such that
    the teacher's jumps of length $\tau / K$ are accurate. Then use the student as the
    next teacher and increase $\tau$.

    The jumps have equal lengths in time. They change if time is reparametrised, and so
    does the gradient away from the exact map.

    **Arguments:**

    - `num_jumps`: the number $K$ of teacher jumps, at least 2. (The paper counts the
      $K + 1$ times instead.)
    - `times`: the distribution of times.
    - `weight`: maps the squared error to the loss. With
      [`flowdiffrax.weights.InverseGap`][] the loss compares velocities.

    The teacher is a map `(s, t, x, args) -> x_t`, for example the student of the previous
    stage or a [`flowdiffrax.ODEFlowMap`][]. `None` uses the trained map itself.

    **Raises:** `ValueError` if `num_jumps` is below 2.

    ??? cite "Reference"

        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507), section 3.3.
    """

    teacher_is_map = True

    num_jumps: int = eqx.field(static=True, default=2)
    times: AbstractTimes = UniformTriangle()
    weight: AbstractWeight = NoWeight()

    def __check_init__(self):
        check_count(self.num_jumps, 2, "num_jumps")

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        del key
        if teacher is not None:
            check_callable(teacher, "teacher", "teacher(s, t, x, args)")
        frozen = freeze(flow_map if teacher is None else teacher)
        I_s = path.evaluate(s)
        # The result is frozen too: a teacher that is a closure hides its arrays.
        target = freeze(ComposedFlowMap(frozen, self.num_jumps)(s, t, I_s, args))
        return subtract(flow_map(s, t, I_s, args), target)


class AbstractProgressiveSelfDistillation(AbstractResidualObjective):
    """Jumps in two pieces off the diagonal, and flow matching on it."""

    needs_diagonal = True
    # Objectives that leave a choice override these with fields.
    stop_gradient = StopGradient.TEACHER
    compare_states = False

    @abc.abstractmethod
    def share(self, key: Key[Array, ""] | None) -> ArrayLike:
        """The share of the jump that the first piece covers."""

    def limit(self, target: State) -> State:
        """Clips the target, if the method does so."""
        return target

    def residual(self, flow_map, teacher, path, s, t, args, key) -> State:
        # The target is made of jumps, to which no guidance rule applies.
        check_unguided(args)
        I_s = path.evaluate(s)
        is_frozen = self.stop_gradient is StopGradient.TEACHER
        own = own_map(flow_map, teacher)
        own = freeze(own) if is_frozen else own
        piece = lambda s, t, x: own.average_velocity(s, t, x, args)
        target = self.limit(two_piece_target(s, t, I_s, self.share(key), piece, piece))
        target = freeze(target) if is_frozen else target
        error = subtract(flow_map.average_velocity(s, t, I_s, args), target)
        if self.compare_states:
            s, t = times_like(I_s, s, t)
            error = scale(t - s, error)
        return error

    def diagonal_residual(self, flow_map, teacher, path, t, args, key) -> State:
        del teacher, key
        return data_residual(flow_map, path, t, args)


class ProgressiveSelfDistillation(AbstractProgressiveSelfDistillation):
    r"""PSD: flow matching, and one jump must equal two jumps.

    Off the diagonal, the loss is
    $|v_{s,t}(I_s) - \mathrm{sg}(a\,v_{s,u}(I_s) + (1 - a)\,v_{u,t}(X_{s,u}(I_s)))|^2$
    with $u = s + a (t - s)$. On the diagonal, it is flow matching, which learns the
    velocity from data. No derivative of the map is taken. The two pieces change if time
    is reparametrised, and so does the gradient away from the exact map.

    The paper defines the loss for states,
    $|X_{s,t}(I_s) - X_{u,t}(X_{s,u}(I_s))|^2$ (`compare_states=True` with
    `StopGradient.NONE`), which is $(t - s)^2$ times the one above, and trains with the
    loss above.

    **Arguments:**

    - `times`: the distribution of times, with a share on the diagonal.
    - `weight`: maps the squared error to the loss.
    - `stop_gradient`: what is held fixed, by default the two jumps, as a whole. With
      `StopGradient.NONE` gradients flow through all three jumps.
    - `split`: the first piece's share $a$, in (0, 1), or `None` to draw it uniformly
      for each example (PSD-U). One half is the midpoint (PSD-M).
    - `compare_states`: whether to compare states instead of average velocities. Short
      jumps then count little.

    The teacher is `None` to make the two jumps with the map itself, or a flow map to make
    them with, such as a moving average.

    **Raises:** `ValueError` for a split outside (0, 1), or for a `stop_gradient` other
    than `NONE` and `TEACHER`.

    ??? cite "Reference"

        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825).
    """

    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.75)
    weight: AbstractWeight = NoWeight()
    stop_gradient: StopGradient = stop_gradient_field(StopGradient.TEACHER)
    split: float | None = 0.5
    compare_states: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        # No derivative is taken, so there is none to hold fixed.
        check_stop_gradient(self.stop_gradient, StopGradient.NONE, StopGradient.TEACHER)
        check_between(self.split, 0, 1, "split", "()", or_none=True)
        check_bools(compare_states=self.compare_states)

    def share(self, key) -> ArrayLike:
        return self.split if self.split is not None else jr.uniform(key)  # pyright: ignore


def split_mean_flow(
    times: AbstractTimes = DiagonalMixture(UniformTriangle(), 0.5),
    weight: AbstractWeight = NoWeight(),
    split: float | None = None,
) -> ProgressiveSelfDistillation:
    """SplitMeanFlow: progressive self-distillation at a split that is drawn.

    It differs from [`flowdiffrax.objectives.ProgressiveSelfDistillation`][] in its
    default settings only, and returns one.

    **Arguments:**

    - `times`: the distribution of times, by default with half of the batch on the
      diagonal.
    - `weight`: maps the squared error of average velocities to the loss.
    - `split`: the first piece's share, or `None` to draw it for each example.

    ??? cite "Reference"

        [arXiv:2507.16884](https://arxiv.org/abs/2507.16884).
    """
    return ProgressiveSelfDistillation(times, weight, split=split)


class Shortcut(AbstractProgressiveSelfDistillation):
    r"""Shortcut models: progressive self-distillation at midpoints of dyadic jumps.

    Jumps are at most 1 long, and the finest pieces $2^{-7}$. Unlike in the paper, the
    velocity is learned on the diagonal rather than at the finest step. The pieces depend
    on how time is parametrised, as in progressive self-distillation.

    **Arguments:**

    - `times`: the distribution of times. By default dyadic jumps of at least two finest
      pieces, with half of the batch on the diagonal. The paper has seven eighths there,
      `DiagonalMixture(Dyadic(6), 7 / 8)`.
    - `weight`: maps the squared error of average velocities to the loss.
    - `clip`: the largest magnitude of an entry of the target, positive, in units of the
      data, or `None` for no limit. The paper clips at 4.0, for centred data with a spread
      of about 1. The paper clips each of the two velocities, this class their average.

    The teacher is a flow map, or `None` to make the two jumps with the map itself. The
    paper uses a moving average with a decay of 0.999 (`fit(..., teacher_decay=0.999)`).

    **Raises:** `ValueError` if `clip` is not positive.

    ??? cite "Reference"

        [arXiv:2410.12557](https://arxiv.org/abs/2410.12557), equation (5).
    """

    times: AbstractTimes = DiagonalMixture(Dyadic(6), 0.5)
    weight: AbstractWeight = NoWeight()
    clip: float | None = None

    def __check_init__(self):
        check_positive(self.clip, "clip", or_none=True)

    def share(self, key) -> ArrayLike:
        del key
        return 0.5

    def limit(self, target: State) -> State:
        clip = self.clip
        if clip is None:
            return target
        # Clips the average of the two velocities; the paper clips each of them.
        return jtu.tree_map(lambda v: jnp.clip(v, -clip, clip), target)
