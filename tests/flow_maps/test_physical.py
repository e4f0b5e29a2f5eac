"""Maps of physical systems: autonomous, hypersolvers, projected, of PyTree states."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    jump_solve,
    linear_map,
    max_abs,
    mlp_map,
    nonlinear_field,
    tight_solve,
    without_type_checks,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
PAIRS = [(0.15, 0.85), (0.9, 0.2)]


def zero_net(s, t, x, args):
    return jtu.tree_map(jnp.zeros_like, x)


def wavy_net(s, t, x, args):
    """A remainder of order one, of all that it sees."""
    args = 0.0 if args is None else args
    phase = s - 2 * t + args
    wave = lambda leaf: jnp.cos(3 * leaf + phase.astype(jnp.result_type(leaf)))
    return jtu.tree_map(wave, x)


class Field(eqx.Module):
    """`nonlinear_field` with a weight, and moved by `args`."""

    weight: jax.Array

    def __call__(self, t, x, args):
        moved = 0.0 if args is None else args * jnp.cos(3 * t)
        return nonlinear_field(t, x, None) * self.weight + moved


def pendulum(t, x, args):
    del t
    length = 1.0 if args is None else args
    return {"angle": x["rate"], "rate": -jnp.sin(x["angle"]) / length}


def pendulum_energy(x, args):
    length = 1.0 if args is None else args
    return 0.5 * x["rate"] ** 2 - jnp.cos(x["angle"]) / length


SWING = {"angle": jnp.asarray(1.1), "rate": jnp.asarray(-0.3)}

# --- hypersolvers -------------------------------------------------------------------

SOLVERS = {
    "euler": diffrax.Euler(),
    "heun": diffrax.Heun(),
    "midpoint": diffrax.Midpoint(),
    "ralston": diffrax.Ralston(),
    "bosh3": diffrax.Bosh3(),
    "tsit5": diffrax.Tsit5(),
    "dopri8": diffrax.Dopri8(),
}


def solver_step(solver, field, s, t, x, args=None):
    term = diffrax.ODETerm(field)
    carry = solver.init(term, s, t, x, args)
    return solver.step(term, s, t, x, args, carry, False)[0]


@pytest.mark.parametrize("s, t", PAIRS)
@pytest.mark.parametrize("name", SOLVERS)
def test_untrained_hypersolver_is_the_solver(name, s, t):
    solver, field = SOLVERS[name], Field(jnp.asarray(1.1))
    flow_map = fd.HypersolverFlowMap(field, zero_net, solver)
    s, t, args = jnp.asarray(s), jnp.asarray(t), jnp.asarray(0.4)
    expected = solver_step(solver, field, s, t, X, args)
    assert_close(flow_map(s, t, X, args), expected, 1e-13)


def test_default_solver_of_a_pytree():
    flow_map = fd.HypersolverFlowMap(pendulum, zero_net)
    expected = solver_step(diffrax.Heun(), pendulum, 0.7, 0.3, SWING, 1.2)
    assert_close(flow_map(0.7, 0.3, SWING, 1.2), expected, 1e-14)


@pytest.mark.parametrize(
    "t0, t1", [pytest.param(0.2, 1.4, marks=pytest.mark.slow), (1.4, 0.2)]
)
def test_untrained_hypersolver_in_a_solve(t0, t1):
    flow_map = fd.HypersolverFlowMap(nonlinear_field, zero_net)
    solve = lambda solver: (
        jump_solve(flow_map, t0, t1, X, field=nonlinear_field, solver=solver).ys
    )
    expected = solve(diffrax.Heun())
    assert_close(solve(fd.FlowMapSolver(flow_map)), expected, 1e-12)


def decay(t, x, args):
    return -(1 + 2 * t) * x


def decayed(s, t, x):
    """The solution of y' = -(1 + 2t) y."""
    return x * np.exp(-(t - s) - (t**2 - s**2))


