"""Arguments of the wrong type: each error names the argument and what it must be.

They are made without the type checks of the other tests, which a user does not have.
"""

import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from helpers import without_type_checks
from test_package import NAMES

import flowdiffrax as fd

KEY = jr.key(0)
TIMES = fd.times.UniformTriangle()
STATES = jnp.ones((4, 2))
FIELD = lambda t, x, args: -x
MAP = lambda s, t, x, args: x
LINEAR = fd.LinearInterpolant()
PIXELS = jnp.zeros((2, 4, 4, 1), jnp.uint8)
NET = {"num_heads": 1, "key": KEY}
IMAGE_NET = ((4, 4, 1), 2)
TOLERANCES = {"rtol": 1e-3, "atol": 1e-3}
FIT = {"num_steps": 1, "key": KEY}


@pytest.fixture(autouse=True, scope="module")
def one_key_for_all():
    with jax.debug_key_reuse(False):
        yield


# How to make or call whatever has an argument that is true or false.
WITH_BOOLS = {
    "AdaptiveFlowMapSolver": lambda **bad: fd.AdaptiveFlowMapSolver(MAP, **bad),
    "FlowMapSolver": lambda **bad: fd.FlowMapSolver(MAP, **bad),
    "TrajectoryMatching": lambda **bad: fd.TrajectoryMatching(TIMES, **bad),
    "advise": lambda **bad: fd.advise(FIELD, STATES, 0.0, 1.0, **bad),
    "data.InterpolantBatches": lambda **bad: fd.data.InterpolantBatches(
        LINEAR, STATES, 4, **bad
    ),
    "data.SplineBatches": lambda **bad: fd.data.SplineBatches(
        fd.paths.LinearSpline((0.0, 1.0)), jnp.ones((4, 2, 2)), 4, **bad
    ),
    "data.TrajectoryBatches": lambda **bad: fd.data.TrajectoryBatches(
        jnp.arange(2.0), jnp.ones((4, 2, 2)), 4, **bad
    ),
    "estimates.LinearisedError": lambda **bad: fd.estimates.LinearisedError(**bad),
    "images.Augmentation": lambda **bad: fd.images.Augmentation(**bad),
    "images.DeviceImages": lambda **bad: fd.images.DeviceImages(PIXELS, **bad),
    "images.cifar10": lambda **bad: fd.images.cifar10("", **bad),
    "images.fashion_mnist": lambda **bad: fd.images.fashion_mnist("", **bad),
    "images.imagenet32": lambda **bad: fd.images.imagenet32("", **bad),
    "images.load_images": lambda **bad: fd.images.load_images("", **bad),
    "learn.learn_from_data": lambda **bad: fd.learn.learn_from_data(
        jnp.arange(3.0), jnp.ones((4, 3, 2)), **bad
    ),
    "learn.learn_posterior": lambda **bad: fd.learn.learn_posterior(
        STATES, STATES, **bad
    ),
    "learn_solver": lambda **bad: fd.learn_solver(FIELD, STATES, 0.0, 1.0, **bad),
    "likelihood.LogDensityVelocity": lambda **bad: fd.likelihood.LogDensityVelocity(
        FIELD, **bad
    ),
    "likelihood.invert": lambda **bad: fd.likelihood.invert(
        MAP, 0.0, 1.0, STATES[0], **bad
    ),
    "nn.DDPMUNet": lambda **bad: fd.nn.DDPMUNet(*IMAGE_NET, key=KEY, **bad),
    "nn.DiT": lambda **bad: fd.nn.DiT((4, 4, 1), 2, 8, 1, **NET, **bad),
    "nn.DilatedResNet": lambda **bad: fd.nn.DilatedResNet((64, 1), 4, key=KEY, **bad),
    "nn.FNO": lambda **bad: fd.nn.FNO((8, 1), 2, 2, key=KEY, **bad),
    "nn.MagnitudePreservingEmbedding": lambda **bad: fd.nn.MagnitudePreservingEmbedding(
        8, key=KEY, **bad
    ),
    "nn.MagnitudePreservingUNet": lambda **bad: fd.nn.MagnitudePreservingUNet(
        *IMAGE_NET, key=KEY, **bad
    ),
    "nn.TwoTimeEmbedding": lambda **bad: fd.nn.TwoTimeEmbedding(8, key=KEY, **bad),
    "nn.UNet": lambda **bad: fd.nn.UNet(*IMAGE_NET, key=KEY, **bad),
    "objectives.ProgressiveSelfDistillation": lambda **bad: (
        fd.objectives.ProgressiveSelfDistillation(**bad)
    ),
    "objectives.RollOutMatching": lambda **bad: fd.objectives.RollOutMatching(**bad),
    "paths.OptimalTransportCoupling": lambda **bad: fd.paths.OptimalTransportCoupling(
        **bad
    ),
    "paths.step_trajectories": lambda **bad: fd.paths.step_trajectories(
        MAP, STATES, jnp.arange(2.0), **bad
    ),
    "solve_batch": lambda **bad: fd.solve_batch(
        MAP, FIELD, jnp.arange(2.0), STATES, **TOLERANCES, **bad
    ),
    "solve_trajectories": lambda **bad: fd.solve_trajectories(
        FIELD, STATES, jnp.arange(2.0), **bad
    ),
    "solvers.roll_out": lambda **bad: fd.solvers.roll_out(MAP, STATES[0], 1, **bad),
    "testing.check": lambda **bad: fd.testing.check(MAP, state=STATES[0], **bad),
    "times.Diagonal": lambda **bad: fd.times.Diagonal(**bad),
    "times.GridTimes": lambda **bad: fd.times.GridTimes(jnp.arange(2.0), **bad),
    "times.LogitNormal": lambda **bad: fd.times.LogitNormal(**bad),
    "train.DataParallel": lambda **bad: fd.train.DataParallel(**bad),
    "train.fit": lambda **bad: fd.train.fit(
        fd.FlowMap(MAP), fd.FlowMatching(), lambda key: None, optax.sgd(1.0), **FIT, **bad
    ),
}
# Results, and settings that are checked where they are used.
NOT_CHECKED = {"Advice", "Plan", "Failure", "Recipe", "Options", "load_split"}
NOT_CHECKED |= {"PosteriorNetwork"}


