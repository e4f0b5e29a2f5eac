"""A problem in other units, moved, or on another clock is the same problem.

A map of the changed problem has the same weights, and the semigradient with regard to
them must be the same up to a factor: for other units one factor for the whole batch, on
another clock one for each pair of times. Where a docstring says that an objective is tied
to its clock, that is shown too.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import mlp_map, nonlinear_field

import flowdiffrax as fd

MAP = mlp_map()


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)])


def parallel(made, expected):
    """How far one vector is from a positive multiple of the other, relatively."""
    factor = made @ expected / (expected @ expected)
    assert factor > 0
    return np.linalg.norm(made - factor * expected) / np.linalg.norm(made), factor


# --- units ----------------------------------------------------------------------------


class Changed(eqx.Module):
    """The average velocity of data in other units, whose mean moves with time."""

    net: object
    scale: jax.Array
    mean: jax.Array

    def __call__(self, s, t, x, args):
        at_rest = (x - s * self.mean) / self.scale
        return self.scale * self.net(s, t, at_rest, args) + self.mean


class Problem(NamedTuple):
    objective: fd.objectives.AbstractObjective
    teacher: str | None = None
    path: str = "interpolant"
    power: int = 2  # of the scale, in the loss
    moves: bool = True  # whether the mean may move along time


UNITS = {
    "flow matching": Problem(fd.FlowMatching()),
    "velocity distillation": Problem(fd.objectives.VelocityDistillation(), "velocity"),
    "LMD": Problem(fd.LagrangianMapDistillation(), "velocity"),
    "LMD, free": Problem(
        fd.LagrangianMapDistillation(stop_gradient=fd.objectives.StopGradient.NONE),
        "velocity",
    ),
    "EMD": Problem(fd.objectives.EulerianMapDistillation(), "velocity"),
    "EE": Problem(fd.objectives.StopGradientEulerian(), moves=False),
    "EE, derivative": Problem(
        fd.objectives.StopGradientEulerian(
            stop_gradient=fd.objectives.StopGradient.DERIVATIVE
        )
    ),
    "naive Eulerian": Problem(fd.objectives.NaiveEulerian()),
    "FMM": Problem(fd.objectives.FlowMapMatching()),
    "PFMM": Problem(fd.objectives.ProgressiveFlowMapMatching(), "map"),
    "LSD": Problem(fd.LagrangianSelfDistillation()),
    "ESD": Problem(fd.objectives.EulerianSelfDistillation(), moves=False),
    "PSD": Problem(fd.objectives.ProgressiveSelfDistillation()),
    "SplitMeanFlow": Problem(fd.objectives.split_mean_flow()),
    "Shortcut": Problem(fd.objectives.Shortcut()),
    "MeanFlow": Problem(fd.objectives.MeanFlow()),
    "improved MeanFlow": Problem(fd.objectives.ImprovedMeanFlow()),
    "AlphaFlow": Problem(fd.objectives.AlphaFlow()),
    "TVM": Problem(fd.objectives.TerminalVelocityMatching()),
    "AYF-EMD": Problem(fd.objectives.AlignYourFlowEMD(), "velocity"),
    "AYF-LMD": Problem(fd.objectives.AlignYourFlowLMD(), "velocity"),
    "AYF-LMD, finite": Problem(fd.objectives.AlignYourFlowLMD(epsilon=0.05), "velocity"),
    "CT": Problem(fd.objectives.ConsistencyTraining()),
    "CT, distance": Problem(
        fd.objectives.ConsistencyTraining(
            weight=fd.weights.WeightChain(
                (fd.weights.PseudoHuber(), fd.weights.InverseNoiseGap())
            )
        ),
        power=1,
    ),
    "CD": Problem(fd.objectives.ConsistencyDistillation(), "velocity"),
    "sCT": Problem(fd.objectives.ContinuousConsistency()),
    "sCD": Problem(fd.objectives.ContinuousConsistency(), "velocity"),
    "FreeFlow": Problem(fd.objectives.free_flow(), "velocity"),
    "trajectory matching": Problem(fd.TrajectoryMatching(), path="trajectory"),
    "cycle": Problem(fd.objectives.CycleConsistency()),
    "roll-out": Problem(fd.objectives.RollOutMatching(), path="trajectory"),
}
X0, X1 = np.asarray(jr.normal(jr.key(1), (2, 8, 2)))


def paths_of(problem, scale, mean):
    """The paths of the problem, with all states scaled and moved along with time."""
    if problem.path == "interpolant":
        return jax.vmap(fd.LinearInterpolant())(
            jnp.asarray(scale * X0), jnp.asarray(scale * X1 + mean)
        )
    ts = np.linspace(0, 1, 5)
    ys = scale * np.cumsum(np.asarray(jr.normal(jr.key(2), (8, 5, 2))), axis=1)
    ys = ys + mean * ts[None, :, None]
    return fd.paths.TrajectoryPath(
        jnp.broadcast_to(jnp.asarray(ts), (8, 5)), jnp.asarray(ys)
    )


@eqx.filter_jit
def batch_gradient(problem, net, scale, mean, paths):
    objective, kind = problem[:2]

    def velocity(t, x, args):
        return scale * nonlinear_field(t, (x - t * mean) / scale, args) + mean

    def loss(net):
        flow_map = fd.FlowMap(Changed(net, scale, mean))
        other = fd.FlowMap(Changed(mlp_map(1).net, scale, mean))
        teacher = {None: None, "velocity": velocity, "map": other}[kind]
        return fd.objectives.batch_loss(
            objective, flow_map, teacher, paths, key=jr.key(0)
        )[0]

    return eqx.filter_grad(loss)(net)


def in_units(problem, scale, mean):
    grads = batch_gradient(
        problem,
        MAP.net,
        jnp.asarray(float(scale)),
        jnp.asarray(float(mean)),
        paths_of(problem, scale, mean),
    )
    return vector(grads)


@pytest.mark.parametrize("name", UNITS)
def test_semigradients_do_not_depend_on_units(name):
    problem = UNITS[name]
    expected = in_units(problem, 1, 0)
    assert np.abs(expected).max() > 1e-3
    for scale, mean in ((0.01, 0), (1000, 0), (1, 20), (1000, 20)):
        made = in_units(problem, scale, mean)
        if mean != 0 and not problem.moves:
            # Its docstring says that data are to be centred.
            assert np.linalg.norm(made / scale**2 - expected) > 1e-4
            continue
        off, factor = parallel(made, expected)
        assert off < 1e-7
        assert factor == pytest.approx(scale**problem.power, rel=1e-6)


WITH_UNITS = {
    "power": lambda scale: fd.weights.PowerWeight(1.0, 0.5, scale=scale),
    "tangent": lambda scale: fd.weights.NormalisedTangent(0.7, scale=scale),
    "huber": lambda scale: fd.weights.PseudoHuber(0.4 * scale),
}


@pytest.mark.parametrize("name", WITH_UNITS)
def test_weights_with_units_take_the_scale_of_the_data(name):
    make = WITH_UNITS[name]
    of = lambda scale, unit: in_units(
        Problem(fd.objectives.MeanFlow(weight=make(unit))), scale, 3
    )
    off, _ = parallel(of(100.0, 100.0), of(1.0, 1.0))
    assert off < 1e-7
    # And without it they are other weights.
    off, _ = parallel(of(100.0, 1.0), of(1.0, 1.0))
    assert off > 1e-2


def test_learned_weight_starts_at_the_scale_of_the_data():
    weight, moved = fd.weights.LearnedWeight(4), fd.weights.LearnedWeight(4, scale=100.0)
    s, t, error = map(jnp.asarray, (0.2, 0.9, 1.7))
    # One more constant in the loss, and the same slope.
    made = moved(s, t, 100.0**2 * error) - 2 * np.log(100.0)
    np.testing.assert_allclose(made, weight(s, t, error), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e5])
def test_inverse_gap_in_any_unit_of_time(unit):
    s, t = 0.2 * unit, 0.21 * unit
    made = fd.weights.InverseGap()(jnp.asarray(s), jnp.asarray(t), jnp.asarray(3.0))
    np.testing.assert_allclose(made, 3.0 / (0.01 * unit) ** 2, rtol=1e-9)


def test_inverse_gap_is_finite_for_gaps_of_rounding():
    weight, one = fd.weights.InverseGap(), jnp.ones((), jnp.float32)
    for start in (0.0, 0.5, 40.0):
        s = jnp.asarray(start, jnp.float32)
        assert np.isfinite(weight(s, s, one))
    late = jnp.asarray(40.0, jnp.float32)
    assert weight(late, late, one) == pytest.approx(1 / (4000 * 2.0**-23) ** 2, rel=1e-3)


# --- clocks ---------------------------------------------------------------------------

# Time runs slowly first; both ends stay.
CLOCK = lambda t: t**2 * (1 + t) / 2
RECLOCKED = fd.paths.Interpolant(lambda t: 1 - CLOCK(t), CLOCK)


class Clock(NamedTuple):
    """An objective, and on which changes its semigradient depends by a factor only."""

    objective: fd.objectives.AbstractObjective
    teacher: str | None = None
    clock: bool = True  # another clock
    schedule: bool = True  # another interpolant, which scales space too


LIMIT = fd.objectives.StopGradient.DERIVATIVE
CLOCKS = {
    "flow matching": Clock(fd.FlowMatching()),
    "velocity distillation": Clock(fd.objectives.VelocityDistillation(), "velocity"),
    "LMD": Clock(fd.LagrangianMapDistillation(), "velocity", schedule=False),
    "LMD, free": Clock(
        fd.LagrangianMapDistillation(stop_gradient=fd.objectives.StopGradient.NONE),
        "velocity",
    ),
    "EMD": Clock(fd.objectives.EulerianMapDistillation(), "velocity"),
    "EE": Clock(fd.objectives.StopGradientEulerian(), schedule=False),
    "EE, derivative": Clock(fd.objectives.StopGradientEulerian(stop_gradient=LIMIT)),
    "naive Eulerian": Clock(fd.objectives.NaiveEulerian()),
    "FMM": Clock(fd.objectives.FlowMapMatching(), clock=False, schedule=False),
    "PFMM": Clock(
        fd.objectives.ProgressiveFlowMapMatching(), "map", clock=False, schedule=False
    ),
    "LSD": Clock(fd.LagrangianSelfDistillation(), schedule=False),
    "ESD": Clock(fd.objectives.EulerianSelfDistillation(), schedule=False),
    "PSD": Clock(
        fd.objectives.ProgressiveSelfDistillation(), clock=False, schedule=False
    ),
    "SplitMeanFlow": Clock(fd.objectives.split_mean_flow(), clock=False, schedule=False),
    "Shortcut": Clock(fd.objectives.Shortcut(), clock=False, schedule=False),
    "MeanFlow": Clock(fd.objectives.MeanFlow()),
    "improved MeanFlow": Clock(fd.objectives.ImprovedMeanFlow(), schedule=False),
    "AlphaFlow": Clock(fd.objectives.AlphaFlow(alpha=0.3), clock=False, schedule=False),
    "TVM": Clock(fd.objectives.TerminalVelocityMatching(), schedule=False),
    "AYF-EMD": Clock(
        fd.objectives.AlignYourFlowEMD(), "velocity", clock=False, schedule=False
    ),
    "AYF-EMD, whole tangent": Clock(
        fd.objectives.AlignYourFlowEMD(tangent_scale=1.0), "velocity"
    ),
    "AYF-LMD": Clock(fd.objectives.AlignYourFlowLMD(), "velocity"),
    "CT": Clock(fd.objectives.ConsistencyTraining()),
    "CD": Clock(
        fd.objectives.ConsistencyDistillation(), "velocity", clock=False, schedule=False
    ),
    "sCT": Clock(fd.objectives.ContinuousConsistency()),
    "FreeFlow": Clock(fd.objectives.free_flow(), "velocity"),
}


def velocity_on(interpolant):
    """The velocity of a flow whose map is known on the linear clock."""
    if interpolant is None:
        return nonlinear_field

    def velocity(t, x, args):
        rescheduled = fd.RescheduledFlowMap(
            Diagonal(), fd.LinearInterpolant(), interpolant
        )
        return rescheduled.velocity(t, x, args)

    return velocity


class Diagonal(fd.AbstractFlowMap):
    """A map that is right to first order: one step along the field."""

    def jump(self, s, t, x, args):
        return x + (t - s) * nonlinear_field(s, x, args)


@eqx.filter_jit
def one_gradient(problem, interpolant, s, t):
    objective, kind, _, _ = problem
    linear = fd.LinearInterpolant()

    def on(flow_map):
        if interpolant is None:
            return flow_map
        return fd.RescheduledFlowMap(flow_map, linear, interpolant)

    def loss(flow_map):
        path = (linear if interpolant is None else interpolant)(
            jnp.asarray(X0[0]), jnp.asarray(X1[0])
        )
        teacher = {
            None: None, "velocity": velocity_on(interpolant), "map": on(mlp_map(1))
        }[kind]  # fmt: skip
        return objective(on(flow_map), teacher, path, s, t, key=jr.key(0))

    return eqx.filter_grad(loss)(MAP)


def times_of(objective, clock):
    """Two times on the linear clock, and the same on another."""
    s, t = (
        (0.3, 1.0)
        if isinstance(objective, fd.objectives.ContinuousConsistency)
        else (0.3, 0.8)
    )
    s = 0.0 if isinstance(objective.times, fd.times.StartAt) else s
    grid = np.linspace(0, 1, 100_001)
    back = lambda u: float(np.interp(u, clock(grid), grid))
    return (s, t), (back(s), back(t))


def gradients_on(problem, interpolant, clock):
    objective = problem.objective
    linear, other = times_of(objective, clock)
    if isinstance(objective, fd.objectives.ConsistencyTraining):
        weight = fd.weights.InverseNoiseGap(interpolant)
        changed = problem._replace(
            objective=fd.objectives.ConsistencyTraining(weight=weight)
        )
    else:
        changed = problem
    made = one_gradient(changed, interpolant, *map(jnp.asarray, other))
    expected = one_gradient(problem, None, *map(jnp.asarray, linear))
    return vector(made), vector(expected)


@pytest.mark.parametrize("name", CLOCKS)
def test_semigradients_on_another_clock(name):
    problem = CLOCKS[name]
    off, factor = parallel(*gradients_on(problem, RECLOCKED, CLOCK))
    # What its docstring calls tied to the clock is so.
    assert off < 1e-6 if problem.clock else off > 1e-5
    if name == "CT":  # its weight knows the noise levels, whatever the clock
        assert factor == pytest.approx(1.0, rel=1e-6)


# What depends on the clock depends on a schedule, which changes the clock as well.
@pytest.mark.parametrize(
    "name",
    [
        name if problem.clock else pytest.param(name, marks=pytest.mark.slow)
        for name, problem in CLOCKS.items()
    ],
)
def test_semigradients_under_another_schedule(name):
    problem = CLOCKS[name]
    interpolant = fd.paths.TrigonometricInterpolant()

    def clock(t):  # of the same ratio of data to base
        sine, cosine = np.sin(np.pi / 2 * t), np.cos(np.pi / 2 * t)
        return sine / (sine + cosine)

    off, _ = parallel(*gradients_on(problem, interpolant, clock))
    assert off < 1e-6 if problem.schedule else off > 1e-5