@pytest.mark.parametrize("net", [zero_net, wavy_net])
@pytest.mark.parametrize("name, h", [("euler", 1e-3), ("heun", 0.01), ("bosh3", 0.02)])
@pytest.mark.parametrize("sign", [1, -1])
def test_local_order(name, h, net, sign):
    solver = SOLVERS[name]
    flow_map = fd.HypersolverFlowMap(decay, net, solver)
    steps = sign * np.asarray([h, h / 2])
    errors = [
        float(flow_map(0.6, 0.6 + h, 1.7)) - decayed(0.6, 0.6 + h, 1.7) for h in steps
    ]
    slope = np.log2(errors[0] / errors[1])
    order = solver.order(diffrax.ODETerm(decay))
    assert slope == pytest.approx(order + 1, abs=0.1)


def test_local_order_of_a_nonlinear_system():
    flow_map = fd.HypersolverFlowMap(nonlinear_field, zero_net, diffrax.Bosh3())
    error = lambda h: max_abs(
        flow_map(0.6, 0.6 + h, X) - tight_solve(nonlinear_field, 0.6, 0.6 + h, X).ys[0]
    )
    assert np.log2(error(0.05) / error(0.025)) == pytest.approx(4, abs=0.1)


def test_remainder_has_the_order_of_the_solver():
    # For y' = -y, Heun's average velocity is (-1 + h/2) y; exact is (exp(-h) - 1)/h y.
    def net(s, t, x, args):
        h = t - s
        return (jnp.expm1(-h) / h + 1 - h / 2) / h**2 * x

    flow_map = fd.HypersolverFlowMap(lambda t, x, args: -x, net)
    for s, t in PAIRS:
        assert_close(flow_map(s, t, X), np.exp(s - t) * X, 1e-14)


def test_hypersolver_velocity_is_the_field():
    flow_map = fd.HypersolverFlowMap(Field(jnp.asarray(1.1)), wavy_net)
    args = jnp.asarray(0.4)
    expected = Field(jnp.asarray(1.1))(0.3, X, args)
    assert_close(flow_map.velocity(0.3, X, args), expected, 0, 0)
    assert_close(flow_map.average_velocity(0.3, 0.3, X, args), expected, 1e-15)
    assert_close(flow_map(0.3, 0.3, X, args), X, 0, 0)


@pytest.mark.parametrize("s, t", [*PAIRS, (0.4, 0.4)])
def test_hypersolver_derivatives(s, t):
    flow_map = fd.HypersolverFlowMap(nonlinear_field, wavy_net, diffrax.Bosh3())
    inputs = (jnp.asarray(s), jnp.asarray(t), X)
    direction = (jnp.asarray(0.3), jnp.asarray(-0.7), jnp.asarray([0.2, 1.0]))
    value = jax.jit(lambda inputs: flow_map.average_velocity(*inputs))
    expected = finite_difference(value, inputs, direction)
    made = jax.jit(lambda p, d: jax.jvp(value, (p,), (d,))[1])(inputs, direction)
    assert_close(made, expected, 1e-8, 1e-8)
    gradient = jax.jit(jax.grad(lambda inputs: value(inputs)[0]))(inputs)
    assert_close(
        sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True)), made[0]
    )


def test_hypersolver_by_jit_and_vmap():
    flow_map = fd.HypersolverFlowMap(nonlinear_field, wavy_net)
    s, t = jnp.asarray([0.1, 0.9, 0.4]), jnp.asarray([0.8, 0.3, 0.4])
    x = jr.normal(jr.key(0), (3, 2))
    made = jax.jit(jax.vmap(flow_map))(s, t, x)
    for k in range(3):
        assert_close(made[k], flow_map(s[k], t[k], x[k]), 1e-13)


@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_hypersolver_in_low_precision(dtype, tol):
    field = lambda t, x, args: -x * x + t.astype(x.dtype)
    flow_map = fd.HypersolverFlowMap(field, zero_net, diffrax.Tsit5())
    made = flow_map(0.1, 0.9, X.astype(dtype))
    assert made.dtype == dtype
    np.testing.assert_allclose(made.astype(float), flow_map(0.1, 0.9, X), rtol=tol)


class Scaled(eqx.Module):
    weight: jax.Array

    def __call__(self, s, t, x, args):
        return self.weight * jnp.sin(x + s - t)


