"""Objectives: zero at the truth, unbiased, with gradients where the papers put them."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    linear_map,
    max_abs,
    mlp_map,
    nonlinear_field,
    public_objectives,
    without_type_checks,
)

import flowdiffrax as fd
from flowdiffrax.objectives import _batch

S, T = jnp.asarray(0.2), jnp.asarray(0.9)
X0, X1 = jnp.asarray([0.8, -0.5]), jnp.asarray([-0.3, 1.1])
PATH = fd.LinearInterpolant()(X0, X1)
STOPS = fd.objectives.StopGradient


def trajectory_path(field=None):
    """An exact trajectory of the linear map's ODE, saved by Diffrax at S and T too."""
    ts = jnp.asarray([0.0, 0.2, 0.55, 0.9, 1.0])
    field = linear_map().velocity if field is None else field
    ys = fd.solve_trajectories(field, X0[None], ts, rtol=1e-12, atol=1e-12)
    return fd.paths.TrajectoryPath(ts, ys[0])


def scaled(flow_map, factor):
    """A map wrong in one number: its average velocities are too long."""

    def net(s, t, x, args):
        return factor * flow_map.average_velocity(s, t, x, args)

    return fd.FlowMap(net)


# name -> (objective, exact map, teacher, path); the maps have 1e-12 tolerances at worst
EXACT = {
    "lagrangian": lambda: (
        fd.LagrangianMapDistillation(),
        gaussian_map(),
        gaussian_map().velocity,
        PATH,
    ),
    "lagrangian-through-teacher": lambda: (
        fd.LagrangianMapDistillation(stop_gradient=fd.objectives.StopGradient.NONE),
        linear_map(),
        linear_map().velocity,
        PATH,
    ),
    "velocity": lambda: (
        fd.objectives.VelocityDistillation(),
        gaussian_map(),
        gaussian_map().velocity,
        PATH,
    ),
    "progressive": lambda: (
        fd.objectives.ProgressiveFlowMapMatching(3),
        gaussian_map(),
        gaussian_map(),
        PATH,
    ),
    "trajectory": lambda: (
        fd.TrajectoryMatching(),
        linear_map(),
        None,
        trajectory_path(),
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("s, t", [(S, T), (T, S)])
def test_zero_at_the_truth(name, s, t):
    objective, flow_map, teacher, path = EXACT[name]()
    assert abs(objective(flow_map, teacher, path, s, t)) < 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_not_zero_at_a_wrong_map(name):
    objective, flow_map, teacher, path = EXACT[name]()
    assert objective(scaled(flow_map, 1.1), teacher, path, S, T) > 1e-5


def test_trajectories_need_their_saved_times():
    # Between saved times the path is a chord, and the map's point is off it.
    objective, flow_map, _, path = EXACT["trajectory"]()
    assert objective(flow_map, None, path, jnp.asarray(0.7), T) > 1e-6


# --- values -------------------------------------------------------------------------


def test_lagrangian_by_finite_differences():
    flow_map, teacher = mlp_map(), nonlinear_field
    start = PATH.evaluate(S)
    end = lambda t: flow_map(S, t, start)
    rate = finite_difference(end, T, jnp.ones(()))
    expected = jnp.sum((rate - teacher(T, end(T), None)) ** 2)
    made = fd.LagrangianMapDistillation()(flow_map, teacher, PATH, S, T)
    assert_close(made, expected, 1e-7, 1e-7)


def test_lagrangian_at_equal_times_is_velocity_distillation():
    args = (mlp_map(), nonlinear_field, PATH, T, T)
    assert_close(
        fd.LagrangianMapDistillation()(*args), fd.objectives.VelocityDistillation()(*args)
    )


def test_flow_matching_value():
    flow_map = mlp_map()
    expected = np.sum((flow_map.velocity(T, PATH.evaluate(T)) - (X1 - X0)) ** 2)
    assert_close(fd.FlowMatching()(flow_map, None, PATH, S, T), expected)


def test_progressive_against_a_loop():
    flow_map, teacher = mlp_map(0), mlp_map(1)
    x = PATH.evaluate(S)
    ts, y = np.linspace(S, T, 4), x
    for k in range(3):
        y = teacher(ts[k], ts[k + 1], y)
    made = fd.objectives.ProgressiveFlowMapMatching(3)(flow_map, teacher, PATH, S, T)
    assert_close(made, np.sum((flow_map(S, T, x) - y) ** 2), 1e-13)


def test_progressive_without_teacher_is_its_own():
    flow_map = mlp_map()
    objective = fd.objectives.ProgressiveFlowMapMatching()
    own = objective(flow_map, flow_map, PATH, S, T)
    assert_close(objective(flow_map, None, PATH, S, T), own)


def test_trajectory_matching_compares_slopes():
    flow_map, path = mlp_map(), trajectory_path()
    slope = (path.evaluate(T) - path.evaluate(S)) / (T - S)
    v_st = flow_map.average_velocity(S, T, path.evaluate(S))
    made = fd.TrajectoryMatching()(flow_map, None, path, S, T)
    assert_close(made, jnp.sum((v_st - slope) ** 2), 1e-12)


# --- gradients ----------------------------------------------------------------------


def gradient(objective, flow_map, teacher, path=PATH):
    loss = lambda flow_map: objective(flow_map, teacher, path, S, T)
    return eqx.filter_grad(loss)(flow_map)


def directional(loss, flow_map):
    """The derivative along a fixed random direction of the weights."""
    weights, rest = eqx.partition(flow_map, eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(weights)
    keys = jr.split(jr.key(7), len(leaves))
    moves = [jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    direction = jtu.tree_unflatten(structure, moves)
    value = lambda weights: loss(eqx.combine(weights, rest))
    return finite_difference(value, weights, direction, 1e-6), direction


def along(grads, direction):
    pairs = zip(jtu.tree_leaves(grads), jtu.tree_leaves(direction), strict=True)
    return sum(jnp.sum(g * d) for g, d in pairs)


def test_lagrangian_teacher_is_frozen():
    student, teacher = mlp_map(), nonlinear_field
    fixed = teacher(T, student(S, T, PATH.evaluate(S)), None)
    frozen_teacher = lambda t, x, args: fixed
    loss = lambda m: fd.LagrangianMapDistillation()(m, frozen_teacher, PATH, S, T)
    expected, direction = directional(loss, student)
    made = along(gradient(fd.LagrangianMapDistillation(), student, teacher), direction)
    assert_close(made, expected, 1e-6, 1e-6)


def test_lagrangian_gradient_through_the_teacher():
    student, teacher = mlp_map(), nonlinear_field
    objective = fd.LagrangianMapDistillation(
        stop_gradient=fd.objectives.StopGradient.NONE
    )
    loss = lambda m: objective(m, teacher, PATH, S, T)
    expected, direction = directional(loss, student)
    full = along(gradient(objective, student, teacher), direction)
    frozen = along(gradient(fd.LagrangianMapDistillation(), student, teacher), direction)
    assert_close(full, expected, 1e-6, 1e-6)
    assert abs(full - frozen) > 1e-2


def test_progressive_target_is_frozen():
    student = mlp_map()
    objective = fd.objectives.ProgressiveFlowMapMatching()
    loss = lambda m: objective(m, student, PATH, S, T)
    expected, direction = directional(loss, student)
    made = along(gradient(objective, student, None), direction)
    assert_close(made, expected, 1e-6, 1e-6)


@pytest.mark.parametrize(
    "objective",
    [fd.objectives.ProgressiveFlowMapMatching(), fd.LagrangianMapDistillation()],
)
def test_teacher_gets_no_gradient(objective):
    distilling = isinstance(objective, fd.LagrangianMapDistillation)
    pick = lambda m: m.velocity if distilling else m
    loss = lambda teacher: objective(mlp_map(0), pick(teacher), PATH, S, T)
    assert max_abs(eqx.filter_grad(loss)(mlp_map(1))) == 0


def test_own_diagonal_as_teacher_is_frozen():
    # The teacher is the student's velocity: still only the map's side is trained.
    student = mlp_map()
    loss = lambda m: fd.LagrangianMapDistillation()(m, m.velocity, PATH, S, T)
    made = eqx.filter_grad(loss)(student)
    expected = gradient(fd.LagrangianMapDistillation(), student, mlp_map().velocity)
    assert_close(eqx.filter(made, eqx.is_array), eqx.filter(expected, eqx.is_array))


class ScaledVelocity(fd.AbstractFlowMap):
    """A map whose velocity has one weight, exact at 1."""

    factor: jax.Array

    def jump(self, s, t, x, args):
        raise NotImplementedError

    def tangent(self, t, x, args):
        return self.factor * gaussian_map().velocity(t, x)


def test_flow_matching_is_unbiased_at_the_truth():
    # The mean of 4000 gradients vanishes within 4 standard errors; the loss is
    # E tr Cov(dI | I), here from the joint law of (I, dI) by NumPy quadrature in time.
    n = 4000
    base, z0, z1 = jr.split(jr.key(0), 3)
    x0 = jnp.asarray([[0.1, -0.2]]) + 1.3 * jr.normal(z0, (n, 2))
    x1 = jnp.asarray([[0.7, 0.5]]) + jnp.asarray([[0.6, 0.4]]) * jr.normal(z1, (n, 2))
    t = jr.uniform(base, (n,))

    def loss(factor, x0, x1, t):
        path = fd.LinearInterpolant()(x0, x1)
        return fd.FlowMatching()(ScaledVelocity(factor), None, path, t, t)

    values, slopes = jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))(
        jnp.asarray(1.0), x0, x1, t
    )
    assert abs(slopes.mean()) < 4 * slopes.std() / np.sqrt(n)
    grid = (np.arange(2000) + 0.5) / 2000
    floor = 0
    for v0, v1 in ((1.69, 0.36), (1.69, 0.16)):
        # Cov(dI | I) = |det| of the two rows over Var(I): a 2x2 Schur complement.
        floor += np.mean(v0 * v1 / ((1 - grid) ** 2 * v0 + grid**2 * v1))
    assert abs(values.mean() - floor) < 4 * values.std() / np.sqrt(n)


# --- weights ------------------------------------------------------------------------


def test_inverse_gap():
    assert_close(fd.weights.InverseGap()(S, T, jnp.asarray(0.98)), 0.98 / 0.49)
    assert_close(fd.weights.InverseGap()(T, S, jnp.asarray(0.98)), 0.98 / 0.49)
    assert_close(
        fd.weights.InverseGap(power=1.0)(S, T, jnp.asarray(0.7)), jnp.asarray(1.0)
    )


def test_inverse_gap_stops_growing():
    weight = fd.weights.InverseGap(min_gap=0.1)
    assert_close(weight(S, S, jnp.asarray(1.0)), jnp.asarray(100.0))


def test_data_end_weight():
    weight = fd.weights.DataEndWeight(0.2)
    values = [float(weight(S, jnp.asarray(t), jnp.asarray(4.0))) for t in (0.5, 0.9, 1.0)]
    np.testing.assert_allclose(values, [4, 1, 0], atol=1e-12)


def test_power_weight_is_held_fixed():
    # With p = 1 and a large error, the loss says 1 and the gradient does not vanish.
    weight = fd.weights.PowerWeight(1.0, 1e-3)
    value, slope = jax.value_and_grad(lambda e: weight(S, T, e))(jnp.asarray(50.0))
    assert_close(value, jnp.asarray(1.0), 1e-4)
    assert_close(slope, jnp.asarray(1 / 50), 1e-6)


def test_pseudo_huber_turns_from_square_to_distance():
    weight = fd.weights.PseudoHuber(0.1)
    small, large = jnp.asarray(1e-8), jnp.asarray(1e8)
    assert_close(weight(S, T, small), small / 0.2, 1e-12, 1e-6)
    assert_close(weight(S, T, large), jnp.sqrt(large) - 0.1, 1e-5)


def test_pseudo_huber_without_a_square_is_the_distance():
    value, slope = jax.value_and_grad(lambda e: fd.weights.PseudoHuber()(S, T, e))(
        jnp.asarray(9.0)
    )
    assert_close(value, jnp.asarray(3.0))
    assert_close(slope, jnp.asarray(1 / 6))
    # Of an error that is zero, the gradient is zero and no NaN.
    loss = lambda x: fd.weights.PseudoHuber()(S, T, jnp.sum(x**2))
    assert max_abs(jax.grad(loss)(jnp.zeros(3))) == 0


def test_inverse_noise_gap():
    # Noise levels of 4 and 1 in units of the base, and the largest one at time 0.
    weight, s, t = fd.weights.InverseNoiseGap(), jnp.asarray(0.2), jnp.asarray(0.5)
    assert_close(weight(s, t, jnp.asarray(6.0)), jnp.asarray(2.0), 1e-12)
    assert_close(weight(jnp.zeros(()), t, jnp.asarray(158.0)), jnp.asarray(2.0), 1e-12)
    lower = fd.weights.InverseNoiseGap(max_noise=3.0)
    assert_close(lower(s, t, jnp.asarray(6.0)), jnp.asarray(3.0), 1e-12)
    # On a circle, the level is the cotangent of the angle.
    circle = fd.weights.InverseNoiseGap(fd.paths.TrigonometricInterpolant())
    third = jnp.asarray(1 / 3)
    expected = 6 / (3**0.5 - 1)
    assert_close(circle(third, t, jnp.asarray(6.0)), jnp.asarray(expected), 1e-12)


def test_band_weight():
    weight = fd.weights.BandWeight(0.25)
    one = jnp.asarray(1.0)
    assert [float(weight(S, S + h, one)) for h in (0.2, 0.3, -0.2)] == [1, 0, 1]


def test_weights_in_a_chain():
    chain = fd.weights.WeightChain(
        [fd.weights.PseudoHuber(0.1), fd.weights.InverseGap(1.0)]
    )
    expected = fd.weights.InverseGap(1.0)(
        S, T, fd.weights.PseudoHuber(0.1)(S, T, jnp.asarray(2.0))
    )
    assert_close(chain(S, T, jnp.asarray(2.0)), expected)
    # One that tells start from end.
    chain = fd.weights.WeightChain([fd.weights.PseudoHuber(0.1), Slanted()])
    expected = (1 + S + 3 * T) * fd.weights.PseudoHuber(0.1)(S, T, jnp.asarray(2.0))
    assert_close(chain(S, T, jnp.asarray(2.0)), expected)


def test_learned_weight_finds_the_mean_error():
    # Errors whose mean is exp(1 + s - t): gradient descent on the weight alone.
    s, t = fd.times.UniformTriangle()(jr.key(0), 4000)
    errors = jnp.exp(1 + s - t) * jr.exponential(jr.key(1), (4000,))

    def loss(weight):
        return jnp.mean(jax.vmap(weight)(s, t, errors))

    @jax.jit
    def step(weight, _):
        grads = eqx.filter_grad(loss)(weight)
        return jtu.tree_map(lambda w, g: w - 0.1 * g, weight, grads), None

    start = fd.weights.LearnedWeight(4)
    assert_close(jax.vmap(start)(s, t, errors), errors)
    weight, _ = jax.lax.scan(step, start, length=800)
    found = jax.vmap(weight.log_variance)(s, t)
    assert jnp.sqrt(jnp.mean((found - (1 + s - t)) ** 2)) < 0.1


def test_learned_weight_of_another_dtype():
    for weight, dtype in (
        (fd.weights.LearnedWeight(), jnp.float64),
        (fd.weights.LearnedWeight(3, jnp.float32), jnp.float32),
    ):
        assert weight.coefficients.dtype == dtype
    assert fd.weights.LearnedWeight().coefficients.shape == (2, 2, 8)
    assert fd.weights.LearnedWeight(3).coefficients.shape == (2, 2, 3)


@pytest.mark.parametrize("name", EXACT)
def test_objectives_apply_their_weight(name):
    objective, flow_map, teacher, path = EXACT[name]()
    arguments = (scaled(flow_map, 1.2), teacher, path, S, T)
    plain = eqx.tree_at(lambda o: o.weight, objective, fd.weights.NoWeight())
    slanted = eqx.tree_at(lambda o: o.weight, objective, Slanted())
    assert_close(slanted(*arguments), (1 + S + 3 * T) * plain(*arguments))


class Slanted(fd.weights.AbstractWeight):
    """Another number for other times, and for the same in the other order."""

    def __call__(self, s, t, squared_error):
        return (1 + s + 3 * t) * squared_error


# --- batches ------------------------------------------------------------------------


def batch(n=8, dtype=float):
    x0, x1 = jr.normal(jr.key(1), (2, n, 2), dtype)
    return jax.vmap(fd.LinearInterpolant())(x0, x1)


class Recorded(fd.objectives.AbstractObjective):
    """A loss that tells which rows it saw: x0 of each, scaled."""

    factor: float = 1.0
    times: fd.times.AbstractTimes = fd.times.UniformTriangle()
    weight: fd.weights.AbstractWeight = fd.weights.NoWeight()

    def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None):
        return self.factor * path.x0[0]


def test_batch_loss_is_a_mean_over_examples():
    paths, objective = batch(5), fd.LagrangianMapDistillation()
    drawn = []

    class Spy(fd.times.AbstractTimes):
        def from_uniform(self, first, second):
            drawn.append(fd.times.UniformTriangle().from_uniform(first, second))
            return drawn[-1]

    spied = eqx.tree_at(lambda o: o.times, objective, Spy())
    args = jr.normal(jr.key(4), (5, 2))
    loss, terms = fd.objectives.batch_loss(
        spied, mlp_map(), nonlinear_field, paths, args, key=jr.key(2)
    )
    ((s, t),) = drawn
    one = eqx.filter_jit(objective)
    each = [
        one(
            mlp_map(),
            nonlinear_field,
            fd.LinearInterpolant()(paths.x0[i], paths.x1[i]),
            s[i],
            t[i],
            args[i],
        )
        for i in range(5)
    ]
    assert_close(loss, np.mean(each), 1e-12)
    assert_close(terms, {"LagrangianMapDistillation": loss})


def test_mixture_rows_and_terms():
    paths = batch(8)
    mixture = fd.objectives.Mixture((Recorded(1.0), Recorded(10.0)), (3.0, 1.0))
    loss, terms = fd.objectives.batch_loss(mixture, mlp_map(), None, paths, key=jr.key(0))
    first, second = paths.x0[:6, 0].mean(), 10 * paths.x0[6:, 0].mean()
    assert_close(terms, {"Recorded": first, "Recorded_1": second})
    assert_close(loss, 0.75 * first + 0.25 * second)


def test_mixture_weights():
    paths = batch(8)
    mixture = fd.objectives.Mixture(
        (Recorded(1.0), Recorded(10.0)), (1.0, 1.0), (2.0, 0.5)
    )
    loss, terms = fd.objectives.batch_loss(mixture, mlp_map(), None, paths, key=jr.key(0))
    assert_close(loss, 2 * terms["Recorded"] + 0.5 * terms["Recorded_1"])


def test_mixture_draws_other_times_for_each():
    objective = fd.objectives.VelocityDistillation()
    mixture = fd.objectives.Mixture((objective, objective), (1.0, 1.0))
    one = jax.vmap(fd.LinearInterpolant())(jnp.ones((8, 2)), jnp.zeros((8, 2)))
    _, terms = fd.objectives.batch_loss(
        mixture, mlp_map(), nonlinear_field, one, key=jr.key(0)
    )
    first, second = terms.values()
    assert abs(first - second) > 1e-6


def test_mixture_of_two_teachers():
    mixture = fd.objectives.Mixture(
        (
            fd.objectives.VelocityDistillation(),
            fd.objectives.ProgressiveFlowMapMatching(),
        ),
        (1.0, 1.0),
    )
    exact = linear_map()
    both = (exact.velocity, exact)
    _, terms = fd.objectives.batch_loss(mixture, exact, both, batch(8), key=jr.key(0))
    assert max_abs(terms) < 1e-12


def tree_net(s, t, x, args):
    return jtu.tree_map(lambda leaf: leaf * jnp.asarray(0.3, leaf.dtype), x)


@pytest.mark.parametrize(
    "objective",
    [
        fd.FlowMatching(),
        fd.LagrangianMapDistillation(),
        fd.objectives.VelocityDistillation(),
        fd.objectives.ProgressiveFlowMapMatching(),
        fd.TrajectoryMatching(),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_objectives_with_pytrees(objective, dtype):
    x0 = {"a": jnp.ones((4, 2), dtype), "b": jnp.ones((4, 1, 3), dtype)}
    paths = jax.vmap(fd.LinearInterpolant())(x0, jtu.tree_map(lambda x: -x, x0))
    if isinstance(objective, fd.TrajectoryMatching):
        ts = jnp.broadcast_to(jnp.asarray([0.0, 1.0], dtype), (4, 2))
        ys = jtu.tree_map(lambda a, b: jnp.stack([a, b], axis=1), paths.x0, paths.x1)
        paths = fd.paths.TrajectoryPath(ts, ys)
    flow_map = fd.FlowMap(tree_net)
    progressive = isinstance(objective, fd.objectives.ProgressiveFlowMapMatching)
    teacher = flow_map if progressive else lambda t, x, args: jtu.tree_map(jnp.cos, x)
    loss, _ = fd.objectives.batch_loss(objective, flow_map, teacher, paths, key=jr.key(0))
    assert loss.dtype == dtype
    assert np.isfinite(loss) and loss > 0


# --- mistakes -----------------------------------------------------------------------

NULL = jnp.zeros(2)
SCALED = fd.velocities.GuidanceArgs(NULL, jnp.asarray(3.0))
SHORT = lambda t, x, args: x[:1]
RATES = fd.velocities.MeanFlowGuidance(NULL, 2.0)
UNTOLD = "has no rule that gives the scale a meaning"


def loss(objective, teacher=None, args=None):
    return objective(mlp_map(), teacher, PATH, S, T, args, key=jr.key(0))


def with_scale(objective):
    flow_map = fd.FlowMap(lambda s, t, x, args: args.scale * x)
    return objective(flow_map, None, PATH, S, T, SCALED, key=jr.key(0))


def mean(objective, flow_map=None, args=None, teacher=None):
    flow_map = mlp_map() if flow_map is None else flow_map
    return fd.objectives.batch_loss(
        objective, flow_map, teacher, batch(), args, key=jr.key(0)
    )


def pair(*args):
    return fd.objectives.Mixture((fd.FlowMatching(),) * 2, *args)


TYPES = {
    "weight as times": (
        lambda: fd.objectives.MeanFlow(fd.weights.NoWeight()),
        "`times` must be an instance of `AbstractTimes`; got NoWeight",
    ),
    "class in a mixture": (
        lambda: fd.objectives.Mixture([fd.FlowMatching], [1.0]),
        "`objectives` must be an instance of `AbstractObjective`; got the class Flow",
    ),
    "class of an objective": (
        lambda: fd.train.make_step(fd.FlowMatching, None),
        "must be an instance",
    ),
    "network": (
        lambda: mean(fd.FlowMatching(), fd.nn.MLP(2, 4, 1, key=jr.key(0))),
        r"as `FlowMap\(net\)`",
    ),
    "no teacher": (
        lambda: loss(fd.LagrangianMapDistillation()),
        "`teacher` must be a callable",
    ),
    "no teacher on the diagonal": (
        lambda: loss(fd.objectives.VelocityDistillation()),
        "`teacher` must be a callable",
    ),
    "map as a teacher": (
        lambda: loss(fd.LagrangianMapDistillation(), mlp_map()),
        "must be a velocity .* Pass its `.velocity`",
    ),
    "velocity as the own map": (
        lambda: loss(fd.LagrangianSelfDistillation(), nonlinear_field),
        "`teacher` must be an instance of `AbstractFlowMap`; got nonlinear_field",
    ),
    "rule for rates": (
        lambda: loss(fd.LagrangianSelfDistillation(guidance=RATES), None, NULL),
        "`guidance` must be a `ClassifierFreeGuidance`",
    ),
    "rule for velocities": (
        lambda: loss(
            fd.objectives.MeanFlow(
                guidance=fd.velocities.ClassifierFreeGuidance(NULL, 2.0)
            ),
            None,
            NULL,
        ),
        "`guidance` must be a `MeanFlowGuidance`",
    ),
}
VALUES = {
    "name of a stop": (
        lambda: fd.LagrangianMapDistillation(stop_gradient="some"),
        "must be a `StopGradient`, or one of .*; got .some.",
    ),
    "stop without a term": (
        lambda: fd.LagrangianMapDistillation(stop_gradient=STOPS.TRANSPORT),
        "must be `StopGradient.NONE` or `StopGradient.TEACHER` or",
    ),
    "biased stop": (
        lambda: fd.objectives.StopGradientEulerian(stop_gradient="none"),
        "must be `StopGradient.TRANSPORT` or `StopGradient.DERIVATIVE` here",
    ),
    "stop of a derivative": (
        lambda: fd.objectives.ProgressiveSelfDistillation(stop_gradient="derivative"),
        "must be `StopGradient.NONE` or `StopGradient.TEACHER` here",
    ),
    "other stop": (
        lambda: fd.objectives.ImprovedMeanFlow(stop_gradient=STOPS.NONE),
        "got `StopGradient.NONE`",
    ),
    "split": (
        lambda: fd.objectives.ProgressiveSelfDistillation(split=1.0),
        r"`split` must be in \(0, 1\)",
    ),
    "clip": (lambda: fd.objectives.Shortcut(clip=0.0), "`clip` must be positive"),
    "alpha": (lambda: fd.objectives.AlphaFlow(alpha=1.5), r"`alpha` must be in \(0, 1\]"),
    "epsilon": (lambda: fd.objectives.AlignYourFlowEMD(epsilon=0.0), "`epsilon` must"),
    "epsilon at the end": (
        lambda: fd.objectives.AlignYourFlowLMD(epsilon=1.5),
        "`epsilon` must",
    ),
    "one jump": (
        lambda: fd.objectives.ProgressiveFlowMapMatching(1),
        "`num_jumps` must be at least 2; got 1",
    ),
    "step": (lambda: fd.objectives.FiniteDifference(0.0), "`step` must be positive"),
    "margin": (
        lambda: fd.velocities.PredictedVelocity(SHORT, None, "score", margin=-1.0),
        "`margin` must be at least 0",
    ),
    "too few shares": (lambda: pair((1.0,)), "one share for each part; got 1 for 2"),
    "no objectives": (lambda: fd.objectives.Mixture((), ()), "one share for each part"),
    "share of nothing": (lambda: pair((1.0, 0.0)), "`shares` must be positive"),
    "too few weights": (lambda: pair((1.0, 1.0), (1.0,)), "one weight for each part"),
    "small batch": (lambda: mean(pair((1.0, 99.0))), "too small for the shares"),
    "too many teachers": (
        lambda: mean(pair((1.0, 1.0)), teacher=(None,) * 3),
        "3 teachers and 2 objectives",
    ),
    "fewer conditions": (
        lambda: mean(fd.FlowMatching(), args=jnp.zeros((7, 2))),
        "Paths and conditions must be arrays with one",
    ),
    "rule beside a teacher": (
        lambda: loss(fd.objectives.MeanFlow(guidance=RATES), nonlinear_field),
        "Guide the teacher instead",
    ),
    "short teacher": (
        lambda: loss(fd.objectives.ConsistencyDistillation(), SHORT),
        "must return the shape",
    ),
    "short teacher of a quotient": (
        lambda: loss(fd.objectives.AlignYourFlowLMD(epsilon=0.1), SHORT),
        "second piece",
    ),
    "short rule": (
        lambda: loss(
            fd.objectives.ImprovedMeanFlow(guidance=lambda v, dI, t, x, args: dI[:1])
        ),
        "`guidance`",
    ),
    "weight of two numbers": (
        lambda: loss(fd.FlowMatching(weight=lambda s, t, error: jnp.ones(2) * error)),
        r"`weight\(s, t, squared_error\)` must be a scalar",
    ),
    "scale for LSD": (
        lambda: with_scale(fd.LagrangianSelfDistillation()),
        UNTOLD,
    ),
    "scale for ESD": (
        lambda: with_scale(fd.objectives.EulerianSelfDistillation()),
        UNTOLD,
    ),
    "scale for TVM": (
        lambda: with_scale(fd.objectives.TerminalVelocityMatching()),
        UNTOLD,
    ),
    "scale for PSD": (
        lambda: with_scale(fd.objectives.ProgressiveSelfDistillation()),
        UNTOLD,
    ),
    "gap of a weight": (lambda: fd.weights.InverseGap(min_gap=0.0), "`min_gap` must be"),
    "width of the end": (lambda: fd.weights.DataEndWeight(1.5), r"`width` .* \(0, 1\]"),
    "power": (lambda: fd.weights.PowerWeight(-1.0), "`power` must be at least 0"),
    "floor": (lambda: fd.weights.PowerWeight(1.0, 0.0), "`floor` must be positive"),
    "size": (lambda: fd.weights.PowerWeight(scale=0.0), "`scale` must be positive"),
    "floor of a tangent": (lambda: fd.weights.NormalisedTangent(0.0), "`floor` must be"),
    "size of a tangent": (
        lambda: fd.weights.NormalisedTangent(scale=-1.0),
        "`scale` must be positive",
    ),
    "c": (lambda: fd.weights.PseudoHuber(-0.1), "`c` must be at least 0"),
    "size of an error": (
        lambda: fd.weights.LearnedWeight(scale=0.0),
        "`scale` must be positive",
    ),
    "frequencies": (lambda: fd.weights.LearnedWeight(0), "`num_frequencies` must be"),
    "noise": (
        lambda: fd.weights.InverseNoiseGap(max_noise=0.0),
        "`max_noise` must be positive",
    ),
}


@pytest.mark.parametrize("name", [*TYPES, *VALUES])
def test_refusals(name):
    act, match = {**TYPES, **VALUES}[name]
    error = TypeError if name in TYPES else ValueError
    with without_type_checks(), pytest.raises(error, match=match):
        act()


@pytest.mark.parametrize(
    "times", [fd.times.UniformTriangle(), fd.times.EndAt(fd.times.LogitNormal())]
)
def test_self_distillation_without_a_diagonal(times):
    lonely = fd.LagrangianSelfDistillation(times)
    with pytest.raises(ValueError, match="puts no row there"):
        mean(lonely)
    both = fd.objectives.Mixture((lonely, fd.FlowMatching()), (1.0, 1.0))
    assert mean(both)[0] > 0


@pytest.mark.parametrize(
    "make, choice",
    [
        (fd.LagrangianMapDistillation, STOPS.NONE),
        (fd.objectives.EulerianMapDistillation, STOPS.TRANSPORT),
        (fd.objectives.StopGradientEulerian, STOPS.DERIVATIVE),
        (fd.objectives.EulerianSelfDistillation, STOPS.TEACHER),
        (fd.objectives.ProgressiveSelfDistillation, STOPS.NONE),
        (fd.objectives.ImprovedMeanFlow, STOPS.TEACHER),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stop_gradients_by_name(make, choice):
    with without_type_checks():
        assert make(stop_gradient=choice.value).stop_gradient is choice


def test_teachers_at_the_end_where_they_are_infinite():
    # Objectives ask there: the last step of a consistency grid, the first dyadic time.
    exact = gaussian_map()
    linear, velocity = fd.LinearInterpolant(), exact.velocity
    denoiser = lambda t, x, args: x + (1 - t) * velocity(t, x, args)
    noise = lambda t, x, args: x - t * velocity(t, x, args)
    at_data = fd.velocities.PredictedVelocity(denoiser, linear, "denoiser")
    at_base = fd.velocities.PredictedVelocity(noise, linear, "noise")
    for teacher, end in ((at_data, 1.0), (at_base, 0.0)):
        exactly = eqx.tree_at(lambda teacher: teacher.margin, teacher, 0.0)
        assert not np.all(np.isfinite(exactly(jnp.asarray(end), X0)))
        inside = jnp.asarray(abs(end - 2e-3))
        assert_close(teacher(inside, X0), velocity(inside, X0), 1e-9, 1e-9)
        assert_close(teacher(jnp.asarray(end), X0), velocity(end, X0), 1e-2, 1e-2)
    distillation, s = fd.objectives.ConsistencyDistillation(), jnp.asarray(0.98)
    assert distillation(exact, at_data, PATH, s, jnp.asarray(1.0)) < 1e-6


@pytest.mark.slow
def test_settings_may_be_traced():
    def loss(number):
        objectives = (
            fd.FlowMatching(weight=fd.weights.PowerWeight(number, number)),
            fd.FlowMatching(weight=fd.weights.PseudoHuber(number)),
            fd.FlowMatching(weight=fd.weights.DataEndWeight(number)),
            fd.FlowMatching(weight=fd.weights.NormalisedTangent(number)),
            fd.FlowMatching(weight=fd.weights.InverseGap(1.0, number)),
            fd.FlowMatching(fd.times.Diagonal(fd.times.LogitNormal(0.0, number))),
            fd.objectives.ProgressiveSelfDistillation(split=number),
            fd.objectives.Shortcut(clip=number),
        )
        mixture = fd.objectives.Mixture(objectives, (1.0,) * len(objectives))
        return fd.objectives.batch_loss(
            mixture, mlp_map(), None, batch(16), key=jr.key(0)
        )[0]

    with without_type_checks():
        assert_close(jax.jit(loss)(jnp.asarray(0.3)), loss(0.3), 1e-12)


@pytest.mark.slow
def test_mixture_weights_may_be_traced():
    def loss(weight):
        mixture = fd.objectives.Mixture(
            (fd.FlowMatching(), fd.objectives.MeanFlow()), (1.0, 1.0), (weight, 1.0)
        )
        return fd.objectives.batch_loss(mixture, mlp_map(), None, batch(), key=jr.key(0))[
            0
        ]

    slope = jax.jit(jax.grad(loss))(jnp.asarray(0.3))
    assert_close(slope, loss(jnp.asarray(1.0)) - loss(jnp.asarray(0.0)), 1e-9)


@pytest.mark.parametrize("saved", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_trajectories_with_times_of_their_own(saved):
    # Non-autonomous, each trajectory over an interval of its own.
    field = lambda t, x, args: -(1 + 2 * t) * x
    starts, gaps = jnp.asarray([0.0, 1.0, -0.5]), jnp.asarray([0.01, 1.0, 0.3])
    ts = starts[:, None] + gaps[:, None] * jnp.linspace(0, 1, saved)[None] ** 2
    ys = fd.solve_trajectories(field, jnp.asarray([[1.0], [2.0], [-0.4]]), ts)
    paths = fd.paths.TrajectoryPath(ts, ys)
    objective = fd.TrajectoryMatching(
        fd.times.GridTimes(jnp.linspace(0.0, 1.0, saved)), positions=True
    )

    def losses(flow_map):
        one = lambda path: objective(flow_map, None, path, 0.0, 1.0)
        return jax.vmap(one)(paths)

    assert_close(losses(fd.ODEFlowMap(field)), jnp.zeros(3), 1e-12)
    # A map that stands still misses the mean velocity of each over its own gap.
    still = losses(fd.FlowMap(lambda s, t, x, args: 0 * x))
    assert_close(still, ((ys[:, -1, 0] - ys[:, 0, 0]) / gaps) ** 2, 1e-12, 1e-12)


def test_positions_find_the_nearest_saved_time():
    path = fd.paths.TrajectoryPath(jnp.asarray([1.0, 2.0, 4.0]), jnp.zeros((3, 1)))
    positions = jnp.asarray([0.0, 0.2, 0.3, 0.7, 0.8, 1.0, 1.2])
    found = jax.vmap(path.saved_time)(positions)
    assert found.tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0]


def test_band_has_its_edge():
    # Dyadic jumps are of exactly that length.
    weight = fd.weights.BandWeight(0.25)
    error = jnp.asarray(3.0)
    assert float(weight(0.5, 0.75, error)) == 3.0
    assert float(weight(0.75, 0.5, error)) == 3.0
    assert float(weight(0.5, 0.76, error)) == 0.0


def test_clip_of_any_positive_length():
    assert fd.objectives.Shortcut(clip=0.5).clip == 0.5


def test_each_part_of_a_mixture_draws_for_its_own_rows():
    times = fd.times.Stratified(fd.times.UniformTriangle())
    mixture = fd.objectives.Mixture(
        (fd.FlowMatching(), fd.LagrangianMapDistillation(times)), (1.0, 3.0)
    )
    drawn = _batch.draw_times(mixture, 16, jr.key(0))
    assert all(leaf.shape == (16,) for leaf in drawn)
    np.testing.assert_array_equal(drawn.row, [*range(4), *range(12)])


def test_objectives_keep_their_settings():
    given = {
        "times": fd.times.Stratified(fd.times.UniformTriangle()),
        "weight": fd.weights.PowerWeight(0.3),
        "end": 0.9,
        "clip": 0.4,
        "epsilon": 0.02,
    }
    for name in public_objectives():
        cls = getattr(fd.objectives, name)
        known = inspect.signature(cls).parameters
        for setting, value in given.items():
            if setting in known and known[setting].default != value:
                made = cls(**{setting: value})
                assert getattr(made, setting) is value, (name, setting)


def test_a_weight_is_a_function():
    with without_type_checks(), pytest.raises(TypeError, match="`weight` must be a call"):
        fd.TrajectoryMatching(weight=None)


def test_flow_matching_learns_the_data_at_scale_one():
    flow_map = fd.FlowMap(lambda s, t, x, args: args.scale * x)
    at = lambda scale: fd.FlowMatching()(
        flow_map,
        None,
        PATH,
        S,
        S,
        SCALED._replace(scale=jnp.asarray(scale)),
        key=jr.key(0),
    )
    np.testing.assert_allclose(at(3.0), at(1.0), rtol=1e-12)
    exact = jnp.sum((PATH.evaluate(S) - PATH.derivative(S)) ** 2)
    np.testing.assert_allclose(at(3.0), exact, rtol=1e-9)
