"""Error estimates without the truth, against the truth."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    assert_close,
    gaussian_map,
    linear_map,
    max_abs,
    mlp_map,
    nonlinear_field,
    tight_solve,
)

import flowdiffrax as fd
from flowdiffrax.estimates import _collocation, _quadrature

X = jnp.asarray([0.8, -0.5])
SPANS = [(0.1, 0.9), (0.85, 0.2)]


class Bent(fd.AbstractFlowMap):
    """An exact map with a smooth error of a given size, zero where the jump starts."""

    flow_map: fd.AbstractFlowMap
    size: float

    def jump(self, s, t, x, args):
        h = jnp.asarray(t) - jnp.asarray(s)
        bend = self.size * jnp.sin(3 * h) * jnp.cos(2 * x + s)
        return self.flow_map(s, t, x, args) + bend


class Logistic(fd.AbstractFlowMap):
    """Growth between -2 and 2, x' = (1 + t) (4 - x^2) / 4, in closed form."""

    def jump(self, s, t, x, args):
        gain = jnp.exp((t - s) + (t**2 - s**2) / 2)
        y = (x + 2) / 4
        return 4 * y * gain / (1 + y * (gain - 1)) - 2

    def tangent(self, t, x, args):
        return (1 + t) * (4 - x**2) / 4


EXACT = {"gaussian": gaussian_map(), "logistic": Logistic()}


def test_logistic_is_exact():
    for s, t in SPANS:
        end = tight_solve(EXACT["logistic"].velocity, s, t, X).ys[0]
        assert_close(EXACT["logistic"](s, t, X), end, 1e-11, 1e-11)


# The Lagrangian bound


@pytest.mark.parametrize("s, t", [(0.2, 1.7), (1.7, 0.2)])
@pytest.mark.parametrize("rate", [-1.3, 0.8])
def test_bound_is_the_error_for_a_line(s, t, rate):
    # In one dimension, linear, with a residual that keeps its sign.
    field = lambda u, x, args: rate * x
    flow_map = lambda s, t, x, args: x + 0.1 * (t - s)
    x = jnp.asarray(-0.7 * np.sign(rate) * np.sign(t - s))
    error = flow_map(s, t, x, None) - x * jnp.exp(rate * (t - s))
    bound = fd.estimates.lagrangian_bound(flow_map, field, s, t, x, num_nodes=12)
    assert bound == pytest.approx(abs(float(error)), rel=1e-10)


@pytest.mark.parametrize("s, t", SPANS)
@pytest.mark.parametrize("name", EXACT)
def test_bound_bounds(name, s, t):
    exact = EXACT[name]
    xs = jr.uniform(jr.key(0), (20, 2), minval=-0.8, maxval=0.8)
    # Along the path, to first order: the error is small. With a rate that holds
    # everywhere, for any map.
    for flow_map, growth in ((Bent(exact, 0.02), None), (lambda s, t, x, args: x, 5.0)):
        bound = lambda x, m=flow_map, growth=growth: fd.estimates.lagrangian_bound(
            m, exact.velocity, s, t, x, growth=growth
        )
        error = lambda x, m=flow_map: jnp.linalg.norm(m(s, t, x, None) - exact(s, t, x))
        assert np.all(jax.vmap(bound)(xs) >= jax.vmap(error)(xs))


def test_bound_takes_a_rate():
    # A constant residual under a constant rate has a closed form.
    flow_map, field = lambda s, t, x, args: x, lambda t, x, args: jnp.asarray([0.3, 0.4])
    for growth in (1.5, lambda t, x, args: 1.5 + 0 * t):
        bound = fd.estimates.lagrangian_bound(flow_map, field, 0.0, 2.0, X, growth=growth)
        assert bound == pytest.approx(0.5 * (np.exp(3.0) - 1) / 1.5, rel=1e-9)


def test_bound_of_no_residual_is_zero():
    field = lambda t, x, args: -x
    exact = lambda s, t, x, args: x * jnp.exp(s - t)
    assert fd.estimates.lagrangian_bound(exact, field, 0.0, 0.0, X, growth=1e6) == 0
    still, none = lambda s, t, x, args: x, lambda t, x, args: 0 * x
    assert fd.estimates.lagrangian_bound(still, none, 0.0, 2.0, X, growth=1e6) == 0