def test_trained_leaves_of_a_hypersolver():
    flow_map = fd.HypersolverFlowMap(Field(jnp.asarray(1.1)), Scaled(jnp.asarray(0.5)))
    loss = lambda flow_map: jnp.sum(flow_map(0.1, 0.9, X) ** 2)
    grads = eqx.filter_grad(loss)(flow_map)
    assert [float(leaf) != 0 for leaf in jtu.tree_leaves(grads)] == [True]


@pytest.mark.parametrize(
    "weight",
    [
        jnp.asarray([1.5, -0.0, jnp.inf]),
        jnp.asarray([1.5, 2.5], jnp.bfloat16),
        jnp.asarray([1.5 - 2.5j], jnp.complex64),
        np.asarray([0.25, -3.0]),
        jnp.asarray([3, 4]),
    ],
)
def test_frozen_arrays_keep_every_bit(weight):
    flow_map = fd.HypersolverFlowMap(Field(weight), zero_net)
    assert eqx.filter(flow_map, eqx.is_inexact_array) == eqx.filter(flow_map, False)
    kept = jax.jit(lambda flow_map: flow_map.vector_field.weight)(
        eqx.filter(flow_map, eqx.is_array)
    )
    assert kept.dtype == weight.dtype
    np.testing.assert_array_equal(np.asarray(kept), np.asarray(weight))


def test_checkpoint_of_a_hypersolver(tmp_path):
    make = lambda weight: fd.HypersolverFlowMap(Field(jnp.asarray(weight)), zero_net)
    fd.train.save(tmp_path / "map", {}, make(1.1))
    _, made = fd.train.load(tmp_path / "map", lambda config: make(0.0))
    assert_close(made.velocity(0.3, X), make(1.1).velocity(0.3, X), 0, 0)


# --- autonomous systems -------------------------------------------------------------


@pytest.mark.parametrize("s, t", [*PAIRS, (12.5, 13.0), (-3.0, -3.4), (0.4, 0.4)])
def test_autonomous_map_of_a_linear_system(s, t):
    made, exact = fd.AutonomousFlowMap(linear_map()), linear_map()
    assert_close(made(s, t, X), exact(s, t, X), 1e-13)
    assert_close(made.velocity(s, X), exact.velocity(s, X), 1e-13)
    expected = exact.average_velocity(s, t, X)
    assert_close(made.average_velocity(s, t, X), expected, 1e-12)


def test_autonomous_map_sees_the_step_only():
    inner = mlp_map()
    made = fd.AutonomousFlowMap(inner)
    assert_close(made(0.7, 0.2, X, X), inner(0.0, -0.5, X, X), 1e-13)
    assert_close(made.velocity(0.7, X, X), inner.velocity(0.0, X, X), 0, 0)
    expected = inner.average_velocity(0.0, -0.5, X, X)
    assert_close(made.average_velocity(0.7, 0.2, X, X), expected, 1e-13)


def test_autonomous_identities():
    flow_map, field = fd.AutonomousFlowMap(linear_map()), linear_map().velocity

    @jax.jit
    def residuals(s, t):
        return (
            fd.lagrangian_residual(flow_map, field, s, t, X),
            fd.eulerian_residual(flow_map, field, s, t, X),
            fd.semigroup_residual(flow_map, s, 4.9, t, X),
        )

    for s, t in [(4.6, 5.3), (5.3, 4.6)]:
        assert max_abs(residuals(s, t)) < 1e-12


def test_checked_step_of_a_number():
    flow_map = fd.AutonomousFlowMap(fd.FlowMap(wavy_net, time_range=(-0.5, 0.5)))
    assert np.isfinite(flow_map(0.2, 0.4, 1.5))
    assert np.isfinite(jax.jit(lambda t: flow_map(0.2, t, 1.5))(0.4))


def test_rounded_steps_are_within_the_range():
    s, t = jnp.float32(70.1), jnp.float32(70.4)
    assert t - s > 0.300002
    flow_map = fd.AutonomousFlowMap(fd.FlowMap(wavy_net, time_range=(-0.3, 0.3)))
    x = X.astype(jnp.float32)
    assert_close(flow_map(s, t, x), flow_map(0.0, 0.3, x), 1e-6, 1e-6)
    value = lambda s, t: jax.jvp(lambda t: flow_map(s, t, x), (t,), (jnp.ones_like(t),))
    expected = value(jnp.float32(0), jnp.float32(0.3))
    assert_close(value(s, t), expected, 1e-5, 1e-5)
    with pytest.raises(ValueError, match="leaves the time range"):
        flow_map(s, t + 1e-3, x)


