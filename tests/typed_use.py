"""What a type checker infers in a user's program. Pyright reads it; nothing runs it."""

# What is wrong here must stay an error.
# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import diffrax
import jax
import jax.numpy as jnp
import optax

import flowdiffrax as fd


def field(t, x, args):
    return -x


key = jax.random.key(0)
flow_map = fd.FlowMap(fd.nn.MLP(2, 64, key=key), time_range=(0.0, 1.0))
assert_type(flow_map, fd.FlowMap)
assert_type(flow_map.time_range, tuple[float, float] | None)

solver = fd.FlowMapSolver(flow_map)
assert_type(solver, fd.FlowMapSolver)
hybrid = fd.HybridSolver(flow_map, diffrax.Kvaerno5(), safety=0.5)
term = diffrax.ODETerm(field)
solution = diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.5, jnp.ones(2))
assert_type(solution, diffrax.Solution)
controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
solution = diffrax.diffeqsolve(
    term, hybrid, 0.0, 1.0, 2.0, jnp.ones(2), stepsize_controller=controller
)

draws = fd.data.InterpolantBatches(fd.LinearInterpolant(), jnp.ones((10, 2)), 4)
objective = fd.objectives.Mixture(
    (fd.objectives.FlowMapMatching(), fd.FlowMatching()), shares=(1, 1)
)
state = fd.train.fit(
    flow_map, objective, draws, optax.adam(1e-3), num_steps=10, key=key, progress=False
)
assert_type(state, fd.train.TrainState)
assert_type(state.ema_map, fd.AbstractFlowMap)
step = fd.train.make_step(objective, optax.adam(1e-3))
state, info = step(state, draws)
assert_type(info, fd.train.StepInfo)

inversion = fd.likelihood.invert(flow_map, 0.0, 1.0, jnp.ones(2))
assert_type(inversion, fd.likelihood.Inversion)
there = fd.likelihood.pull_back(flow_map, jnp.ones(2))
assert_type(there, fd.likelihood.PullBack)
assert_type(fd.metrics.rms_distance(jnp.ones(2), jnp.zeros(2)), float)

config, loaded = fd.train.load("map.safetensors", lambda config: flow_map)
assert_type(config, Any)
digits = fd.images.digits()
assert_type(digits, fd.images.Images)
assert_type(fd.images.recipe("cifar10-lsd"), fd.images.Recipe)

fd.FlowMapSolver(0.5)  # pyright: ignore[reportArgumentType]
fd.sample(flow_map, jnp.ones(2), "two")  # pyright: ignore[reportArgumentType]
fd.train.fit(flow_map, "LSD", draws, optax.adam(1e-3), num_steps=1)  # pyright: ignore[reportArgumentType]