def test_logarithmic_norm_is_the_fastest_growth():
    # Over all directions, of the length of a small difference.
    t, step = 0.3, 1e-6
    norm = fd.estimates.logarithmic_norm(nonlinear_field, t, X)
    angles = jnp.linspace(0, np.pi, 2001)
    directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)

    def growth(d):
        ahead = nonlinear_field(t, X + step * d, None)
        behind = nonlinear_field(t, X - step * d, None)
        return d @ (ahead - behind) / (2 * step)

    assert norm == pytest.approx(float(jax.vmap(growth)(directions).max()), abs=1e-5)
    tree = lambda t, x, args: {"a": -2.0 * x["a"], "b": 0.5 * x["b"]}
    state = {"a": jnp.ones(()), "b": jnp.ones(3)}
    assert fd.estimates.logarithmic_norm(tree, 0.0, state) == pytest.approx(0.5)


# Identities for the error


@pytest.mark.parametrize("s, t", SPANS)
@pytest.mark.parametrize("name", EXACT)
def test_eulerian_identity(name, s, t):
    exact = EXACT[name]
    for flow_map in (mlp_map(), Bent(exact, 0.1)):
        error = flow_map(s, t, X) - exact(s, t, X)
        found = fd.estimates.eulerian_error(
            flow_map, exact.velocity, s, t, X, exact=exact, num_nodes=14
        )
        assert_close(found, error, 1e-7, 1e-7)


def test_eulerian_identity_solves_for_the_trajectory():
    error = mlp_map()(0.1, 0.9, X) - tight_solve(nonlinear_field, 0.1, 0.9, X).ys[0]
    found = fd.estimates.eulerian_error(
        mlp_map(), nonlinear_field, 0.1, 0.9, X, num_nodes=14
    )
    assert_close(found, error, 1e-7, 1e-7)


@pytest.mark.parametrize("s, t", SPANS)
def test_alekseev_groebner_is_exact_where_errors_do_not_bend(s, t):
    # A linear ODE, and a map whose Jacobian is the true one.
    exact = linear_map()
    shift = jnp.asarray([0.2, -0.1])
    flow_map = lambda s, t, x, args: exact(s, t, x) + jnp.sin(2 * (t - s)) * shift
    found = fd.estimates.AlekseevGroebner(12).errors(flow_map, exact.velocity, s, t, X)[1]
    assert_close(found, flow_map(s, t, X, None) - exact(s, t, X), 1e-10, 1e-10)


@pytest.mark.parametrize(
    "kind", [fd.estimates.AlekseevGroebner, fd.estimates.LinearisedError]
)
@pytest.mark.parametrize("s, t", SPANS)
def test_vector_estimates_are_of_second_order(s, t, kind):
    exact = EXACT["logistic"]
    sizes = np.asarray([0.02, 0.01, 0.005])
    misses = []
    for size in sizes:
        flow_map = Bent(exact, size)
        found = kind(12).errors(flow_map, exact.velocity, s, t, X)[1]
        misses.append(max_abs(found - (flow_map(s, t, X) - exact(s, t, X))))
    slope = np.polyfit(np.log(sizes), np.log(misses), 1)[0]
    assert slope == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("s, t", SPANS)
def test_linearised_error_is_exact_for_linear_odes(s, t):
    # Whatever the map.
    exact = linear_map()
    found = fd.estimates.LinearisedError(12).errors(mlp_map(), exact.velocity, s, t, X)[1]
    assert_close(found, mlp_map()(s, t, X) - exact(s, t, X), 1e-8, 1e-8)


@pytest.mark.parametrize("rate", [-1e1, -1e4, -1e8])
@pytest.mark.parametrize("s, t", [(0.0, 1.5), (0.3, -1.2)])
def test_linearised_error_of_a_stiff_system(s, t, rate):
    # Prothero and Robinson's equation, in the direction of time in which it is stiff.
    rate = rate * np.sign(t - s)
    field = lambda t, x, args: rate * (x - jnp.sin(t)) + jnp.cos(t)
    exact = lambda t: jnp.sin(t) + (X - jnp.sin(s)) * jnp.exp(rate * (t - s))
    flow_map = lambda s, t, x, args: exact(t) + 0.01 * jnp.sin(2 * (t - s))
    error = flow_map(s, t, X, None) - exact(t)
    _, found, gap = fd.estimates.LinearisedError().errors(flow_map, field, s, t, X)
    # A fast layer that the nodes do not resolve is part of the gap.
    assert_close(found, error, 0.1 * max_abs(error) + max_abs(gap))
    assert max_abs(gap) < 0.5 * max_abs(error)
    # What is for stiff systems must not go by the size of the residual.
    _, blind = fd.estimates.PicardDefect()(flow_map, field, s, t, X)
    assert max_abs(blind) > 0.1 * abs(rate) * max_abs(error)