def test_steps_beyond_those_of_an_integrated_map():
    # The inner solve must not see a step that is not a number.
    inner = fd.ODEFlowMap(linear_map().velocity, time_range=(-1.0, 1.0))
    flow_map = fd.AutonomousFlowMap(inner)
    made = jax.jit(jax.vmap(flow_map, (None, 0, None)))(3.0, jnp.asarray([3.8, 5.0]), X)
    assert_close(made[0], linear_map()(0.0, 0.8, X), 1e-6, 1e-6)
    assert jnp.all(jnp.isnan(made[1]))


def test_steps_beyond_leave_integers_alone():
    class Counting(fd.AbstractFlowMap):
        time_range = (-1.0, 1.0)

        def jump(self, s, t, x, args):
            return {"x": x["x"] + t - s, "count": x["count"]}

    flow_map = fd.AutonomousFlowMap(Counting())
    state = {"x": jnp.asarray(0.0), "count": jnp.asarray(3, jnp.int32)}
    made = jax.jit(flow_map)(3.0, jnp.asarray(5.0), state)
    assert jnp.isnan(made["x"])
    assert made["count"] == 3 and made["count"].dtype == jnp.int32


def test_late_times_keep_short_steps():
    # In float32 the two times would be equal.
    s, t = np.float64(1e6), np.float64(1e6 + 1e-3)
    x = X.astype(jnp.float32)
    moved = fd.AutonomousFlowMap(linear_map())(s, t, x)
    assert_close(moved, linear_map()(0.0, 1e-3, x), 1e-7, 1e-7)
    assert moved.dtype == jnp.float32 and max_abs(moved - x) > 5e-4


@pytest.mark.parametrize("t0, t1", [(10.0, 12.0), (12.0, 10.0)])
def test_autonomous_map_in_a_solve(t0, t1):
    made = jump_solve(fd.AutonomousFlowMap(linear_map()), t0, t1, X).ys[0]
    assert_close(made, linear_map()(t0, t1, X), 1e-12)


def test_time_range_is_one_of_steps():
    flow_map = fd.AutonomousFlowMap(fd.FlowMap(zero_net, time_range=(-0.1, 0.5)))
    assert flow_map.time_range is None
    assert_close(flow_map(7.0, 7.5, X), X)
    assert_close(flow_map(7.0, 6.9, X), X)
    for s, t in [(7.0, 7.6), (7.0, 6.8), (0.2, 0.0)]:
        with pytest.raises(ValueError, match=r"\[-0.1, 0.5\]"):
            flow_map(s, t, X)
    # Inside `jit`, for the example that leaves it alone.
    ends = jax.jit(jax.vmap(lambda t: flow_map(7.0, t, X)))(jnp.asarray([7.5, 7.6]))
    assert_close(ends[0], X)
    assert np.all(np.isnan(ends[1]))
    sol = jump_solve(flow_map, 7.0, 9.0, X, steps=2, throw=False)
    assert sol.result == diffrax.RESULTS.nonlinear_divergence


def test_checked_steps_may_be_differentiated():
    flow_map = fd.AutonomousFlowMap(fd.FlowMap(wavy_net, time_range=(-0.5, 0.5)))
    plain = fd.AutonomousFlowMap(fd.FlowMap(wavy_net))

    @jax.jit
    def loss(s, t, x):
        losses = jax.vmap(
            lambda s, t, x: (
                jnp.sum(fd.lagrangian_residual(flow_map, decay, s, t, x) ** 2),
                jnp.sum(fd.lagrangian_residual(plain, decay, s, t, x) ** 2),
            )
        )(s, t, x)
        return tuple(map(jnp.sum, losses))

    inputs = jnp.asarray([0.1, 0.6]), jnp.asarray([0.4, 0.2]), jnp.stack([X, -X])
    made, expected = jax.jit(jax.jacrev(loss, 2))(*inputs)
    assert_close(made, expected)


