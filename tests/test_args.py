"""Whatever takes `args` hands them on, to all that it calls.

Nothing is computed where tracing will do: the map and the field of these tests fail
without the `args` that they were made for, and note that they were asked.
"""

import inspect

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from helpers import OBJECTIVES as TEACHERS
from test_package import NAMES, public

import flowdiffrax as fd
from flowdiffrax import testing

X = jnp.asarray([0.8, -0.5])
S, U, T = jnp.asarray(0.2), jnp.asarray(0.5), jnp.asarray(0.9)
ARGS = {"rate": jnp.asarray(0.7)}
KEY = jr.key(0)
PATH = fd.LinearInterpolant()(X, -X)
LINEAR = fd.LinearInterpolant()
asked = set()


def field(t, x, args):
    asked.add("field")
    return args["rate"] * x


class Growth(fd.AbstractFlowMap):
    """The flow map of `field`."""

    def jump(self, s, t, x, args):
        asked.add("map")
        return x * jnp.exp(args["rate"] * (jnp.asarray(t) - jnp.asarray(s)))


def net(s, t, x, args):
    asked.add("map")
    return jax.tree_util.tree_map(lambda leaf: args["rate"] * jnp.sin(leaf), x)


def vector_net(s, t, x, args):
    return net(s, t, x, {"rate": args[0]})


def guided(velocity, t, x, args):
    return 2 * velocity(t, x, args)


def condition(t, y, args, **kwargs):
    asked.add("event")
    return args["rate"] * y[0] - 10.0


MAP, MAP_OF_NET = Growth(), fd.FlowMap(net)
PAIR = (X, jnp.asarray(0.0))
TERM, EVENT = diffrax.ODETerm(field), diffrax.Event(condition)


def solved(solver, args):
    controller = diffrax.ConstantStepSize()
    if isinstance(solver, fd.AdaptiveFlowMapSolver | fd.HybridSolver):
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    return diffrax.diffeqsolve(
        TERM, solver, 0.1, 0.9, 0.2, X, args=args, stepsize_controller=controller
    ).ys


def of_objective(objective, kind):
    """At a jump and on the diagonal."""
    teacher = {"velocity": field, "map": MAP, None: None}[kind]
    path = PATH
    if isinstance(objective, fd.TrajectoryMatching | fd.objectives.RollOutMatching):
        ts = jnp.linspace(0.0, 1.0, 5)
        path = fd.paths.TrajectoryPath(ts, jnp.outer(1 + ts, X))

    def call(args):
        inputs = MAP_OF_NET, teacher, path
        jump = objective(*inputs, S, T, args, key=KEY)
        try:
            return jump, objective.on_diagonal(*inputs, T, args, key=jr.key(1))
        except ValueError:  # it has none
            return jump

    return call


def of_map(flow_map, x=X):
    return lambda args: (
        flow_map(S, T, x, args),
        flow_map.velocity(T, x, args),
        flow_map.average_velocity(S, T, x, args),
    )


