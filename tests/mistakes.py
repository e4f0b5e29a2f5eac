"""Makes each mistake of a newcomer, and prints what came of it as JSON.

`test_mistakes.py` runs it by itself: with JAX as it comes, and without the type checks of
the other tests, which a user does not have either.
"""

import contextlib
import json
import tempfile

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import flowdiffrax as fd
from flowdiffrax import testing

NET = fd.nn.MLP(2, 8, 1, key=jr.key(0))
MAP = fd.FlowMap(NET, time_range=(0.0, 1.0))
PLAIN = eqx.nn.MLP(2, 2, 8, 1, key=jr.key(0))
STATE = jnp.ones(2)
FIELD = lambda t, x, args: -x
DRAW = lambda key, number: jr.normal(key, (number, 2))
LINEAR = fd.LinearInterpolant()
BATCHES = fd.data.InterpolantBatches(LINEAR, DRAW, 8)


def fit(flow_map=MAP, objective=None, batches=BATCHES, optim=None, **settings):
    return fd.train.fit(
        flow_map,
        fd.objectives.FlowMapMatching() if objective is None else objective,
        batches,
        optax.adam(1e-3) if optim is None else optim,
        **{"num_steps": 1, "key": jr.key(1), "progress": False, **settings},
    )


def distil(teacher):
    return fit(objective=fd.LagrangianMapDistillation(), teacher=teacher)


def solve(solver, field=FIELD, state=STATE):
    return diffrax.diffeqsolve(diffrax.ODETerm(field), solver, 0.0, 1.0, 0.5, state)


class Bare(eqx.Module):
    """A network of the state alone."""

    layer: eqx.nn.Linear = eqx.nn.Linear(2, 2, key=jr.key(0))

    def __call__(self, x):
        return self.layer(x)


