"""Every objective at the exact map, and at maps that are wrong in one parameter.

Distillation is zero there. What learns from data keeps a variance: there the mean
gradient vanishes, within standard errors, and away from it, it does not.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian_map, linear_map, nonlinear_field

import flowdiffrax as fd

X0, X1 = jnp.asarray([0.8, -0.5]), jnp.asarray([-0.3, 1.1])
PATH = fd.LinearInterpolant()(X0, X1)
PAIRS = [(0.15, 0.85), (0.9, 0.2)]


class Wrong(fd.AbstractFlowMap):
    """A map off by `size` times a smooth error of its average velocity."""

    flow_map: fd.AbstractFlowMap
    size: jax.Array

    def jump(self, s, t, x, args):
        error = self._error(jnp.asarray(s), jnp.asarray(t), x)
        return self.flow_map(s, t, x, args) + (t - s) * self.size * error

    def tangent(self, t, x, args):
        t = jnp.asarray(t)
        return self.flow_map.velocity(t, x, args) + self.size * self._error(t, t, x)

    def chord(self, s, t, x, args):
        error = self._error(jnp.asarray(s), jnp.asarray(t), x)
        return self.flow_map.average_velocity(s, t, x, args) + self.size * error

    def _error(self, s, t, x):
        return jnp.cos(2 * x + s) + 0.5 * t


def mixture_velocity():
    means = [[1.0, 0.3], [-0.8, 0.5], [0.1, -1.2]]
    return fd.exact.GaussianMixtureVelocity([0.5, 0.3, 0.2], means, [0.09, 0.25, 0.16])


MAPS = {
    "gaussian-linear": gaussian_map,
    "gaussian-trigonometric": lambda: gaussian_map(fd.paths.TrigonometricInterpolant()),
    "gaussian-vp": lambda: gaussian_map(fd.paths.VariancePreservingInterpolant()),
    "mixture": lambda: fd.ODEFlowMap(mixture_velocity(), rtol=1e-13, atol=1e-13),
    "linear": linear_map,
    "nonlinear": lambda: fd.ODEFlowMap(nonlinear_field, rtol=1e-13, atol=1e-13),
}

# Solved by Diffrax, and so slow to compile.
ODES = ("mixture", "nonlinear")
SLOW = (*ODES, "gaussian-vp")

STOPS = fd.objectives.StopGradient
# name -> (objective, what it takes for a teacher: a velocity, a map, or nothing)
EXACT = {
    "lmd": (fd.LagrangianMapDistillation(), "velocity"),
    "lmd-none": (fd.LagrangianMapDistillation(stop_gradient=STOPS.NONE), "velocity"),
    "lmd-derivative": (
        fd.LagrangianMapDistillation(stop_gradient=STOPS.DERIVATIVE),
        "velocity",
    ),
    "emd": (fd.objectives.EulerianMapDistillation(), "velocity"),
    "emd-none": (
        fd.objectives.EulerianMapDistillation(stop_gradient=STOPS.NONE),
        "velocity",
    ),
    "emd-transport": (
        fd.objectives.EulerianMapDistillation(stop_gradient=STOPS.TRANSPORT),
        "velocity",
    ),
    "emd-derivative": (
        fd.objectives.EulerianMapDistillation(stop_gradient=STOPS.DERIVATIVE),
        "velocity",
    ),
    "lsd": (fd.LagrangianSelfDistillation(), None),
    "lsd-average": (fd.LagrangianSelfDistillation(), "map"),
    "esd": (fd.objectives.EulerianSelfDistillation(), None),
    "psd": (fd.objectives.ProgressiveSelfDistillation(), None),
    "psd-uniform": (fd.objectives.ProgressiveSelfDistillation(split=None), None),
    "split-mean-flow": (fd.objectives.split_mean_flow(), None),
    "shortcut": (fd.objectives.Shortcut(), "map"),
    "pfmm": (fd.objectives.ProgressiveFlowMapMatching(3), "map"),
    "mean-flow": (fd.objectives.MeanFlow(weight=fd.weights.NoWeight()), "velocity"),
    "ayf-emd": (
        fd.objectives.AlignYourFlowEMD(weight=fd.weights.NoWeight(), tangent_scale=1.0),
        "velocity",
    ),
    "ayf-lmd": (fd.objectives.AlignYourFlowLMD(weight=fd.weights.NoWeight()), "velocity"),
    "free-flow": (fd.objectives.free_flow(), "velocity"),
    "scm": (
        fd.objectives.ContinuousConsistency(weight=fd.weights.NoWeight()),
        "velocity",
    ),
}


def teacher_for(kind, flow_map):
    return {"velocity": flow_map.velocity, "map": flow_map, None: None}[kind]


def losses(name):
    """All losses of one map at once, as a function of its error and of the times."""
    exact = MAPS[name]()

    @jax.jit
    def compute(size, s, t):
        flow_map = Wrong(exact, size)
        return {
            key: objective(flow_map, teacher_for(kind, exact), PATH, s, t, key=jr.key(3))
            for key, (objective, kind) in EXACT.items()
        }

    return compute


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MAPS],
)
def test_zero_at_the_exact_map_only(name):
    compute = losses(name)
    for s, t in PAIRS:
        # The residual is the root of the loss.
        for key, loss in compute(jnp.asarray(0.0), s, t).items():
            assert abs(loss) < 1e-20, (key, s, t)
        for key, loss in compute(jnp.asarray(0.1), s, t).items():
            assert loss > 1e-5, (key, s, t)


# --- what learns from data ----------------------------------------------------------

N = 20_000
FROM_DATA = {
    "fm": fd.FlowMatching(),
    "ee": fd.objectives.StopGradientEulerian(),
    "ee-derivative": fd.objectives.StopGradientEulerian(stop_gradient=STOPS.DERIVATIVE),
    "mean-flow": fd.objectives.MeanFlow(weight=fd.weights.NoWeight()),
    "improved-mean-flow": fd.objectives.ImprovedMeanFlow(weight=fd.weights.NoWeight()),
    "improved-mean-flow-teacher": fd.objectives.ImprovedMeanFlow(
        weight=fd.weights.NoWeight(), stop_gradient=STOPS.TEACHER
    ),
    "fmm": fd.objectives.FlowMapMatching(),
    "tvm": fd.objectives.TerminalVelocityMatching(),
    # The bias of these two is of the order of their step.
    "alpha-flow": fd.objectives.AlphaFlow(alpha=1e-4, weight=fd.weights.NoWeight()),
    "consistency": fd.objectives.ConsistencyTraining(
        weight=fd.weights.InverseGap(1.0, min_gap=1e-9)
    ),
    "scm": fd.objectives.ContinuousConsistency(weight=fd.weights.NoWeight()),
}
INTERPOLANTS = {
    "linear": fd.LinearInterpolant(),
    "trigonometric": fd.paths.TrigonometricInterpolant(),
}


def mean_gradient(objective, interpolant, size):
    """The mean of the derivative in the map's one parameter, and its standard error."""
    base_key, data_key, gap_key, start_key = jr.split(jr.key(0), 4)
    # The law that `gaussian_map` is the flow of.
    x0 = jnp.asarray([[0.1, -0.2]]) + 1.3 * jr.normal(base_key, (N, 2))
    scale = jnp.asarray([[0.6, 0.4]])
    x1 = jnp.asarray([[0.7, 0.5]]) + scale * jr.normal(data_key, (N, 2))
    h, u = jr.uniform(gap_key, (N,)), jr.uniform(start_key, (N,))
    s = (1 - h) * u
    t = s + h
    if isinstance(objective, fd.objectives.ConsistencyTraining):
        t = s + 1e-4
    if isinstance(objective, fd.objectives.ContinuousConsistency):
        t = jnp.ones_like(s)

    @eqx.filter_jit
    def gradients(objective, size):
        def loss(size, x0, x1, s, t):
            flow_map = Wrong(gaussian_map(interpolant), size)
            return objective(flow_map, None, interpolant(x0, x1), s, t)

        over_rows = jax.vmap(jax.grad(loss), (None, 0, 0, 0, 0))
        return over_rows(size, x0, x1, s, t)

    each = gradients(objective, jnp.asarray(size))
    return float(each.mean()), float(each.std() / np.sqrt(N))


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("name", FROM_DATA)
def test_unbiased_at_the_exact_map(name, path):
    mean, error = mean_gradient(FROM_DATA[name], INTERPOLANTS[path], 0.0)
    assert abs(mean) < 4 * error


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_wrong_map_is_pulled_back(name):
    for size in (0.3, -0.3):
        mean, error = mean_gradient(FROM_DATA[name], fd.LinearInterpolant(), size)
        assert np.sign(size) * mean > 8 * error


def test_naive_eulerian_leaves_the_exact_map():
    mean, error = mean_gradient(
        fd.objectives.NaiveEulerian(), fd.LinearInterpolant(), 0.0
    )
    assert abs(mean) > 10 * error


def test_distillation_from_a_diffrax_step():
    # The target is off by the solver's local error, of fifth order in the step.
    exact = linear_map()
    objective = fd.objectives.ConsistencyDistillation(solver=diffrax.Tsit5())
    u = jnp.asarray(0.2 + 1e-2)
    loss = objective(exact, exact.velocity, PATH, jnp.asarray(0.2), u)
    assert loss < 1e-20
    wrong = Wrong(exact, jnp.asarray(0.1))
    assert objective(wrong, exact.velocity, PATH, jnp.asarray(0.2), u) > 1e-8
