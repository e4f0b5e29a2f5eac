r"""How far a jump is from the truth, computed without knowing the truth.

Each function takes a map $\hat X$, the vector field $b$ it should follow and a jump, and
speaks of its error $e = \hat X_{s,t}(x) - X_{s,t}(x)$. What is an identity or a bound is
so up to the quadrature: what a map does between two nodes, leaving no trace at them, is
seen by none.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._custom_types import Args, Scalar, State, Time, TwoTimeMap, VectorField
from ._flow_map import AbstractFlowMap, ODEFlowMap
from ._flow_map.wrappers import check_composable
from ._identities import end_and_residual, eulerian_residual
from ._leaves import ravel
from ._misc import add_scaled, check_callable, scale, squared_norm, subtract, times_like


def lagrangian_bound(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    growth: Callable[[Time, State, Args], Scalar] | float | None = None,
    num_nodes: int = 8,
) -> Scalar:
    r"""A bound of the error's length from residuals along the map's own path.

    With $r_u = \partial_u \hat X_{s,u}(x) - b_u(\hat X_{s,u}(x))$ and the rate $C_u$ at
    which small differences grow under the ODE,

    $$|e| \le \int_s^t \exp\Big(\int_u^t C_w\,dw\Big)\,|r_u|\,du,$$

    with equality in one dimension where $b$ is linear and $r_u$ keeps its sign. No true
    trajectory is needed. Lengths are Euclidean, over all entries.

    !!! info "Numerics"

        `num_nodes` forward-mode passes through the map and calls of the teacher, plus
        one forward-mode pass through the teacher for each entry of the state and each
        node, if `growth` is left out. The rate is then that of the path itself, so
        that for a nonlinear ODE the bound is one to first order in the error; for a
        rigorous one, give a number that bounds the rate wherever both can be. Either is
        up to the quadrature: a residual of short duration can slip between its nodes.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field it should follow.
    - `s`, `t`: start and end of the jump, in either order.
    - `x`: one state at time `s`; use `jax.vmap` for a batch.
    - `args`: passed on to both.
    - `growth`: $C_u$, a number or a function `(u, x, args)`, for the direction of time of
      the jump; `None` for [`flowdiffrax.logarithmic_norm`][] along the path.
    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Returns:** a scalar.

    **Raises:** `ValueError` for fewer nodes than one.

    ??? cite "Reference"

        Grönwall's inequality, as in flow map matching, proposition 3.7:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    s, t = times_like(x, s, t)
    direction = jnp.where(t < s, -1, 1).astype(t.dtype)
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)
    lengths = jax.vmap(lambda r: jnp.sqrt(squared_norm(r)))(residuals)
    if growth is None:
        field = lambda u, y, args: scale(direction, teacher(u, y, args))
        rate = lambda u, y: logarithmic_norm(field, u, y, args)
    elif callable(growth):
        rate = lambda u, y: jnp.asarray(growth(u, y, args), s.dtype)
    else:
        rate = lambda u, y: jnp.asarray(growth, s.dtype)
    rates = jax.vmap(rate)(us, path).astype(s.dtype)
    weights, to_end = radau(num_nodes)[1:3]
    exponents = jnp.asarray(to_end, s.dtype) @ rates
    h = jnp.abs(t - s)
    # No residual has no part, however fast it would grow.
    grown = jnp.where(lengths == 0, 0, jnp.exp(h * exponents) * lengths)
    return h * jnp.sum(jnp.asarray(weights, s.dtype) * grown)


