"""Under `jax.shard_map` with its default check of which values vary from shard to shard.

A mesh of one device is checked as strictly as a large one. Diffrax's own loops, in
`diffeqsolve` and in most of its solvers, do not pass this check: solvers are stepped by
hand, with a classical solver that has no loop.
"""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import linear_map, nonlinear_field
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import flowdiffrax as fd
from flowdiffrax.likelihood._inversion import _largest_singular_value

EXACT = linear_map()
FIELD = lambda t, x, args: EXACT.velocity(t, x)
WITHOUT_LOOP = diffrax.HalfSolver(diffrax.Euler())
BASE = lambda x: -jnp.sum(x**2)


def half(s, t, x, args):
    """Exact for positive first entries, and far off for others."""
    return jnp.where(x[0] > 0, EXACT(s, t, x), x + 1)


def three_steps(x):
    solver = fd.HybridSolver(half, WITHOUT_LOOP, rtol=1e-3, atol=1e-3)
    term, h = diffrax.ODETerm(FIELD), 0.1

    def turn(carry, _):
        t, x, state = carry
        x, _, _, state, _ = solver.step(term, t, t + h, x, None, state, False)
        return (t + h, x, state), None

    t = jnp.asarray(0.0)
    state = solver.init(term, t, t + h, x, None)
    (_, x, state), _ = lax.scan(turn, (t, x, state), None, length=3)
    return x, state.num_learned


def divergence(trace):
    return lambda x: fd.likelihood.divergence(
        nonlinear_field, 0.3, x, trace=trace, key=jr.key(1)
    )


CASES = {
    "hybrid": three_steps,
    "log-density": lambda x: fd.likelihood.log_prob(EXACT, BASE, x, 3),
    "exact trace": divergence(fd.likelihood.ExactTrace()),
    "random probes": divergence(fd.likelihood.Hutchinson(2)),
    "sketch": divergence(fd.likelihood.HutchPlusPlus(3)),
    "singular value": lambda x: _largest_singular_value(jnp.sin, x, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_shards_get_what_a_batch_gets(name):
    xs = jnp.asarray([[0.9, -0.5], [-0.8, 0.4]])
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data")
    batched = jax.vmap(CASES[name])
    sharded = jax.shard_map(batched, mesh=mesh, in_specs=spec, out_specs=spec)
    found, expected = jax.jit(sharded)(xs), jax.jit(batched)(xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), found, expected)
    if name == "hybrid":
        # Of the first, all steps are jumps, and of the second none.
        assert found[1].tolist() == [3, 0]
