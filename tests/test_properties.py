"""Identities over random times, states, dtypes and PyTrees."""

import functools

import equinox as eqx
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import gaussian_map, linear_map, max_abs, mlp_map, nonlinear_field
from hypothesis import given

import flowdiffrax as fd

times = st.floats(0, 1, width=32)
# Any order, and equal times often enough.
pairs = st.tuples(times, times) | times.map(lambda t: (t, t))
states = lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-2, 2, width=32))


class Turning(fd.AbstractFlowMap):
    """The map of dx/dt = rate cos(t) x on each leaf of a PyTree."""

    rate: complex = eqx.field(static=True, default=-1.5)

    def __call__(self, s, t, x, args=None):
        growth = jnp.exp(self.rate * (jnp.sin(t) - jnp.sin(s)))
        return jtu.tree_map(lambda leaf: growth.astype(leaf.dtype) * leaf, x)


def turning_field(rate, t, x, args):
    return jtu.tree_map(lambda leaf: (rate * jnp.cos(t)).astype(leaf.dtype) * leaf, x)


def residuals(flow_map, teacher, s, u, t, x):
    return {
        "identity": fd.semigroup_residual(flow_map, s, s, s, x),
        "lagrangian": fd.lagrangian_residual(flow_map, teacher, s, t, x),
        "eulerian": fd.eulerian_residual(flow_map, teacher, s, t, x),
        "semigroup": fd.semigroup_residual(flow_map, s, u, t, x),
        "tangent": fd.tangent_residual(flow_map, teacher, t, x),
        "inverse": fd.inverse_residual(flow_map, s, t, x),
        "chord": chord_residual(flow_map, s, t, x),
    }


def chord_residual(flow_map, s, t, x):
    v = flow_map.average_velocity(s, t, x)
    h = t - s
    return jtu.tree_map(
        lambda end, start, v: end - start - h.astype(v.dtype) * v,
        flow_map(s, t, x),
        x,
        v,
    )


CASES = {
    "gaussian": (gaussian_map, (2,)),
    "gaussian-vp": (lambda: gaussian_map(fd.VariancePreservingInterpolant()), (2,)),
    "gaussian-scalar": (lambda: fd.exact.GaussianFlowMap(target_std=0.3), ()),
    "gaussian-matrix": (
        lambda: fd.exact.GaussianFlowMap(target_std=jnp.asarray([0.5, 1.5, 2])),
        (2, 3),
    ),
    "gaussian-empty": (lambda: fd.exact.GaussianFlowMap(target_std=0.3), (0,)),
    "linear": (linear_map, (2,)),
    "ode": (
        lambda: fd.ODEFlowMap(nonlinear_field, rtol=1e-11, atol=1e-11),
        (2,),
    ),
}


@functools.cache
def compiled(name):
    flow_map = CASES[name][0]()

    @jax.jit
    def evaluate(s, u, t, x):
        found = residuals(flow_map, flow_map.velocity, s, u, t, x)
        largest = lambda leaf: jnp.max(jnp.abs(leaf), initial=0)
        return jtu.tree_map(largest, found)

    return evaluate


def violations(name, dtype, s, u, t, x, tol):
    cast = lambda value: jnp.asarray(value, dtype)
    found = compiled(name)(cast(s), cast(u), cast(t), cast(x))
    size = 1 + float(np.max(np.abs(x), initial=0))
    return {key: value for key, value in found.items() if not value <= tol * size}


# Thirty integrations of derivatives take half a minute.
SLOW = {"ode": pytest.mark.slow}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CASES]
)
@given(data=st.data())
def test_identities_float64(name, data):
    (s, t), u, x = data.draw(pairs), data.draw(times), data.draw(states(CASES[name][1]))
    # The VP schedule starts with a rate of ten.
    assert not violations(name, jnp.float64, s, u, t, x, 1e-8)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-matrix", "linear"])
@given(data=st.data())
def test_identities_float32(name, data):
    (s, t), u, x = data.draw(pairs), data.draw(times), data.draw(states(CASES[name][1]))
    assert not violations(name, jnp.float32, s, u, t, x, 2e-4)


@pytest.mark.parametrize(
    "rate, dtypes, tol",
    [
        (-1.5, (jnp.float64, jnp.float64), 1e-10),
        (-1.5, (jnp.float32, jnp.float32), 1e-4),
        (-1.5, (jnp.float64, jnp.float32), 1e-4),
        (1.5j, (jnp.complex128, jnp.complex64), 1e-4),
        (1.5j, (jnp.complex128, jnp.complex128), 1e-10),
    ],
)
def test_identities_of_pytrees(rate, dtypes, tol):
    flow_map = Turning(rate)
    teacher = functools.partial(turning_field, rate)

    @jax.jit
    def evaluate(s, u, t, x):
        # The map is a closed form in numbers, whatever the dtype of the times.
        with jax.numpy_dtype_promotion("standard"):
            return residuals(flow_map, teacher, s, u, t, x)

    @given(pair=pairs, u=times, a=states((2,)), b=states((3, 1)))
    def check(pair, u, a, b):
        x = {"a": jnp.asarray(a, dtypes[0]), "b": [jnp.asarray(b, dtypes[1])]}
        found = evaluate(pair[0], u, pair[1], x)
        for identity, residual in found.items():
            assert jtu.tree_structure(residual) == jtu.tree_structure(x)
            dtype_of = lambda tree: jtu.tree_map(lambda leaf: leaf.dtype, tree)
            assert dtype_of(residual) == dtype_of(x)
            assert max_abs(residual) <= tol, identity

    check()


@functools.cache
def mlp_functions():
    flow_map = mlp_map()
    # Twice inverted, it is the same map with the velocities of the base class.
    plain = fd.InverseFlowMap(fd.InverseFlowMap(flow_map))
    return jax.jit(
        lambda s, t, x: {
            "identity": flow_map(s, s, x) - x,
            "composed identity": fd.ComposedFlowMap(flow_map, 3)(s, s, x) - x,
            "inverse at rest": fd.inverse_residual(flow_map, t, t, x),
            "lagrangian on the diagonal": fd.lagrangian_residual(
                flow_map, flow_map.velocity, t, t, x
            ),
            "eulerian on the diagonal": fd.eulerian_residual(
                flow_map, flow_map.velocity, t, t, x
            ),
            "tangent": fd.tangent_residual(plain, flow_map.velocity, t, x),
            "chord": chord_residual(plain, s, t, x),
            "average velocity on the diagonal": (
                plain.average_velocity(t, t, x) - flow_map.average_velocity(t, t, x)
            ),
        }
    )


@given(pair=pairs, x=states((2,)))
def test_any_residual_map(pair, x):
    for name, residual in mlp_functions()(*pair, jnp.asarray(x)).items():
        assert max_abs(residual) < 1e-12, name


@given(pair=pairs, x=states((2,)))
def test_untrained_map_is_not_consistent(pair, x):
    # The identities above are no tautologies of the residual form.
    s, t = pair
    flow_map, teacher = mlp_map(), nonlinear_field
    residual = fd.tangent_residual(flow_map, teacher, t, jnp.asarray(x) + 3)
    assert max_abs(residual) > 1e-3
