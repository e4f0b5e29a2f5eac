"""A network where a flow map is expected: its velocity must not pass for a state."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import without_type_checks

import flowdiffrax as fd

X = jnp.ones((4, 4, 1))
FIELD = lambda t, x, args: -x

NETWORKS = {
    "MLP": lambda: fd.nn.MLP(2, 8, 1, key=jr.key(0)),
    "DiT": lambda: fd.nn.DiT((4, 4, 1), 2, 8, 1, num_heads=1, key=jr.key(0)),
    "UNet": lambda: fd.nn.UNet((4, 4, 1), 8, (1,), 1, key=jr.key(0)),
    "MagnitudePreservingUNet": lambda: fd.nn.MagnitudePreservingUNet(
        (4, 4, 1), 8, (1,), 1, key=jr.key(0)
    ),
    "FNO": lambda: fd.nn.FNO((4, 4, 1), 8, 1, 1, key=jr.key(0)),
    "DilatedResNet": lambda: fd.nn.DilatedResNet(
        (4, 4, 1), 8, 1, dilations=(1,), key=jr.key(0)
    ),
    "Ravelled": lambda: fd.nn.Ravelled(fd.nn.MLP(2, 8, 1, key=jr.key(0))),
    "LogDensityNet": lambda: fd.likelihood.LogDensityNet(
        fd.nn.MLP(2, 8, 1, key=jr.key(0))
    ),
    "MLP of Equinox": lambda: eqx.nn.MLP(2, 2, 8, 1, key=jr.key(0)),
    # Takes four arrays, as a flow map does.
    "attention of Equinox": lambda: eqx.nn.MultiheadAttention(1, 2, key=jr.key(0)),
}

ENTRIES = {
    "sample": lambda net: fd.sample(net, X, 1),
    "sample_with_restarts": lambda net: fd.sample_with_restarts(
        net, fd.LinearInterpolant(), X, [0.5], base=fd.data.GaussianBase(), key=jr.key(0)
    ),
    "sample_tilted": lambda net: fd.solvers.sample_tilted(
        *(net, fd.LinearInterpolant(), lambda x, args: jnp.sum(x), X[None], 1),
        key=jr.key(0),
    ),
    "FlowMapSolver": fd.FlowMapSolver,
    "AdaptiveFlowMapSolver": fd.AdaptiveFlowMapSolver,
    "HybridSolver": fd.HybridSolver,
    "FlowMapInterpolation": lambda net: fd.solvers.FlowMapInterpolation(
        jnp.asarray([0.0, 1.0]), jnp.stack([X, X]), net
    ),
    "log_prob": lambda net: fd.likelihood.log_prob(net, lambda x: jnp.sum(x), X),
    "sample_log_prob": lambda net: fd.likelihood.sample_log_prob(
        net, lambda x: jnp.sum(x), X
    ),
    "pull_back": lambda net: fd.likelihood.pull_back(net, X),
    "log_det": lambda net: fd.likelihood.log_det(net, 0.0, 1.0, X),
    "invert": lambda net: fd.likelihood.invert(net, 0.0, 1.0, X),
    "ComposedFlowMap": lambda net: fd.ComposedFlowMap(net, 2),
    "InverseFlowMap": fd.InverseFlowMap,
    "RescheduledFlowMap": lambda net: fd.RescheduledFlowMap(
        net, fd.LinearInterpolant(), fd.paths.TrigonometricInterpolant()
    ),
    "DefectCorrectedFlowMap": lambda net: fd.estimates.DefectCorrectedFlowMap(net, FIELD),
    "GuidedFlowMap": lambda net: fd.velocities.GuidedFlowMap(
        net, lambda v, t, x, args: x
    ),
    "LogDensityFlowMap": fd.likelihood.LogDensityFlowMap,
    "lagrangian_residual": lambda net: fd.lagrangian_residual(net, FIELD, 0.0, 1.0, X),
    "eulerian_residual": lambda net: fd.eulerian_residual(net, FIELD, 0.0, 1.0, X),
    "semigroup_residual": lambda net: fd.semigroup_residual(net, 0.0, 0.5, 1.0, X),
    "tangent_residual": lambda net: fd.tangent_residual(net, FIELD, 0.5, X),
    "inverse_residual": lambda net: fd.inverse_residual(net, 0.0, 1.0, X),
    "lagrangian_bound": lambda net: fd.estimates.lagrangian_bound(
        net, FIELD, 0.0, 1.0, X
    ),
    "LinearisedError": lambda net: fd.estimates.LinearisedError()(
        net, FIELD, 0.0, 1.0, X
    ),
    "AlekseevGroebner": lambda net: fd.estimates.AlekseevGroebner()(
        net, FIELD, 0.0, 1.0, X
    ),
    "eulerian_error": lambda net: fd.estimates.eulerian_error(
        net, FIELD, 0.0, 1.0, X, exact=lambda s, t, x, args: x
    ),
    "defects": lambda net: fd.metrics.defects(
        net, FIELD, jnp.zeros(1), jnp.ones(1), X[None], X[None]
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return eqx.filter_eval_shape(NETWORKS[request.param])


@pytest.mark.parametrize("entry", ENTRIES)
def test_bare_network_is_refused(network, entry):
    with without_type_checks(), pytest.raises(TypeError, match=r"Wrap it as `FlowMap\(n"):
        ENTRIES[entry](network)


@pytest.mark.parametrize("wrap", [eqx.filter_jit, eqx.filter_checkpoint])
def test_wrapped_network_is_refused(wrap):
    with pytest.raises(TypeError, match="a bare network, MLP"):
        fd.FlowMapSolver(wrap(NETWORKS["MLP"]()))


@pytest.mark.parametrize("wrap", [lambda fn: fn, eqx.filter_jit])
def test_flow_maps_and_functions_are_not_taken_for_networks(wrap):
    net = NETWORKS["MLP"]()
    for flow_map in (fd.FlowMap(net), lambda s, t, x, args: x + (t - s) * net(s, t, x)):
        solver = fd.FlowMapSolver(wrap(flow_map))
        assert isinstance(solver, diffrax.AbstractSolver)
