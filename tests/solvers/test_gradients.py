"""Derivatives through solves: hand-unrolled loops and finite differences agree."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    jump_solve,
    mlp_map,
    unroll,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
ARGS = jnp.asarray([0.3, 0.7])
WEIGHTS = jnp.asarray([1.3, -0.8])
SPANS = [(0.1, 0.9), (0.85, 0.2)]
STEPS = 2
FRACTIONS = (0.3, 0.8)


def arrays_of(tree):
    return eqx.partition(tree, eqx.is_inexact_array)


def point(t0, t1):
    """Everything there is to differentiate in, and what is left of the map."""
    params, static = arrays_of(mlp_map())
    return (params, X, ARGS, jnp.asarray(t0), jnp.asarray(t1)), static


def direction_like(tree):
    leaves, structure = jtu.tree_flatten(tree)
    keys = jr.split(jr.key(7), len(leaves))
    moves = [
        jr.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jtu.tree_unflatten(structure, moves)


def dot(a, b):
    products = jtu.tree_map(lambda a, b: jnp.sum(a * b), a, b)
    return jtu.tree_reduce(jnp.add, products)


def end_point(static, inputs, **kwargs):
    params, x, args, t0, t1 = inputs
    flow_map = eqx.combine(params, static)
    sol = jump_solve(flow_map, t0, t1, x, args, steps=STEPS, max_steps=STEPS, **kwargs)
    return WEIGHTS @ sol.ys[0]


def saved_points(static, inputs, **kwargs):
    params, x, args, t0, t1 = inputs
    flow_map = eqx.combine(params, static)
    saveat = diffrax.SaveAt(ts=t0 + jnp.asarray(FRACTIONS) * (t1 - t0))
    sol = jump_solve(
        flow_map, t0, t1, x, args, steps=STEPS, max_steps=STEPS, saveat=saveat, **kwargs
    )
    return jnp.sum(sol.ys @ WEIGHTS)


def dense_points(static, inputs, **kwargs):
    params, x, args, t0, t1 = inputs
    flow_map = eqx.combine(params, static)
    sol = jump_solve(
        flow_map,
        t0,
        t1,
        x,
        args,
        steps=STEPS,
        max_steps=STEPS,
        solver=fd.FlowMapSolver(flow_map, dense_degree=24),
        saveat=diffrax.SaveAt(dense=True),
        **kwargs,
    )
    ys = jnp.stack([sol.evaluate(t0 + f * (t1 - t0)) for f in FRACTIONS])
    return jnp.sum(ys @ WEIGHTS)


def unrolled_end(static, inputs):
    params, x, args, t0, t1 = inputs
    grid = [t0 + k / STEPS * (t1 - t0) for k in range(STEPS + 1)]
    return WEIGHTS @ unroll(eqx.combine(params, static), grid, x, args)


def unrolled_points(static, inputs):
    params, x, args, t0, t1 = inputs
    flow_map = eqx.combine(params, static)
    total = 0.0
    for fraction in FRACTIONS:
        done = [k / STEPS for k in range(STEPS) if k / STEPS < fraction]
        grid = [t0 + f * (t1 - t0) for f in [*done, fraction]]
        total = total + WEIGHTS @ unroll(flow_map, grid, x, args)
    return total


REVERSE = {
    "recursive": diffrax.RecursiveCheckpointAdjoint(),
    "one checkpoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=1),
    "direct": diffrax.DirectAdjoint(),
}
FORWARD = {"forward": diffrax.ForwardMode(), "direct": diffrax.DirectAdjoint()}
OUTPUTS = {
    "end": (end_point, unrolled_end),
    "ts": (saved_points, unrolled_points),
    "dense": (dense_points, unrolled_points),
}


@functools.cache
def compiled(output, adjoint):
    """The function, its gradient, and that of the loop: compiled once for all times."""
    static = point(0.1, 0.9)[1]
    solved, unrolled = OUTPUTS[output]
    fn = jax.jit(lambda inputs: solved(static, inputs, adjoint=REVERSE[adjoint]))
    looped = lambda inputs: unrolled(static, inputs)
    return fn, jax.jit(jax.grad(fn)), jax.jit(jax.grad(looped))


def check_reverse(output, adjoint, t0, t1):
    inputs, _ = point(t0, t1)
    fn, gradient, truth = compiled(output, adjoint)
    # The series of a jump is not quite the jump.
    tolerance = 1e-6 if output == "dense" else 1e-11
    assert_close(gradient(inputs), truth(inputs), tolerance, tolerance)
    direction = direction_like(inputs)
    slope = finite_difference(fn, inputs, direction)
    assert_close(dot(gradient(inputs), direction), slope, 1e-7, 1e-7)


@pytest.mark.parametrize("t0, t1", SPANS)
def test_gradient_of_the_end(t0, t1):
    check_reverse("end", "recursive", t0, t1)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["one checkpoint", "direct"])
def test_gradient_by_other_adjoints(adjoint):
    check_reverse("end", adjoint, 0.85, 0.2)


@pytest.mark.parametrize("output, adjoint", [("ts", "recursive"), ("dense", "direct")])
@pytest.mark.slow
def test_gradient_of_points_between(output, adjoint):
    check_reverse(output, adjoint, 0.85, 0.2)


@pytest.mark.parametrize(
    "output, adjoint, t0, t1",
    [
        pytest.param("end", "forward", 0.1, 0.9, marks=pytest.mark.slow),
        ("ts", "forward", 0.85, 0.2),
        ("end", "direct", 0.85, 0.2),
    ],
)
@pytest.mark.slow
def test_forward_derivative(output, adjoint, t0, t1):
    solved, unrolled = OUTPUTS[output]
    inputs, static = point(t0, t1)
    direction = direction_like(inputs)
    fn = jax.jit(lambda inputs: solved(static, inputs, adjoint=FORWARD[adjoint]))
    derivative = lambda fn: jax.jit(lambda *a: jax.jvp(fn, (a[0],), (a[1],))[1])(
        inputs, direction
    )
    truth = derivative(lambda inputs: unrolled(static, inputs))
    assert_close(derivative(fn), truth, 1e-11, 1e-11)
    slope = finite_difference(fn, inputs, direction)
    assert_close(derivative(fn), slope, 1e-7, 1e-7)


@pytest.mark.slow
def test_gradient_along_a_grid():
    flow_map = mlp_map()

    def solved(x, ts):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(flow_map.velocity),
            fd.FlowMapSolver(flow_map),
            ts[0],
            ts[-1],
            None,
            x,
            stepsize_controller=diffrax.StepTo(ts),
            max_steps=STEPS,
        )
        return WEIGHTS @ sol.ys[0]

    ts = jnp.asarray([0.9, 0.7, 0.2])
    looped = lambda x, ts: WEIGHTS @ unroll(flow_map, ts, x)
    truth = jax.jit(jax.grad(looped, (0, 1)))(X, ts)
    gradient = jax.jit(jax.grad(solved, (0, 1)))(X, ts)
    assert_close(gradient, truth, 1e-11, 1e-11)


def test_gradient_under_vmap():
    inputs, static = point(0.1, 0.9)
    states, ends = jnp.stack([X, 2 * X]), jnp.asarray([0.9, 0.05])

    def gradients(fn):
        one = lambda x, t1: fn(static, (inputs[0], x, ARGS, inputs[3], t1))
        return jax.jit(jax.vmap(jax.grad(one, (0, 1))))(states, ends)

    assert_close(gradients(end_point), gradients(unrolled_end), 1e-11, 1e-11)


def test_gradient_of_an_event_time():
    t0, t1, x = 0.85, 0.2, jnp.asarray([-1.5, 0.7])
    exact = gaussian_map()
    level = exact(t0, t0 + 0.4 * (t1 - t0), x)[0]
    newton = optx.Newton(rtol=1e-12, atol=1e-12)
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] - level, newton)
    params, static = arrays_of(exact)

    def event_time(params, x):
        flow_map = eqx.combine(params, static)
        sol = jump_solve(flow_map, t0, t1, x, steps=1, max_steps=2, event=event)
        return sol.ts[0]

    gradient = jax.jit(jax.grad(event_time, (0, 1)))(params, x)
    # The implicit function theorem on the closed form.
    first = lambda params, x, t: eqx.combine(params, static)(t0, t, x)[0]
    *partials, speed = jax.grad(first, (0, 1, 2))(params, x, t0 + 0.4 * (t1 - t0))
    truth = jtu.tree_map(lambda partial: -partial / speed, tuple(partials))
    assert_close(gradient, truth, 1e-6, 1e-6)


def test_gradient_of_an_adaptive_solve_is_finite():
    # A defect of exactly zero has a norm without a gradient.
    shift = lambda s, t, x, args: x + (t - s) * args

    def solved(x, args):
        sol = jump_solve(
            shift,
            0.9,
            0.1,
            x,
            args,
            field=lambda t, x, args: args,
            steps=0.5,
            solver=fd.AdaptiveFlowMapSolver(shift),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        )
        return WEIGHTS @ sol.ys[0]

    gradient = jax.grad(solved, (0, 1))(X, ARGS)
    assert_close(gradient, (WEIGHTS, -0.8 * WEIGHTS))


# Adjoints with conditions


def test_unsuitable_modes_are_refused():
    inputs, static = point(0.1, 0.9)
    fn = lambda inputs, adjoint: end_point(static, inputs, adjoint=adjoint)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(
            lambda i: fn(i, diffrax.RecursiveCheckpointAdjoint()), (inputs,), (inputs,)
        )
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda i: fn(i, diffrax.ForwardMode()))(inputs)


def backsolve(adjoint, params, x):
    exact = eqx.combine(params, arrays_of(gaussian_map())[1])
    with jax.numpy_dtype_promotion("standard"):
        return WEIGHTS @ jump_solve(exact, 0.85, 0.2, x, adjoint=adjoint).ys[0]


def test_backsolve_by_the_map_is_refused():
    # The map knows nothing of the adjoint equation.
    params, _ = arrays_of(gaussian_map())
    adjoint = diffrax.BacksolveAdjoint()
    with pytest.raises(ValueError, match=r"AdjointTerm(.|\n)*expected:\ndiffrax.ODETerm"):
        jax.grad(lambda x: backsolve(adjoint, params, x))(X)


def test_backsolve_by_a_classical_solver():
    exact = gaussian_map()
    params, _ = arrays_of(exact)
    adjoint = diffrax.BacksolveAdjoint(
        solver=diffrax.Tsit5(),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
        max_steps=4096,
    )
    gradient = jax.grad(lambda x: backsolve(adjoint, params, x))(X)
    truth = jax.grad(lambda x: WEIGHTS @ exact(0.85, 0.2, x))(X)
    assert_close(gradient, truth, 1e-7, 1e-7)
    with pytest.raises(RuntimeError, match="`filter_custom_vjp` cannot be"):
        jax.grad(lambda params: backsolve(adjoint, params, X))(params)


def test_implicit_adjoint_differentiates_the_steady_state():
    # The steady state of x' = A x + c is -A^{-1} c, wherever one starts.
    matrix = jnp.asarray([[-1.2, -1.1], [0.7, -0.9]])

    def steady(offset, x, map_offset):
        flow_map = fd.exact.LinearFlowMap(matrix, map_offset)
        term = fd.exact.LinearFlowMap(matrix, offset).velocity
        with jax.numpy_dtype_promotion("standard"):
            sol = jump_solve(
                flow_map,
                0.0,
                60.0,
                x,
                field=term,
                steps=3,
                adjoint=diffrax.ImplicitAdjoint(),
            )
        return WEIGHTS @ sol.ys[0]

    offset = jnp.asarray([0.3, -0.1])
    gradient = jax.grad(steady, (0, 1, 2))(offset, X, offset)
    truth = -jnp.linalg.solve(matrix.T, WEIGHTS)
    assert_close(gradient, (truth, jnp.zeros(2), jnp.zeros(2)), 1e-8, 1e-8)
