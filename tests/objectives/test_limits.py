"""How the objectives are related: special cases, limits, and the papers' own clocks.

Everything is checked on a random map, for which no residual is small.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_close, finite_difference, max_abs, mlp_map, nonlinear_field

import flowdiffrax as fd

S, T = jnp.asarray(0.2), jnp.asarray(0.9)
X0, X1 = jnp.asarray([0.8, -0.5]), jnp.asarray([-0.3, 1.1])
PATH = fd.LinearInterpolant()(X0, X1)
MAP = mlp_map()
STOPS = fd.objectives.StopGradient


@eqx.filter_jit
def value_and_grad(objective, teacher=None, s=S, t=T, flow_map=MAP, path=PATH, key=None):
    loss = lambda flow_map: objective(flow_map, teacher, path, s, t, key=key)
    value, grads = eqx.filter_value_and_grad(loss)(flow_map)
    flat = [leaf.ravel() for leaf in jtu.tree_leaves(grads)]
    return value, jnp.concatenate(flat)


def gradient(objective, teacher=None, **kwargs):
    return value_and_grad(objective, teacher, **kwargs)[1]


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def plain(cls, **kwargs):
    return cls(weight=fd.weights.NoWeight(), **kwargs)


def constant_map(v):
    """A map whose velocity is `v` everywhere."""
    return fd.FlowMap(Constant(v))


class Constant(eqx.Module):
    value: jax.Array

    def __call__(self, s, t, x, args):
        return self.value


# --- limits -------------------------------------------------------------------------


def assert_first_order(errors):
    """Errors at steps 1e-1, 1e-2 and 1e-3 that fall with the step."""
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_allclose(errors[1] / errors[2], 10, rtol=0.15)
    assert errors[2] < 1e-2


STEPS = (1e-1, 1e-2, 1e-3)


@pytest.mark.parametrize("name", ["AlignYourFlowEMD", "AlignYourFlowLMD"])
def test_align_your_flow_has_its_limit(name):
    cls = getattr(fd.objectives, name)
    kwargs = {"tangent_scale": 1.0} if name == "AlignYourFlowEMD" else {}
    limit = value_and_grad(plain(cls, **kwargs), nonlinear_field)
    finite = [value_and_grad(plain(cls, epsilon=step), nonlinear_field) for step in STEPS]
    assert_first_order([relative(grads, limit[1]) for _, grads in finite])
    assert_first_order([abs(value / limit[0] - 1) for value, _ in finite])


def test_alpha_flow_goes_to_mean_flow():
    # With the adaptive weight as with none.
    for weight in (fd.weights.NoWeight(), fd.weights.PowerWeight(1.0, 1e-2)):
        limit = gradient(fd.objectives.MeanFlow(weight=weight))
        finite = [
            gradient(fd.objectives.AlphaFlow(weight=weight, alpha=step)) for step in STEPS
        ]
        assert_first_order([relative(grads, limit) for grads in finite])


def test_alpha_flow_has_the_gradient_of_its_paper():
    # That of the squared distance to a fixed target, over alpha.
    alpha = 0.3
    v = lambda s, t, x: MAP.average_velocity(s, t, x)
    u = S + alpha * (T - S)
    target = alpha * (X1 - X0) + (1 - alpha) * v(u, T, PATH.evaluate(u))

    def papers(flow_map):
        error = flow_map.average_velocity(S, T, PATH.evaluate(S)) - target
        return jnp.sum(error**2) / alpha

    leaves = jtu.tree_leaves(eqx.filter_grad(papers)(MAP))
    expected = jnp.concatenate([leaf.ravel() for leaf in leaves])
    assert_close(gradient(plain(fd.objectives.AlphaFlow, alpha=alpha)), expected, 1e-12)


def test_schedule_of_alpha_flow():
    # Half way through it is one half, and falls at the rate of a sigmoid, a quarter of
    # its steepness; it starts at 1 and stops at its floor.
    schedule = fd.objectives.sigmoid_schedule(1000)
    values = jax.vmap(schedule)(jnp.arange(1001))
    assert jnp.all(jnp.diff(values) <= 0)
    assert_close(values[0], 1.0, 1e-5, 0)
    assert_close(values[500], 0.5)
    assert_close((values[501] - values[499]) / 2, -25 / 4 / 1000, 1e-5, 0)
    assert_close(values[-1], 5e-3)
    other = fd.objectives.sigmoid_schedule(1000, temperature=8.0, low=0.1)
    assert_close((other(501) - other(499)) / 2, -8 / 4 / 1000, 1e-6, 0)
    assert_close(other(1000), 0.1)


def test_alpha_flow_at_one_is_flow_matching_of_every_jump():
    value, _ = value_and_grad(plain(fd.objectives.AlphaFlow, alpha=1.0))
    v_st = MAP.average_velocity(S, T, PATH.evaluate(S))
    assert_close(value, jnp.sum((v_st - (X1 - X0)) ** 2))


def test_consistency_training_goes_to_its_continuous_form():
    # In X rather than in v, hence the factor 1 - s.
    limit = (1 - S) * gradient(
        plain(fd.objectives.ContinuousConsistency), t=jnp.asarray(1.0)
    )
    eulerian = fd.objectives.StopGradientEulerian(stop_gradient=STOPS.DERIVATIVE)
    assert_close((1 - S) * gradient(eulerian, t=jnp.asarray(1.0)), limit)
    objective = plain(fd.objectives.ConsistencyTraining)
    finite = [gradient(objective, t=S + step) / step for step in STEPS]
    assert_first_order([relative(grads, limit) for grads in finite])


def test_consistency_distillation_goes_to_its_continuous_form():
    limit = gradient(
        plain(fd.objectives.ContinuousConsistency), nonlinear_field, t=jnp.asarray(1.0)
    )
    objective = plain(fd.objectives.ConsistencyDistillation)
    finite = [gradient(objective, nonlinear_field, t=S + step) / step for step in STEPS]
    assert_first_order([relative(grads, (1 - S) * limit) for grads in finite])


@pytest.mark.parametrize("end", ["start", "end"])
def test_progressive_goes_to_the_equations(end):
    # A first piece that is short sees the Eulerian residual, a last one the Lagrangian.
    x = PATH.evaluate(S)
    if end == "start":
        residual = fd.eulerian_residual(MAP, MAP.velocity, S, T, x)
    else:
        residual = fd.lagrangian_residual(MAP, MAP.velocity, S, T, x)
    errors = []
    for step in STEPS:
        split = step if end == "start" else 1 - step
        loss, _ = value_and_grad(fd.objectives.ProgressiveSelfDistillation(split=split))
        errors.append(abs(float(loss) / step**2 / float(jnp.sum(residual**2)) - 1))
    assert_first_order(errors)


# --- special cases ------------------------------------------------------------------


def test_shortcut_is_progressive_at_the_midpoint():
    times = {"s": jnp.asarray(0.25), "t": jnp.asarray(0.5)}
    other = mlp_map(1)
    made = value_and_grad(fd.objectives.Shortcut(clip=None), other, **times)
    assert_close(
        made, value_and_grad(fd.objectives.ProgressiveSelfDistillation(), other, **times)
    )


def test_shortcut_clips_its_target():
    far = constant_map(jnp.asarray([7.0, -0.3]))
    value, _ = value_and_grad(fd.objectives.Shortcut(clip=2.0), far)
    v_st = MAP.average_velocity(S, T, PATH.evaluate(S))
    assert_close(value, jnp.sum((v_st - jnp.asarray([2.0, -0.3])) ** 2))


def test_split_mean_flow_is_progressive_at_a_drawn_split():
    made = value_and_grad(fd.objectives.split_mean_flow(), key=jr.key(1))
    same = value_and_grad(
        fd.objectives.ProgressiveSelfDistillation(split=None), key=jr.key(1)
    )
    other = value_and_grad(fd.objectives.split_mean_flow(), key=jr.key(2))
    assert_close(made, same)
    assert abs(made[0] - other[0]) > 1e-6


def test_improved_mean_flow_along_the_data_is_mean_flow():
    along_data = constant_map(X1 - X0)
    improved = gradient(plain(fd.objectives.ImprovedMeanFlow), along_data)
    assert_close(improved, gradient(plain(fd.objectives.MeanFlow)), 1e-12)


def test_improved_mean_flow_is_another_estimate():
    improved, mean_flow = map(
        gradient, map(plain, (fd.objectives.ImprovedMeanFlow, fd.objectives.MeanFlow))
    )
    assert relative(improved, mean_flow) > 1e-2


def test_align_your_flow_is_mean_flow_along_the_teacher():
    align = plain(fd.objectives.AlignYourFlowEMD, tangent_scale=1.0)
    along_teacher = constant_map(nonlinear_field(S, PATH.evaluate(S), None))
    # Improved mean flow regresses on the data: so let the data move with the teacher.
    b_s = nonlinear_field(S, PATH.evaluate(S), None)
    x0 = PATH.evaluate(S) - S * b_s
    moved = fd.LinearInterpolant()(x0, x0 + b_s)
    expected = gradient(plain(fd.objectives.ImprovedMeanFlow), along_teacher, path=moved)
    assert_close(gradient(align, nonlinear_field), expected, 1e-11)


def test_tangent_scale_favours_straight_lines():
    # At scale r the gradient is r times the exact one, and 1 - r times that of a
    # regression of every average velocity on the teacher.
    r = 0.6
    exact = gradient(
        plain(fd.objectives.AlignYourFlowEMD, tangent_scale=1.0), nonlinear_field
    )
    straight = gradient(
        plain(fd.objectives.AlignYourFlowEMD, epsilon=1.0), nonlinear_field
    )
    mixed = gradient(
        plain(fd.objectives.AlignYourFlowEMD, tangent_scale=r), nonlinear_field
    )
    assert_close(mixed, r * exact + (1 - r) * straight, 1e-12)


def test_normalised_tangent_scales_the_gradient():
    bare = plain(fd.objectives.AlignYourFlowLMD)
    value, grads = value_and_grad(bare, nonlinear_field)
    weight = fd.weights.NormalisedTangent()
    scaled = gradient(fd.objectives.AlignYourFlowLMD(weight=weight), nonlinear_field)
    assert_close(scaled, grads / (jnp.sqrt(value) + 0.1), 1e-12)


def test_terminal_velocity_matching_is_the_sum_of_its_parts():
    parts = (
        value_and_grad(fd.LagrangianSelfDistillation()),
        value_and_grad(fd.FlowMatching()),
    )
    made = value_and_grad(fd.objectives.TerminalVelocityMatching())
    assert_close(made, jtu.tree_map(jnp.add, *parts), 1e-12)


def test_free_flow_is_lagrangian_from_the_base():
    zero = jnp.zeros(())
    lagrangian = fd.LagrangianMapDistillation(stop_gradient=STOPS.DERIVATIVE)
    made = value_and_grad(
        fd.objectives.free_flow(), nonlinear_field, s=zero, path=fd.paths.StatePath(X0)
    )
    assert_close(made, value_and_grad(lagrangian, nonlinear_field, s=zero))
    s, _ = fd.objectives.free_flow().times(jr.key(0), 32)
    assert max_abs(s) == 0


@pytest.mark.parametrize(
    "objective",
    [fd.LagrangianSelfDistillation(), fd.objectives.ProgressiveSelfDistillation()],
    ids=["lsd", "psd"],
)
def test_self_distillation_says_nothing_at_equal_times(objective):
    value, grads = value_and_grad(objective, s=T)
    assert max_abs((value, grads)) < 1e-12


DATA_DRIVEN = {
    "ee": fd.objectives.StopGradientEulerian(),
    "mean-flow": plain(fd.objectives.MeanFlow),
    "improved-mean-flow": plain(fd.objectives.ImprovedMeanFlow),
    "alpha-flow": plain(fd.objectives.AlphaFlow, alpha=1.0),
    "fmm": fd.objectives.FlowMapMatching(),
}


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_learning_from_data_is_flow_matching_at_equal_times(name):
    made = value_and_grad(DATA_DRIVEN[name], s=T)
    assert_close(made, value_and_grad(fd.FlowMatching()), 1e-11)


DIAGONAL = DATA_DRIVEN | {
    "lsd": fd.LagrangianSelfDistillation(),
    "esd": fd.objectives.EulerianSelfDistillation(),
    "psd": fd.objectives.ProgressiveSelfDistillation(),
    "shortcut": fd.objectives.Shortcut(),
    "split": fd.objectives.split_mean_flow(),
    "naive": fd.objectives.NaiveEulerian(),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_diagonal_rows_are_flow_matching(name):
    made = DIAGONAL[name].on_diagonal(MAP, None, PATH, T)
    assert_close(made, fd.FlowMatching()(MAP, None, PATH, T, T), 1e-11)


FROM_TEACHER = {
    "lmd": fd.LagrangianMapDistillation(),
    "emd": fd.objectives.EulerianMapDistillation(),
    "ayf-emd": plain(fd.objectives.AlignYourFlowEMD),
    "ayf-lmd": plain(fd.objectives.AlignYourFlowLMD),
    "mean-flow": plain(fd.objectives.MeanFlow),
    "scm": plain(fd.objectives.ContinuousConsistency),
}


@pytest.mark.parametrize("name", FROM_TEACHER)
def test_diagonal_rows_follow_the_teacher(name):
    objective = FROM_TEACHER[name]
    made = objective.on_diagonal(MAP, nonlinear_field, PATH, T)
    expected = fd.objectives.VelocityDistillation()(MAP, nonlinear_field, PATH, T, T)
    assert_close(made, expected, 1e-11)
    assert_close(objective(MAP, nonlinear_field, PATH, T, T), expected, 1e-11)


class OnlyDiagonal(fd.AbstractFlowMap):
    """The identity, but for a diagonal that knows better."""

    def jump(self, s, t, x, args):
        return x

    def tangent(self, t, x, args):
        return nonlinear_field(t, x, args)


def test_a_cheat_that_the_semigroup_cannot_see():
    x = PATH.evaluate(S)
    assert max_abs(fd.semigroup_residual(OnlyDiagonal(), S, 0.5, T, x)) == 0
    made = fd.lagrangian_residual(OnlyDiagonal(), nonlinear_field, S, T, x)
    assert_close(made, -nonlinear_field(T, x, None))


# --- the papers' own clocks ---------------------------------------------------------


def test_mean_flow_on_the_papers_clock():
    # Data at time 0: u(z, r, t) is the mean of dz/dt over [r, t], z = (1 - t) x + t e.
    u = lambda z, r, t: -MAP.average_velocity(1 - t, 1 - r, z)
    r, t = 1 - T, 1 - S
    z, v = (1 - t) * X1 + t * X0, X0 - X1
    along = lambda h: u(z + h * v, r, t + h)
    du_dt = finite_difference(along, jnp.zeros(()), jnp.ones(()))
    expected = jnp.sum((u(z, r, t) - (v - (t - r) * du_dt)) ** 2)
    assert_close(value_and_grad(plain(fd.objectives.MeanFlow))[0], expected, 1e-8, 1e-8)


def test_improved_mean_flow_on_the_papers_clock():
    u = lambda z, r, t: -MAP.average_velocity(1 - t, 1 - r, z)
    r, t = 1 - T, 1 - S
    z, v = (1 - t) * X1 + t * X0, u((1 - t) * X1 + t * X0, t, t)
    du_dt = finite_difference(
        lambda h: u(z + h * v, r, t + h), jnp.zeros(()), jnp.ones(())
    )
    compound = u(z, r, t) + (t - r) * du_dt
    expected = jnp.sum((compound - (X0 - X1)) ** 2)
    assert_close(
        value_and_grad(plain(fd.objectives.ImprovedMeanFlow))[0], expected, 1e-8, 1e-8
    )


class TrigFlow(fd.AbstractFlowMap):
    """sCM's form of a consistency function, on our clock."""

    net: fd.FlowMap
    sigma: float = 0.5

    def jump(self, s, t, x, args):
        angle = jnp.pi / 2 * (1 - s)
        F = self.net.average_velocity(angle, angle, x / self.sigma)
        return jnp.cos(angle) * x - jnp.sin(angle) * self.sigma * F