# What is done, the error, and the words of its message that say what to do instead.
MISTAKES = {
    "batch without vmap": (
        lambda: MAP(0.0, 1.0, jnp.ones((5, 2))),
        ValueError,
        "one state, an array of shape (2,); got (5, 2). For a batch, use `jax.vmap`",
    ),
    "batch in sample": (
        lambda: fd.sample(MAP, jnp.ones((5, 2)), 1),
        ValueError,
        "For a batch, use `jax.vmap`",
    ),
    "batch in the solver": (
        lambda: solve(fd.FlowMapSolver(MAP), state=jnp.ones((5, 2))),
        ValueError,
        "For a batch, use `jax.vmap`",
    ),
    "batch of images": (
        lambda: fd.nn.DiT((4, 4, 1), 2, 8, 1, num_heads=1, key=jr.key(0))(
            0.0, 1.0, jnp.ones((3, 4, 4, 1))
        ),
        ValueError,
        "one image of shape (4, 4, 1), the channels last; got (3, 4, 4, 1)",
    ),
    "batch of times": (
        lambda: MAP(jnp.zeros(5), jnp.ones(5), STATE),
        ValueError,
        "Times are single numbers, and come before the state; got shapes [(5,), (5,)]",
    ),
    "state first": (
        lambda: MAP(STATE, 0.0, 1.0),
        ValueError,
        "Times are single numbers, and come before the state; got shapes [(2,), ()]",
    ),
    "state first in sample": (
        lambda: fd.sample(STATE, MAP, 1),
        TypeError,
        "`flow_map` must be a callable `flow_map(s, t, x, args)`",
    ),
    "state of integers": (
        lambda: fd.sample(MAP, jnp.ones(2, int), 1),
        TypeError,
        "Convert integers with `.astype(float)`",
    ),
    "state as a list": (
        lambda: MAP(0.0, 1.0, [1.0, 1.0]),
        ValueError,
        "an array of shape (2,); got list",
    ),
    "state that is not finite": (
        lambda: fd.sample(MAP, jnp.array([jnp.nan, 1.0]), 1),
        ValueError,
        "a flow map takes finite states",
    ),
    "jumps not whole": (
        lambda: fd.sample(MAP, STATE, 4.0),
        ValueError,
        "a number of jumps, an integer, or a one-dimensional grid",
    ),
    "times in no order": (
        lambda: fd.sample(MAP, STATE, [0.0, 0.5, 0.2]),
        ValueError,
        "must strictly rise or strictly fall",
    ),
    "times outside": (
        lambda: fd.sample(MAP, STATE, [0.0, 2.0]),
        ValueError,
        "integrate within its range, or declare a wider `time_range`",
    ),
    "network of one argument": (
        lambda: fd.FlowMap(PLAIN),
        TypeError,
        "`net(s, t, x, args)`, which `MLP(x, *, key=None)` does not allow. Wrap it",
    ),
    "network of one argument, own": (
        lambda: fd.FlowMap(Bare()),
        TypeError,
        "`net(s, t, x, args)`, which `Bare(x)` does not allow. Wrap it",
    ),
    "network with the state first": (
        lambda: fd.FlowMap(lambda x, s, t, args: x)(0.0, 1.0, STATE),
        ValueError,
        "Look at the order of its arguments: times, state, `args`",
    ),
    "class of a network": (
        lambda: fd.FlowMap(fd.nn.MLP),
        TypeError,
        "got the class MLP, not an instance of it",
    ),
    "network as a flow map": (
        lambda: fit(NET),
        TypeError,
        "Wrap a network as `FlowMap(net)`",
    ),
    "network as a solver": (
        lambda: fd.FlowMapSolver(NET),
        TypeError,
        "Wrap it as `FlowMap(net)`",
    ),
    "training state as a map": (
        lambda: fd.FlowMapSolver(fit()),
        TypeError,
        "got TrainState. Pass its `.ema_map`",
    ),
    "teacher without args": (
        lambda: distil(lambda t, x: -x),
        TypeError,
        "`teacher(t, x, args)`, which `<lambda>(t, x)` does not allow. Wrap it",
    ),
    "teacher with the state first": (
        lambda: distil(lambda x, t, args: -x),
        ValueError,
        "`teacher` must return the shape of the state, (2,); got (). Look at the order",
    ),
    "teacher forgotten": (
        lambda: distil(None),
        TypeError,
        "`teacher` must be a callable `teacher(t, x, args)`; got NoneType",
    ),
    "teacher as a term": (
        lambda: distil(diffrax.ODETerm(FIELD)),
        TypeError,
        "got ODETerm. Pass its `.vector_field`",
    ),
    "flow map as a velocity": (
        lambda: distil(fd.exact.GaussianFlowMap(target_std=0.5)),
        TypeError,
        "Pass its `.velocity`",
    ),
    "velocity as a flow map": (
        lambda: fit(objective=fd.objectives.ProgressiveFlowMapMatching(), teacher=FIELD),
        TypeError,
        "`teacher(s, t, x, args)`, which `<lambda>(t, x, args)` does not allow",
    ),
    "field without args": (
        lambda: fd.solve_trajectories(lambda t, x: -x, jnp.ones((5, 2)), [0.0, 1.0]),
        TypeError,
        "`vector_field(t, x, args)`, which `<lambda>(t, x)` does not allow. Wrap it",
    ),
    "class of an objective": (
        lambda: fit(objective=fd.objectives.FlowMapMatching),
        TypeError,
        "must be an instance such as `FlowMatching()`",
    ),
    "optimiser not called": (
        lambda: fit(optim=optax.adam),
        TypeError,
        "an Optax optimiser, for example `optax.adam(1e-3)`; got 'adam'",
    ),
    "learning rate as optimiser": (
        lambda: fit(optim=1e-3),
        TypeError,
        "an Optax optimiser, for example `optax.adam(1e-3)`",
    ),
    "seed as a key": (
        lambda: fit(key=0),
        TypeError,
        "a key of JAX, for example `jax.random.key(0)`; got 0",
    ),
    "seed as a network's key": (
        lambda: fd.nn.MLP(2, key=0),
        TypeError,
        "a key of JAX, for example `jax.random.key(0)`; got 0",
    ),
    "several keys": (
        lambda: fit(key=jr.split(jr.key(0), 3)),
        ValueError,
        "must be a single key; got an array of them, of shape (3,)",
    ),
    "no key": (
        lambda: fit(key=None),
        ValueError,
        "for example `jax.random.key(0)`",
    ),
    "steps not whole": (
        lambda: fit(num_steps=1e3),
        TypeError,
        "`num_steps` must be an integer; got 1000.0",
    ),
    "data as batches": (
        lambda: fit(batches=jnp.ones((5, 2))),
        TypeError,
        "`batches` must be a callable `batches(key)`",
    ),
    "class of an interpolant": (
        lambda: fd.data.InterpolantBatches(fd.LinearInterpolant, DRAW, 8),
        TypeError,
        "an instance such as `LinearInterpolant()`",
    ),
    "data before the interpolant": (
        lambda: fd.data.InterpolantBatches(DRAW, LINEAR, 8),
        TypeError,
        "`interpolant` comes first",
    ),
    "draw without a number": (
        lambda: fd.data.InterpolantBatches(LINEAR, lambda key: jr.normal(key, (8, 2)), 8),
        TypeError,
        "`data(key, batch_size)`, which `<lambda>(key)` does not allow",
    ),
    "data of integers": (
        lambda: fd.data.InterpolantBatches(LINEAR, np.ones((9, 2), int), 8),
        TypeError,
        "Convert integers with `.astype(float)`",
    ),
    "data of another size": (
        lambda: fit(batches=fd.data.InterpolantBatches(LINEAR, jnp.ones((9, 3)), 8)),
        ValueError,
        "an array of shape (2,); got (3,)",
    ),
    "shape of one image": (
        lambda: fd.nn.UNet(28, 8, key=jr.key(0)),
        ValueError,
        "that of one image, (height, width, channels); got 28",
    ),
    "fallback without an estimate": (
        lambda: fd.HybridSolver(MAP, fallback=diffrax.Euler()),
        ValueError,
        "use `diffrax.Tsit5()`",
    ),
    "adaptive steps of what has no estimate": (
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(FIELD),
            fd.FlowMapSolver(MAP),
            0.0,
            1.0,
            0.5,
            STATE,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        ),
        RuntimeError,  # Diffrax's own
        "a solver that does not provide error estimates",
    ),
    "other map in a checkpoint": (
        lambda: fd.train.load("map.safetensors", lambda config: fd.FlowMap(wider_net())),
        ValueError,
        "Build the tree with the configuration that it was saved with",
    ),
    "checkpoint of Equinox": (
        lambda: fd.train.load("map.eqx", lambda config: MAP),
        ValueError,
        "map.eqx is not a checkpoint of flowdiffrax",
    ),
    "load with arguments swapped": (
        lambda: fd.train.load(lambda config: MAP, "map.safetensors"),
        TypeError,
        "`make` must be a callable `make(config)`; got str",
    ),
    "save with arguments swapped": (
        lambda: fd.train.save("other.safetensors", MAP, {"width": 8}),
        TypeError,
        "comes before the tree",
    ),
    "two precisions": (
        lambda: single_precision(),
        TypeError,
        "Give state and weights one dtype",
    ),
    "one key for two things": (
        lambda: one_key_twice(),
        jax.errors.KeyReuseError,  # JAX's own
        "Previously-consumed key",
    ),
    "no average": (
        lambda: fit(ema_decay=None),
        ValueError,
        "0 keeps the last weights",
    ),
    "density of each entry": (
        lambda: fd.likelihood.log_prob(MAP, jax.scipy.stats.norm.logpdf, STATE),
        ValueError,
        "Of independent entries, sum",
    ),
    "flow map as a vector field": (
        lambda: fd.ODEFlowMap(MAP),
        TypeError,
        "got the flow map FlowMap. Pass its `.velocity`",
    ),
    "time range of one number": (
        lambda: fd.FlowMap(NET, 1.0),
        TypeError,
        "must be two numbers, `(low, high)`; got 1.0",
    ),
    "class of an estimate": (
        lambda: fd.AdaptiveFlowMapSolver(MAP, fd.estimates.SemigroupDefect),
        TypeError,
        "an instance such as `PicardDefect()`",
    ),
    "class of a coupling": (
        lambda: fd.data.InterpolantBatches(
            LINEAR, DRAW, 8, coupling=fd.paths.IndependentCoupling
        ),
        TypeError,
        "got the class IndependentCoupling, not an instance of it",
    ),
    "folder as a run": (
        lambda: fit(run="folder"),
        TypeError,
        "`run` must be a `train.Run` or `None`",
    ),
    "channels first": (
        lambda: fd.images.DeviceImages(np.zeros((9, 3, 32, 32), np.uint8)),
        ValueError,
        "`images` must have its channels last",
    ),
    "more classes than a recipe has": (
        lambda: fd.images.recipe("imagenet32-class-lmd").batches(
            fd.images.Images(
                np.zeros((9, 8, 8, 3), np.uint8), np.arange(9), num_classes=2000
            )
        ),
        ValueError,
        "num_classes=2000)`",
    ),
    "rounding twice": (
        lambda: fd.images.to_uint8(np.zeros((2, 2), np.uint8)),
        TypeError,
        "takes floats in [-1, 1]; got uint8",
    ),
    "tolerance of no identity": (
        lambda: testing.check(MAP, state=STATE, atol={"semi_group": 1.0}),
        ValueError,
        "got ['semi_group']",
    ),
    "map without its state": (
        lambda: testing.check(MAP, state=jnp.zeros(0)),
        ValueError,
        "give one as the map takes it",
    ),
}


def single_precision():
    """A float64 state on a map of float32."""
    flow_map = fd.FlowMap(lambda s, t, x, args: jnp.ones(2, jnp.float32))
    with jax.enable_x64(True):
        return fd.sample(flow_map, jnp.ones(2, jnp.float64), 1)


def one_key_twice():
    """With the setting of JAX that looks for it, under which all other tests run."""
    key = jr.key(0)
    with jax.debug_key_reuse(True):
        return fd.data.InterpolantBatches(LINEAR, jr.normal(key, (9, 2)), 8)(key)


def wider_net():
    return fd.nn.MLP(2, 9, 1, key=jr.key(0))


def outcome(act):
    """The names of the error's classes, and its message; neither if there was none."""
    try:
        act()
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        fd.train.save("map.safetensors", {"width": 8}, MAP)
        eqx.tree_serialise_leaves("map.eqx", MAP)
        print(json.dumps({name: outcome(act) for name, (act, *_) in MISTAKES.items()}))