# --- projections --------------------------------------------------------------------


def squared_length(x, args):
    return jnp.sum(x**2)


def conserve(invariants, num_iterations=3):
    """The projection, compiled once and not operation by operation."""
    return eqx.filter_jit(fd.ConserveInvariants(invariants, num_iterations))


def test_projection_on_a_circle():
    # The nearest point of a circle is on the same ray.
    start, end = jnp.asarray([3.0, 4.0]), jnp.asarray([5.5, -0.4])
    made = conserve(squared_length, 5)(start, end)
    assert_close(made, 5 * end / np.linalg.norm(end), 1e-13)


def test_projection_of_linear_invariants():
    # One step, and the nearest point: by least squares.
    matrix = jr.normal(jr.key(3), (2, 5))
    start, end = jr.normal(jr.key(4), (2, 5))
    project = conserve(lambda x, args: {"sums": matrix @ x}, 1)
    correction = np.linalg.lstsq(np.asarray(matrix), matrix @ (start - end))[0]
    assert_close(project(start, end), end + correction, 1e-12)


def test_gauss_newton_is_quadratic():
    start = {"angle": jnp.asarray(1.1), "rate": jnp.asarray(-0.3)}
    end = {"angle": jnp.asarray(0.95), "rate": jnp.asarray(-0.6)}
    errors = []
    for n in (1, 2, 3):
        made = conserve(pendulum_energy, n)(start, end, 0.7)
        errors.append(abs(pendulum_energy(made, 0.7) - pendulum_energy(start, 0.7)))
    assert errors[1] < 30 * errors[0] ** 2 and errors[2] < 1e-13


def test_several_invariants_of_a_pytree():
    # A Kepler orbit: energy and angular momentum, at a point and a disturbed one.
    def invariants(x, args):
        q, p = x
        energy = 0.5 * jnp.sum(p**2) - 1 / jnp.sqrt(jnp.sum(q**2))
        # In units that differ much.
        return 1e6 * energy, 1e-3 * (q[0] * p[1] - q[1] * p[0])

    start = (jnp.asarray([1.0, 0.1]), jnp.asarray([-0.2, 0.9]))
    end = (jnp.asarray([0.85, 0.5]), jnp.asarray([-0.6, 0.72]))
    made = conserve(invariants, 5)(start, end)
    assert_close(invariants(made, None), invariants(start, None), 1e-15, 1e-12)
    assert 1e-3 < max_abs(made[0] - end[0]) < 0.1


def test_dependent_invariants_share_the_correction():
    twice = lambda x, args: (squared_length(x, args), 3 * squared_length(x, args))
    end = jnp.asarray([0.9, -0.3])
    made = conserve(twice, 4)(X, end)
    assert_close(made, conserve(squared_length, 4)(X, end), 1e-12)


@pytest.mark.parametrize("start", [X, jnp.zeros(2)])
def test_vanishing_gradient_of_an_invariant(start):
    project = conserve(squared_length)
    origin = jnp.zeros(2)
    assert_close(project(start, origin), origin, 0, 0)
    value = lambda start, end: jnp.sum(jnp.sin(project(start, end) + 1))
    gradients = jax.jit(jax.grad(value, (0, 1)))(start, origin)
    assert np.isfinite(gradients).all() and max_abs(gradients) > 0


def test_one_vanishing_gradient_among_others():
    # At rest, the kinetic energy has none, and the sum is still conserved.
    invariants = lambda x, args: jnp.stack([jnp.sum(x), jnp.sum(x**2)])
    made = conserve(invariants, 1)(jnp.ones(2), jnp.zeros(2))
    assert_close(made, jnp.ones(2), 1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-9, 1e-150])
def test_corrections_are_no_longer_than_twice_the_jump(size):
    made = conserve(squared_length)(X, jnp.asarray([size, 0.0]))
    assert np.isfinite(made).all() and max_abs(made) < 10


def test_projection_where_nothing_moves():
    project = conserve(lambda x, args: jnp.sin(3 * x).sum())
    assert_close(project(X, X), X, 0, 0)