def test_scm_on_the_papers_clock():
    sigma = 0.5
    path = fd.paths.TrigonometricInterpolant()(sigma * X0, X1)
    angle = jnp.pi / 2 * (1 - S)

    def f(flow_map, angle, x):
        return flow_map(1 - 2 * angle / jnp.pi, jnp.asarray(1.0), x)

    flow_map = TrigFlow(MAP)
    x = jnp.cos(angle) * X1 + jnp.sin(angle) * sigma * X0
    dx = jnp.cos(angle) * sigma * X0 - jnp.sin(angle) * X1
    along = lambda h: f(flow_map, angle + h, x + h * dx)
    df = finite_difference(along, jnp.zeros(()), jnp.ones(()))

    def papers(flow_map):
        F = flow_map.net.average_velocity(angle, angle, x / sigma)
        fixed = jax.lax.stop_gradient(F) + jnp.cos(angle) * df
        return jnp.sum((F - fixed) ** 2)

    grads = jtu.tree_leaves(eqx.filter_grad(papers)(flow_map))
    expected = jnp.concatenate([leaf.ravel() for leaf in grads])
    one = jnp.asarray(1.0)
    made = gradient(
        plain(fd.objectives.ContinuousConsistency), t=one, flow_map=flow_map, path=path
    )
    # The two differ by a function of time.
    factor = jnp.dot(made, expected) / jnp.dot(expected, expected)
    assert factor > 0
    assert relative(made, factor * expected) < 1e-7