def logarithmic_norm(
    vector_field: VectorField, t: Time, x: State, args: Args = None
) -> Scalar:
    r"""How fast two neighbouring solutions can move apart, $\lambda_{\max}$ of the
    symmetric part of $\nabla b_t(x)$.

    It is negative where all neighbours approach. It takes one forward-mode pass for each
    entry of the state, and the eigenvalues of a matrix of that size.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `t`, `x`, `args`: where.

    **Returns:** a scalar, in one over time.
    """
    (t,) = times_like(x, t)
    flat, unravel = ravel(x, "`logarithmic_norm`")
    field = lambda y: ravel(vector_field(t, unravel(y), args), "`logarithmic_norm`")[0]
    jacobian = jax.jacfwd(field)(flat)
    return jnp.linalg.eigvalsh((jacobian + jacobian.T) / 2)[-1]


def eulerian_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    exact: TwoTimeMap | None = None,
    num_nodes: int = 8,
) -> State:
    r"""The error itself, from residuals along the true trajectory.

    With $r_u(y) = \partial_u \hat X_{u,t}(y) + \nabla \hat X_{u,t}(y)\,b_u(y)$ and the
    true trajectory $x_u$, the identity $e = -\int_s^t r_u(x_u)\,du$ holds without
    constants or remainder: it says from which part of the way an error comes. Its mean
    square bounds the squared Wasserstein distance to the true density.

    !!! info "Numerics"

        `num_nodes` forward-mode passes through the map and calls of the teacher, and as
        many solves of the ODE. Its only error is that of the quadrature.

    **Arguments:** as for [`flowdiffrax.lagrangian_bound`][], and

    - `exact`: the true flow map; `None` for [`flowdiffrax.ODEFlowMap`][] of the teacher.

    **Returns:** a state like `x`.

    ??? cite "Reference"

        The pointwise form of flow map matching, proposition 3.8:
        [arXiv:2406.07507](https://arxiv.org/abs/2406.07507).
    """
    s, t = times_like(x, s, t)
    exact = ODEFlowMap(teacher) if exact is None else exact
    fractions, weights = radau(num_nodes)[:2]

    def residual(u):
        x_u = exact(s, u, x, args)
        return eulerian_residual(flow_map, teacher, u, t, x_u, args)

    residuals = jax.vmap(residual)(_between(s, t, fractions))
    return integral(scale(-1.0 * (t - s), residuals), weights)


def alekseev_groebner_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    num_nodes: int = 4,
) -> State:
    r"""A first-order estimate of the error, as a vector.

    The Alekseev-Gröbner formula carries each residual of the map's own path to the end,
    $e = \int_s^t \nabla X_{u,t}(\hat X_{s,u}(x))\,r_u\,du$. Here the map's own Jacobian
    stands for that of the unknown $X_{u,t}$, which leaves a relative error of the size of
    the residuals. Subtracted from the jump, it makes a better one:
    [`flowdiffrax.DefectCorrectedFlowMap`][].

    !!! info "Numerics"

        `2 * num_nodes` forward-mode passes through the map and `num_nodes` calls of the
        teacher. The jump itself comes out of it.

    **Arguments:** as for [`flowdiffrax.lagrangian_bound`][].

    **Returns:** a state like `x`.

    ??? cite "Reference"

        Hairer, Nørsett, Wanner: Solving Ordinary Differential Equations I, theorem
        I.14.5.
    """
    return end_and_error(flow_map, teacher, s, t, x, args, num_nodes)[1]


def end_and_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[State, State]:
    """The jump and its Alekseev-Gröbner estimate, which has the jump in it."""
    s, t = times_like(x, s, t)
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)

    def to_end(u, y, r):
        return jax.jvp(lambda y: flow_map(u, t, y, args), (y,), (r,))[1]

    weights = radau(num_nodes)[1]
    carried = integral(jax.vmap(to_end)(us, path, residuals), weights)
    return last(path), scale(t - s, carried)