@pytest.mark.parametrize("s, t", SPANS)
def test_corrected_map(s, t):
    exact = EXACT["logistic"]
    field, end = exact.velocity, exact(s, t, X)
    flow_map = Bent(exact, 0.02)
    corrected = fd.estimates.DefectCorrectedFlowMap(flow_map, field, num_nodes=8)
    assert max_abs(corrected(s, t, X) - end) < 0.1 * max_abs(flow_map(s, t, X) - end)
    assert_close(corrected(t, t, X), X)
    assert_close(corrected.velocity(t, X), field(t, X, None))
    # Its velocity is the derivative of its jump.
    step = 1e-5
    slope = (corrected(s, s + step, X) - corrected(s, s - step, X)) / (2 * step)
    assert_close(slope, field(s, X, None), 1e-7, 1e-7)


def test_corrected_map_steps_in_diffrax():
    exact = gaussian_map()
    flow_map = fd.estimates.DefectCorrectedFlowMap(Bent(exact, 0.02), exact.velocity)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(exact.velocity), fd.FlowMapSolver(flow_map), 0.9, 0.1, -0.4, X
    )
    assert_close(sol.ys[0], exact(0.9, 0.1, X), 2e-3, 2e-3)


@pytest.mark.parametrize("s, t", SPANS)
@pytest.mark.parametrize("frequency", [1.0, 30.0, 300.0])
def test_an_error_that_oscillates_is_not_overestimated(s, t, frequency):
    # The derivative in time of this error is `frequency` times as large.
    exact = EXACT["logistic"]
    wiggle = lambda h: 1e-4 * jnp.sin(frequency * h + 1) * (1 - jnp.exp(-5 * jnp.abs(h)))
    flow_map = lambda s, t, x, args: exact(s, t, x) + wiggle(t - s)
    inputs = flow_map, exact.velocity, s, t, X
    error = flow_map(s, t, X, None) - exact(s, t, X)
    for kind in (fd.estimates.AlekseevGroebner, fd.estimates.LinearisedError):
        assert_close(kind(12).errors(*inputs)[1], error, 3e-5, 0)
    assert max_abs(fd.estimates.PicardDefect(12)(*inputs)[1]) < 5e-4


@pytest.mark.parametrize(
    "kind",
    [
        fd.estimates.PicardDefect,
        fd.estimates.AlekseevGroebner,
        fd.estimates.LinearisedError,
    ],
)
@pytest.mark.parametrize("num_nodes", [3, 5, 8])
def test_too_few_nodes_are_noticed(kind, num_nodes):
    # An exact map, whose rates change too much between the nodes.
    field = lambda t, x, args: jnp.full_like(x, jnp.cos(9 * t))
    exact = lambda s, t, x, args: x + (jnp.sin(9 * t) - jnp.sin(9 * s)) / 9
    _, error, gap = kind(num_nodes).errors(exact, field, 0.0, 2.0, X)
    if kind is not fd.estimates.PicardDefect:
        assert max_abs(gap) > 0.5 * max_abs(error)
    # They are enough where the jump is short.
    _, _, less = kind(num_nodes).errors(exact, field, 0.0, 0.02, X)
    assert max_abs(less) < 1e-5 * max_abs(gap)


# As estimates of a solver


def nested(x):
    return {"a": x[..., 0], "b": (x[..., 1:],)}


def on_trees(flow_map, field):
    flat = lambda x: jnp.concatenate([x["a"][None], x["b"][0]])
    return (
        lambda s, t, x, args: nested(flow_map(s, t, flat(x), args)),
        lambda t, x, args: nested(field(t, flat(x), args)),
    )