# --- what is held fixed -------------------------------------------------------------

SELF_TAUGHT = {
    "lsd": lambda: fd.LagrangianSelfDistillation(),
    "esd": lambda: fd.objectives.EulerianSelfDistillation(),
    "psd": lambda: fd.objectives.ProgressiveSelfDistillation(),
    "shortcut": lambda: fd.objectives.Shortcut(),
    "split": lambda: fd.objectives.split_mean_flow(split=0.3),
    "tvm": lambda: fd.objectives.TerminalVelocityMatching(),
    "improved-mean-flow": lambda: fd.objectives.ImprovedMeanFlow(),
    "consistency": lambda: fd.objectives.ConsistencyTraining(),
}


@pytest.mark.parametrize("name", SELF_TAUGHT)
def test_own_weights_teach_as_a_copy_does(name):
    # A teacher that is given has no gradient: so the map's own has none either.
    objective = SELF_TAUGHT[name]()
    made = value_and_grad(objective)
    assert_close(made, value_and_grad(objective, MAP), 1e-12)
    assert relative(gradient(objective, mlp_map(1)), made[1]) > 1e-3


def test_lagrangian_self_distillation_as_written():
    free = fd.LagrangianSelfDistillation(stop_gradient=STOPS.NONE)
    assert relative(gradient(free), gradient(fd.LagrangianSelfDistillation())) > 1e-2


