"""Bits per dimension, against what is known of simple sources."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import without_type_checks
from scipy import stats

import flowdiffrax as fd


def test_noise_has_eight_bits():
    # The uniform density over all that can be drawn.
    log_prob = -48 * np.log(2 * 256 / 255)
    assert float(fd.images.bits_per_dim(log_prob, 48)) == pytest.approx(8, abs=1e-6)


def test_values_stay_in_their_level():
    images = np.arange(256, dtype=np.uint8)
    drawn = jax.vmap(lambda key: fd.images.dequantise(key, images))(
        jr.split(jr.key(0), 500)
    )
    level = (np.asarray(drawn, np.float64) + 1) * 127.5 - images
    assert np.abs(level).max() < 0.501
    assert stats.kstest(level.ravel(), stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    # Rounded again, they are what they were, but for the ends of a level in float32.
    assert np.mean(np.asarray(fd.images.to_uint8(drawn)) == images) > 0.9999


def test_bound_is_close_for_a_smooth_source():
    # A pixel whose levels have the probabilities of a Gaussian over each of them.
    gaussian = stats.norm(0.1, 0.2)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    p = np.diff(gaussian.cdf(edges))
    entropy = -np.sum(p * np.log2(p / p.sum())) / p.sum()
    rng = np.random.default_rng(0)
    images = rng.choice(256, 200_000, p=p / p.sum()).astype(np.uint8)
    x = np.asarray(fd.images.dequantise(jr.key(1), images), np.float64)
    bits = fd.images.bits_per_dim(jnp.asarray(gaussian.logpdf(x)), 1)
    assert float(bits.mean()) == pytest.approx(entropy, abs=0.01)


def test_refuses_what_is_scaled_already():
    with without_type_checks(), pytest.raises(TypeError, match="scales uint8; got float"):
        fd.images.dequantise(jr.key(0), np.zeros((4, 4, 1), np.float32))
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        fd.images.bits_per_dim(0.0, 0)