def linearised_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args = None,
    *,
    num_nodes: int = 4,
) -> State:
    r"""A first-order estimate of the error as a vector, for stiff systems too.

    To first order the error follows $e' = \nabla b_u(\hat X_{s,u}(x))\,e + r_u$ from
    zero: the ODE carries its own residuals. Here that linear ODE is solved by collocation
    at the Radau nodes (a step of Radau IIA), so that directions in which all errors die
    out at once are damped as they should be. [`flowdiffrax.alekseev_groebner_error`][]
    asks the map for the same derivatives; this asks the ODE, and is right about maps
    whose own are wrong. Growth by much more than $e^3$ in one jump (for three nodes) is
    underestimated, as it is by implicit solvers.

    !!! info "Numerics"

        `num_nodes + 1` forward-mode passes through the map and calls of the teacher, a
        forward-mode pass through the teacher for each entry of the state and each
        node, and a linear solve for all of them at once: for states of few entries. The
        pass at the start shows a fast layer there, which the nodes would miss.

    **Arguments:** as for [`flowdiffrax.lagrangian_bound`][].

    **Returns:** a state like `x`.

    **Raises:** `TypeError` for a complex state, `ValueError` for fewer nodes than one.

    ??? cite "Reference"

        The method: Hairer, Wanner: Solving Ordinary Differential Equations II, section
        IV.5.
    """
    return last(path_and_errors(flow_map, teacher, s, t, x, args, num_nodes)[1])


