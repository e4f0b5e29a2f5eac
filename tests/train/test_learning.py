"""Each objective, trained from scratch, finds the map between two Gaussians.

A quick run of a few, and of all with `pytest -m slow tests/train/test_learning.py`.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import gaussian_map

import flowdiffrax as fd

EXACT = gaussian_map()
MEAN, STD = jnp.asarray([0.7, 0.5]), jnp.asarray([0.6, 0.4])


def draw_base(key, x1):
    return jnp.asarray([[0.1, -0.2]]) + 1.3 * jr.normal(key, x1.shape)


def draw_data(key, n):
    return MEAN[None] + STD[None] * jr.normal(key, (n, 2))


BATCHES = fd.data.InterpolantBatches(
    fd.LinearInterpolant(), draw_data, 256, base=draw_base
)

# The default times of the mean-flow family are made for images: they hardly ever draw the
# whole jump from 0 to 1, which is measured here.
UNIFORM = fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.5)

# name -> (objective, teacher, options of `fit`)
QUICK = {
    "lsd": (fd.LagrangianSelfDistillation(), None, {}),
    "lmd": (fd.LagrangianMapDistillation(), EXACT.velocity, {}),
}
ALL = QUICK | {
    "mean-flow": (fd.objectives.MeanFlow(UNIFORM), None, {}),
    "psd": (fd.objectives.ProgressiveSelfDistillation(), None, {}),
    "esd": (fd.objectives.EulerianSelfDistillation(), None, {}),
    "split": (fd.objectives.split_mean_flow(), None, {}),
    "shortcut": (fd.objectives.Shortcut(), None, {"teacher_decay": 0.99}),
    "tvm": (fd.objectives.TerminalVelocityMatching(), None, {"teacher_decay": 0.99}),
    "ee": (fd.objectives.StopGradientEulerian(), None, {}),
    "improved-mean-flow": (fd.objectives.ImprovedMeanFlow(UNIFORM), None, {}),
    "alpha-flow": (fd.objectives.AlphaFlow(UNIFORM), None, {}),
    "fmm": (fd.objectives.FlowMapMatching(), None, {}),
    "consistency-training": (fd.objectives.ConsistencyTraining(), None, {}),
    "scm": (fd.objectives.ContinuousConsistency(), None, {}),
    "scm-teacher": (fd.objectives.ContinuousConsistency(), EXACT.velocity, {}),
    "emd": (fd.objectives.EulerianMapDistillation(), EXACT.velocity, {}),
    "pfmm": (fd.objectives.ProgressiveFlowMapMatching(), EXACT, {}),
    "ayf-emd": (fd.objectives.AlignYourFlowEMD(), EXACT.velocity, {}),
    "ayf-emd-finite": (fd.objectives.AlignYourFlowEMD(epsilon=0.05), EXACT.velocity, {}),
    "ayf-lmd": (fd.objectives.AlignYourFlowLMD(), EXACT.velocity, {}),
    "consistency-distillation": (
        fd.objectives.ConsistencyDistillation(),
        EXACT.velocity,
        {},
    ),
    "free-flow": (fd.objectives.free_flow(), EXACT.velocity, {}),
    "learned-weight": (
        fd.LagrangianSelfDistillation(weight=fd.weights.LearnedWeight()),
        None,
        {},
    ),
    "sum-of-three": (
        fd.objectives.Mixture(
            (
                fd.LagrangianSelfDistillation(),
                fd.objectives.EulerianSelfDistillation(),
                fd.objectives.ProgressiveSelfDistillation(),
            ),
            (1.0, 1.0, 1.0),
        ),
        None,
        {},
    ),
}


def error_of_one_jump(objective, teacher, steps, **options):
    """The rms distance of X_{0,1} from the exact map, over draws of the base."""
    flow_map = fd.FlowMap(fd.nn.MLP(2, 64, 3, scale=1.3, key=jr.key(0)))
    state = fd.train.fit(
        flow_map,
        objective,
        BATCHES,
        optax.adam(optax.cosine_decay_schedule(3e-3, steps), b2=0.99),
        num_steps=steps,
        teacher=teacher,
        key=jr.key(1),
        progress=False,
        **options,
    )
    x0 = draw_base(jr.key(2), jnp.zeros((1000, 2)))
    ends = jax.jit(jax.vmap(lambda x: state.ema_map(0.0, 1.0, x)))(x0)
    return fd.metrics.rms_distance(ends, jax.vmap(lambda x: EXACT(0.0, 1.0, x))(x0))


# The identity is off by 1.5.
@pytest.mark.parametrize("name", QUICK)
def test_learns(name):
    objective, teacher, options = QUICK[name]
    assert error_of_one_jump(objective, teacher, 300, **options) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_learns_well(name):
    objective, teacher, options = ALL[name]
    assert error_of_one_jump(objective, teacher, 2000, **options) < 0.25


@pytest.mark.slow
def test_naive_eulerian_learns_a_contraction():
    error = error_of_one_jump(fd.objectives.NaiveEulerian(), None, 2000)
    assert 0.25 < error < 1.0


def test_the_identity_is_far_off():
    x0 = draw_base(jr.key(2), jnp.zeros((1000, 2)))
    ends = jax.vmap(lambda x: EXACT(0.0, 1.0, x))(x0)
    assert np.isclose(fd.metrics.rms_distance(x0, ends), 1.5, atol=0.1)
