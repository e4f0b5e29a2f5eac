"""Flow maps with what else there is for JAX: networks, distributions, solvers, files."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import assert_close, linear_map, mlp_map

import flowdiffrax as fd

FIELD = lambda t, x, args: jnp.stack([x[1], -args * jnp.sin(x[0])])
PENDULUM = fd.ODEFlowMap(FIELD, rtol=1e-10, atol=1e-10)
X = jnp.asarray([0.5, 0.2])


def integrate(x, args, t1=1.0):
    """By Diffrax, without any flow map."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(FIELD),
        diffrax.Tsit5(),
        0.0,
        t1,
        0.01,
        x,
        args,
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
    ).ys[0]


# --- networks -------------------------------------------------------------------------


class OfTwoTimes(eqx.Module):
    net: eqx.Module

    def __call__(self, s, t, x, args):
        return self.net(jnp.concatenate([x, jnp.stack([s, t - s])]))


NETWORKS = {
    "mlp": lambda key: eqx.nn.MLP(4, 2, 16, 2, jax.nn.tanh, key=key),
    "sequential": lambda key: eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 16, key=key),
            eqx.nn.LayerNorm(16),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Linear(16, 2, key=jr.fold_in(key, 1)),
        ]
    ),
}


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_network_of_equinox_learns(name):
    flow_map = fd.FlowMap(OfTwoTimes(NETWORKS[name](jr.key(0))))
    exact = linear_map()
    draw = lambda key, number: jr.normal(key, (number, 2))
    state = fd.train.fit(
        flow_map,
        fd.LagrangianMapDistillation(),
        fd.data.StateBatches(draw, 128),
        optax.adam(3e-3),
        num_steps=300,
        teacher=exact.velocity,
        key=jr.key(1),
        progress=False,
    )
    xs = draw(jr.key(2), 200)
    jump = lambda flow_map: jax.vmap(lambda x: flow_map(0.0, 1.0, x))(xs)
    off = lambda flow_map: fd.metrics.rms_distance(jump(flow_map), jump(exact))
    assert off(state.ema_map) < 0.3 * fd.metrics.rms_distance(xs, jump(exact))


# --- distributions --------------------------------------------------------------------


def distreqx_normal():
    distributions = pytest.importorskip("distreqx.distributions")
    return distributions.MultivariateNormalDiag(jnp.zeros(2), jnp.asarray([1.0, 2.0]))


def flowjax_normal():
    distributions = pytest.importorskip("flowjax.distributions")
    return distributions.Normal(jnp.zeros(2), jnp.asarray([1.0, 2.0]))


@pytest.mark.parametrize("make", [distreqx_normal, flowjax_normal])
def test_distribution_as_a_base(make):
    normal = make()
    base = lambda key, x1: jax.vmap(normal.sample)(jr.split(key, len(x1)))
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), jnp.zeros((1, 2)), 4000, base
    )
    paths, _ = batches(jr.key(0))
    # Four standard errors of a standard deviation.
    deviations = jnp.std(paths.x0, axis=0) / jnp.asarray([1.0, 2.0])
    assert_close(deviations, jnp.ones(2), 4 / np.sqrt(2 * 4000))
    # Under x -> A x, a normal is a normal again.
    flow_map = linear_map()
    matrix = jax.jacobian(lambda x: flow_map(0.0, 1.0, x))(jnp.zeros(2))
    covariance = matrix @ jnp.diag(jnp.asarray([1.0, 4.0])) @ matrix.T
    mean = flow_map(0.0, 1.0, jnp.zeros(2))
    expected = jax.scipy.stats.multivariate_normal.logpdf(X, mean, covariance)
    assert_close(fd.likelihood.log_prob(flow_map, normal.log_prob, X, 2), expected, 1e-6)


# --- Optimistix and Lineax ------------------------------------------------------------


def test_boundary_value_by_root_finding():
    def miss(speed, args):
        return PENDULUM(0.0, 1.0, jnp.stack([0.0, speed]), 1.0)[0] - 1.0

    newton = optx.Newton(rtol=1e-9, atol=1e-9)
    speed = optx.root_find(miss, newton, jnp.asarray(1.0)).value
    assert_close(integrate(jnp.stack([0.0, speed]), 1.0)[0], 1.0, 1e-7)


def test_parameter_by_least_squares():
    target = integrate(X, 1.7)
    gap = lambda stiffness, args: PENDULUM(0.0, 1.0, X, stiffness) - target
    solver = optx.LevenbergMarquardt(rtol=1e-9, atol=1e-9)
    assert_close(optx.least_squares(gap, solver, jnp.asarray(1.0)).value, 1.7, 1e-6)


def test_jacobian_as_a_linear_operator():
    gap = jnp.asarray([0.1, -0.1])
    jump = lambda x, args: PENDULUM(0.0, 1.0, x, 1.0)
    operator = lx.JacobianLinearOperator(jump, X)
    step = lx.linear_solve(operator, gap, lx.GMRES(rtol=1e-9, atol=1e-9)).value
    rate = (integrate(X + 1e-5 * step, 1.0) - integrate(X - 1e-5 * step, 1.0)) / 2e-5
    assert_close(rate, gap, 1e-5)


# --- NumPy and files ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_and_out(dtype):
    single = lambda leaf: leaf.astype(dtype) if eqx.is_array(leaf) else leaf
    flow_map = jax.tree_util.tree_map(single, mlp_map())
    x = np.asarray([0.3, -0.8], dtype)
    ends = [
        flow_map(0.0, 1.0, x),
        flow_map(np.float64(0), np.float64(1), x),
        fd.sample(flow_map, x, np.asarray([0.0, 1.0])),
    ]
    expected = flow_map(0.0, 1.0, jnp.asarray(x))
    for end in map(np.asarray, ends):
        assert end.dtype == dtype and isinstance(end, np.ndarray)
        np.testing.assert_allclose(end, expected, rtol=1e-6)


def test_file_of_equinox(tmp_path):
    flow_map, blank = mlp_map(), mlp_map(seed=1)
    eqx.tree_serialise_leaves(tmp_path / "map.eqx", flow_map)
    again = eqx.tree_deserialise_leaves(tmp_path / "map.eqx", blank)
    assert eqx.tree_equal(again, flow_map) and not eqx.tree_equal(blank, flow_map)
