"""Traces, log-determinants and densities against closed forms and continuous flows."""

import functools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.linalg
from helpers import (
    RUN_TIME_ERROR,
    assert_close,
    finite_difference,
    gaussian_map,
    linear_map,
    mlp_map,
    nonlinear_field,
    tight_solve,
    without_type_checks,
)
from scipy import stats

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
MATRIX = np.asarray([[0.2, -1.1], [0.7, -0.4]])

_jitted = eqx.filter_jit(fd.likelihood.log_det)
log_prob = eqx.filter_jit(fd.likelihood.log_prob)


def log_det(flow_map, s, t, *inputs, **options):
    """Compiled, once for all times."""
    return _jitted(flow_map, jnp.asarray(s), jnp.asarray(t), *inputs, **options)


# --- traces -------------------------------------------------------------------------


def matrix(size, rank, seed=0):
    """A matrix of low rank, with a little of every rank added."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size))
    return jnp.asarray(low + 1e-3 * rng.normal(size=(size, size)))


def estimates(trace, a, number=4000):
    """Independent estimates of the trace of a matrix."""
    one = lambda key: trace(lambda z: a @ z, jnp.zeros(a.shape[0]), key)
    return np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), number)))


@pytest.mark.parametrize(
    "trace", [fd.likelihood.Hutchinson(4), fd.likelihood.HutchPlusPlus(6)]
)
def test_estimates_are_unbiased(trace):
    a = matrix(12, 4)
    made = estimates(trace, a)
    error = made.std() / np.sqrt(made.size)
    assert abs(made.mean() - np.trace(a)) < 4 * error


def test_hutchinson_has_its_variance():
    a = np.asarray(matrix(12, 4))
    symmetric = (a + a.T) / 2
    expected = 2 * (np.sum(symmetric**2) - np.sum(np.diag(symmetric) ** 2)) / 4
    made = estimates(fd.likelihood.Hutchinson(4), jnp.asarray(a))
    # The relative error of a variance from 4000 draws is about 0.04 for light tails.
    np.testing.assert_allclose(made.var(), expected, rtol=0.2)


def test_hutch_plus_plus_does_better_on_low_rank():
    a = matrix(24, 3)
    plain, better = (
        estimates(trace, a, 400).var()
        for trace in (fd.likelihood.Hutchinson(12), fd.likelihood.HutchPlusPlus(12))
    )
    # The same cost; the rank is below that of the sketch.
    assert better < 1e-4 * plain


@pytest.mark.parametrize(
    "trace", [fd.likelihood.ExactTrace(), fd.likelihood.HutchPlusPlus(15)]
)
def test_exact_traces(trace):
    a = matrix(5, 5)
    made = jax.jit(lambda key: trace(lambda z: a @ z, jnp.zeros(5), key))(jr.key(1))
    np.testing.assert_allclose(made, np.trace(a), rtol=1e-12)


def test_one_sign_is_enough_for_a_diagonal():
    made = fd.likelihood.Hutchinson()(
        lambda z: jnp.arange(5.0) * z, jnp.zeros(5), jr.key(3)
    )
    np.testing.assert_allclose(made, 10.0, rtol=1e-12)


def test_gradient_of_a_sketched_trace():
    # Of rank one, which a QR factorisation of six columns has no derivative at.
    u, v = jr.normal(jr.key(0), (2, 8))

    def value(u):
        return fd.likelihood.HutchPlusPlus(18)(
            lambda z: u * (v @ z), jnp.zeros(8), jr.key(1)
        )

    assert np.isfinite(jax.jit(jax.grad(value))(u)).all()
    one = lambda key: jax.grad(
        lambda u: fd.likelihood.HutchPlusPlus(6)(lambda z: u * (v @ z), jnp.zeros(8), key)
    )(u)
    made = np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(2), 4000)))
    error = made.std(axis=0) / np.sqrt(4000)
    assert (np.abs(made.mean(axis=0) - np.asarray(v)) < 4 * error).all()


def test_traces_in_half_precision():
    a = matrix(6, 6).astype(jnp.bfloat16)
    made = [
        jax.jit(lambda key, trace=trace: trace(lambda z: a @ z, a[0], key))(jr.key(0))
        for trace in (
            fd.likelihood.ExactTrace(),
            fd.likelihood.Hutchinson(),
            fd.likelihood.HutchPlusPlus(18),
        )
    ]
    assert [value.dtype for value in made] == [jnp.float32] * 3
    np.testing.assert_allclose(made[0], np.trace(a.astype(float)), rtol=1e-2)


def test_divergence():
    # Of the curl-free part only: the swirl has none.
    field = lambda t, x, args: jnp.stack([x[0] ** 2 * t - x[1], x[0] + args * x[1]])
    velocity, made = jax.jit(functools.partial(fd.likelihood.divergence, field))(
        0.5, X, 0.3
    )
    assert_close(velocity, field(0.5, X, 0.3))
    np.testing.assert_allclose(made, 2 * 0.5 * 0.8 + 0.3, rtol=1e-12)


def test_divergence_of_a_pytree():
    field = lambda t, x, args: {"q": x["q"] * x["p"], "p": 3 * x["p"] + x["q"]}
    x = {"q": jnp.asarray([[1.0], [2.0]]), "p": jnp.asarray([[0.5], [-1.0]])}
    velocity, made = jax.jit(functools.partial(fd.likelihood.divergence, field))(0.0, x)
    assert_close(velocity, field(0.0, x, None))
    np.testing.assert_allclose(made, 0.5 - 1.0 + 2 * 3.0, rtol=1e-12)


# --- log-determinants ---------------------------------------------------------------

SHORT = 0.2
METHODS = {
    "exact": fd.likelihood.ExactJacobian(),
    "series": fd.likelihood.PowerSeries(fd.likelihood.ExactTrace(), 16),
    "divergence": fd.likelihood.DivergenceIntegral(16),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("s, t", [(0.1, 0.3), (0.9, 0.7), (0.4, 0.4)])
def test_linear_ode(name, s, t):
    # Liouville: the trace times the time.
    X_st, made = log_det(linear_map(), s, t, X, method=METHODS[name])
    assert_close(X_st, linear_map()(s, t, X))
    np.testing.assert_allclose(made, np.trace(MATRIX) * (t - s), atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_gaussian_log_det(name):
    made = log_det(gaussian_map(), 0.0, SHORT, X, method=METHODS[name])[1]
    std = lambda t, target: np.hypot((1 - t) * 1.3, t * target)
    expected = sum(np.log(std(SHORT, b) / 1.3) for b in (0.6, 0.4))
    np.testing.assert_allclose(made, expected, atol=1e-10)


def test_jacobian_of_an_inconsistent_map():
    # Which follows no velocity: only the Jacobian is right.
    flow_map = mlp_map()
    jump = jax.jit(lambda x: flow_map(0.1, 0.9, x))
    jacobian = np.stack([finite_difference(jump, X, e) for e in np.eye(2)])
    made = log_det(flow_map, 0.1, 0.9, X)[1]
    np.testing.assert_allclose(made, np.linalg.slogdet(jacobian)[1], atol=1e-8)
    other = log_det(flow_map, 0.1, 0.9, X, method=METHODS["divergence"])[1]
    assert abs(made - other) > 3e-3


@pytest.mark.parametrize(
    "method",
    [
        fd.likelihood.PowerSeries(fd.likelihood.Hutchinson(2), 6),
        fd.likelihood.PowerSeries(fd.likelihood.HutchPlusPlus(3), 6),
        fd.likelihood.DivergenceIntegral(8, fd.likelihood.Hutchinson(1)),
    ],
)
def test_stochastic_log_dets_are_unbiased(method):
    flow_map = fd.exact.LinearFlowMap(0.3 * np.random.default_rng(0).normal(size=(6, 6)))
    x = jnp.zeros(6)
    exact = log_det(flow_map, 0.0, 0.3, x)[1]
    one = lambda key: log_det(flow_map, 0.0, 0.3, x, method=method, key=key)[1]
    made = np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), 2000)))
    assert abs(made.mean() - exact) < 4 * made.std() / np.sqrt(2000)
    assert made.std() > 1e-3


def test_truncation_of_the_series_is_bounded():
    half = fd.FlowMap(lambda s, t, x, args: 0.5 * x)
    for terms in (2, 8):
        method = fd.likelihood.PowerSeries(fd.likelihood.ExactTrace(), terms)
        error = abs(log_det(half, 0.0, 1.0, X, method=method)[1] - 2 * math.log(1.5))
        assert 1e-8 < error < 2 * 0.5 ** (terms + 1) / ((terms + 1) * 0.5)


def test_series_that_diverges_is_no_number():
    double = fd.FlowMap(lambda s, t, x, args: 1.5 * x)
    made = log_det(double, 0.0, 1.0, X, method=METHODS["series"])[1]
    assert np.isnan(made)
    # A shorter jump converges.
    made = log_det(double, 0.0, 0.3, X, method=METHODS["series"])[1]
    np.testing.assert_allclose(made, 2 * math.log(1.45), atol=1e-6)


def test_a_fold_has_no_density():
    mirror = fd.FlowMap(lambda s, t, x, args: -2 * x * jnp.asarray([1.0, 0.0]))
    X_st, made = log_det(mirror, 0.0, 1.0, X)
    assert_close(X_st, X * jnp.asarray([-1.0, 1.0]))
    assert np.isnan(made)
    # Two mirrors are a rotation by half a turn.
    rotation = fd.FlowMap(lambda s, t, x, args: -2 * x)
    np.testing.assert_allclose(log_det(rotation, 0.0, 1.0, X)[1], 0, atol=1e-12)


def test_divergence_of_a_teacher_on_the_way_of_a_map():
    # A callable that knows no velocity of its own.
    field = linear_map().velocity
    method = fd.likelihood.DivergenceIntegral(2, vector_field=field)
    flow_map = lambda s, t, x, args: linear_map()(s, t, x)
    made = log_det(flow_map, 0.2, 0.9, X, method=method)[1]
    np.testing.assert_allclose(made, 0.7 * np.trace(MATRIX), rtol=1e-12)


@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ["exact", "divergence"])
def test_low_precision(name, dtype, tol):
    x = X.astype(dtype)
    X_st, made = log_det(gaussian_map(), 0.0, SHORT, x, method=METHODS[name])
    assert X_st.dtype == dtype and made.dtype == jnp.float32
    exact = log_det(gaussian_map(), 0.0, SHORT, x.astype(float))[1]
    np.testing.assert_allclose(made, exact, atol=tol)


def mixed_net(s, t, x, args):
    """Couples two leaves of different dtypes."""
    h = (t - s).astype(jnp.float32)
    q = x["q"].astype(jnp.float32)
    v = {"q": x["q"] * 0.2 + jnp.sum(x["p"]).astype(float), "p": h * x["p"] * jnp.sum(q)}
    return v


@pytest.mark.parametrize("name", ["exact", "series"])
def test_pytree_of_mixed_dtypes(name):
    x = {"q": jnp.asarray([0.3, 0.1]), "p": jnp.asarray([[0.2]], jnp.float32)}
    flow_map = fd.FlowMap(mixed_net)
    X_st, made = log_det(flow_map, 0.1, 0.3, x, method=METHODS[name])
    assert_close(X_st, jax.jit(flow_map)(0.1, 0.3, x), 1e-7, 1e-7)
    h = 0.2
    jacobian = np.eye(3) + h * np.asarray(
        [[0.2, 0, 1.0], [0, 0.2, 1.0], [h * 0.2, h * 0.2, h * 0.4]]
    )
    np.testing.assert_allclose(made, np.log(np.linalg.det(jacobian)), atol=1e-6)


def test_args_and_jit():
    flow_map = mlp_map()
    made = jax.jit(lambda x, args: log_det(flow_map, 0.1, 0.7, x, args))(X, X)
    assert_close(made, log_det(flow_map, 0.1, 0.7, X, X))
    assert abs(made[1] - log_det(flow_map, 0.1, 0.7, X)[1]) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_maps_to_another_shape(name):
    flow_map = lambda s, t, x, args: jnp.append(x, x[0])
    method = METHODS[name]
    if name == "divergence":
        method = fd.likelihood.DivergenceIntegral(vector_field=nonlinear_field)
    with pytest.raises(ValueError, match=r"shape of the state, \(2,\); got \(3,\)"):
        log_det(flow_map, 0.0, 1.0, X, method=method)


# --- densities ----------------------------------------------------------------------


def gaussian_base(x0):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x0, jnp.asarray([0.1, -0.2]), 1.3))


def normal_base(x0):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x0))


def gaussian_data(x1):
    return stats.norm.logpdf(x1, [0.7, 0.5], [0.6, 0.4]).sum()


newton = functools.partial(fd.likelihood.invert, solver=optx.Newton(1e-10, 1e-10))


@pytest.mark.parametrize(
    "ts, inverse",
    [
        (1, None),
        (3, None),
        ([0.0, 0.1, 1.0], None),
        (1, fd.likelihood.invert),
        (3, newton),
        ([0.0, 0.1, 0.6, 1.0], newton),
    ],
)
def test_gaussian_density(ts, inverse):
    ts = jnp.asarray(ts) if isinstance(ts, list) else ts
    made = log_prob(gaussian_map(), gaussian_base, X, ts, inverse=inverse)
    np.testing.assert_allclose(made, gaussian_data(X), atol=1e-8)


@pytest.mark.parametrize("ts", [1, 4])
def test_gaussian_density_of_a_sample(ts):
    fn = eqx.filter_jit(fd.likelihood.sample_log_prob)
    x1, made = fn(gaussian_map(), gaussian_base, X, ts)
    assert_close(x1, fd.sample(gaussian_map(), X, ts))
    np.testing.assert_allclose(made, gaussian_data(x1), atol=1e-10)


def test_time_may_fall_from_base_to_data():
    # The flow of -x (1 + t).
    grows = lambda s, t, x, args: x * jnp.exp((s - t) * (1 + (s + t) / 2))
    made = log_prob(grows, normal_base, X, np.asarray([2.0, 0.5, 0.0]))
    # From 2 to 0 the exponent grows by the integral of 1 + t, which is 4.
    expected = stats.norm.logpdf(X, scale=np.exp(4.0)).sum()
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_jumps_add_up():
    flow_map, ts = mlp_map(), np.asarray([0.0, 0.3, 0.45, 1.0])
    x, total = X, 0.0
    for k in range(3):
        x, gain = log_det(flow_map, ts[k], ts[k + 1], x, X)
        total = total + gain
    base = lambda x0: jnp.sum(-(x0**2))
    x1, made = fd.likelihood.sample_log_prob(flow_map, base, X, ts, X)
    assert_close(x1, x)
    assert_close(made, base(X) - total)


def test_stochastic_jumps_have_probes_of_their_own():
    flow_map = fd.exact.LinearFlowMap([[0.0, 1.0], [0.5, 0.0]])
    method = fd.likelihood.DivergenceIntegral(1, fd.likelihood.Hutchinson())
    base = lambda x0: jnp.zeros(())
    prob = lambda key: fd.likelihood.log_prob(
        flow_map, base, X, 4, method=method, key=key
    )
    made = jax.jit(jax.vmap(prob))(jr.split(jr.key(0), 64))
    # With one sign for all four jumps there would be but two values.
    assert len(np.unique(np.round(made, 6))) > 2


COVARIANCES = [[[0.2, 0.1], [0.1, 0.15]], [[0.1, 0], [0, 0.3]]]
MIXTURE = fd.exact.GaussianMixtureVelocity(
    [0.3, 0.7], [[-1.2, 0.3], [0.9, -0.4]], COVARIANCES
)
TOLS = {"solver": diffrax.Tsit5(), "rtol": 1e-9, "atol": 1e-9}


def test_mixture_density():
    x1 = jr.normal(jr.key(5), (8, 2))
    flow_map = fd.ODEFlowMap(MIXTURE, **TOLS)
    prob = lambda x: fd.likelihood.log_prob(flow_map, normal_base, x, 2)
    parts = zip([0.3, 0.7], MIXTURE.means, COVARIANCES, strict=True)
    expected = sum(w * stats.multivariate_normal.pdf(x1, m, c) for w, m, c in parts)
    np.testing.assert_allclose(jax.jit(jax.vmap(prob))(x1), np.log(expected), atol=1e-7)


def by_hand(t, y, args):
    jacobian = jax.jacrev(lambda x: nonlinear_field(t, x, None))(y[0])
    return nonlinear_field(t, y[0], None), -(jacobian[0, 0] + jacobian[1, 1])


@functools.cache
def continuous_flow():
    """Log-densities of eight points by Diffrax, the trace written out by hand."""
    x1 = jr.normal(jr.key(5), (8, 2))

    def one(x):
        x0, gain = tight_solve(by_hand, 1.0, 0.0, (x, jnp.zeros(()))).ys
        return normal_base(x0[0]) - gain[0]

    return x1, jax.jit(jax.vmap(one))(x1)


@pytest.mark.slow
def test_jacobian_against_the_continuous_flow():
    x1, expected = continuous_flow()
    flow_map = fd.ODEFlowMap(nonlinear_field, **TOLS)
    prob = lambda x: fd.likelihood.log_prob(flow_map, normal_base, x, 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(prob))(x1), expected, atol=1e-7)


def test_density_integrates_to_one():
    # Of a map that is no flow, nor close to one: its Jacobian knows.
    flow_map = fd.FlowMap(lambda s, t, x, args: 0.4 * jnp.sin(x + t) * (1 + s) + args)
    side = np.linspace(-7, 7, 141)
    points = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2))
    prob = lambda x: fd.likelihood.log_prob(flow_map, normal_base, x, 2, 0.3)
    mass = jnp.exp(jax.jit(jax.vmap(prob))(points)).sum() * 0.1**2
    np.testing.assert_allclose(mass, 1, atol=1e-3)


def test_gradients_of_a_density():
    def value(inputs):
        x, weight = inputs
        net = lambda s, t, x, args: weight * jnp.sin(x[::-1] + s - 2 * t)
        return fd.likelihood.log_prob(fd.FlowMap(net), normal_base, x, 2)

    inputs = X, jnp.asarray(0.3)
    direction = jnp.asarray([0.4, -1.0]), jnp.asarray(0.7)
    # One program for both, value and derivative.
    jvp = jax.jit(lambda x: jax.jvp(value, (x,), (direction,)))
    expected = finite_difference(lambda x: jvp(x)[0], inputs, direction)
    assert_close(jvp(inputs)[1], expected, 1e-8, 1e-8)


def test_round_trip_error():
    # There and back the net's times are swapped, and its sign is not.
    flow_map = fd.FlowMap(lambda s, t, x, args: (1 + s) * jnp.ones_like(x))
    there = fd.likelihood.pull_back(flow_map, X, 1)
    # Back by 2, then forth by 1.
    assert_close(there.x0, X - 2)
    np.testing.assert_allclose(there.error, 1.0, rtol=1e-12)
    exact = jax.jit(lambda x: fd.likelihood.pull_back(gaussian_map(), x, 3))(X)
    assert exact.error < 1e-12


def test_jump_that_cannot_be_inverted_has_no_density():
    inverse = functools.partial(newton, throw=False, max_steps=8)
    flow_map = fd.FlowMap(lambda s, t, x, args: x**2)
    there = jax.jit(lambda x: fd.likelihood.pull_back(flow_map, x, 1, inverse=inverse))(
        -jnp.ones(2)
    )
    assert np.isnan(there.log_det) and there.error > 0.5


def test_bad_times_inside_jit():
    made = jax.jit(
        lambda ts: fd.likelihood.log_prob(gaussian_map(), gaussian_base, X, ts)
    )
    np.testing.assert_allclose(made(jnp.asarray([0.0, 1.0])), gaussian_data(X), atol=1e-9)
    with pytest.raises(RUN_TIME_ERROR, match="leaves the time range"):
        made(jnp.asarray([0.0, 1.5])).block_until_ready()


# --- the log-density as a part of the state -----------------------------------------

PAIR = X, jnp.asarray(0.7)


@pytest.mark.parametrize("field", [MIXTURE, nonlinear_field])
def test_pair_has_the_velocity_of_the_continuous_flow(field):
    states, levels = jr.normal(jr.key(5), (3, 2)), jnp.arange(3.0)
    made = jax.jit(jax.vmap(lambda *y: fd.likelihood.LogDensityVelocity(field)(0.6, y)))
    trace = lambda x: jnp.trace(jax.jacrev(lambda x: field(0.6, x, None))(x))
    expected = jax.jit(jax.vmap(lambda x: (field(0.6, x, None), -trace(x))))
    assert_close(made(states, levels), expected(states))


def test_density_by_a_map_of_pairs():
    x1, expected = continuous_flow()
    pair = fd.ODEFlowMap(fd.likelihood.LogDensityVelocity(nonlinear_field), **TOLS)
    flow_map, method = (
        fd.likelihood.LogDensityFlowMap(pair),
        fd.likelihood.LearnedLogDet(),
    )
    prob = lambda x: fd.likelihood.log_prob(flow_map, normal_base, x, 2, method=method)
    np.testing.assert_allclose(jax.jit(jax.vmap(prob))(x1), expected, atol=1e-7)


class PairNet(eqx.Module):
    """Returns all it is given, and a little of the times."""

    def __call__(self, s, t, x, args):
        return jax.tree_util.tree_map(lambda leaf: leaf + (s + 2 * t), x)


@pytest.mark.parametrize("net", ["vector", "pair"])
def test_network_does_not_see_the_log_density(net):
    if net == "vector":
        x = X
        net = fd.nn.MLP(3, 8, 2, key=jr.key(0))
        net = eqx.tree_at(lambda net: net.last.bias, net, jnp.asarray([0.1, 0.2, 0.3]))
    else:
        x, net = {"a": X}, PairNet()
    flow_map = fd.FlowMap(fd.likelihood.LogDensityNet(net))
    jump = jax.jit(lambda level: flow_map(0.1, 0.8, (x, level)))
    (low, gain_low), (high, gain_high) = jump(-3.0), jump(5.0)
    assert_close(low, high, 0, 0)
    np.testing.assert_allclose(gain_high - gain_low, 8.0, rtol=1e-12)
    assert abs(gain_low + 3.0) > 1e-3


@pytest.mark.parametrize(
    "objective", [fd.LagrangianMapDistillation(), fd.objectives.EulerianMapDistillation()]
)
def test_pair_is_a_teacher(objective):
    # Zero at the closed form, which gains minus the trace, and not at half of it.
    teacher = fd.likelihood.LogDensityVelocity(linear_map().velocity)
    path = fd.paths.StatePath(PAIR)

    class Exact(fd.AbstractFlowMap):
        share: jax.Array

        def jump(self, s, t, x, args):
            gain = -self.share * np.trace(MATRIX) * (t - s)
            return linear_map()(s, t, x[0]), x[1] + gain

    loss = eqx.filter_jit(lambda share: objective(Exact(share), teacher, path, s, t))
    s, t = jnp.asarray(0.2), jnp.asarray(0.9)
    assert loss(jnp.asarray(1.0)) < 1e-20
    assert loss(jnp.asarray(0.5)) > 1e-4


@pytest.mark.slow
def test_pair_is_learned():
    teacher = fd.likelihood.LogDensityVelocity(linear_map().velocity)
    net = fd.likelihood.LogDensityNet(fd.nn.MLP(3, 32, 2, key=jr.key(0)))
    draw = lambda key, n: (jr.normal(key, (n, 2), jnp.float32), jnp.zeros(n, jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        state = fd.train.fit(
            fd.FlowMap(jax.tree_util.tree_map(_as_float32, net)),
            fd.LagrangianMapDistillation(),
            fd.data.StateBatches(draw, 256),
            optax.adam(3e-3),
            num_steps=300,
            teacher=teacher,
            key=jr.key(1),
            ema_decay=0.98,
            progress=False,
        )
    state_map = fd.likelihood.LogDensityFlowMap(state.ema_map)
    x = X.astype(jnp.float32)
    made = log_det(state_map, 0.0, 1.0, x, method=fd.likelihood.LearnedLogDet())[1]
    np.testing.assert_allclose(made, np.trace(MATRIX), atol=0.02)


def _as_float32(leaf):
    return leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf


def test_fixed_probes_are_smooth_in_time():
    field = fd.likelihood.LogDensityVelocity(
        nonlinear_field, fd.likelihood.Hutchinson(), jr.key(0)
    )
    term = diffrax.ODETerm(field)
    ends = jnp.asarray(0.2), jnp.asarray(0.9)
    # One key on purpose, at all times.
    with jax.debug_key_reuse(False):
        solve = functools.partial(diffrax.diffeqsolve, term, diffrax.Tsit5(), *ends)
        # An array, so that the second step size compiles nothing.
        made, finer = (solve(jnp.asarray(dt0), PAIR).ys for dt0 in (0.05, 0.01))
    assert_close(made, finer, 1e-7)


def test_fresh_probes_average_out():
    # Around one state: the mean of probes, where a fixed probe has the same error.
    key = jr.key(3)
    states = X[None] + 1e-6 * jr.normal(jr.key(4), (4000, 2))
    exact = fd.likelihood.divergence(nonlinear_field, 0.4, X)[1]

    def rates(fresh):
        field = fd.likelihood.LogDensityVelocity(
            nonlinear_field, fd.likelihood.Hutchinson(), key, fresh
        )
        one = lambda x: -field(0.4, (x, jnp.zeros(())))[1]
        return np.asarray(jax.jit(jax.vmap(one))(states))

    fixed, fresh = rates(False), rates(True)
    assert fixed.std() < 1e-4 and abs(fixed.mean() - exact) > 0.05
    assert abs(fresh.mean() - exact) < 4 * fresh.std() / np.sqrt(4000)


def test_pair_keeps_its_dtypes():
    x = X.astype(jnp.bfloat16), jnp.asarray(0.5, jnp.float32)
    b_t, rate = fd.likelihood.LogDensityVelocity(lambda t, x, args: -x)(0.3, x)
    assert (b_t.dtype, rate.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(rate, 2.0)


def test_map_of_pairs_keeps_the_time_range():
    flow_map = fd.FlowMap(fd.likelihood.LogDensityNet(PairNet()), time_range=(-1.0, 2.0))
    assert fd.likelihood.LogDensityFlowMap(flow_map).time_range == (-1.0, 2.0)


# --- refusals ---------------------------------------------------------------------------


def unit(method=fd.likelihood.ExactJacobian(), flow_map=linear_map(), x=X):
    return log_det(flow_map, 0.0, 1.0, x, method=method)


def density(ts):
    return fd.likelihood.log_prob(gaussian_map(), gaussian_base, X, np.asarray(ts))


def pair(x, trace=fd.likelihood.ExactTrace()):
    return fd.likelihood.LogDensityVelocity(nonlinear_field, trace)(0.3, x)


REFUSALS = {
    "two products": (
        lambda: fd.likelihood.HutchPlusPlus(2),
        ValueError,
        "`num_probes` must be 3, 6, 9, ...; got 2",
    ),
    "four products": (lambda: fd.likelihood.HutchPlusPlus(4), ValueError, "got 4"),
    "no probes": (lambda: fd.likelihood.Hutchinson(0), ValueError, "`num_probes` must"),
    "no terms": (
        lambda: fd.likelihood.PowerSeries(num_terms=0),
        ValueError,
        "`num_terms` must be at least 1; got 0",
    ),
    "no nodes": (
        lambda: fd.likelihood.DivergenceIntegral(0),
        ValueError,
        "`num_nodes` must be at least 1; got 0",
    ),
    "probes without a key": (
        lambda: unit(fd.likelihood.PowerSeries()),
        ValueError,
        "pass `key=jax.random.key",
    ),
    "probes of pairs without a key": (
        lambda: pair(PAIR, fd.likelihood.Hutchinson()),
        ValueError,
        "pass `key=jax.random.key",
    ),
    "complex state": (
        lambda: unit(x=jnp.zeros(2, complex)),
        TypeError,
        "floating-point.*two real leaves",
    ),
    "state of integers": (
        lambda: unit(x=jnp.zeros(2, int)),
        TypeError,
        "floating-point",
    ),
    "map without velocity": (
        lambda: unit(METHODS["divergence"], lambda s, t, x, args: x),
        TypeError,
        "`vector_field` must be",
    ),
    "map of states": (
        lambda: unit(fd.likelihood.LearnedLogDet()),
        TypeError,
        "`flow_map` must be an instance of `LogDensityFlowMap`; got LinearFlowMap",
    ),
    "equal times": (lambda: density([0.0, 0.5, 0.5]), ValueError, "strictly"),
    "times outside": (lambda: density([0.0, 1.5]), ValueError, "leaves the time range"),
    "no jumps": (lambda: density(0), ValueError, "at least 1"),
    "state without a density": (lambda: pair(X), ValueError, r"a tuple `\(x, l\)`"),
    "several densities": (lambda: pair((X, X)), ValueError, r"a tuple `\(x, l\)`"),
    "list": (lambda: pair([X, jnp.zeros(())]), ValueError, r"a tuple `\(x, l\)`"),
    "number as a map": (
        lambda: fd.likelihood.LogDensityFlowMap(3),
        TypeError,
        "must be a callable",
    ),
    "number as a field": (
        lambda: fd.likelihood.LogDensityVelocity(3),
        TypeError,
        "must be a callable",
    ),
    "number as a network": (
        lambda: fd.likelihood.LogDensityNet(3),
        TypeError,
        "must be a callable",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, error, match = REFUSALS[name]
    with without_type_checks(), pytest.raises(error, match=match):
        make()


# --- weights ------------------------------------------------------------------------


def test_weights_of_a_gaussian_for_another():
    # Both densities and all moments are known; the target lacks a factor of 5.
    rng = np.random.default_rng(0)
    x = rng.normal(0.0, 1.5, 200_000)
    target, proposal = stats.norm(0.5, 1.0), stats.norm(0.0, 1.5)
    made = fd.likelihood.importance_weights(
        jnp.asarray(target.logpdf(x) + np.log(5.0)), jnp.asarray(proposal.logpdf(x))
    )
    error = float(made.log_normaliser_error)
    assert abs(float(made.log_normaliser) - np.log(5.0)) < 4 * error < 0.02
    weights = np.exp(made.log_weights)
    assert np.average(x, weights=weights) == pytest.approx(0.5, abs=0.02)
    # The integral of p^2 / q, in closed form.
    precision = 2 / 1.0 - 1 / 1.5**2
    square = 1.5 / np.sqrt(precision) * np.exp(0.5 * (1.0**2 / precision - 0.5))
    assert float(made.effective_size) / x.size == pytest.approx(1 / square, rel=0.02)


def test_standard_error_of_the_log_evidence():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 300))
    made = jax.vmap(fd.likelihood.importance_weights)(
        jnp.asarray(stats.norm(0.3, 0.9).logpdf(x)), jnp.asarray(stats.norm.logpdf(x))
    )
    expected = np.std(np.asarray(made.log_normaliser))
    assert np.mean(np.asarray(made.log_normaliser_error)) == pytest.approx(
        expected, rel=0.15
    )


def test_weights_of_samples_without_a_density():
    target = jnp.asarray([0.0, 0.0, -jnp.inf, 0.0])
    made = fd.likelihood.importance_weights(target, jnp.asarray([0.0, np.nan, 0.0, 0.0]))
    assert int(made.num_lost) == 1
    assert made.log_weights.tolist() == [0.0, -np.inf, -np.inf, 0.0]
    assert float(made.effective_size) == pytest.approx(2)
    assert float(made.log_normaliser) == pytest.approx(np.log(0.5))
    with pytest.raises(ValueError, match=r"one entry for each sample.*\(4,\) and \(2,\)"):
        with without_type_checks():
            fd.likelihood.importance_weights(target, target[:2])


def test_complex_densities_have_no_weights():
    with without_type_checks(), pytest.raises(TypeError, match="must be real"):
        fd.likelihood.importance_weights(jnp.zeros(2, complex), jnp.zeros(2))


def test_samples_of_a_map_weigh_their_target():
    # The map is a flow, but not that of the target.
    flow_map = gaussian_map()
    base = lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x))
    x0 = jr.normal(jr.key(0), (20_000, 2))
    x1, log_proposal = jax.vmap(
        lambda x0: fd.likelihood.sample_log_prob(flow_map, base, x0, 2)
    )(x0)
    mean, cov = np.mean(x1, 0) + 0.2, 0.7 * np.cov(np.asarray(x1).T)
    log_target = jnp.asarray(stats.multivariate_normal.logpdf(x1, mean, cov))
    made = fd.likelihood.importance_weights(log_target, log_proposal)
    assert abs(float(made.log_normaliser)) < 5 * float(made.log_normaliser_error) < 0.1
    weighted = np.average(x1, axis=0, weights=np.exp(made.log_weights))
    np.testing.assert_allclose(weighted, mean, atol=0.05)


def test_errors_in_nats():
    # One Euler step of a linear field: its determinant and inverse are known.
    field = lambda t, x, args: jnp.asarray(MATRIX) @ x
    euler = lambda s, t, x, args: x + (t - s) * field(s, x, args)
    base = lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x))
    xs = jr.normal(jr.key(0), (5, 2))
    made = fd.likelihood.log_prob_errors(euler, field, base, xs)
    back = np.eye(2) - MATRIX
    step = stats.norm.logpdf(xs @ back.T).sum(1) + np.linalg.slogdet(back)[1]
    flow = scipy.linalg.expm(-MATRIX)
    exact = stats.norm.logpdf(xs @ flow.T).sum(1) - np.trace(MATRIX)
    np.testing.assert_allclose(made, step - exact, atol=1e-6)
    assert np.abs(made).max() > 0.1
    exact_map = fd.ODEFlowMap(field)
    made = fd.likelihood.log_prob_errors(exact_map, field, base, xs, 3)
    np.testing.assert_allclose(made, 0, atol=1e-6)