def test_eulerian_self_distillation_by_finite_differences():
    x = PATH.evaluate(S)
    along = lambda h: MAP(S + h, T, x + h * MAP.velocity(S, x))
    residual = finite_difference(along, jnp.zeros(()), jnp.ones(()))
    value = fd.objectives.EulerianSelfDistillation()(MAP, None, PATH, S, T)
    assert_close(value, jnp.sum(residual**2), 1e-7, 1e-7)


def test_transport_is_held_fixed():
    # Only the derivative in s is trained: to it, the other part is a constant.
    x, w = PATH.evaluate(S), X1 - X0
    slid = finite_difference(lambda h: MAP(S, T, x + h * w), jnp.zeros(()), jnp.ones(()))

    def papers(flow_map):
        _, dX_ds = jax.jvp(lambda s: flow_map(s, T, x), (S,), (jnp.ones(()),))
        return jnp.sum((dX_ds + slid) ** 2)

    leaves = jtu.tree_leaves(eqx.filter_grad(papers)(MAP))
    expected = jnp.concatenate([leaf.ravel() for leaf in leaves])
    assert_close(gradient(fd.objectives.StopGradientEulerian()), expected, 1e-7, 1e-7)


def test_flow_map_matching_by_finite_differences():
    I_t = PATH.evaluate(T)
    y = MAP(T, S, I_t)
    rate = finite_difference(lambda t: MAP(S, t, y), T, jnp.ones(()))
    rate_error = jnp.sum((rate - (X1 - X0)) ** 2)
    round_trip = jnp.sum((MAP(S, T, y) - I_t) ** 2)
    for factor, objective in (
        (1.0, fd.objectives.FlowMapMatching()),
        (3.0, fd.objectives.FlowMapMatching(inverse_weight=3.0)),
    ):
        expected = rate_error + factor * round_trip
        assert_close(objective(MAP, None, PATH, S, T), expected, 1e-7, 1e-7)