def test_projection_derivatives():
    project = conserve(pendulum_energy)
    end = {"angle": jnp.asarray(0.95), "rate": jnp.asarray(-0.5)}
    inputs = (SWING, end, jnp.asarray(0.7))
    direction = ({"angle": 0.3, "rate": -1.0}, {"angle": 0.8, "rate": 0.2}, 0.4)
    direction = jtu.tree_map(jnp.asarray, direction)
    value = jax.jit(lambda inputs: project(*inputs))
    expected = finite_difference(value, inputs, direction)
    made = jax.jit(lambda p, d: jax.jvp(value, (p,), (d,))[1])(inputs, direction)
    assert_close(made, expected, 1e-8, 1e-8)
    gradient = jax.jit(jax.grad(lambda inputs: value(inputs)["rate"]))(inputs)
    products = jtu.tree_map(lambda g, d: g * d, gradient, direction)
    assert_close(sum(jtu.tree_leaves(products)), made["rate"])


@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_projection_in_low_precision(dtype, tol):
    start, end = X.astype(dtype), jnp.asarray([0.6, -0.6], dtype)
    made = conserve(squared_length)(start, end)
    assert made.dtype == dtype
    length = np.linalg.norm(np.asarray(made, float))
    assert length == pytest.approx(np.linalg.norm(X), rel=tol)


def oscillator():
    return fd.exact.LinearFlowMap([[0.0, 1.0], [-1.0, 0.0]])


class Drifting(fd.AbstractFlowMap):
    """A map whose velocity is right, and which gains energy."""

    def jump(self, s, t, x, args):
        h = jnp.asarray(t) - jnp.asarray(s)
        field = lambda x: {"angle": x["rate"], "rate": -jnp.sin(x["angle"])}
        return jtu.tree_map(lambda x, v: x + h * v, x, field(x))


def test_projection_of_an_exact_map_changes_nothing():
    made = fd.ProjectedFlowMap(oscillator(), fd.ConserveInvariants(squared_length))
    jump, velocity = eqx.filter_jit(made), eqx.filter_jit(made.velocity)
    for s, t in [*PAIRS, (0.3, 0.3)]:
        assert_close(jump(s, t, X), oscillator()(s, t, X), 1e-14)
    assert_close(velocity(0.3, X), oscillator().velocity(0.3, X), 1e-14)


def test_projected_velocity_is_the_derivative_of_the_jump():
    # An inner velocity that does not conserve anything.
    project = fd.ConserveInvariants(lambda x, args: jnp.sum(x**4) + args * x[0])
    flow_map = fd.ProjectedFlowMap(gaussian_map(), project)
    args = jnp.asarray(0.5)
    value = jax.jit(lambda t: flow_map(0.3, t, X, args))
    expected = finite_difference(value, jnp.asarray(0.3), jnp.ones(()), 1e-4)
    made = eqx.filter_jit(flow_map.velocity)(0.3, X, args)
    assert_close(made, expected, 1e-6, 1e-6)
    average = eqx.filter_jit(flow_map.average_velocity)
    assert_close(average(0.3, 0.3, X, args), made, 1e-12)


@pytest.mark.parametrize("t0, t1", [(0.0, 6.0), (6.0, 0.0)])
def test_pendulum_keeps_its_energy(t0, t1):
    project = fd.ConserveInvariants(pendulum_energy)
    solve = lambda flow_map: (
        jump_solve(flow_map, t0, t1, SWING, steps=24, field=pendulum).ys
    )
    energy = lambda ys: pendulum_energy(jtu.tree_map(lambda y: y[-1], ys), None)
    start = pendulum_energy(SWING, None)
    kept = energy(solve(fd.ProjectedFlowMap(Drifting(), project)))
    assert_close(kept, start, 1e-12)
    assert abs(energy(solve(Drifting())) - start) > 0.5


class Weighted(eqx.Module):
    mass: jax.Array

    def __call__(self, x, args):
        return jnp.sum(self.mass * x**2)