@pytest.mark.parametrize(
    "estimate",
    [
        fd.estimates.PicardDefect(),
        fd.estimates.AlekseevGroebner(),
        fd.estimates.LinearisedError(),
        fd.estimates.LagrangianDefect(),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("s, t", SPANS)
def test_estimates(estimate, s, t):
    exact = gaussian_map()
    flow_map = Bent(exact, 0.02)
    end, error = estimate(flow_map, exact.velocity, s, t, X)
    assert_close(end, flow_map(s, t, X), 1e-15, 1e-15)
    true = jnp.linalg.norm(flow_map(s, t, X) - exact(s, t, X))
    assert 0.3 < jnp.linalg.norm(error) / true < 6
    # Nothing to estimate, no error but that of the quadrature.
    _, none = estimate(exact, exact.velocity, s, t, X)
    assert max_abs(none) < 1e-2 * true
    # Any state will do, and float32 stays float32.
    tree_map, tree_field = on_trees(flow_map, exact.velocity)
    tree_end, tree_error = estimate(tree_map, tree_field, s, t, nested(X))
    assert_close((tree_end, tree_error), (nested(end), nested(error)), 1e-13, 1e-13)
    single = fd.FlowMap(lambda s, t, x, args: -x)
    field = lambda t, x, args: -x
    x32 = X.astype(jnp.float32)
    assert all(leaf.dtype == x32.dtype for leaf in estimate(single, field, s, t, x32))


def test_numbers_of_nodes():
    # Few enough for another number to give another error.
    inputs = Bent(EXACT["logistic"], 0.3), EXACT["logistic"].velocity, 0.1, 0.9, X
    for kind in (
        fd.estimates.AlekseevGroebner,
        fd.estimates.LinearisedError,
        fd.estimates.PicardDefect,
    ):
        one, two = (kind(number)(*inputs)[1] for number in (1, 2))
        assert max_abs(one - two) > 1e-4
        if kind is fd.estimates.AlekseevGroebner:
            corrected = fd.estimates.DefectCorrectedFlowMap(*inputs[:2], num_nodes=2)
            end, error, _ = kind(2).errors(*inputs)
            assert_close(corrected(*inputs[2:]), end - error, 1e-14)


def test_residuals_within_a_jump_are_seen():
    # Right at the end of the jump, wrong on the way: x' = 1 - t from 0 to 1, stood still.
    still = lambda s, t, x, args: x
    field = lambda t, x, args: jnp.full_like(x, 1 - t)
    _, at_end = fd.estimates.LagrangianDefect()(still, field, 0.0, 1.0, X)
    _, on_the_way = fd.estimates.PicardDefect()(still, field, 0.0, 1.0, X)
    assert max_abs(at_end) == 0
    assert_close(on_the_way, jnp.full(2, 0.5))


def test_linearised_error_of_complex_states():
    with pytest.raises(TypeError, match="takes real arrays"):
        fd.estimates.LinearisedError()(
            EXACT["gaussian"], nonlinear_field, 0.0, 1.0, X.astype(complex)
        )


@pytest.mark.parametrize(
    "make",
    [
        fd.estimates.PicardDefect,
        fd.estimates.AlekseevGroebner,
        fd.estimates.LinearisedError,
    ],
)
def test_bad_number_of_nodes(make):
    with pytest.raises(ValueError, match="`num_nodes` must be at least 1; got 0"):
        make(0)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 6, 12, 24])
def test_radau_quadrature_has_its_degree(num_nodes):
    nodes, weights, from_start, at_start = _quadrature.radau(num_nodes)
    assert nodes[-1] == 1 and (np.diff(nodes) > 0).all() and nodes[0] > 0
    for degree in range(2 * num_nodes - 1):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), abs=1e-12)
    for degree in range(num_nodes):
        whole = nodes ** (degree + 1) / (degree + 1)
        np.testing.assert_allclose(from_start @ nodes**degree, whole, atol=1e-12)
        np.testing.assert_allclose(at_start @ (1 - nodes) ** degree, 1, atol=1e-9)
        rest = (1 - nodes ** (degree + 1)) / (degree + 1)
        to_end = _quadrature.radau(num_nodes).to_end
        np.testing.assert_allclose(to_end @ nodes**degree, rest, atol=1e-12)


@pytest.mark.parametrize("num_nodes, of_last", [(4, 1), (24, 4)])
def test_last_coefficients_of_a_jump(num_nodes, of_last):
    # Polynomials of Chebyshev in the share of the time, and less where a start is off.
    coefficients = jnp.arange(1.0, num_nodes + 2).at[0].set(0.3)
    shares = np.concatenate([[0.0], _quadrature.radau(num_nodes).nodes])
    values = np.polynomial.chebyshev.chebval(2 * shares - 1, np.asarray(coefficients))
    values = jnp.stack([values, -values], axis=1)
    nodes = _collocation.at_nodes(
        lambda s, t, x, args: x,
        lambda t, x, args: x,
        0.2,
        0.7,
        values[0],
        None,
        num_nodes,
    )
    found = _collocation.tail(nodes, values[1:])
    assert_close(found, jnp.full(2, sum(coefficients[-of_last:])), 1e-9)


def test_eulerian_error_asks_the_exact_map_that_is_given():
    asked = []

    def exact(s, t, x, args):
        asked.append(args)
        return EXACT["logistic"](s, t, x)

    fd.estimates.eulerian_error(
        Bent(EXACT["logistic"], 0.1), nonlinear_field, 0.1, 0.9, X, "a", exact=exact
    )
    assert asked and set(asked) == {"a"}
