"""Oracles and comparisons that several test files share."""

import _thread
import contextlib
import functools
import signal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import numpy as np

import flowdiffrax as fd

# What a failed check inside `jit` raises, in newer and in older versions of JAX.
RUN_TIME_ERROR = (RuntimeError, ValueError)


def assert_close(x, y, atol=1e-10, rtol=1e-10):
    """Equal in structure and, leaf by leaf, within tolerances."""
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=rtol)


# Every objective, and what it is taught by.
OBJECTIVES = {
    "FlowMatching": None,
    "FlowMapMatching": None,
    "LagrangianMapDistillation": "velocity",
    "EulerianMapDistillation": "velocity",
    "VelocityDistillation": "velocity",
    "LagrangianSelfDistillation": None,
    "EulerianSelfDistillation": None,
    "ProgressiveSelfDistillation": None,
    "ProgressiveFlowMapMatching": "map",
    "Shortcut": None,
    "TerminalVelocityMatching": None,
    "StopGradientEulerian": None,
    "NaiveEulerian": None,
    "MeanFlow": None,
    "ImprovedMeanFlow": None,
    "AlphaFlow": None,
    "AlignYourFlowEMD": "velocity",
    "AlignYourFlowLMD": "velocity",
    "ConsistencyTraining": None,
    "ConsistencyDistillation": "velocity",
    "ContinuousConsistency": None,
    "TrajectoryMatching": None,
    "RollOutMatching": None,
    "CycleConsistency": None,
}


def public_objectives() -> set[str]:
    """The names of all objectives that are there to be used."""
    return {
        name
        for name, item in vars(fd.objectives).items()
        if isinstance(item, type)
        and issubclass(item, fd.objectives.AbstractObjective)
        and not name.startswith("Abstract")
    }


def max_abs(x) -> float:
    """The largest entry of a PyTree, by magnitude."""
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jtu.tree_leaves(x))


def nonlinear_field(t, x, args):
    """A two-dimensional field without any symmetry in time or space."""
    del args
    swirl = jnp.stack([-x[1] + 0.3 * x[0] ** 2, x[0] * (0.5 + t)])
    return swirl + 0.4 * jnp.sin(2 * t + x) - 0.2 * x


def gaussian_map(interpolant=None) -> fd.exact.GaussianFlowMap:
    """The closed-form map between two Gaussians in two dimensions."""
    return fd.exact.GaussianFlowMap(
        fd.LinearInterpolant() if interpolant is None else interpolant,
        base_std=1.3,
        target_std=jnp.asarray([0.6, 0.4]),
        base_mean=jnp.asarray([0.1, -0.2]),
        target_mean=jnp.asarray([0.7, 0.5]),
    )


def linear_map() -> fd.exact.LinearFlowMap:
    """The closed-form map of an affine ODE with a non-symmetric matrix."""
    return fd.exact.LinearFlowMap([[0.2, -1.1], [0.7, -0.4]], [0.3, -0.1])


def tight_solve(vector_field, t0, t1, y0, args=None, **kwargs):
    """Diffrax at tight tolerance, whatever the direction of time."""
    t0, t1 = jnp.asarray(t0, float), jnp.asarray(t1, float)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Dopri8(),
        t0,
        t1,
        1e-3 * (t1 - t0),
        y0,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-12),
        **kwargs,
    )


def finite_difference(fn, x, direction, step=1e-5):
    """The central difference of `fn` at `x` along `direction`, PyTrees both."""
    move = lambda sign: jtu.tree_map(lambda a, d: a + sign * step * d, x, direction)
    ahead, behind = jax.block_until_ready((fn(move(1)), fn(move(-1))))
    return jtu.tree_map(lambda a, b: (a - b) / (2 * step), ahead, behind)


class _Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, s, t, x, args):
        args = jnp.zeros_like(x) if args is None else args
        times = jnp.stack([s, t]).astype(x.dtype)
        return self.mlp(jnp.concatenate([x, args, times]))


@functools.cache
def mlp_map(seed: int = 0) -> fd.FlowMap:
    """A random map, consistent with nothing, of 2-vectors and `args` like them."""
    with jax.ensure_compile_time_eval():  # the cache outlives a trace that calls it first
        mlp = eqx.nn.MLP(6, 2, 16, 2, activation=jnp.tanh, key=jr.key(seed))
    return fd.FlowMap(_Net(mlp))


def unroll(flow_map, ts, x, args=None):
    """Jumps along a grid of times by a Python loop."""
    for k in range(len(ts) - 1):
        x = flow_map(ts[k], ts[k + 1], x, args)
    return x


def jump_solve(
    flow_map, t0, t1, y0, args=None, *, field=None, steps=4, solver=None, **kwargs
):
    """`diffeqsolve` in equal jumps, with the map's velocity as the default term."""
    # Arrays, so that a second call with other times compiles nothing.
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(flow_map.velocity if field is None else field),
        fd.FlowMapSolver(flow_map) if solver is None else solver,
        t0,
        t1,
        (t1 - t0) / steps,
        y0,
        args=args,
        **{"max_steps": 64, **kwargs},
    )


@contextlib.contextmanager
def without_type_checks():
    """Lets bad input past beartype, to the error that users would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


class Interrupting:
    """A stream that presses Ctrl-C at a certain line."""

    def __init__(self, at):
        self.at, self.lines = at, []

    def write(self, text):
        self.lines.append(text)
        if self.at in text:
            self.at = "never again"
            unhandled = signal.default_int_handler, signal.SIG_IGN
            if signal.getsignal(signal.SIGINT) in unhandled:
                # As the first would, but never in a destructor, where it would be lost.
                # A job in the background ignores the signal.
                raise KeyboardInterrupt
            _thread.interrupt_main()

    def flush(self):
        pass