def test_training_leaves_field_and_invariants_alone():
    # Weight decay would change every weight it sees, whatever its gradient.
    field, net = Field(jnp.asarray(1.1)), Scaled(jnp.asarray(0.5))
    mass = jnp.asarray([1.0, 2.5])
    start = fd.ProjectedFlowMap(
        fd.HypersolverFlowMap(field, net), fd.ConserveInvariants(Weighted(mass), 1)
    )
    ts = jnp.linspace(0.0, 1.0, 3)
    pool = fd.data.TrajectoryBatches(ts, jr.normal(jr.key(1), (8, 3, 2)), 8)
    optim = optax.adamw(0.1, weight_decay=0.5)
    objective = fd.TrajectoryMatching(fd.times.GridTimes(ts, both_directions=True))
    options = {"num_steps": 3, "key": jr.key(0), "progress": False}
    state = fd.train.fit(start, objective, pool, optim, **options)
    assert int(state.skipped) == 0
    for made in (state.flow_map, state.ema_map):
        inner = made.flow_map
        assert np.isfinite(inner.net.weight) and float(inner.net.weight) != 0.5
        assert float(inner.vector_field.weight) == 1.1
        assert_close(made.projection.invariants.mass, mass, 0, 0)


def test_projection_of_ones_own():
    clip = lambda x_start, x_end, args: jnp.clip(x_end, -args, args)
    made = fd.ProjectedFlowMap(linear_map(), clip)(0.1, 0.9, X, 0.6)
    assert_close(made, np.clip(linear_map()(0.1, 0.9, X), -0.6, 0.6), 0, 0)


def test_projection_keeps_the_time_range():
    flow_map = fd.FlowMap(zero_net, time_range=(-1.0, 3.0))
    made = fd.ProjectedFlowMap(flow_map, lambda x, y, args: y)
    assert made.time_range == (-1.0, 3.0)


# --- networks on vectors ------------------------------------------------------------


def recording_net(seen):
    def net(s, t, vector, args):
        seen.append((vector, args))
        return 2 * vector + 1

    return net


def test_ravelled_state_and_args():
    seen = []
    x = {"a": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "b": (jnp.asarray(5.0),)}
    args = {"label": jnp.asarray(7), "mass": jnp.asarray([0.5, 0.25])}
    out = fd.nn.Ravelled(recording_net(seen))(0.1, 0.9, x, args)
    assert_close(out, jtu.tree_map(lambda leaf: 2 * leaf + 1, x))
    assert_close(seen[0][0], jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert_close(seen[0][1], jnp.asarray([7.0, 0.5, 0.25]))


def test_ravelled_without_args():
    seen = []
    fd.nn.Ravelled(recording_net(seen))(0.1, 0.9, SWING)
    assert seen[0][1] is None


def test_ravelled_keeps_dtypes():
    seen = []
    x = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((1, 2), jnp.bfloat16)}
    net = fd.nn.Ravelled(recording_net(seen))
    out = fd.FlowMap(net)(0.0, 0.5, x, (1.5, np.ones(2)))
    assert jtu.tree_map(jnp.result_type, out) == jtu.tree_map(jnp.result_type, x)
    assert seen[0][0].dtype == seen[0][1].dtype == jnp.float32


def test_ravelled_mlp_of_a_pendulum():
    net = fd.nn.Ravelled(fd.nn.MLP(2, 8, 1, args_size=1, key=jr.key(0)))
    flow_map = fd.HypersolverFlowMap(pendulum, net)
    args = jnp.asarray(1.3)
    expected = fd.HypersolverFlowMap(pendulum, zero_net)(0.2, 0.6, SWING, args)
    assert_close(eqx.filter_jit(flow_map)(0.2, 0.6, SWING, args), expected, 1e-14)


# --- refusals -------------------------------------------------------------------------


def hyper(field=nonlinear_field, net=zero_net, solver=None, **settings):
    return fd.HypersolverFlowMap(field, net, solver, **settings)


def cast(flow_map):
    to_float32 = lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf
    return jtu.tree_map(to_float32, flow_map)