# What is called, and what it is to ask: a map ("map"), a vector field, or both.
BOTH = {"map", "field"}
RESIDUALS = {
    "lagrangian_residual": (
        lambda args: fd.lagrangian_residual(MAP, field, S, T, X, args),
        BOTH,
    ),
    "eulerian_residual": (
        lambda args: fd.eulerian_residual(MAP, field, S, T, X, args),
        BOTH,
    ),
    "tangent_residual": (lambda args: fd.tangent_residual(MAP, field, T, X, args), BOTH),
    "semigroup_residual": (
        lambda args: fd.semigroup_residual(MAP, S, U, T, X, args),
        {"map"},
    ),
    "inverse_residual": (lambda args: fd.inverse_residual(MAP, S, T, X, args), {"map"}),
}
ERRORS = {
    "eulerian_error": (
        lambda args: (
            fd.estimates.eulerian_error(MAP, field, S, T, X, args),
            fd.estimates.eulerian_error(MAP, field, S, T, X, args, exact=MAP),
        ),
        BOTH,
    ),
    "lagrangian_bound": (
        lambda args: (
            fd.estimates.lagrangian_bound(MAP, field, S, T, X, args),
            fd.estimates.lagrangian_bound(
                MAP, field, S, T, X, args, growth=lambda t, x, args: args["rate"]
            ),
        ),
        BOTH,
    ),
    "logarithmic_norm": (
        lambda args: fd.estimates.logarithmic_norm(field, T, X, args),
        {"field"},
    ),
    "AlekseevGroebner": (
        lambda args: fd.estimates.AlekseevGroebner()(MAP, field, S, T, X, args),
        BOTH,
    ),
    "LagrangianDefect": (
        lambda args: fd.estimates.LagrangianDefect()(MAP, field, S, T, X, args),
        BOTH,
    ),
    "LinearisedError": (
        lambda args: fd.estimates.LinearisedError()(MAP, field, S, T, X, args),
        BOTH,
    ),
    "PicardDefect": (
        lambda args: fd.estimates.PicardDefect()(MAP, field, S, T, X, args),
        BOTH,
    ),
    "SemigroupDefect": (
        lambda args: fd.estimates.SemigroupDefect()(MAP, field, S, T, X, args),
        {"map"},
    ),
}
INNER = {
    "AutonomousFlowMap": (of_map(fd.AutonomousFlowMap(MAP)), {"map"}),
    "flow_maps.RelaxationFlowMap": (
        of_map(fd.flow_maps.RelaxationFlowMap(lambda *given: (net(*given), X))),
        {"map"},
    ),
    "flow_maps.RavelledFlowMap": (
        of_map(fd.flow_maps.RavelledFlowMap(fd.FlowMap(vector_net)), {"x": X}),
        {"map"},
    ),
    "ComposedFlowMap": (of_map(fd.ComposedFlowMap(MAP, 3)), {"map"}),
    "DefectCorrectedFlowMap": (
        of_map(fd.estimates.DefectCorrectedFlowMap(MAP, field)),
        BOTH,
    ),
    "FlowMap": (of_map(MAP_OF_NET), {"map"}),
    "GuidedFlowMap": (of_map(fd.velocities.GuidedFlowMap(MAP, guided)), {"map"}),
    "HypersolverFlowMap": (of_map(fd.HypersolverFlowMap(field, net)), BOTH),
    "InverseFlowMap": (of_map(fd.InverseFlowMap(MAP)), {"map"}),
    "LogDensityFlowMap": (
        lambda args: (
            of_map(
                fd.likelihood.LogDensityFlowMap(
                    fd.FlowMap(fd.likelihood.LogDensityNet(net))
                )
            )(args),
            fd.likelihood.LogDensityFlowMap(fd.FlowMap(net)).with_log_det(S, T, X, args),
        ),
        {"map"},
    ),
    "NormalisedFlowMap": (
        of_map(fd.Normalisation(jnp.zeros(2), jnp.ones(2)).flow_map(MAP)),
        {"map"},
    ),
    "ODEFlowMap": (of_map(fd.ODEFlowMap(field)), {"field"}),
    "flow_maps.StepperFlowMap": (
        of_map(fd.flow_maps.StepperFlowMap(fd.ODEFlowMap(field), net)),
        BOTH,
    ),
    "ProjectedFlowMap": (
        of_map(
            fd.ProjectedFlowMap(
                MAP, fd.ConserveInvariants(lambda x, args: args["rate"] * jnp.sum(x**2))
            )
        ),
        {"map"},
    ),
    "RescheduledFlowMap": (
        of_map(fd.RescheduledFlowMap(MAP, LINEAR, fd.paths.TrigonometricInterpolant())),
        {"map"},
    ),
    "AbstractFlowMap": (of_map(MAP), {"map"}),
    "nn.Ravelled": (
        lambda args: fd.nn.Ravelled(vector_net)(S, T, {"x": X}, args),
        {"map"},
    ),
    "LogDensityNet": (
        lambda args: fd.likelihood.LogDensityNet(net)(S, T, PAIR, args),
        {"map"},
    ),
}
FIELDS = {
    "AutoguidedVelocity": (
        lambda args: fd.velocities.AutoguidedVelocity(field, field, 2.0)(T, X, args),
        {"field"},
    ),
    "GuidedVelocity": (
        lambda args: fd.velocities.GuidedVelocity(field, guided)(T, X, args),
        {"field"},
    ),
    "LogDensityVelocity": (
        lambda args: fd.likelihood.LogDensityVelocity(field)(T, PAIR, args),
        {"field"},
    ),
    "PredictedVelocity": (
        lambda args: [
            fd.velocities.PredictedVelocity(field, LINEAR, source)(T, X, args)
            for source in fd.velocities.Prediction
        ],
        {"field"},
    ),
    "divergence": (lambda args: fd.likelihood.divergence(field, T, X, args), {"field"}),
}
LOG_DETS = {
    "DivergenceIntegral": fd.likelihood.DivergenceIntegral(vector_field=field),
    "ExactJacobian": fd.likelihood.ExactJacobian(),
    "PowerSeries": fd.likelihood.PowerSeries(),
    "LearnedLogDet": fd.likelihood.LearnedLogDet(),
}


