"""Chains on a wrong density, corrected, against a target in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import RUN_TIME_ERROR, assert_close, without_type_checks

import flowdiffrax as fd

MEAN = jnp.asarray([0.3, -0.5])
FACTOR = jnp.asarray([[1.0, 0.0], [0.6, 0.5]])  # of the covariance, by Cholesky
COVARIANCE = FACTOR @ FACTOR.T


def exact(x):
    """A correlated normal density, without its constant."""
    return -0.5 * jnp.sum(jnp.linalg.solve(FACTOR, x - MEAN) ** 2)


def cheap(x):
    """Wrong in its mean and its covariance, and wider than the exact one."""
    return -0.5 * jnp.sum(x**2) / 1.5


def walk(log_density, num_steps=3, scale=1.5):
    """Steps of random-walk Metropolis that leave a density invariant."""

    def step(x, key):
        move_key, accept_key = jr.split(key)
        y = x + scale * jr.normal(move_key, x.shape)
        accepted = -jr.exponential(accept_key) <= log_density(y) - log_density(x)
        return jnp.where(accepted, y, x), None

    return lambda key, x: jax.lax.scan(step, x, jr.split(key, num_steps))[0]


def run(chain, key, x0, num_steps):
    step = lambda state, key: (chain.step(key, state),) * 2
    return jax.lax.scan(step, chain.init(x0), jr.split(key, num_steps))[1]


def chain_of(exact=exact, cheap=cheap, propose=None):
    propose = walk(cheap) if propose is None else propose
    return fd.likelihood.DelayedAcceptance(propose, cheap, exact)


def many(chain, num_chains=64, num_steps=1_000):
    one = eqx.filter_jit(jax.vmap(lambda key: run(chain, key, jnp.zeros(2), num_steps)))
    # The check takes a scan over keys under `vmap` for a second use; `run` alone passes.
    with jax.debug_key_reuse(False):
        return one(jr.split(jr.key(0), num_chains))


def errors(x):
    """Of the means and the covariances, in standard errors over independent chains."""
    x = np.asarray(x)[:, 100:]  # without the approach
    centred = x - np.asarray(MEAN)
    moments = (centred[..., None] * centred[..., None, :]).mean(1).reshape(len(x), 4)
    found = np.concatenate([x.mean(1), moments], axis=1)
    truth = np.concatenate([np.asarray(MEAN), np.asarray(COVARIANCE).ravel()])
    return (found.mean(0) - truth) / (found.std(0, ddof=1) / np.sqrt(len(x)))


def test_corrected_chain_is_exact():
    states = many(chain_of())
    assert np.abs(errors(states.x)).max() < 3.5
    assert 0.2 < float(states.accepted.mean()) < 0.9


def test_uncorrected_chain_is_wrong():
    states = many(chain_of(exact=cheap))
    assert np.abs(errors(states.x)).min() > 10


def test_accepts_everything_where_both_agree():
    assert bool(many(chain_of(exact=cheap), 4, 50).accepted.all())
    # Unnormalised densities agree as well.
    shifted = lambda x: cheap(x) + 2.5
    assert bool(many(chain_of(exact=shifted), 4, 50).accepted.all())


def test_log_densities_belong_to_the_position():
    states = many(chain_of(), 4, 50)
    over = lambda fn: jax.vmap(jax.vmap(fn))(states.x)
    assert_close(states.exact, over(exact))
    assert_close(states.cheap, over(cheap))


def test_counts_exact_evaluations():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(0))
        return exact(x)

    states = run(chain_of(exact=counted), jr.key(0), jnp.zeros(2), 7)
    jax.effects_barrier()
    assert len(calls) == 8 == int(states.num_exact[-1])


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf, jnp.inf])
@pytest.mark.parametrize("which", ["exact", "cheap"])
def test_rejects_log_densities_that_are_not_finite(bad, which):
    propose = lambda key, x: x + 1 + 0 * jr.normal(key)
    broken = lambda x: jnp.where(x.sum() > 0, bad, 0.0)
    chain = chain_of(propose=propose, **{"exact": exact, "cheap": cheap, which: broken})
    start = chain.init(jnp.zeros(2))
    state = chain.step(jr.key(0), start)
    assert not bool(state.accepted)
    assert_close(state[:3], start[:3])


def test_takes_positions_of_any_structure():
    on_tree = lambda fn: lambda x: fn(jnp.stack([x["a"], x["b"]]))
    move = walk(cheap)

    def propose(key, x):
        a, b = move(key, jnp.stack([x["a"], x["b"]]))
        return {"a": a, "b": b}

    tree = chain_of(exact=on_tree(exact), cheap=on_tree(cheap), propose=propose)
    x = run(tree, jr.key(1), {"a": jnp.asarray(0.0), "b": jnp.asarray(0.0)}, 20).x
    same = run(chain_of(), jr.key(1), jnp.zeros(2), 20).x
    assert_close(jnp.stack([x["a"], x["b"]], axis=1), same)


def test_takes_a_cheap_density_of_lower_precision():
    single = lambda x: cheap(x).astype(jnp.float32)
    state = chain_of(cheap=single, propose=walk(cheap)).init(jnp.zeros(2))
    assert state.cheap.dtype == state.exact.dtype == jnp.float64


@pytest.mark.parametrize("which", ["cheap", "exact"])
def test_refuses_a_start_outside_the_support(which):
    chain = chain_of(**{which: lambda x: -jnp.inf + 0 * x.sum()}, propose=walk(cheap))
    with pytest.raises(RUN_TIME_ERROR, match=f"`{which}_log_density` is not finite"):
        jax.block_until_ready(eqx.filter_jit(chain.init)(jnp.zeros(2)))


def test_refuses_what_does_not_fit():
    with without_type_checks():
        with pytest.raises(TypeError, match="`propose` is called as"):
            chain_of(propose=lambda x: x)
        with pytest.raises(TypeError, match="`exact_log_density` must be a callable"):
            chain_of(exact=1.0)
        for value in (None, 1j):
            with pytest.raises(TypeError, match="must be a real number; got"):
                chain_of(exact=lambda x, value=value: value).init(jnp.zeros(2))
        flat = chain_of(exact=lambda x: 0).init(jnp.zeros(2))
        assert jnp.issubdtype(flat.exact.dtype, jnp.floating)
        with pytest.raises(ValueError, match="must be a scalar"):
            chain_of(exact=lambda x: x).init(jnp.zeros(2))
        chain = chain_of(propose=lambda key, x: x[:1])
        with pytest.raises(ValueError, match="`propose` must return the shape"):
            chain.step(jr.key(0), chain.init(jnp.zeros(2)))