INNER = {
    "AutonomousFlowMap": fd.AutonomousFlowMap,
    "ProjectedFlowMap": lambda inner: fd.ProjectedFlowMap(inner, lambda x, y, args: y),
    "NormalisedFlowMap": lambda inner: fd.Normalisation(0.0, 1.0).flow_map(inner),
}
NOT_RK = "explicit Runge-Kutta solver.*got "
SHORT_NET = lambda s, t, x, args: x[:1]
COMPLEX = X.astype(complex)


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
@pytest.mark.parametrize(
    "inner, match",
    [
        (lambda s, t, x, args: x, "must be an instance of `AbstractFlowMap`; got <lamb"),
        (3, "must be a callable"),
        (fd.InverseFlowMap(linear_map()), "for one jump"),
    ],
)
def test_refused_inner_maps(make, inner, match):
    with without_type_checks(), pytest.raises(TypeError, match=match):
        make(inner)


@pytest.mark.parametrize(
    "act, error, match",
    [
        (lambda: hyper(solver=diffrax.Kvaerno5()), TypeError, NOT_RK + "Kvaerno5"),
        (lambda: hyper(solver=diffrax.ShARK()), TypeError, NOT_RK + "ShARK"),
        (
            lambda: hyper(solver=diffrax.LeapfrogMidpoint()),
            TypeError,
            NOT_RK + "LeapfrogMidpoint",
        ),
        (
            lambda: hyper(solver=diffrax.HalfSolver(diffrax.Heun())),
            TypeError,
            NOT_RK + "HalfSolver",
        ),
        (lambda: hyper(solver=diffrax.Heun), TypeError, NOT_RK + "Heun"),
        (lambda: hyper(solver="heun"), TypeError, NOT_RK + "str"),
        (lambda: hyper(net=3), TypeError, "`net` must be a callable"),
        (lambda: hyper(3), TypeError, "`vector_field` must be a callable"),
        (lambda: hyper(time_range=(1.0, 0.0)), ValueError, "low < high"),
        (
            lambda: hyper(time_range=(0.0, 1.0))(0.0, 1.5, X),
            ValueError,
            "leaves the time range",
        ),
        (
            lambda: hyper(lambda t, x, args: x[:1])(0.0, 1.0, X),
            ValueError,
            "`vector_field` must return the shape of the state",
        ),
        (
            lambda: hyper(net=SHORT_NET)(0.0, 1.0, X),
            ValueError,
            "`HypersolverFlowMap.net` must return the shape of the state",
        ),
        (
            lambda: cast(hyper(Field(jnp.asarray(1.1)))).velocity(0.3, X),
            TypeError,
            "held fixed was cast to float32",
        ),
        (
            lambda: fd.AutonomousFlowMap(fd.FlowMap(zero_net, time_range=(0.1, 0.5))),
            ValueError,
            r"must hold 0; got \(0.1, 0.5\)",
        ),
        (
            lambda: fd.ProjectedFlowMap(linear_map(), 3),
            TypeError,
            "`projection` must be a callable",
        ),
        (
            lambda: INNER["ProjectedFlowMap"](fd.FlowMap(zero_net, (-1.0, 3.0)))(
                0.0, 4.0, X
            ),
            ValueError,
            "leaves the time range",
        ),
        (
            lambda: fd.ProjectedFlowMap(linear_map(), lambda x, y, args: y[:1])(
                0.0, 1.0, X
            ),
            ValueError,
            "`projection` must return the shape",
        ),
        (lambda: fd.ConserveInvariants(3), TypeError, "`invariants` must be a callable"),
        (
            lambda: fd.ConserveInvariants(squared_length, 0),
            ValueError,
            "`num_iterations` must be at least 1; got 0",
        ),
        (
            lambda: fd.ConserveInvariants(squared_length)(COMPLEX, COMPLEX),
            TypeError,
            "imaginary part as two leaves",
        ),
        (lambda: fd.nn.Ravelled(3), TypeError, "`net` must be a callable"),
        (
            lambda: fd.nn.Ravelled(SHORT_NET)(0.0, 1.0, SWING),
            ValueError,
            "`Ravelled.net` must return the shape",
        ),
        (
            lambda: fd.nn.Ravelled(SHORT_NET)(0.0, 1.0, COMPLEX),
            TypeError,
            "imaginary part as two leaves",
        ),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()
