"""Inverses of jumps against known ones, and what is said about them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    RUN_TIME_ERROR,
    assert_close,
    finite_difference,
    gaussian_map,
    linear_map,
    mlp_map,
    without_type_checks,
)
from scipy.linalg import expm

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
MATRIX = np.asarray([[0.2, -1.1], [0.7, -0.4]])
SOLVERS = {
    "default": None,
    "fixed point": optx.FixedPointIteration(1e-11, 1e-11),
    "newton": optx.Newton(1e-11, 1e-11),
    "levenberg": optx.LevenbergMarquardt(1e-11, 1e-11),
}


_jitted = eqx.filter_jit(fd.likelihood.invert)


def invert(flow_map, s, t, *inputs, **options):
    """Compiled, once for all times and weights."""
    return _jitted(flow_map, jnp.asarray(s), jnp.asarray(t), *inputs, **options)


class Scale(eqx.Module):
    factor: jax.Array

    def __call__(self, s, t, x, args):
        return self.factor * x


def scaled(*factors):
    """The map x + (t - s) factor x, with two factors or one for both components."""
    return fd.FlowMap(Scale(jnp.broadcast_to(jnp.asarray(factors), (2,))))


# --- the inverse --------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("s, t", [(0.2, 0.6), (0.4, 0.2)])
def test_undoes_an_exact_map(name, s, t):
    there = gaussian_map()(s, t, X)
    made = invert(gaussian_map(), s, t, there, solver=SOLVERS[name])
    assert_close(made.x, X, 1e-8)
    assert made.success and made.error < 1e-8


def test_is_the_map_back():
    made = invert(linear_map(), 0.1, 1.4, X, solver=SOLVERS["newton"]).x
    assert_close(made, linear_map()(1.4, 0.1, X), 1e-8)


def test_fixed_point_and_newton_agree():
    flow_map, y = mlp_map(), jnp.asarray([1.3, 0.4])
    made = [
        invert(flow_map, 0.0, 0.9, y, X, solver=SOLVERS[name])
        for name in ("fixed point", "newton")
    ]
    assert_close(made[0].x, made[1].x, 1e-9)
    assert_close(flow_map(0.0, 0.9, made[0].x, X), y, 1e-9)
    # Newton's steps are fewer, the contraction is one of the map.
    assert made[1].num_steps < made[0].num_steps
    assert_close(made[0].contraction, made[1].contraction, 1e-8)


def test_error_is_the_round_trip():
    # Two steps of an iteration that halves the error: 1, 1/2, 1/4 of the first one.
    solver = optx.FixedPointIteration(1e-11, 1e-11)
    made = invert(scaled(-0.5), 0.0, 1.0, X, solver=solver, max_steps=2, throw=False)
    # x = y + y/2 + y/4, of which the map makes a half.
    assert_close(made.x, 1.75 * X)
    np.testing.assert_allclose(made.error, 0.8 * (1 - 0.875), rtol=1e-12)


def test_no_jump():
    made = invert(scaled(0.7), 0.4, 0.4, X, solver=SOLVERS["newton"])
    assert_close(made.x, X)
    assert made.contraction == 0 and made.success


def test_guess_saves_steps():
    y, solver = jnp.asarray([1.3, 0.4]), SOLVERS["newton"]
    plain = invert(mlp_map(), 0.0, 1.0, y, X, solver=solver)
    again = invert(mlp_map(), 0.0, 1.0, y, X, solver=solver, guess=plain.x)
    assert again.num_steps < plain.num_steps
    assert_close(plain.x, again.x, 1e-10)


# --- when it exists -----------------------------------------------------------------


@pytest.mark.parametrize("h", [0.3, -0.3, 1.5])
def test_contraction_of_a_linear_map(h):
    made = invert(linear_map(), 0.5, 0.5 + h, X, solver=SOLVERS["newton"])
    expected = np.linalg.norm(expm(h * MATRIX) - np.eye(2), ord=2)
    np.testing.assert_allclose(made.contraction, expected, rtol=1e-6)


def test_contraction_is_an_estimate_from_below():
    # Two singular values that are hard to tell apart.
    flow_map, solver = scaled(0.5, 0.49), SOLVERS["fixed point"]
    made = [
        invert(flow_map, 0.0, 1.0, X, solver=solver, num_iterations=number).contraction
        for number in (1, 5, 40)
    ]
    assert 0.49 < made[0] < made[1] < made[2] <= 0.5
    np.testing.assert_allclose(made[2], 0.5, rtol=1e-2)


def iterate(factor):
    """By many fixed-point iterations, whether or not they converge."""
    options = {"solver": optx.FixedPointIteration(1e-8, 1e-8), "throw": False}
    return invert(scaled(factor), 0.0, 1.0, X, max_steps=400, **options)


@pytest.mark.parametrize("factor", [0.9, -0.9])
def test_iteration_converges_below_one(factor):
    made = iterate(factor)
    assert made.success
    assert_close(made.x, X / (1 + factor), 1e-6)
    np.testing.assert_allclose(made.contraction, 0.9, rtol=1e-10)


@pytest.mark.parametrize("factor", [1.1, -2.1])
def test_divergence_is_flagged_above_one(factor):
    made = iterate(factor)
    assert not made.success and made.error > 1
    np.testing.assert_allclose(made.contraction, abs(factor), rtol=1e-6)
    # The map is invertible all the same, and Newton's method finds it.
    made = invert(scaled(factor), 0.0, 1.0, X, solver=SOLVERS["newton"])
    assert_close(made.x, X / (1 + factor), 1e-8)


def test_divergence_raises():
    solver = optx.FixedPointIteration(1e-8, 1e-8)
    with pytest.raises(RUN_TIME_ERROR, match="maximum number of steps"):
        fd.likelihood.invert(scaled(1.1), 0, 1, X, solver=solver).x.block_until_ready()


# --- gradients ----------------------------------------------------------------------


class Net(eqx.Module):
    weight: jax.Array

    def __call__(self, s, t, x, args):
        return self.weight * jnp.sin(x[::-1] + s - args * t)


INPUTS = (jnp.asarray(0.4), X, jnp.asarray(0.6), jnp.asarray(0.1), jnp.asarray(0.8))


def inverse_of(inputs, solver=None):
    weight, y, args, s, t = inputs
    return fd.likelihood.invert(fd.FlowMap(Net(weight)), s, t, y, args, solver=solver).x


@pytest.mark.parametrize("name", ["default", "fixed point"])
def test_gradients(name):
    value = functools.partial(inverse_of, solver=SOLVERS[name])
    direction = (
        jnp.asarray(0.3),
        jnp.asarray([1.0, -0.4]),
        jnp.asarray(-0.7),
        jnp.asarray(0.2),
        jnp.asarray(0.5),
    )
    # One program for both, value and derivative.
    jvp = jax.jit(lambda x: jax.jvp(value, (x,), (direction,)))
    expected = finite_difference(lambda x: jvp(x)[0], INPUTS, direction)
    assert_close(jvp(INPUTS)[1], expected, 1e-7, 1e-7)
    gradient = jax.grad(lambda x: value(x) @ jnp.asarray([1.0, -2.0]))
    gradient = jax.jit(gradient)(INPUTS)
    total = sum(
        jnp.sum(g * d) for g, d in zip(jtu.tree_leaves(gradient), direction, strict=True)
    )
    assert_close(total, expected @ jnp.asarray([1.0, -2.0]), 1e-7, 1e-7)


def test_gradient_through_the_round_trip_is_the_identity():
    def again(y):
        inverse = fd.likelihood.invert(mlp_map(), 0.1, 0.9, y, solver=SOLVERS["newton"])
        return mlp_map()(0.1, 0.9, inverse.x)

    assert_close(jax.jit(jax.jacrev(again))(X), jnp.eye(2), 1e-8)


# --- states -------------------------------------------------------------------------


def test_vmap_of_several_inverses():
    s, t = jnp.asarray([0.1, 0.9, 0.4]), jnp.asarray([0.8, 0.3, 0.4])
    x = jr.normal(jr.key(0), (3, 2))
    y = jax.vmap(gaussian_map())(s, t, x)
    solver = SOLVERS["newton"]
    fn = lambda s, t, y: fd.likelihood.invert(gaussian_map(), s, t, y, solver=solver)
    made = jax.jit(jax.vmap(fn))(s, t, y)
    assert_close(made.x, x, 1e-8)
    assert made.success.all() and made.contraction.shape == (3,)
    alone = invert(gaussian_map(), s[1], t[1], y[1], solver=solver)
    assert_close(made.contraction[1], alone.contraction, 1e-8)


def test_one_failure_in_a_batch():
    # x + x^2 is never -1.
    flow_map = fd.FlowMap(lambda s, t, x, args: x**2)
    fn = lambda y: fd.likelihood.invert(flow_map, 0, 1, y, throw=False)
    made = jax.jit(jax.vmap(fn))(jnp.asarray([[2.0], [-1.0]]))
    assert made.success.tolist() == [True, False]
    np.testing.assert_allclose(made.x[0], 1.0, rtol=1e-8)
    assert made.error[1] > 0.5


@pytest.mark.parametrize("name", ["default", "fixed point"])
def test_pytree(name):
    def net(s, t, x, args):
        return {"q": 0.3 * x["p"].sum() + 0.2 * x["q"], "p": -0.4 * x["p"]}

    x = {"q": jnp.asarray([0.3, 0.1]), "p": jnp.asarray([[0.2], [0.7]])}
    flow_map = fd.FlowMap(net)
    y = flow_map(0.0, 0.9, x)
    assert_close(invert(flow_map, 0.0, 0.9, y, solver=SOLVERS[name]).x, x, 1e-8)


@pytest.mark.parametrize(
    "solver, dtype, tol",
    [
        (None, jnp.float32, 1e-4),
        (None, jnp.bfloat16, 0.1),
        (optx.FixedPointIteration(1e-2, 1e-2), jnp.float16, 0.1),
    ],
)
def test_low_precision(solver, dtype, tol):
    made = invert(gaussian_map(), 0.0, 0.5, X.astype(dtype), solver=solver)
    assert made.x.dtype == dtype
    assert made.error.dtype == made.contraction.dtype == jnp.float32
    expected = gaussian_map()(0.5, 0.0, X)
    np.testing.assert_allclose(made.x.astype(float), expected, atol=tol)


def test_python_number():
    flow_map = fd.FlowMap(lambda s, t, x, args: 0.5 * x)
    made = fd.likelihood.invert(flow_map, 0.0, 1.0, 3.0, solver=SOLVERS["newton"])
    np.testing.assert_allclose(made.x, 2.0, rtol=1e-8)


# --- errors -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 1001])
def test_large_states_have_no_jacobian(size):
    jump = lambda s, t, x, args: x + (t - s) * jnp.sin(x + jnp.roll(x, 1))
    x = jr.normal(jr.key(0), (size,))
    solve = lambda y: fd.likelihood.invert(jump, 0.0, 0.3, y).x
    y = jump(0.0, 0.3, x, None)
    assert (f"[{size},{size}]" in str(jax.make_jaxpr(solve)(y))) == (size == 1000)
    if size > 1000:
        assert_close(jax.jit(solve)(y), x, 1e-7)


# --- refusals ---------------------------------------------------------------------------


def half(x, flow_map=gaussian_map(), **settings):
    return fd.likelihood.invert(flow_map, 0.0, 0.5, x, **settings)


REFUSALS = {
    "name of a solver": (
        lambda: half(X, solver="newton"),
        TypeError,
        "Optimistix.*solver; got str",
    ),
    "minimiser": (
        lambda: half(X, solver=optx.BFGS(1e-3, 1e-3)),
        TypeError,
        "Optimistix.*solver; got BFGS",
    ),
    "complex state": (lambda: half(jnp.zeros(2, complex)), TypeError, "floating-point"),
    "state of integers": (lambda: half(jnp.zeros(2, int)), TypeError, "floating-point"),
    "guess of another shape": (
        lambda: half(X, guess=X[:1]),
        ValueError,
        "`guess`.*shape",
    ),
    "guess of another dtype": (
        lambda: half(X, guess=X.astype(jnp.float32)),
        TypeError,
        "`guess`.*float64; got float32",
    ),
    "map to another shape": (
        lambda: half(X, lambda s, t, x, args: jnp.append(x, 0.0)),
        ValueError,
        "`flow_map` must return the shape",
    ),
    "map to another dtype": (
        lambda: half(X.astype(jnp.float32), lambda s, t, x, args: x.astype(float)),
        TypeError,
        "`flow_map` must return the dtype",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, error, match = REFUSALS[name]
    with without_type_checks(), pytest.raises(error, match=match):
        make()
