"""Guidance: of teachers, of maps being sampled, within training, and its batches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    assert_close,
    jump_solve,
    max_abs,
    mlp_map,
    tight_solve,
    unroll,
    without_type_checks,
)
from scipy import integrate, stats

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
MEANS = np.asarray([[1.0, 0.5], [-0.8, 0.9]])
LABEL, OTHER, NONE = 0, 1, 2


def mixture_field():
    """The exact velocities of two Gaussian classes, and of both together as class 2."""
    make = fd.exact.GaussianMixtureVelocity
    classes = [make([1.0], mean[None], [0.1]) for mean in MEANS]
    both = make([0.3, 0.7], MEANS, [0.1, 0.1])

    def field(t, x, label):
        return jnp.stack([velocity(t, x) for velocity in (*classes, both)])[label]

    return field


def with_scale(field):
    """A network with the scale as an input that knows scale 1 only."""

    def velocity(t, x, args):
        return jnp.where(args.scale == 1, field(t, x, args.condition), jnp.nan)

    return velocity


class LinearMap(fd.AbstractFlowMap):
    """The exact map of dx/dt = A x + c, whose condition is c."""

    time_range = (-1.0, 2.0)

    def exact(self, offset):
        return fd.exact.LinearFlowMap([[0.2, -1.1], [0.7, -0.4]], offset)

    def jump(self, s, t, x, args):
        return self.exact(args)(s, t, x)

    def tangent(self, t, x, args):
        return self.exact(args).velocity(t, x)


class GaussianMap(fd.AbstractFlowMap):
    """The exact map from a Gaussian base to a Gaussian whose mean is the condition."""

    time_range = (0.0, 1.0)

    def jump(self, s, t, x, args):
        return fd.exact.GaussianFlowMap(target_std=0.4, target_mean=args)(s, t, x)


C = jnp.asarray([0.6, -0.3])
NULL = jnp.asarray([-0.2, 0.1])
# Gaussians of one covariance have velocities that are affine in the mean. So the guided
# Gaussian is a Gaussian again, with the extrapolated mean.
GUIDED_MEAN = np.asarray([1.8, -0.9])  # at scale 2.5

# --- classifier-free guidance -------------------------------------------------------


def guided(scale, null=NONE, field=None, **kwargs):
    field = mixture_field() if field is None else field
    guidance = fd.velocities.ClassifierFreeGuidance(null, scale, **kwargs)
    return fd.velocities.GuidedVelocity(field, guidance)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_scale_one_is_the_condition(t):
    assert_close(guided(1.0)(t, X, LABEL), mixture_field()(t, X, LABEL), 0, 0)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_scale_zero_is_no_condition(t):
    assert_close(guided(0.0)(t, X, LABEL), mixture_field()(t, X, NONE), 1e-14)


def test_linear_in_the_scale():
    at = lambda scale: guided(scale)(0.4, X, LABEL)
    assert_close((at(-1.0) + at(5.0)) / 2, at(2.0), 1e-13)
    assert max_abs(at(5.0) - at(-1.0)) > 0.1


def test_guided_gaussian_is_the_gaussian_of_the_guided_mean():
    teacher = guided(2.5, NULL, GaussianMap().velocity)
    out = tight_solve(teacher, 0.0, 1.0, X, C).ys[0]
    assert_close(out, GaussianMap()(0.0, 1.0, X, GUIDED_MEAN), 1e-9)


def test_guidance_leads_away_from_the_other_class():
    x0 = jr.normal(jr.key(0), (20, 2))

    @jax.jit
    @jax.vmap
    def end(x0, scale):
        euler = lambda k, x: x + guided(scale)(k / 50, x, LABEL) / 50
        return jax.lax.fori_loop(0, 50, euler, x0)

    away = MEANS[LABEL] - MEANS[OTHER]
    progress = (end(x0, jnp.full(20, 3.0)) - end(x0, jnp.ones(20))) @ away
    # Next to nothing only where the other class is out of sight already.
    assert (progress > 0).all() and progress.mean() > 0.1


def test_no_condition_is_not_guided():
    assert_close(guided(3.0)(0.4, X, NONE), mixture_field()(0.4, X, NONE), 0, 0)


@pytest.mark.parametrize("t, inside", [(0.3, 1), (0.7, 1), (0.299, 0), (0.701, 0)])
@pytest.mark.parametrize("make", [float, np.float64, jnp.float64, jnp.float32])
def test_interval_includes_its_ends(t, inside, make):
    out = guided(3.0, interval=(0.3, 0.7))(make(t), X, LABEL)
    assert_close(out, guided(3.0 if inside else 1.0)(make(t), X, LABEL), 1e-12)


def test_rounded_end_time_is_inside():
    t = np.nextafter(1.0, 2.0)
    out = guided(0.0, NULL, LinearMap().velocity)(t, X, C)
    assert_close(out, LinearMap().velocity(t, X, NULL))


def test_interval_without_end():
    interval = (-float("inf"), float("inf"))
    out = guided(0.0, NULL, LinearMap().velocity, interval=interval)(50.0, X, C)
    assert_close(out, LinearMap().velocity(50.0, X, NULL))


def test_scale_from_args():
    teacher = guided(None, field=with_scale(mixture_field()))
    out = teacher(0.4, X, fd.velocities.GuidanceArgs(LABEL, 3.0))
    assert_close(out, guided(3.0)(0.4, X, LABEL))


def test_scale_from_args_outside_the_interval():
    teacher = guided(None, field=with_scale(mixture_field()), interval=(0.0, 0.3))
    out = teacher(0.4, X, fd.velocities.GuidanceArgs(LABEL, 3.0))
    assert_close(out, mixture_field()(0.4, X, LABEL), 0, 0)


def test_batch_of_scales():
    teacher = guided(None, field=with_scale(mixture_field()))
    args = fd.velocities.GuidanceArgs(
        jnp.asarray([0, 1, 2]), jnp.asarray([1.0, 2.0, 3.0])
    )
    out = jax.jit(jax.vmap(teacher, in_axes=(None, None, 0)))(0.4, X, args)
    assert_close(out, jnp.stack([guided(k + 1.0)(0.4, X, k) for k in range(3)]))


@pytest.mark.parametrize("scale", [2.0, 2, jnp.float64(2), jnp.float32(2)])
def test_scale_one_has_the_type_of_the_scale(scale):
    seen = []

    def field(t, x, args):
        seen.append(args.scale)
        return x

    guided(None, 0, field)(0.4, X, fd.velocities.GuidanceArgs(1, scale))
    assert [float(one) for one in seen] == [1.0, 1.0]
    if eqx.is_array(scale):
        assert {one.dtype for one in seen} == {scale.dtype}
    else:
        assert {type(one) for one in seen} == {float}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("scale", [3.0, 3, np.float64(3), jnp.asarray(3.0)])
def test_state_keeps_its_dtype(dtype, scale):
    x = {"a": jnp.ones(2, dtype), "b": (jnp.ones((1, 2), dtype),)}
    field = lambda t, x, c: jtu.tree_map(lambda leaf: c.astype(leaf.dtype) * leaf, x)
    out = guided(scale, 1.0, field)(0.4, x, jnp.float32(2))
    assert_close(out, jtu.tree_map(lambda leaf: 4 * leaf, x), 1e-2, 1e-2)
    assert {leaf.dtype for leaf in jtu.tree_leaves(out)} == {jnp.dtype(dtype)}


def test_scale_is_an_array_of_the_module():
    teacher = guided(np.asarray(2.0), np.asarray([0.1, 0.2]), LinearMap().velocity)
    arrays = jtu.tree_leaves(eqx.filter(teacher, eqx.is_array))
    assert sorted(leaf.shape for leaf in arrays) == [(), (2,)]


def test_gradient_in_the_scale():
    field = LinearMap().velocity
    value = lambda scale: guided(scale, NULL, field)(0.4, X, C)
    # dx/dt = A x + c: the condition moves the velocity by as much.
    assert_close(jax.jacfwd(value)(jnp.asarray(2.0)), C - NULL)


def test_null_is_as_weak_as_the_condition():
    # Strict promotion: a strong integer would not go with a float32 state.
    x = X.astype(jnp.float32)
    teacher = guided(0.0, 0, lambda t, x, c: x * c)
    assert_close(teacher(0.4, x, 3), 0 * x)
    assert_close(jax.jit(teacher)(0.4, x, 3), 0 * x)


def test_condition_may_be_a_pytree():
    field = lambda t, x, args: x * args["a"] + args["b"][0]
    condition = {"a": jnp.asarray(2.0), "b": (jnp.asarray([1.0, 0.0]),)}
    null = {"a": 0, "b": (np.zeros(2),)}
    out = guided(0.0, null, field)(0.4, X, condition)
    assert_close(out, jnp.zeros(2))


# --- autoguidance -------------------------------------------------------------------

STRONG = lambda t, x, args: jnp.sin(x + t) * args
WEAK = lambda t, x, args: 0.9 * jnp.sin(x) + 0.1 * args


def test_autoguidance_at_one_and_zero():
    assert_close(
        fd.velocities.AutoguidedVelocity(STRONG, WEAK, 1.0)(0.4, X, 2.0),
        STRONG(0.4, X, 2.0),
    )
    assert_close(
        fd.velocities.AutoguidedVelocity(STRONG, WEAK, 0.0)(0.4, X, 2.0),
        WEAK(0.4, X, 2.0),
    )


def test_autoguidance_at_two_has_the_strong_one_in_the_middle():
    out = fd.velocities.AutoguidedVelocity(STRONG, WEAK, 2.0)(0.4, X, 2.0)
    assert_close((out + WEAK(0.4, X, 2.0)) / 2, STRONG(0.4, X, 2.0))


def test_autoguidance_scale_from_args():
    teacher = fd.velocities.AutoguidedVelocity(STRONG, WEAK)
    args = fd.velocities.GuidanceArgs(jnp.asarray([2.0, 1.0]), jnp.asarray([3.0, 0.5]))
    out = jax.vmap(teacher, in_axes=(None, None, 0))(0.4, X, args)
    fixed = lambda scale: fd.velocities.AutoguidedVelocity(STRONG, WEAK, scale)
    expected = [fixed(3.0)(0.4, X, 2.0), fixed(0.5)(0.4, X, 1.0)]
    assert_close(out, jnp.stack(expected))


def test_autoguidance_by_a_field_without_condition_is_classifier_free():
    field = mixture_field()
    weak = lambda t, x, args: field(t, x, NONE)
    out = fd.velocities.AutoguidedVelocity(field, weak, 3.0)(0.4, X, LABEL)
    assert_close(out, guided(3.0)(0.4, X, LABEL))


# --- guided maps --------------------------------------------------------------------


def guided_map(scale=2.5, flow_map=None, **kwargs):
    flow_map = LinearMap() if flow_map is None else flow_map
    return fd.velocities.GuidedFlowMap(
        flow_map, fd.velocities.ClassifierFreeGuidance(NULL, scale, **kwargs)
    )


@pytest.mark.parametrize("s, t", [(0.0, 1.0), (0.9, 0.2)])
def test_guided_linear_map_is_the_map_of_the_guided_velocity(s, t):
    # Average velocities are affine in the condition here, so that guidance commutes.
    teacher = guided(2.5, NULL, LinearMap().velocity)
    expected = tight_solve(teacher, s, t, X, C).ys[0]
    assert_close(guided_map()(s, t, X, C), expected, 1e-10)


def test_guided_gaussian_map():
    out = guided_map(flow_map=GaussianMap())(0.2, 0.9, X, C)
    assert_close(out, GaussianMap()(0.2, 0.9, X, GUIDED_MEAN))


def test_guided_map_on_the_diagonal():
    flow_map = guided_map(flow_map=mlp_map())
    teacher = guided(2.5, NULL, mlp_map().velocity)
    assert_close(flow_map(0.4, 0.4, X, C), X, 0, 0)
    assert_close(flow_map.velocity(0.4, X, C), teacher(0.4, X, C))
    assert_close(flow_map.average_velocity(0.4, 0.4, X, C), teacher(0.4, X, C))


def test_guided_map_in_the_solver_and_in_sample():
    ts = jnp.linspace(0.0, 1.0, 5)
    expected = unroll(guided_map(), ts, X, C)
    assert_close(jump_solve(guided_map(), 0.0, 1.0, X, C).ys[0], expected)
    assert_close(fd.sample(guided_map(), X, ts, C), expected)


def test_guided_map_backwards_in_the_solver():
    there = guided_map()(0.0, 1.0, X, C)
    back = jump_solve(guided_map(), 1.0, 0.0, there, C, steps=3).ys[0]
    assert_close(back, X, 1e-9)


def test_guided_map_interval_is_that_of_the_start():
    flow_map = guided_map(interval=(0.3, 0.6))
    inside, outside = flow_map(0.5, 0.9, X, C), flow_map(0.2, 0.5, X, C)
    assert_close(inside, guided_map()(0.5, 0.9, X, C))
    assert_close(outside, LinearMap()(0.2, 0.5, X, C))


def test_guided_map_has_the_range_of_the_map():
    assert guided_map().time_range == (-1.0, 2.0)


def test_guided_map_of_a_network_with_scales():
    def net(s, t, x, args):
        condition, scale = args
        return jnp.where(scale == 1, mlp_map().net(s, t, x, condition), jnp.nan)

    flow_map = guided_map(None, fd.FlowMap(net))
    args = fd.velocities.GuidanceArgs(jnp.stack([C, C]), jnp.asarray([2.5, 1.0]))
    out = jax.jit(jax.vmap(flow_map, in_axes=(None, None, None, 0)))(0.1, 0.8, X, args)
    expected = [guided_map(a, mlp_map())(0.1, 0.8, X, C) for a in (2.5, 1.0)]
    assert_close(out, jnp.stack(expected))


def test_guided_map_of_a_float32_network():
    cast = lambda tree: jtu.tree_map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, tree
    )
    flow_map = fd.velocities.GuidedFlowMap(
        cast(mlp_map()), fd.velocities.ClassifierFreeGuidance(NULL, jnp.asarray(2.5))
    )
    out = flow_map(0.1, 0.8, cast(X), cast(C))
    assert out.dtype == jnp.float32
    assert_close(out, cast(guided_map(flow_map=mlp_map())(0.1, 0.8, X, C)), 1e-5, 1e-5)


def test_gradient_through_a_guided_map():
    loss = lambda flow_map: jnp.sum(fd.sample(flow_map, X, 2, C) ** 2)
    gradients = eqx.filter_jit(eqx.filter_grad(loss))(guided_map(flow_map=mlp_map()))
    assert all(max_abs(leaf) > 0 for leaf in jtu.tree_leaves(gradients))


# --- guidance within training -------------------------------------------------------

FACTORS = [(1.0, 0.5, 2.0), (2.0, 0.25, 8 / 3), (1.0, 0.0, 1.0), (0.6, 0.8, 3.0)]


@pytest.mark.parametrize("omega, kappa, scale", FACTORS)
def test_effective_scale(omega, kappa, scale):
    guidance = fd.velocities.MeanFlowGuidance(NONE, omega, kappa)
    np.testing.assert_allclose(guidance.effective_scale, scale, rtol=1e-12)
    assert fd.velocities.MeanFlowGuidance(NONE, kappa=None).effective_scale is None


def learnt(scale):
    """A network that has learnt guidance at a scale, and the plain velocity for none."""
    return guided(scale)


@pytest.mark.parametrize("omega, kappa, scale", FACTORS)
def test_guided_field_is_the_fixed_point(omega, kappa, scale):
    # The target is affine in dI, whose mean over the data is the plain velocity.
    guidance = fd.velocities.MeanFlowGuidance(NONE, omega, kappa)
    mean = mixture_field()(0.4, X, LABEL)
    target = guidance(learnt(scale), mean, 0.4, X, LABEL)
    assert_close(target, learnt(scale)(0.4, X, LABEL), 1e-12)


def test_regression_on_data_has_the_guided_field_for_its_mean():
    # 20,000 paths of one class: the residual has mean zero, against any function of I_t.
    size, t = 20_000, 0.4
    x0, noise = jr.normal(jr.key(0), (2, size, 2))
    x1 = MEANS[None, LABEL] + jnp.sqrt(0.1) * noise
    velocity, guidance = learnt(2.0), fd.velocities.MeanFlowGuidance(NONE)

    def residual(x0, x1):
        I_t, dI = (1 - t) * x0 + t * x1, x1 - x0
        error = guidance(velocity, dI, t, I_t, LABEL) - velocity(t, I_t, LABEL)
        return jnp.concatenate([error, error * I_t])

    residuals = np.asarray(jax.jit(jax.vmap(residual))(x0, x1))
    errors = residuals.std(0) / np.sqrt(size)
    assert (np.abs(residuals.mean(0)) < 4 * errors).all()


def test_fixed_point_at_every_scale():
    plain = mixture_field()

    def velocity(t, x, args):
        # Without condition the network has learnt scale 1 only.
        is_known = (args.condition != NONE) | (args.scale == 1)
        out = guided(args.scale)(t, x, args.condition)
        return jnp.where(is_known, out, jnp.nan)

    guidance = fd.velocities.MeanFlowGuidance(NONE, kappa=None)
    for scale in (1.0, 2.5, 8.0):
        args = fd.velocities.GuidanceArgs(jnp.asarray(LABEL), jnp.asarray(scale))
        target = guidance(velocity, plain(0.4, X, LABEL), 0.4, X, args)
        assert_close(target, velocity(0.4, X, args), 1e-11)


def test_scale_from_args_has_omega_too():
    args = fd.velocities.GuidanceArgs(LABEL, 3.0)
    guidance = fd.velocities.MeanFlowGuidance(NONE, omega=2.0, kappa=None)
    velocity = lambda t, x, args: guided(3.0)(t, x, args.condition)
    target = guidance(velocity, mixture_field()(0.4, X, LABEL), 0.4, X, args)
    assert_close(target, guided(3.0)(0.4, X, LABEL), 1e-12)


@pytest.mark.parametrize("kappa", [0.5, None])
def test_dropped_examples_learn_the_plain_velocity(kappa):
    guidance = fd.velocities.MeanFlowGuidance(NONE, kappa=kappa)
    labels, dI = jnp.asarray([NONE, LABEL]), jnp.asarray([[0.3, 0.1], [0.3, 0.1]])
    args = labels if kappa else fd.velocities.GuidanceArgs(labels, jnp.full(2, 2.0))
    field = mixture_field()
    velocity = field if kappa else lambda t, x, args: field(t, x, args.condition)
    target = jax.jit(jax.vmap(lambda dI, c: guidance(velocity, dI, 0.4, X, c)))(dI, args)
    assert_close(target[0], dI[0], 0, 0)
    assert max_abs(target[1] - dI[1]) > 1e-2


def test_partly_equal_to_null_is_not_dropped():
    guidance = fd.velocities.MeanFlowGuidance({"a": 0, "b": np.zeros(2)})
    velocity = lambda t, x, args: x + args["a"] + args["b"]
    target = lambda a, b: guidance(velocity, X, 0.4, X, {"a": a, "b": jnp.asarray(b)})
    assert_close(target(0, [0.0, 0.0]), X, 0, 0)
    assert max_abs(target(0, [0.0, 1.0]) - X) > 0.1
    assert max_abs(target(1, [0.0, 0.0]) - X) > 0.1


@pytest.mark.parametrize("t, inside", [(0.3, True), (0.7, True), (0.2, False)])
def test_training_interval(t, inside):
    guidance = fd.velocities.MeanFlowGuidance(NONE, interval=(0.3, 0.7))
    dI = jnp.asarray([0.3, 0.1])
    everywhere = fd.velocities.MeanFlowGuidance(NONE)(mixture_field(), dI, t, X, LABEL)
    out = guidance(mixture_field(), dI, t, X, LABEL)
    assert_close(out, everywhere if inside else dI, 0, 0)


def test_target_keeps_structure_and_dtypes():
    x = {"a": jnp.ones(2, jnp.float32), "b": (jnp.ones((1, 2), jnp.bfloat16),)}
    velocity = lambda t, x, args: x
    out = fd.velocities.MeanFlowGuidance(0, jnp.asarray(2.0))(velocity, x, 0.4, x, 1)
    # The factors sum to one.
    assert_close(out, x, 1e-2)
    assert jtu.tree_map(jnp.result_type, out) == jtu.tree_map(jnp.result_type, x)


def test_target_has_gradients_for_the_objective_to_stop():
    guidance = fd.velocities.MeanFlowGuidance(NULL)
    loss = lambda m: jnp.sum(guidance(m.velocity, X, 0.4, X, C))
    gradients = jtu.tree_leaves(eqx.filter_grad(loss)(mlp_map()))
    assert max(map(max_abs, gradients)) > 0


# --- batches ------------------------------------------------------------------------

DATA = jnp.stack([jnp.arange(10.0)] * 2, axis=1)


def batches(batch_size=6, args=None):
    args = jnp.arange(10) if args is None else args
    return fd.data.InterpolantBatches(fd.LinearInterpolant(), DATA, batch_size, args=args)


def dropout(*args, size=6, **kwargs):
    return fd.data.ConditionDropout(batches(size), 10, *args, **kwargs)


@pytest.mark.parametrize("rate", [0.1, 0.6, jnp.float32(0.3)])
def test_dropout_rate(rate):
    # 20,000 examples, four standard errors.
    _, labels = eqx.filter_jit(dropout(rate, size=20_000))(jr.key(0))
    rate = float(rate)
    error = np.sqrt(rate * (1 - rate) / 20_000)
    assert abs(np.mean(np.asarray(labels) == 10) - rate) < 4 * error


def test_dropout_of_none_and_of_all():
    _, labels = dropout(0.0)(jr.key(0))
    assert (labels < 10).all()
    _, labels = dropout(1)(jr.key(1))
    assert (labels == 10).all()


def test_kept_labels_stay_with_their_data():
    paths, labels = dropout(0.4, size=100)(jr.key(0))
    kept = np.asarray(labels) < 10
    assert 0 < kept.sum() < 100
    assert_close(paths.x1[kept], DATA[labels[kept]])


def test_dropout_is_independent_of_the_data():
    paths, labels = dropout(0.5, size=20_000)(jr.key(0))
    for x in (paths.x1[:, 0], paths.x0[:, 0]):
        assert abs(np.corrcoef(labels == 10, x)[0, 1]) < 4 / np.sqrt(20_000)


def test_dropout_is_a_function_of_the_key():
    draw = lambda seed: dropout(0.5, size=64, scale=fd.data.PowerLawScale())(jr.key(seed))
    (_, first), (_, again), (_, other) = draw(0), draw(0), draw(1)
    assert_close(first, again, 0, 0)
    assert ((first.condition == 10) != (other.condition == 10)).any()
    assert (first.scale != other.scale).any()


def test_dropout_of_a_pytree():
    conditions = {"a": jnp.ones((10, 3), jnp.float32), "b": (jnp.arange(1, 11),)}
    null = {"a": np.zeros(3), "b": (0,)}
    source = fd.data.ConditionDropout(batches(64, conditions), null, 0.5)
    _, out = source(jr.key(0))
    assert out["a"].dtype == jnp.float32 and out["b"][0].dtype == conditions["b"][0].dtype
    dropped = np.asarray(out["b"][0]) == 0
    assert 0 < dropped.sum() < 64
    assert_close(out["a"], np.where(dropped[:, None], 0.0, np.ones((64, 3))))


def test_dropped_examples_have_scale_one():
    _, args = dropout(0.5, size=64, scale=fd.data.PowerLawScale(2.0, 3.0))(jr.key(0))
    dropped = np.asarray(args.condition) == 10
    assert 0 < dropped.sum() < 64
    assert (args.scale[dropped] == 1).all() and (args.scale[~dropped] >= 2).all()


def test_dropped_examples_are_those_that_learn_the_plain_velocity():
    source = dropout(0.5, size=16, scale=fd.data.PowerLawScale(2.0, 3.0))
    _, args = source(jr.key(0))
    guidance = fd.velocities.MeanFlowGuidance(10, kappa=None)
    velocity = lambda t, x, args: jnp.where(args.condition == 10, -x, x)
    out = jax.vmap(lambda args: guidance(velocity, X, 0.4, X, args))(args)
    learns_plain = (np.asarray(out) == np.asarray(X)).all(axis=1)
    assert (learns_plain == (np.asarray(args.condition) == 10)).all()


def test_a_network_learns_from_scaled_batches():
    class Net(eqx.Module):
        table: jax.Array

        def __call__(self, s, t, x, args):
            return args.scale * self.table[args.condition] + x

    source = dropout(0.5, scale=fd.data.PowerLawScale())
    paths, args = source(jr.key(0))
    loss = lambda m: fd.objectives.batch_loss(
        fd.FlowMatching(), m, None, paths, args, key=jr.key(1)
    )[0]
    gradient = eqx.filter_grad(loss)(fd.FlowMap(Net(jnp.zeros((11, 2)))))
    touched = np.flatnonzero(np.abs(gradient.net.table).sum(axis=1))
    assert set(touched) == set(np.asarray(args.condition))


@pytest.mark.parametrize("power", [1.0, 2, 0.0, -1.5, 1.0001, 40.0])
def test_power_law(power):
    law = fd.data.PowerLawScale(1.5, 6.0, power)
    scales = np.asarray(law(jr.key(3), 5000))
    density = lambda a: (a / 1.5) ** -power
    grid = np.linspace(1.5, 6.0, 20_001)
    cumulative = integrate.cumulative_simpson(density(grid), x=grid, initial=0)
    cdf = lambda a: np.interp(a, grid, cumulative / cumulative[-1])
    assert 1.5 <= scales.min() and scales.max() <= 6.0 * (1 + 1e-12)
    assert stats.kstest(scales, cdf).pvalue > 1e-3


def test_power_law_default_is_log_uniform():
    scales = fd.data.PowerLawScale()(jr.key(0), 5000)
    assert stats.kstest(scales, stats.loguniform(1, 8).cdf).pvalue > 1e-3


def test_power_law_dtype():
    law = fd.data.PowerLawScale(dtype=jnp.float32)
    assert jax.jit(law, static_argnums=1)(jr.key(0), 4).dtype == jnp.float32


# --- refusals -------------------------------------------------------------------------

SCALED = fd.velocities.GuidanceArgs(0, 2.0)
FREE = fd.velocities.ClassifierFreeGuidance(NONE, 2.0)


def guide(scale=2.0, null=NONE, args=LABEL):
    return guided(scale, null)(0.4, X, args)


TYPES = {
    "fraction for a label": (
        lambda: guide(null=0.5, args=jnp.asarray(1)),
        r"integer of dtype int\d+, like",
    ),
    "no scale": (lambda: guide(None), r"`GuidanceArgs\(condition, scale\)`; got int"),
    "no scale for autoguidance": (
        lambda: fd.velocities.AutoguidedVelocity(STRONG, WEAK)(0.4, X, 2.0),
        "`AutoguidedVelocity` with `scale=None`",
    ),
    "no scale in training": (
        lambda: fd.velocities.MeanFlowGuidance(NONE, kappa=None)(
            mixture_field(), X, 0.4, X, LABEL
        ),
        "`MeanFlowGuidance` with `kappa=None`",
    ),
    "no velocity": (
        lambda: fd.velocities.GuidedVelocity(None, FREE),
        "`velocity` must be a callable",
    ),
    "no rule": (
        lambda: fd.velocities.GuidedVelocity(STRONG, None),
        "`guidance` must be a callable",
    ),
    "number as a velocity": (
        lambda: fd.velocities.AutoguidedVelocity(STRONG, 0.5, 2.0),
        "`weak` must be a callable",
    ),
    "inverse": (lambda: guided_map(flow_map=fd.InverseFlowMap(LinearMap())), "one jump"),
    "function as a map": (
        lambda: guided_map(flow_map=lambda s, t, x, args: x),
        "must be an instance of `AbstractFlowMap`",
    ),
    "no batches": (
        lambda: fd.data.ConditionDropout(DATA, 10),
        "`batches` must be a callable",
    ),
}
VALUES = {
    "null of two": (lambda: guide(null=(0, 1), args=0), "structure of the condition"),
    "no condition": (lambda: guide(null=NULL, args=None), "structure of the condition"),
    "scale in `args` alone": (
        lambda: guide(null=0, args=SCALED),
        "`GuidanceArgs` only if",
    ),
    "null of another shape": (
        lambda: guide(null=0.0, args=C),
        r"shape of the condition, \(2,\); got \(\)",
    ),
    "scales of a batch": (
        lambda: guide(jnp.ones(2)),
        r"`scale` must be a scalar; got shape \(2,\)",
    ),
    "interval": (
        lambda: fd.velocities.ClassifierFreeGuidance(NONE, 2.0, (0.7, 0.3)),
        "low <= high; got",
    ),
    "interval in training": (
        lambda: fd.velocities.MeanFlowGuidance(NONE, interval=(0.7, 0.3)),
        "low <= high; got",
    ),
    "kappa": (
        lambda: fd.velocities.MeanFlowGuidance(NONE, kappa=1),
        "`kappa` must be below 1; got 1",
    ),
    "time range": (lambda: guided_map()(0.0, 2.5, X, C), "time range"),
    "rate": (lambda: dropout(1.1), r"`rate` must be in \[0, 1\]; got"),
    "negative rate": (lambda: dropout(-0.1), r"`rate` must be in \[0, 1\]; got"),
    "dropout of nothing": (
        lambda: fd.data.ConditionDropout(
            fd.data.InterpolantBatches(fd.LinearInterpolant(), DATA, 4), 10
        )(jr.key(0)),
        "Conditions must be arrays",
    ),
    "batch for null": (
        lambda: fd.data.ConditionDropout(batches(), np.arange(10))(jr.key(0)),
        r"shape of the condition, \(\); got \(10,\)",
    ),
    "one scale for a batch": (
        lambda: dropout(scale=lambda key, batch_size: jnp.asarray(2.0))(jr.key(0)),
        r"one scale per example, \(6,\); got shape \(\)",
    ),
    "lowest scale": (
        lambda: fd.data.PowerLawScale(0.0, 2.0),
        "`low` and `high` must be positive",
    ),
    "falling scales": (
        lambda: fd.data.PowerLawScale(3.0, 2.0),
        "`low` and `high` must be positive",
    ),
}


@pytest.mark.parametrize("name", [*TYPES, *VALUES])
def test_refusals(name):
    act, match = {**TYPES, **VALUES}[name]
    error = TypeError if name in TYPES else ValueError
    with without_type_checks(), pytest.raises(error, match=match):
        act()