def log_det_map(method):
    learned = isinstance(method, fd.likelihood.LearnedLogDet)
    return fd.likelihood.LogDensityFlowMap(fd.FlowMap(net)) if learned else MAP


def of_log_det(method):
    asks = {"field"} if isinstance(method, fd.likelihood.DivergenceIntegral) else set()
    flow_map = log_det_map(method)
    return lambda args: method(flow_map, S, T, X, args, key=KEY), {"map", *asks}


def normal(x):
    return -jnp.sum(x**2)


LIKELIHOODS = {name: of_log_det(method) for name, method in LOG_DETS.items()} | {
    "log_det": (lambda args: fd.likelihood.log_det(MAP, S, T, X, args), {"map"}),
    "log_prob": (
        lambda args: (
            fd.likelihood.log_prob(MAP, normal, X, 2, args),
            fd.likelihood.log_prob(MAP, normal, X, 2, args, inverse=fd.likelihood.invert),
        ),
        {"map"},
    ),
    "log_prob_errors": (
        lambda args: fd.likelihood.log_prob_errors(MAP, field, normal, X[None], 1, args),
        BOTH,
    ),
    "pull_back": (lambda args: fd.likelihood.pull_back(MAP, X, 2, args), {"map"}),
    "sample_log_prob": (
        lambda args: fd.likelihood.sample_log_prob(MAP, normal, X, 2, args),
        {"map"},
    ),
    "invert": (lambda args: fd.likelihood.invert(MAP, S, T, X, args), {"map"}),
}
SAMPLES = {
    "AdaptiveFlowMapSolver": (
        lambda args: solved(fd.AdaptiveFlowMapSolver(MAP), args),
        BOTH,
    ),
    "EventSolver": (
        lambda args: solved(fd.solvers.EventSolver(fd.HybridSolver(MAP), EVENT), args),
        {*BOTH, "event"},
    ),
    "FlowMapSolver": (lambda args: solved(fd.FlowMapSolver(MAP), args), BOTH),
    "HybridSolver": (
        lambda args: (
            solved(fd.HybridSolver(MAP), args),
            fd.HybridSolver(MAP).func(TERM, 0.1, X, args),
        ),
        BOTH,
    ),
    "solvers.parareal": (
        lambda args: fd.solvers.parareal(
            MAP, field, jnp.stack([S, U, T]), X, args, rtol=1e-3, atol=1e-3
        ),
        BOTH,
    ),
    "solvers.roll_out": (
        lambda args: fd.solvers.roll_out(MAP, X, jnp.stack([S, T]), args),
        {"map"},
    ),
    "solve_batch": (
        lambda args: (
            fd.solve_batch(
                MAP, field, jnp.stack([S, T]), X[None], args, rtol=1e-3, atol=1e-3
            ).ys
        ),
        BOTH,
    ),
    "FlowMapInterpolation": (
        lambda args: fd.solvers.FlowMapInterpolation(
            jnp.stack([S, T]), jnp.stack([X, X]), MAP, args
        ).evaluate(U),
        {"map"},
    ),
    "sample": (
        lambda args: (fd.sample(MAP, X, 1, args), fd.sample(MAP, X, 3, args)),
        {"map"},
    ),
    "sample_with_restarts": (
        lambda args: fd.sample_with_restarts(
            MAP, LINEAR, X, S[None], args, base=fd.data.GaussianBase(), key=KEY
        ),
        {"map"},
    ),
    "sample_tilted": (
        lambda args: fd.solvers.sample_tilted(
            *(MAP, LINEAR, lambda x, args: jnp.sum(x) * args["rate"], X[None]),
            *(2, args),
            key=KEY,
        ),
        {"map"},
    ),
    "paths.step_trajectories": (
        lambda args: fd.paths.step_trajectories(MAP, X[None], jnp.stack([S, T]), args),
        {"map"},
    ),
    "solve_trajectories": (
        lambda args: fd.solve_trajectories(field, X[None], jnp.stack([S, T]), args),
        {"field"},
    ),
}


