"""The closed-form maps satisfy every identity, and maps that are wrong do not."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import gaussian_map, linear_map, max_abs, nonlinear_field

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
MAPS = {
    "gaussian-linear": gaussian_map,
    "gaussian-trigonometric": lambda: gaussian_map(fd.TrigonometricInterpolant()),
    "gaussian-latent": lambda: gaussian_map(
        fd.LinearInterpolant(latent=fd.SineSquaredLatent(0.5))
    ),
    "linear": linear_map,
    "ode": lambda: fd.ODEFlowMap(nonlinear_field, rtol=1e-12, atol=1e-12),
}
PAIRS = [(0.15, 0.85), (0.9, 0.2), (0.4, 0.4)]


def residuals(flow_map, teacher, s, t, x):
    u = 0.3 * s + 0.7 * t
    return {
        "lagrangian": fd.lagrangian_residual(flow_map, teacher, s, t, x),
        "eulerian": fd.eulerian_residual(flow_map, teacher, s, t, x),
        "semigroup": fd.semigroup_residual(flow_map, s, u, t, x),
        "tangent": fd.tangent_residual(flow_map, teacher, t, x),
        "inverse": fd.inverse_residual(flow_map, s, t, x),
    }


@functools.cache
def compiled(name):
    flow_map = MAPS[name]()
    return jax.jit(lambda s, t, x: residuals(flow_map, flow_map.velocity, s, t, x))


@pytest.mark.parametrize("s, t", PAIRS)
@pytest.mark.parametrize("name", MAPS)
def test_exact_maps_satisfy_all(name, s, t):
    for identity, residual in compiled(name)(s, t, X).items():
        assert max_abs(residual) < 1e-9, identity


class Shifted(fd.AbstractFlowMap):
    """An exact map with an error of a given order in the jump."""

    flow_map: fd.AbstractFlowMap
    size: float = eqx.field(static=True, default=0.1)

    def __call__(self, s, t, x, args=None):
        h = jnp.asarray(t) - jnp.asarray(s)
        return self.flow_map(s, t, x, args) + self.size * h * jnp.cos(3 * x + s)


@pytest.mark.parametrize(
    "identity", ["lagrangian", "eulerian", "semigroup", "tangent", "inverse"]
)
def test_wrong_map_violates(identity):
    exact = gaussian_map()
    residual = residuals(Shifted(exact), exact.velocity, 0.15, 0.85, X)[identity]
    assert max_abs(residual) > 1e-3