def test_flow_map_matching_holds_nothing_fixed():
    loss = lambda flow_map: fd.objectives.FlowMapMatching()(flow_map, None, PATH, S, T)
    weights, rest = eqx.partition(MAP, eqx.is_inexact_array)
    value = lambda weights: loss(eqx.combine(weights, rest))
    direction = jtu.tree_map(jnp.ones_like, weights)
    expected = finite_difference(value, weights, direction, 1e-6)
    assert_close(jnp.sum(gradient(fd.objectives.FlowMapMatching())), expected, 1e-6, 1e-6)


# --- derivatives without forward mode -----------------------------------------------

WITH_JVP = {
    "lmd": (fd.LagrangianMapDistillation, nonlinear_field),
    "emd": (fd.objectives.EulerianMapDistillation, nonlinear_field),
    "ee": (fd.objectives.StopGradientEulerian, None),
    "naive": (fd.objectives.NaiveEulerian, None),
    "fmm": (fd.objectives.FlowMapMatching, None),
    "lsd": (fd.LagrangianSelfDistillation, None),
    "esd": (fd.objectives.EulerianSelfDistillation, None),
    "mean-flow": (fd.objectives.MeanFlow, None),
    "improved-mean-flow": (fd.objectives.ImprovedMeanFlow, None),
    "ayf-emd": (fd.objectives.AlignYourFlowEMD, nonlinear_field),
    "ayf-lmd": (fd.objectives.AlignYourFlowLMD, nonlinear_field),
    "scm": (fd.objectives.ContinuousConsistency, None),
    "tvm": (fd.objectives.TerminalVelocityMatching, None),
    "free-flow": (fd.objectives.free_flow, nonlinear_field),
}


@pytest.mark.parametrize("name", WITH_JVP)
def test_finite_differences(name):
    cls, teacher = WITH_JVP[name]
    expected = value_and_grad(cls(), teacher)
    calls, derivative = [], fd.objectives.FiniteDifference(1e-5)

    def counted(*args, **kwargs):
        calls.append(args)
        return derivative(*args, **kwargs)

    made = value_and_grad(cls(jvp=counted), teacher)
    assert calls
    assert_close(made, expected, 1e-7, 1e-6)


def test_finite_differences_call_no_forward_mode():
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    net = lambda s, t, x, args: sine(x + s - 2 * t)
    objective = fd.LagrangianSelfDistillation(jvp=fd.objectives.FiniteDifference(1e-5))
    value = objective(fd.FlowMap(net), None, PATH, S, T)
    smooth = fd.FlowMap(lambda s, t, x, args: jnp.sin(x + s - 2 * t))
    assert_close(value, fd.LagrangianSelfDistillation()(smooth, None, PATH, S, T), 1e-8)
    with pytest.raises(TypeError, match="custom_vjp"):
        fd.LagrangianSelfDistillation()(fd.FlowMap(net), None, PATH, S, T)
