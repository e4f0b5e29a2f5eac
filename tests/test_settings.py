"""Settings that are handed on to Diffrax arrive there, and so do their defaults.

Nothing is solved: the call is looked at, and ends there.
"""

import diffrax
import jax
import jax.numpy as jnp
import pytest
from helpers import nonlinear_field

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])
TS = jnp.asarray([0.0, 0.5, 1.0])


class Called(Exception):
    """With what."""


@pytest.fixture
def handed_on(monkeypatch):
    """What `diffrax.diffeqsolve` is called with, by a function of a vector field."""

    def solve(terms, solver, *rest, stepsize_controller, **settings):
        tolerances = {"rtol": stepsize_controller.rtol, "atol": stepsize_controller.atol}
        raise Called({"solver": solver, **tolerances, **settings})

    def call(fn):
        # A field of its own, so that nothing is in a cache.
        with pytest.raises(Called) as caught:
            jax.eval_shape(lambda: fn(lambda *args: nonlinear_field(*args)))
        return caught.value.args[0]

    monkeypatch.setattr(diffrax, "diffeqsolve", solve)
    return call


@pytest.mark.parametrize("dtype, tol", [(jnp.float64, 1e-8), (jnp.float32, 1e-6)])
def test_settings_of_an_integrated_map(handed_on, dtype, tol):
    x = X.astype(dtype)
    seen = handed_on(lambda field: fd.ODEFlowMap(field)(0.1, 0.9, x))
    assert seen["solver"] == diffrax.Dopri8() and seen["max_steps"] == 256
    assert isinstance(seen["adjoint"], diffrax.DirectAdjoint)
    assert seen["rtol"] == seen["atol"] == tol
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    given = {"rtol": 1e-3, "atol": 1e-5, "max_steps": 77, "adjoint": adjoint}
    make = lambda field: fd.ODEFlowMap(field, diffrax.Heun(), **given)
    seen = handed_on(lambda field: make(field)(0.1, 0.9, x))
    assert seen["solver"] == diffrax.Heun()
    assert {name: seen[name] for name in given} == given


@pytest.mark.parametrize(
    "dtype, solver, tol",
    [
        (jnp.float64, None, 1e-8),
        (jnp.float64, diffrax.Kvaerno3(), 1e-8),
        (jnp.float32, None, 1e-5),
        (jnp.float32, diffrax.Kvaerno3(), 1e-3),
    ],
)
def test_settings_of_solved_trajectories(handed_on, dtype, solver, tol):
    x0 = jnp.stack([X, -X]).astype(dtype)
    run = lambda **settings: handed_on(
        lambda field: fd.solve_trajectories(field, x0, TS, **settings)
    )
    seen = run(solver=solver)
    assert seen["rtol"] == seen["atol"] == tol
    assert seen["solver"] == (diffrax.Tsit5() if solver is None else solver)
    assert seen["max_steps"] == 4096 and seen["throw"]
    given = {"rtol": 1e-2, "atol": 1e-4, "max_steps": 77, "throw": False}
    seen = run(solver=solver, **given)
    assert {name: seen[name] for name in given} == given


@pytest.mark.parametrize("kind", [fd.FlowMapSolver, fd.AdaptiveFlowMapSolver])
def test_degree_of_dense_output(kind):
    term, flow_map = diffrax.ODETerm(nonlinear_field), lambda s, t, x, args: x + t - s
    lengths = []
    for settings in ({}, {"dense_degree": 5}):
        solver = kind(flow_map, **settings)
        jump = solver.step(term, 0.1, 0.9, X, None, None, made_jump=False)[2]["jump"]
        dense = solver.interpolation_cls(t0=0.1, t1=0.9, jump=jump)
        assert jnp.allclose(dense.evaluate(0.3), X + 0.2)
        lengths += [len(leaf) for leaf in jax.tree.leaves(jump) if leaf.ndim == 2]
    assert lengths == [16 + 1, 5 + 1]
