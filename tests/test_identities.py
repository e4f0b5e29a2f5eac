"""The closed-form maps satisfy every identity, and maps that are wrong do not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_map, linear_map, nonlinear_field

import flowdiffrax as fd
from flowdiffrax import testing

X = jnp.asarray([0.8, -0.5])
MAPS = {
    "gaussian-linear": gaussian_map,
    "gaussian-trigonometric": lambda: gaussian_map(fd.paths.TrigonometricInterpolant()),
    "gaussian-latent": lambda: gaussian_map(
        fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent(0.5))
    ),
    "linear": linear_map,
    "ode": lambda: fd.ODEFlowMap(nonlinear_field, rtol=1e-12, atol=1e-12),
}
# Forwards, backwards and at rest.
S, T = jnp.asarray([0.15, 0.9, 0.4]), jnp.asarray([0.85, 0.2, 0.4])
IDENTITIES = ["lagrangian", "eulerian", "semigroup", "tangent", "inverse"]


def assert_all(flow_map, teacher, identities, **tolerances):
    u, x = 0.3 * S + 0.7 * T, jnp.tile(X, (3, 1))
    testing.assert_identities(
        flow_map, teacher, S, u, T, x, identities=identities, **tolerances
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=pytest.mark.slow) if k == "ode" else k for k in MAPS],
)
def test_exact_maps_satisfy_all(name):
    flow_map = MAPS[name]()
    assert_all(flow_map, flow_map.velocity, IDENTITIES, rtol=0.0, atol=1e-9)


class Shifted(fd.AbstractFlowMap):
    """An exact map with an error of a given order in the jump."""

    flow_map: fd.AbstractFlowMap
    size: float = eqx.field(static=True, default=0.1)

    def jump(self, s, t, x, args):
        h = jnp.asarray(t) - jnp.asarray(s)
        return self.flow_map(s, t, x, args) + self.size * h * jnp.cos(3 * x + s)


def test_wrong_map_violates_each():
    exact = gaussian_map()
    with pytest.raises(testing.IdentityError) as caught:
        assert_all(Shifted(exact), exact.velocity, IDENTITIES, rtol=0.0, atol=1e-3)
    assert {failure.identity for failure in caught.value.failures} == {*IDENTITIES}


def test_args_reach_the_map_and_the_teacher():
    # Growth at a rate that both are told; 0.1 more for the map in each jump.
    grown = lambda s, t, x, args: x * jnp.exp(args["rate"] * (t - s))
    field = lambda t, x, args: args["rate"] * x
    more = lambda s, t, x, args: grown(s, t, x, args) + 0.1 * args["rate"] * (t - s)
    args, (s, u, t) = {"rate": jnp.asarray(0.7)}, (0.2, 0.4, 0.9)

    def residuals(flow_map):
        both = {
            "lagrangian": fd.lagrangian_residual(flow_map, field, s, t, X, args),
            "eulerian": fd.eulerian_residual(flow_map, field, s, t, X, args),
        }
        alone = {
            "semigroup": fd.semigroup_residual(flow_map, s, u, t, X, args),
            "inverse": fd.inverse_residual(flow_map, s, t, X, args),
        }
        return both | alone

    for residual in residuals(grown).values():
        assert jnp.allclose(residual, 0, atol=1e-12)
    # By hand, with e the growth over a piece.
    e = lambda h: np.exp(0.7 * h)
    expected = {
        "lagrangian": 0.07 * (1 - 0.7 * (t - s)),
        "eulerian": -0.07,
        "semigroup": 0.07 * ((u - s) * e(t - u) + (t - u) - (t - s)),
        "inverse": 0.07 * (t - s) * (e(s - t) - 1),
    }
    for name, residual in residuals(more).items():
        assert jnp.allclose(residual, expected[name], atol=1e-12), name
    velocity = fd.FlowMap(lambda s, t, x, args: args["rate"] * x + 0.1)
    assert jnp.allclose(fd.tangent_residual(velocity, field, t, X, args), 0.1)


def test_each_residual_is_its_equation():
    # By hand, where the kit has the library's functions: an error of 0.1 in the average
    # velocity of dx/dt = 0.
    wrong = fd.FlowMap(lambda s, t, x, args: jnp.full_like(x, 0.1))
    at_rest = lambda t, x, args: jnp.zeros_like(x)
    s, u, t = 0.2, 0.4, 0.7
    found = {
        "lagrangian": fd.lagrangian_residual(wrong, at_rest, s, t, X),
        "eulerian": fd.eulerian_residual(wrong, at_rest, s, t, X),
        "tangent": fd.tangent_residual(wrong, at_rest, t, X),
        "semigroup": fd.semigroup_residual(wrong, s, u, t, X),
        "inverse": fd.inverse_residual(wrong, s, t, X),
    }
    expected = {
        "lagrangian": 0.1,
        "eulerian": -0.1,
        "tangent": 0.1,
        "semigroup": 0.0,
        "inverse": 0.0,
    }
    for name, residual in found.items():
        assert jnp.allclose(residual, expected[name], atol=1e-12), name
    assert jax.tree_util.tree_leaves(found)[0].shape == X.shape