def path_and_errors(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[State, State]:
    """The map's path at the Radau nodes, and what the linearised equation says of it."""
    s, t = times_like(x, s, t)
    _, unravel = ravel(x, "`linearised_error`")
    us, path, residuals = path_residuals(flow_map, teacher, s, t, x, args, num_nodes)
    flat = lambda y: ravel(y, "`linearised_error`")[0]
    field = lambda u, y: flat(teacher(u, unravel(y), args))
    r = jax.vmap(flat)(residuals)
    start = flat(start_error(flow_map, teacher, s, t, x, args, residuals, num_nodes))
    jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(us, jax.vmap(flat)(path))
    weights, to_end = radau(num_nodes)[1:3]
    # Weights from the start to each node, times the length of the jump.
    collocation = (t - s).astype(r.dtype) * jnp.asarray(weights - to_end, r.dtype)
    coupling = jnp.einsum("ij,jkl->ikjl", collocation, jacobians).reshape(r.size, r.size)
    identity = jnp.eye(r.size, dtype=r.dtype)
    forcing = start[None, :] + collocation @ r
    errors = _solve(identity - coupling, forcing.reshape(-1))
    return path, jax.vmap(unravel)(errors.reshape(r.shape))


def _solve(
    matrix: Float[Array, "size size"], right: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Gauss-Jordan elimination, with the largest entry of each column as its pivot.

    `jnp.linalg.solve` calls LAPACK, and of JAX 0.10 on a CPU with two cores, thousands of
    such calls at once in a loop, as in a batch of Diffrax's solves, never return.
    """
    rows = jnp.arange(right.size)

    def eliminate(k, table):
        column = table[:, k]
        pivot = jnp.argmax(jnp.where(rows < k, -1, jnp.abs(column)))
        new = table[pivot] / column[pivot]
        table = table.at[pivot].set(table[k])
        table = table - table[:, k, None] * new[None, :]
        return table.at[k].set(new)

    table = jnp.concatenate([matrix, right[:, None]], axis=1)
    return lax.fori_loop(0, right.size, eliminate, table)[:, -1]


class DefectCorrectedFlowMap(AbstractFlowMap):
    r"""A map less its own estimated error: better where the estimate is small already.

    $\hat X_{s,t}(x) - \hat e$ with $\hat e$ of [`flowdiffrax.alekseev_groebner_error`][]:
    one Newton step towards the solution of the ODE, whose error is quadratic in that of
    the map. It needs the teacher, at `num_nodes` calls a jump, and `2 * num_nodes`
    forward-mode passes through the map. Its velocity is the teacher.

    **Arguments:**

    - `flow_map`, `teacher`: the map and the vector field it should follow.
    - `num_nodes`: nodes of the Radau quadrature, at least 1.

    **Raises:** `TypeError` for a map or a teacher that is not callable, `ValueError` for
    fewer nodes than one.
    """

    flow_map: TwoTimeMap
    teacher: VectorField
    num_nodes: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        check_composable(self.flow_map)
        check_callable(self.teacher, "teacher", "teacher(t, x, args)")
        check_num_nodes(self.num_nodes)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        X_st, error = end_and_error(
            self.flow_map, self.teacher, s, t, x, args, self.num_nodes
        )
        return subtract(X_st, error)

    def velocity(self, t: Time, x: State, args: Args = None) -> State:
        (t,) = times_like(x, t)
        return self.teacher(t, x, args)


# Quadrature


def path_residuals(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    num_nodes: int,
) -> tuple[Array, State, State]:
    """Times, states and Lagrangian residuals of the map's path, at the Radau nodes.

    Every leaf has the nodes as its leading axis; the last node is the end of the jump.
    """
    us = _between(s, t, radau(num_nodes)[0])
    along = lambda u: end_and_residual(flow_map, teacher, s, u, x, args)
    path, residuals = jax.vmap(along)(us)
    return us, path, residuals


def start_error(
    flow_map: TwoTimeMap,
    teacher: VectorField,
    s: Time,
    t: Time,
    x: State,
    args: Args,
    residuals: State,
    num_nodes: int,
) -> State:
    """What the start adds to the error: the map's own at `s`, and that of a fast layer.

    Where the residual at `s` is not that of the polynomial through the nodes, the
    difference is taken to fade by the first of them.
    """
    X_ss, r_s = end_and_residual(flow_map, teacher, s, s, x, args)
    nodes, _, _, at_start = radau(num_nodes)
    layer = subtract(r_s, integral(residuals, at_start))
    return add_scaled(subtract(X_ss, x), (t - s) * float(nodes[0] / 2), layer)


def _between(s: Time, t: Time, fractions: np.ndarray) -> Float[Array, " nodes"]:
    share = jnp.asarray(fractions, jnp.result_type(t))
    # This way round the last node is `t` to the bit.
    return (1 - share) * s + share * t


def integral(values: State, weights: np.ndarray) -> State:
    """The weighted sum over the leading axis of every leaf."""
    total = lambda leaf: jnp.tensordot(jnp.asarray(weights, leaf.dtype), leaf, axes=1)
    return jtu.tree_map(total, values)


def last(values: State) -> State:
    """What belongs to the last node, the end of the jump."""
    return jtu.tree_map(lambda leaf: leaf[-1], values)


@functools.cache
def radau(num_nodes: int) -> tuple[np.ndarray, ...]:
    """Right Radau quadrature on [0, 1]: nodes, weights, weights from nodes to 1, and
    weights of the value at 0 of the polynomial through the nodes.

    The last node is 1, so that the end of a jump is one of them.
    """
    check_num_nodes(num_nodes)
    series = np.zeros(num_nodes + 1)
    series[-2:] = 1.0
    left = np.sort(np.real(np.polynomial.legendre.legroots(series)))
    nodes = np.sort(1 - left) / 2
    nodes[-1] = 1.0
    powers = np.arange(num_nodes)
    # Integrals of all polynomials of the degree that the nodes determine.
    values = nodes[:, None] ** powers
    whole = 1 / (powers + 1)
    to_end = (1 - nodes[:, None] ** (powers + 1)) / (powers + 1)
    rules = np.stack([whole, 0.0**powers, *to_end], axis=1)
    weights, at_start, *ends = np.linalg.solve(values.T, rules).T
    return nodes, weights, np.stack(ends), at_start


def check_num_nodes(num_nodes: int) -> None:
    """**Raises:** `ValueError` for what is no whole number of nodes, at least 1."""
    if not isinstance(num_nodes, int | np.integer) or num_nodes < 1:
        raise ValueError(f"`num_nodes` must be at least 1, and whole; got {num_nodes}.")