def rows(args):
    return {"rate": jnp.full(2, args["rate"])}


PATHS = LINEAR(jnp.stack([X, X]), jnp.stack([-X, X]))
LMD = fd.LagrangianMapDistillation()


def updated(args):
    optim, start = optax.sgd(0.1), fd.FlowMap(fd.nn.MLP(2, 4, 1, key=KEY))
    state = fd.train.TrainState.create(start, optim, key=KEY, ema_decay=0.9)
    inputs = state, LMD, optim, field, PATHS, rows(args)
    return fd.train.update(*inputs, key=KEY, ema_decay=0.9)[1].loss


BATCHES = {
    "batch_loss": (
        lambda args: fd.objectives.batch_loss(
            LMD, MAP, field, PATHS, rows(args), key=KEY
        )[0],
        BOTH,
    ),
    "train.update": (updated, {"field"}),
}
OBJECTIVES = {
    name: (
        of_objective(getattr(fd.objectives, name)(), kind),
        {"map", "field"} if kind == "velocity" else {"map"},
    )
    for name, kind in TEACHERS.items()
}
OBJECTIVES |= {
    "AlignYourFlowEMD, finite": (
        of_objective(fd.objectives.AlignYourFlowEMD(epsilon=0.01), "velocity"),
        BOTH,
    ),
    "MeanFlow, with a teacher": (
        of_objective(fd.objectives.MeanFlow(), "velocity"),
        BOTH,
    ),
    "ContinuousConsistency, with a teacher": (
        of_objective(fd.objectives.ContinuousConsistency(), "velocity"),
        BOTH,
    ),
    "AlignYourFlowLMD, finite": (
        of_objective(fd.objectives.AlignYourFlowLMD(epsilon=0.01), "velocity"),
        BOTH,
    ),
}
EVERYTHING = {
    **{**RESIDUALS, **ERRORS, **INNER, **FIELDS, **LIKELIHOODS, **SAMPLES, **BATCHES},
    **OBJECTIVES,
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_args_reach_all_that_is_called(name):
    call, callees = EVERYTHING[name]
    asked.clear()
    jax.eval_shape(call, ARGS)
    assert asked == callees


def from_data(velocity, dI, t, x, args):
    asked.add("rule")
    return velocity(t, x, args) + dI


def from_itself(velocity, t, x, args):
    asked.add("rule")
    return velocity(t, x, args)


GUIDED = [
    name
    for name in TEACHERS
    if "guidance" in inspect.signature(getattr(fd.objectives, name)).parameters
]


@pytest.mark.parametrize("name", GUIDED)
def test_args_reach_the_rule_of_guidance(name):
    cls = getattr(fd.objectives, name)
    learns_from_data = cls in (
        fd.objectives.MeanFlow,
        fd.objectives.ImprovedMeanFlow,
        fd.objectives.AlphaFlow,
    )
    objective = cls(guidance=from_data if learns_from_data else from_itself)
    # The diagonal of these two is plain flow matching.
    plain = cls in (fd.LagrangianSelfDistillation, fd.objectives.EulerianSelfDistillation)
    diagonal = lambda args: objective.on_diagonal(
        MAP_OF_NET, None, PATH, T, args, key=KEY
    )
    jump = lambda args: objective(MAP_OF_NET, None, PATH, S, T, args, key=KEY)
    for call, callees in (
        (jump, {"map", "rule"}),
        (diagonal, {"map"} if plain else {"map", "rule"}),
    ):
        asked.clear()
        jax.eval_shape(call, ARGS)
        assert asked == callees


TIMES, XS = (S[None], U[None], T[None]), X[None]
S_, U_, T_ = TIMES
# What gives numbers or says no: computed, on a batch of one.
REPORTS = {
    "metrics.defects": lambda args: fd.metrics.defects(MAP, field, S_, T_, XS, XS, args),
    "metrics.loss_by_times": lambda args: fd.metrics.loss_by_times(
        LMD,
        MAP,
        field,
        PATHS,
        jax.tree.map(lambda leaf: jnp.tile(leaf, 2), args),
        key=KEY,
    ),
    "testing.assert_average_velocity": lambda args: testing.assert_average_velocity(
        MAP, S_, T_, XS, args
    ),
    "testing.assert_both_directions": lambda args: testing.assert_both_directions(
        MAP, S_, T_, XS, args
    ),
    "testing.assert_dense_output": lambda args: testing.assert_dense_output(
        MAP, S_, T_, XS, args, num_steps=1
    ),
    "testing.assert_eulerian": lambda args: testing.assert_eulerian(
        MAP, field, S_, T_, XS, args
    ),
    "testing.assert_identities": lambda args: testing.assert_identities(
        MAP, field, *TIMES, XS, args, identities=["semigroup"]
    ),
    "testing.assert_inverse": lambda args: testing.assert_inverse(MAP, S_, T_, XS, args),
    "testing.assert_lagrangian": lambda args: testing.assert_lagrangian(
        MAP, field, S_, T_, XS, args
    ),
    "testing.assert_positive_jacobian": lambda args: testing.assert_positive_jacobian(
        MAP, S_, T_, XS, args
    ),
    "testing.assert_semigroup": lambda args: testing.assert_semigroup(
        MAP, *TIMES, XS, args
    ),
    "testing.assert_solver_equals_map": lambda args: testing.assert_solver_equals_map(
        MAP, S_, T_, XS, args, num_steps=1
    ),
    "testing.assert_starts_as_identity": lambda args: testing.assert_starts_as_identity(
        MAP, S_, XS, args
    ),
    "testing.assert_tangent": lambda args: testing.assert_tangent(
        MAP, field, T_, XS, args
    ),
    "testing.defect_report": lambda args: testing.defect_report(
        MAP, field, states=XS, num_times=2, args=args
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_args_reach_what_is_measured(name):
    REPORTS[name]({"rate": ARGS["rate"][None]})


# Elsewhere, with a reason.
OTHERS = {
    # Asks only its subclasses.
    "AbstractChordFlowMap",
    # A condition or a scale is taken out of `args`, or put into it: `test_guidance.py`.
    *("ClassifierFreeGuidance", "MeanFlowGuidance"),
    # `args` are conditions of a pool, drawn with its points: `test_data.py`.
    *("data.ConditionedPoints", "data.InterpolantBatches", "data.StateBatches"),
    "data.StoredTrajectories",
    *("data.TrajectoryBatches", "AbstractCoupling", "IndependentCoupling"),
    "data.SplineBatches",  # `test_spline_batches.py`
    *("OptimalTransportCoupling", "ConditionalOptimalTransportCoupling"),
    # Closed forms take them and need none.
    *("exact.GaussianFlowMap", "exact.GaussianMixtureVelocity", "exact.LinearFlowMap"),
    *("exact.UniformBoxesVelocity", "testing.KnownField"),
    # `args` are inputs of the network: `tests/nn`.
    *("nn.MLP", "nn.DiT", "nn.UNet", "nn.DDPMUNet", "nn.MagnitudePreservingUNet"),
    *("nn.DilatedResNet", "nn.FNO", "nn.RelaxationMLP", "nn.LogUnits", "nn.Summarised"),
    # From the vector field to a map of the same `args`: `tests/learn`.
    *("advise", "learn_solver", "learn.export_jump", "learn.learn_from_data"),
    # Handed to the invariants: `test_roll_outs.py`.
    "metrics.invariant_drift",
    # By the maps that use it, `ProjectedFlowMap` above.
    *("ConserveInvariants", "flow_maps.ConserveLinear"),
    # Abstract, or a result that quotes them.
    *("AbstractErrorEstimate", "AbstractLogDet", "AbstractObjective"),
    *("AbstractResidualObjective", "testing.Failure"),
    # `test_reports.py` and, by the assertions that it makes, `test_testing.py`.
    *("train.SampleGrids", "testing.check"),
    # `test_score_curves.py` and, in `tests/plot`, `test_report.py`.
    *("images.ScoreCurves", "plot.report"),
}


def takes_args(value):
    """Whether a function, or a class by its `__call__` or `step`, takes `args`."""
    own = [value]
    for base in value.__mro__[:-1] if isinstance(value, type) else ():
        own += [vars(base)[name] for name in ("__call__", "step") if name in vars(base)]
    return any(
        "args" in inspect.signature(one).parameters for one in own if callable(one)
    )


def test_everything_that_takes_args_is_listed():
    everything = NAMES | public(testing)
    found = {name for name, value in everything.items() if callable(value)}
    found = {name for name in found if takes_args(everything[name])}
    bare = lambda names: {name.partition(",")[0].rpartition(".")[2] for name in names}
    assert bare(found) == bare({*EVERYTHING, *REPORTS, *OTHERS})
