r"""Errors along a jump, from values of the map and of the vector field at nodes.

Let $\hat X_k$ be the map's states at the right Radau nodes $c_1, \dots, c_K = 1$ of a
jump of length $h$ from $x$, and $A_{kj}$ the weights of integrals from the start to each
node. A solution has $X_k = x + h \sum_j A_{kj} b(X_j)$, up to the quadrature's error. A
map misses this by its Picard defect $d_k = \hat X_k - x - h \sum_j A_{kj} b(\hat X_j)$.
The time derivative of the map is not needed, so an error that oscillates in time is not
overestimated.

Nodes are shares of a jump by a `Clock`, and rates are derivatives in the share: the
vector field times the length of the jump, unless the clock is slower at the start.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._check import check_count, check_like
from .._time import times_like
from .._tree import scale, subtract
from .._types import Args, State, Time, TwoTimeMap, VectorField
from ..flow_maps._inverse import check_composable
from ._base import AbstractErrorEstimate
from ._clock import Clock
from ._quadrature import barycentric_weights, integral, last, radau, to_chebyshev

_GOLDEN = (5**0.5 - 1) / 2


class Nodes(NamedTuple):
    """A jump at its nodes.

    **Attributes:**

    - `start`, `start_rate`: the state at the start, and its rate.
    - `clock`: the times of shares of the jump.
    - `states`, `rates`: the states of the map, and their rates. Every leaf has the nodes
      as its leading axis.
    - `probe_share`, `probe_rate`: a place between the nodes, and the rate of the map's
      state there.
    """

    start: State
    start_rate: State
    clock: Clock
    states: State
    rates: State
    probe_share: Float[Array, ""]
    probe_rate: State

    @property
    def us(self) -> Float[Array, " nodes"]:
        """The times of the nodes."""
        return self.clock.times(radau(self.num_nodes).nodes)

    @property
    def num_nodes(self) -> int:
        return len(jtu.tree_leaves(self.states)[0])


def at_nodes(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
    grade: Float[Array, ""] | None = None,
) -> Nodes:
    """Evaluates the map and the vector field at the nodes."""
    check_composable(flow_map)
    s, t = times_like(x, s, t)
    clock = Clock(s, t, grade)
    share = probe_share(clock.start, clock.end)
    # All of the map's states by one batched call, and so all rates.
    shares = jnp.append(jnp.asarray(radau(num_nodes).nodes, share.dtype), share)
    jump = lambda u: check_like(flow_map(clock.start, u, x, args), x, "`flow_map`")
    states = jax.vmap(jump)(clock.times(shares))
    shares, all_states = jnp.append(shares, jnp.zeros_like(share)), append(states, x)
    rates = clock.rates(shares, all_states, teacher, args)
    return Nodes(
        start=x,
        start_rate=_row(rates, -1),
        clock=clock,
        states=_head(states, -1),
        rates=_head(rates, -2),
        probe_share=share,
        probe_rate=_row(rates, -2),
    )


def append(states: State, x: State) -> State:
    """Adds a state to those along the leading axis."""
    join = lambda ys, y: jnp.concatenate([ys, jnp.expand_dims(y, 0)])
    return jtu.tree_map(join, states, x)


def _head(tree: State, end: int) -> State:
    return jtu.tree_map(lambda leaf: leaf[:end], tree)


def _row(tree: State, index: int) -> State:
    return jtu.tree_map(lambda leaf: leaf[index], tree)


def probe_share(s: Array, t: Array) -> Array:
    """Returns a share of a jump that is as good as random.

    Jumps of equal length that follow each other have different ones.
    """
    return jnp.mod(0.5 + _GOLDEN * s / jnp.where(t == s, 1, t - s), 1)


def at_states(nodes: Nodes, states: State, teacher: VectorField, args: Args) -> Nodes:
    """Returns the nodes with other states, and a probe on the polynomial through them."""
    y = at_probe(nodes, states)
    shares = jnp.asarray(radau(nodes.num_nodes).nodes, nodes.probe_share.dtype)
    shares = jnp.append(shares, nodes.probe_share)
    rates = nodes.clock.rates(shares, append(states, y), teacher, args)
    return nodes._replace(states=states, rates=_head(rates, -1), probe_rate=last(rates))


def at_probe(nodes: Nodes, states: State) -> State:
    """Returns the value at the probe of the polynomial through the start and states."""
    ends = np.concatenate([[0.0], radau(nodes.num_nodes).nodes])
    weights = at_share(ends, nodes.probe_share)

    def value(x, states):
        both = jnp.concatenate([jnp.expand_dims(x, 0), states])
        return jnp.tensordot(weights.astype(both.dtype), both, axes=1)

    return jtu.tree_map(value, nodes.start, states)


def tail(nodes: Nodes, states: State) -> State:
    """Returns the size of the last coefficients of the polynomial through states.

    Where the nodes resolve the states, they are as small as what is left out. States that
    vary faster than the nodes can tell are as good as random there, so that several of
    their coefficients are never small together.
    """
    # Without the column of the start, where the displacement is zero.
    rows = to_chebyshev(nodes.num_nodes)[-max(1, nodes.num_nodes // 6) :, 1:]

    def size(x, states):
        moved = states - jnp.expand_dims(x, 0)
        last = jnp.tensordot(jnp.asarray(rows, moved.dtype), moved, axes=1)
        return jnp.sum(jnp.abs(last), axis=0).astype(moved.dtype)

    return jtu.tree_map(size, nodes.start, states)


def total_size(first: State, second: State) -> State:
    """Returns the sum of the sizes of two errors, entry by entry."""
    size = lambda a, b: (jnp.abs(a) + jnp.abs(b)).astype(a.dtype)
    return jtu.tree_map(size, first, second)


def largest(values: State) -> State:
    """Returns the largest size of each entry along the leading axis of every leaf."""
    most = lambda leaf: jnp.max(jnp.abs(leaf), axis=0).astype(leaf.dtype)
    return jtu.tree_map(most, values)


def picard_defects(nodes: Nodes) -> State:
    """Returns the Picard defect at every node."""
    from_start = radau(nodes.num_nodes).from_start

    def defect(y, rates, x):
        matrix = jnp.asarray(from_start, rates.dtype)
        return y - jnp.expand_dims(x, 0) - jnp.tensordot(matrix, rates, axes=1)

    return jtu.tree_map(defect, nodes.states, nodes.rates, nodes.start)


class Miss(NamedTuple):
    """By how much the polynomial through the rates misses one of them.

    **Attributes:**

    - `rate`: the difference.
    - `reduced`: what it tells of the integral, which is less if it is small.
    - `width`: for which share of the jump its integral may be wrong by it: the interval
      between two nodes.
    - `node`: the node at the end of this interval.
    """

    rate: State
    reduced: State
    width: Array
    node: Array


def misses(nodes: Nodes) -> tuple[Miss, Miss]:
    """Returns the misses at the start and at the probe.

    They tell how well the nodes resolve the rates. Radau quadrature integrates smooth
    rates much better than its polynomial follows them, and the smaller a miss is beside
    the rates, the smoother they are: each is reduced by the root of its share of the
    largest rate. A pulse between two nodes is as large as the rates, and is not reduced.
    """
    rule = radau(nodes.num_nodes)
    share = nodes.probe_share
    ends = np.concatenate([[0.0], rule.nodes])
    index = jnp.sum(jnp.asarray(ends[:-1], share.dtype) <= share, dtype=jnp.int32) - 1
    widths = jnp.asarray(np.diff(ends), share.dtype)

    def miss(rate, weights, index):
        difference = subtract(rate, integral(nodes.rates, weights))
        reduced = jtu.tree_map(_reduced, difference, nodes.rates)
        return Miss(difference, reduced, widths[index], index)

    at_probe = at_share(rule.nodes, share)
    return (
        miss(nodes.start_rate, rule.at_start, jnp.zeros_like(index)),
        miss(nodes.probe_rate, at_probe, index),
    )


def _reduced(miss, rates):
    most = jnp.max(jnp.abs(rates), axis=0)
    share = jnp.abs(miss) / jnp.where(most == 0, 1, most)
    return miss * jnp.sqrt(jnp.minimum(share, 1)).astype(miss.dtype)


def quadrature_gap(nodes: Nodes) -> State:
    """Returns by how much the integral over the jump may be wrong."""
    return total_size(*(scale(miss.width, miss.reduced) for miss in misses(nodes)))


def at_share(nodes: np.ndarray, share: Array) -> Float[Array, " nodes"]:
    """Returns the weights for the value at `share` of the polynomial through nodes."""
    barycentric = jnp.asarray(barycentric_weights(nodes), share.dtype)
    away = share - jnp.asarray(nodes, share.dtype)
    is_node = away == 0
    parts = barycentric / jnp.where(is_node, 1, away)
    # On a node, its own value.
    parts = jnp.where(is_node.any(), is_node.astype(parts.dtype), parts)
    return parts / parts.sum()


class AbstractCollocationEstimate(AbstractErrorEstimate):
    """Base class of estimates from values at quadrature nodes along the jump.

    **Attributes:**

    - `num_nodes`: the number of nodes.
    """

    num_nodes: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_count(self.num_nodes, 1, "num_nodes")

    @property
    def order(self) -> int:
        return 1

    @abc.abstractmethod
    def errors(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State, State]:
        """Returns the jump, its estimated error, and how wrong the quadrature may be.

        All are like `x`. The error is an estimate of the jump less the exact solution.
        """

    def __call__(
        self,
        flow_map: TwoTimeMap,
        teacher: VectorField,
        s: Time,
        t: Time,
        x: State,
        args: Args = None,
    ) -> tuple[State, State]:
        end, error, gap = self.errors(flow_map, teacher, s, t, x, args)
        return end, total_size(error, gap)