def bools():
    for name, value in NAMES.items():
        if not callable(value) or name.rpartition(".")[2] in NOT_CHECKED:
            continue
        try:
            parameters = inspect.signature(value).parameters.values()
        except ValueError:
            continue
        yield from ((name, each.name) for each in parameters if each.annotation is bool)


@pytest.mark.parametrize("name, argument", list(bools()))
def test_true_or_false(name, argument):
    message = f"`{argument}` must be `True` or `False`; got 'no'"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        WITH_BOOLS[name](**{argument: "no"})


def tilted(**change):
    settings = {"flow_map": fd.FlowMap(MAP), "interpolant": LINEAR, "x0": STATES}
    settings |= {"reward": lambda x, args: jnp.sum(x), "ts": 2, "key": KEY}
    return fd.solvers.sample_tilted(**settings | change)


def conditional(**change):
    return fd.paths.ConditionalOptimalTransportCoupling(**change)


WRONG = {
    "share of no kind": (
        lambda: conditional(share=None),
        "`share` must be a real number",
    ),
    "weight in words": (
        lambda: conditional(weight="1"),
        "`weight` must be a real number or `None`; got '1'",
    ),
    "rate of no kind": (
        lambda: fd.images.Augmentation(None),
        "`rate` must be a real num",
    ),
    "no dropout": (
        lambda: fd.nn.DiT((4, 4, 1), 2, 8, 1, dropout=None, **NET),
        "`dropout` must be a real number; got None",
    ),
    "gap in words": (lambda: fd.times.UniformTriangle("1"), "`max_gap` must be a real"),
    "complex gap": (lambda: fd.times.UniformTriangle(0.5j), "`max_gap` must be a real"),
    "mean of no kind": (lambda: fd.times.LogitNormal(None), "`mean` must be a real"),
    "upper end in words": (
        lambda: fd.paths.VarianceExplodingInterpolant(0.1, "9"),
        "`sigma_max` must be a real number",
    ),
    "width of no kind": (
        lambda: fd.train.PowerAverage(None),
        "`sigma_rel` must be a real number; got None",
    ),
    "class for an average": (
        lambda: fd.train.make_step(
            fd.FlowMatching(), optax.sgd(1.0), ema_decay=fd.train.PowerAverage
        ),
        r"`PowerAverage\(0.05\)`; got the class PowerAverage, not an instance",
    ),
    "teacher's decay in words": (
        lambda: fd.train.make_step(
            fd.FlowMatching(), optax.sgd(1.0), teacher_decay="0.9"
        ),
        "`teacher_decay` must be a number, or an instance",
    ),
    "folder of no kind": (
        lambda: fd.train.Snapshots(None, fd.train.PowerAverage(0.1)),
        '`folder` must be a path, for example "out/run"; got NoneType',
    ),
    "folder of a run": (lambda: fd.train.Run(None), "`folder` must be a path"),
    "interval in words": (
        lambda: fd.train.Run("", save_every="1"),
        "`save_every` must be an integer",
    ),
    "folder of snapshots": (
        lambda: fd.train.power_average(None, fd.FlowMap(MAP), 0.1),
        "`folder` must be a path",
    ),
    "recipe of no kind": (lambda: fd.images.recipe(None), "`images.recipes.*got None"),
    "tolerance of no kind": (
        lambda: fd.solve_batch(MAP, FIELD, jnp.arange(2.0), STATES, rtol=None, atol=1e-3),
        "`rtol` must be a real number; got None",
    ),
    "tolerance of a teacher in words": (
        lambda: fd.ODEFlowMap(FIELD, rtol="1e-3"),
        "`rtol` must be a real number or `None`; got '1e-3'",
    ),
    "report to nobody": (
        lambda: fd.train.fit(
            fd.FlowMap(MAP),
            fd.FlowMatching(),
            None,
            optax.sgd(1.0),
            **FIT,
            on_report=None,
        ),  # fmt: skip
        r"`on_report` must be a callable `on_report\(state, report\)`; got NoneType",
    ),
    "jumps in words": (lambda: tilted(ts="4"), "`ts` must be a number of jumps, or a gr"),
    "grid in words": (lambda: fd.sample(MAP, STATES[0], "4"), "`ts` must be a number of"),
    "no reward": (lambda: tilted(reward=None), "`reward` must be a callable"),
    "reward of no kind": (
        lambda: tilted(reward=lambda x, args: None),
        r"`reward\(x, args\)` must be a number; got NoneType",
    ),
    "tilt of no kind": (
        lambda: tilted(tilt=lambda t: None),
        r"`tilt\(t\)` must be a number; got NoneType",
    ),
    "integer images": (
        lambda: fd.images.Augmentation()(KEY, PIXELS),
        "floating dtype; got uint8. Scale 8-bit images with `images.from_uint8`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_type_errors(name):
    make, message = WRONG[name]
    with without_type_checks(), pytest.raises(TypeError, match=message):
        make()


VALUES = {
    "negative tolerance": (
        lambda: fd.ODEFlowMap(FIELD, atol=-1e-6),
        "`atol` must be at least 0; got -1e-06",
    ),
    "tolerance that is no number": (
        lambda: fd.solve_trajectories(FIELD, STATES, jnp.arange(2.0), rtol=float("nan")),
        "`rtol` must be at least 0; got nan",
    ),
    "no devices": (lambda: fd.train.DataParallel(()), "`devices` is empty"),
    "base without spread": (
        lambda: fd.data.GaussianBase(0.0),
        "`std` must be positive; got 0.0",
    ),
    "scale of zero": (
        lambda: fd.nn.MLP(2, scale=0.0, key=KEY),
        "`scale` must be positive; got 0.0",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_out_of_range(name):
    make, message = VALUES[name]
    with without_type_checks(), pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("choice", [None, "everything"])
def test_choices_are_listed(choice):
    with without_type_checks():
        with pytest.raises(
            ValueError, match='`stop_gradient` .* "none", "teacher", "tra'
        ):
            fd.objectives.MeanFlow(stop_gradient=choice)
        with pytest.raises(ValueError, match='`source` .* "velocity", "noise", "denoise'):
            fd.velocities.PredictedVelocity(FIELD, LINEAR, choice)
