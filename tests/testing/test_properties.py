"""Identities over random times, states, dtypes and PyTrees, by the library's own kit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from helpers import gaussian_map, linear_map, max_abs, mlp_map, nonlinear_field
from hypothesis import given

import flowdiffrax as fd
from flowdiffrax import testing

IDENTITIES = [
    "starts_as_identity",
    "semigroup",
    "inverse",
    "tangent",
    "lagrangian",
    "eulerian",
    "average_velocity",
    "both_directions",
]


class Turning(fd.AbstractFlowMap):
    """The map of dx/dt = rate cos(t) x on each leaf of a PyTree."""

    rate: complex = eqx.field(static=True, default=-1.5)

    def jump(self, s, t, x, args):
        # A closed form in numbers, whatever the dtype of the times.
        with jax.numpy_dtype_promotion("standard"):
            growth = jnp.exp(self.rate * (jnp.sin(t) - jnp.sin(s)))
        return jtu.tree_map(lambda leaf: growth.astype(leaf.dtype) * leaf, x)

    def field(self, t, x, args):
        del args
        with jax.numpy_dtype_promotion("standard"):
            slope = self.rate * jnp.cos(t)
        return jtu.tree_map(lambda leaf: slope.astype(leaf.dtype) * leaf, x)


CASES = {
    "gaussian": (gaussian_map, (2,)),
    "gaussian-vp": (lambda: gaussian_map(fd.paths.VariancePreservingInterpolant()), (2,)),
    "gaussian-scalar": (lambda: fd.exact.GaussianFlowMap(target_std=0.3), ()),
    "gaussian-matrix": (
        lambda: fd.exact.GaussianFlowMap(target_std=jnp.asarray([0.5, 1.5, 2])),
        (2, 3),
    ),
    "linear": (linear_map, (2,)),
    # Thirty integrations of derivatives take half a minute.
    "ode": (lambda: fd.ODEFlowMap(nonlinear_field, rtol=1e-11, atol=1e-11), (2,)),
}
SLOW = {"ode": pytest.mark.slow}
# Beyond rounding, the integrator's own tolerance; inverses of short jumps magnify it.
ATOL = {"ode": 1e-8}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CASES]
)
def test_identities_float64(name):
    make, shape = CASES[name]
    flow_map = make()
    testing.check(
        flow_map,
        flow_map.velocity,
        state=jnp.zeros(shape),
        identities=IDENTITIES,
        atol=ATOL.get(name),
    )


def test_state_without_entries():
    flow_map = fd.exact.GaussianFlowMap(target_std=0.3)
    for at in (0.7, 0.2):
        assert flow_map(jnp.asarray(0.2), jnp.asarray(at), jnp.zeros(0)).shape == (0,)
    assert flow_map.velocity(jnp.asarray(0.2), jnp.zeros(0)).shape == (0,)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-matrix", "linear"])
def test_identities_float32(name):
    make, shape = CASES[name]
    flow_map, state = make(), jnp.zeros(shape, jnp.float32)
    testing.check(flow_map, flow_map.velocity, state=state, identities=IDENTITIES)


@pytest.mark.parametrize(
    "rate, dtypes",
    [
        (-1.5, (jnp.float64, jnp.float64)),
        (-1.5, (jnp.float32, jnp.float32)),
        (-1.5, (jnp.float64, jnp.float32)),
        pytest.param(1.5j, (jnp.complex128, jnp.complex64), marks=pytest.mark.slow),
        (1.5j, (jnp.complex128, jnp.complex128)),
    ],
)
def test_identities_of_pytrees(rate, dtypes):
    flow_map = Turning(rate)
    state = {"a": jnp.zeros(2, dtypes[0]), "b": [jnp.zeros((3, 1), dtypes[1])]}
    testing.check(flow_map, flow_map.field, state=state, identities=IDENTITIES)


@given(testing.time_triples(), testing.pytrees(testing.dtypes()))
def test_residuals_are_like_the_state(times, x):
    s, u, t = times
    flow_map = Turning(-1.0)
    like = jax.eval_shape(lambda x: x, x)
    residuals = jax.eval_shape(
        lambda x: (
            fd.semigroup_residual(flow_map, s, u, t, x),
            fd.inverse_residual(flow_map, s, t, x),
            fd.tangent_residual(flow_map, flow_map.field, t, x),
            fd.lagrangian_residual(flow_map, flow_map.field, s, t, x),
            fd.eulerian_residual(flow_map, flow_map.field, s, t, x),
        ),
        x,
    )
    assert all(residual == like for residual in residuals)


RESIDUAL_MAP = mlp_map()
# Twice inverted, it is the same map with the velocities of the base class.
PLAIN = fd.InverseFlowMap(fd.InverseFlowMap(RESIDUAL_MAP))


@pytest.mark.parametrize("flow_map", [PLAIN, fd.ComposedFlowMap(RESIDUAL_MAP, 3)])
def test_any_residual_map(flow_map):
    # Consistent with nothing, but for what the form itself grants.
    granted = ["starts_as_identity", "tangent", "average_velocity"]
    testing.check(flow_map, RESIDUAL_MAP.velocity, state=jnp.zeros(2), identities=granted)


@given(testing.times(), testing.states(2))
def test_any_residual_map_on_the_diagonal(t, x):
    names = ["inverse", "lagrangian", "eulerian"]
    testing.assert_identities(RESIDUAL_MAP, None, t, t, t, x, identities=names)
    gap = PLAIN.average_velocity(t, t, x) - RESIDUAL_MAP.average_velocity(t, t, x)
    assert max_abs(gap) < 1e-12


@given(testing.times(), testing.states(2))
def test_untrained_map_is_not_consistent(t, x):
    # The identities above are no tautologies of the residual form.
    residual = fd.tangent_residual(RESIDUAL_MAP, nonlinear_field, t, x + 3)
    assert max_abs(residual) > 1e-3
