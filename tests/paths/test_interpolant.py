"""Interpolants: boundary values, rates, latents, paths, and what they refuse."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, finite_difference, without_type_checks

import flowdiffrax as fd

FAMILY = {
    "linear": lambda: fd.LinearInterpolant(),
    "linear-sigma": lambda: fd.LinearInterpolant(sigma_min=0.1),
    "linear-latent": lambda: fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent(0.5)),
    "linear-brownian": lambda: fd.LinearInterpolant(latent=fd.paths.BrownianLatent(0.7)),
    "trigonometric": lambda: fd.paths.TrigonometricInterpolant(),
    "trigonometric-latent": lambda: fd.paths.TrigonometricInterpolant(
        fd.paths.BrownianLatent(0.5)
    ),
    "vp": lambda: fd.paths.VariancePreservingInterpolant(),
    "ve": lambda: fd.paths.VarianceExplodingInterpolant(),
    "general": lambda: fd.paths.Interpolant(
        lambda t: (1 - t) ** 3, lambda t: jnp.sin(jnp.pi * t / 2), lambda t: t * (1 - t)
    ),
}
# Values at t = 0 and t = 1; VP and VE reach their base and data only nearly.
BOUNDARY = {
    "linear-sigma": ((1, 0, 0), (0.1, 1, 0)),
    "vp": ((0.99998, 0.00657, 0), (0, 1, 0)),
    "ve": ((50, 1, 0), (0.01, 1, 0)),
}


def path_of(interpolant):
    x0, x1, z = jr.normal(jr.key(0), (3, 2))
    return interpolant(x0, x1, z if interpolant.has_latent else None)


@pytest.mark.parametrize("name", FAMILY)
def test_boundary_values(name):
    interpolant = FAMILY[name]()
    expected = BOUNDARY.get(name, ((1, 0, 0), (0, 1, 0)))
    for t, values in zip((0.0, 1.0), expected, strict=True):
        np.testing.assert_allclose(interpolant.coefficients(t), values, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("t", [0.12, 0.5, 0.93])
def test_derivative(name, t):
    path = path_of(FAMILY[name]())
    t = jnp.asarray(t)
    expected = finite_difference(path.evaluate, t, jnp.ones(()))
    assert_close(path.derivative(t), expected, 1e-7, 1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_rates_are_finite_at_the_ends(name):
    interpolant = FAMILY[name]()
    if isinstance(getattr(interpolant, "latent", None), fd.paths.BrownianLatent):
        pytest.skip("infinite by nature")
    for t in (0.0, 1.0):
        assert np.isfinite(interpolant.rates(t)).all()


@pytest.mark.parametrize("name", FAMILY)
def test_increment(name):
    path = path_of(FAMILY[name]())
    difference = path.evaluate(0.8) - path.evaluate(0.3)
    assert_close(path.evaluate(0.3, 0.8), difference, 1e-12)


def test_path_is_the_weighted_sum():
    path = fd.LinearInterpolant(0.25, fd.paths.SineSquaredLatent(2.0))(1.0, 10.0, 100.0)
    assert_close(path.evaluate(0.5), 0.625 + 5 + 200, 1e-9)


@pytest.mark.parametrize("name", ["vp", "trigonometric", "trigonometric-latent"])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0])
def test_variance_is_preserved(name, t):
    squares = np.square(FAMILY[name]().coefficients(t))
    np.testing.assert_allclose(squares.sum(), 1, rtol=1e-12)


def test_vp_is_the_diffusion_run_backwards():
    # d log(beta)/d tau = -rate(tau)/2 with a rate that rises linearly in tau = 1 - t.
    interpolant = fd.paths.VariancePreservingInterpolant(0.2, 12.0)
    for t in (0.1, 0.6, 1.0):
        rate = 0.2 + (1 - t) * 11.8
        _, beta, _ = interpolant.coefficients(t)
        _, d_beta, _ = interpolant.rates(t)
        np.testing.assert_allclose(d_beta / beta, rate / 2, rtol=1e-12)


def test_vp_keeps_digits_near_the_data():
    t = 1 - 1e-4
    single = fd.paths.VariancePreservingInterpolant().coefficients(
        jnp.asarray(t, jnp.float32)
    )
    double = fd.paths.VariancePreservingInterpolant().coefficients(t)
    # The clock itself is rounded: 1 - t has a relative error of 3e-4 in float32.
    np.testing.assert_allclose(single[0], double[0], rtol=5e-4)


def test_ve_is_geometric():
    sigma = [
        fd.paths.VarianceExplodingInterpolant(0.02, 50.0).alpha(t)
        for t in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(sigma, [50, 1, 0.02])


def test_brownian_latent_is_the_bridge():
    assert_close(fd.paths.BrownianLatent(4.0)(jnp.asarray(0.5)), jnp.asarray(1.0))


def test_pytree_paths_keep_dtypes():
    x0 = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.complex64)}
    x1 = {"a": jnp.zeros(2, jnp.float32), "b": jnp.ones((), jnp.complex64) * 1j}
    I_t = fd.LinearInterpolant()(x0, x1).evaluate(0.25)
    assert_close(I_t, {"a": jnp.full(2, 0.75), "b": jnp.asarray(0.75 + 0.25j)}, 1e-6)
    assert (I_t["a"].dtype, I_t["b"].dtype) == (jnp.float32, jnp.complex64)


def test_bfloat16_path():
    path = fd.LinearInterpolant()(jnp.zeros(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16))
    assert path.evaluate(0.3).dtype == path.derivative(0.3).dtype == jnp.bfloat16


# --- refusals -----------------------------------------------------------------------

ENDS = "at t = 0 and .* at t = 1; got"
LATENT, LINEAR = FAMILY["linear-latent"], FAMILY["linear"]
PAIR, THREE = jnp.ones(2), jnp.ones(3)


@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: LATENT()(PAIR, PAIR), r"has a latent: call it .*\(x0, x1, z\)"),
        (lambda: LINEAR()(PAIR, PAIR, PAIR), r"has no latent: call it .*\(x0, x1\)"),
        (lambda: LATENT()(PAIR, PAIR, THREE), "`z` must be like `x0`"),
        (lambda: LINEAR()(PAIR, THREE), "`x1` must be like `x0`"),
        (lambda: LINEAR()(PAIR, jnp.ones((2, 1))), "`x1` must be like `x0`"),
        (lambda: LINEAR()(PAIR, (PAIR,)), "`x1` must be like `x0`"),
        (lambda: fd.paths.Interpolant(lambda t: t, lambda t: 1 - t), "replace t by 1 -"),
        (lambda: fd.paths.Interpolant(lambda t: 1 - t, lambda t: 2 * t), ENDS),
        (
            lambda: fd.paths.Interpolant(lambda t: 1 - t, lambda t: t, lambda t: 1 - t),
            ENDS,
        ),
        (lambda: fd.LinearInterpolant(latent=lambda t: t), ENDS),
        (lambda: fd.paths.TrigonometricInterpolant(latent=jnp.cos), ENDS),
        (
            lambda: fd.paths.TrigonometricInterpolant(fd.paths.SineSquaredLatent(1.2)),
            "must stay below 1; got 1.2",
        ),
        (lambda: fd.LinearInterpolant(sigma_min=1.0), r"in \[0, 1\); got 1"),
        (lambda: fd.LinearInterpolant(sigma_min=-0.1), r"in \[0, 1\); got -0.1"),
        (lambda: fd.paths.VariancePreservingInterpolant(2.0, 1.0), "`b_min` must be in"),
        (lambda: fd.paths.VariancePreservingInterpolant(0.0, 1.0), "`b_min` must be in"),
        (lambda: fd.paths.VarianceExplodingInterpolant(1.0, 1.0), "`sigma_min` must be"),
        (lambda: fd.paths.VarianceExplodingInterpolant(0.0, 1.0), "`sigma_min` must be"),
        (lambda: fd.paths.BrownianLatent(0.0), "`a` must be positive"),
    ],
)
def test_refusals(make, match, inside_jit):
    def build(x):
        make()
        return x

    with without_type_checks(), pytest.raises(ValueError, match=match):
        jax.jit(build)(1.0) if inside_jit else build(1.0)


def test_paths_go_from_time_zero_to_time_one():
    path = fd.LinearInterpolant()(jnp.zeros(2), jnp.ones(2))
    assert (path.t0, path.t1) == (0.0, 1.0)
