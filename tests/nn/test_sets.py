"""Summaries of sets, and networks that see them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

import flowdiffrax as fd

ENCODER = fd.nn.SetEncoder(2, 5, 8, key=jr.key(0))
ROWS = np.random.default_rng(0).normal(size=(4, 2))
encode = eqx.filter_jit(ENCODER)
SUMMARY = encode(ROWS)


def test_order_does_not_matter_but_number_does():
    assert SUMMARY.shape == (5,)
    assert_close(encode(ROWS[::-1]), SUMMARY)
    # The mean of the rows is the same, their number is not.
    twice = encode(np.concatenate([ROWS, ROWS]))
    assert float(np.abs(twice - SUMMARY).max()) > 1e-3
    assert np.isfinite(encode(np.zeros((0, 2)))).all()


def test_rows_masked_out_leave_no_trace():
    padded = np.concatenate([ROWS, np.full((3, 2), np.nan)])
    mask = np.arange(7) < 4
    loss = eqx.filter_value_and_grad(lambda net: jnp.sum(net(padded, mask)))
    value, gradient = eqx.filter_jit(loss)(ENCODER)
    assert_close(value, jnp.sum(SUMMARY))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(gradient))


def test_every_weight_matters():
    loss = eqx.filter_grad(lambda net: jnp.sum(net(ROWS) ** 2))
    gradient = eqx.filter_jit(loss)(ENCODER)
    assert all(np.any(leaf != 0) for leaf in jax.tree_util.tree_leaves(gradient))


def test_a_network_sees_the_summary():
    seen = []
    net = lambda s, t, x, args: seen.append(args) or x
    summarised = fd.nn.Summarised(net, encode)
    mask = np.asarray([True, True, True, False])
    summarised(0.0, 1.0, jnp.ones(3), (ROWS, mask))
    assert_close(seen[0], encode(ROWS[:3]))
    fd.nn.Summarised(net, jnp.sum)(0.0, 1.0, jnp.ones(3), ROWS)
    assert_close(seen[1], jnp.sum(ROWS))


def test_bad_sets():
    with pytest.raises(ValueError, match=r"shape \(rows, 2\); got \(4,\)"):
        ENCODER(jnp.ones(4))
    with pytest.raises(ValueError, match="each of the 4 rows"):
        ENCODER(ROWS, jnp.ones(3))
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        fd.nn.SetEncoder(2, 0, key=jr.key(0))
    with pytest.raises(TypeError, match=r"called as `summary\(args\)`"):
        fd.nn.Summarised(fd.nn.MLP(2, 8, 1, key=jr.key(0)), lambda a, b, c: a)
    assert repr(ENCODER).startswith("SetEncoder(2, 5, width=8; ")
