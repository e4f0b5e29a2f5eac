"""Measures of roll-outs, on states whose values are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, finite_difference

import flowdiffrax as fd

RNG = np.random.default_rng(0)


def test_normalised_errors():
    ys = {"a": RNG.standard_normal((3, 4, 2)), "b": RNG.standard_normal((3, 4))}
    xs = {"a": ys["a"] + 0.3, "b": ys["b"] - 0.4}
    made = fd.metrics.roll_out_errors(xs, ys)
    norm = np.linalg.norm(np.concatenate([ys["a"], ys["b"][..., None]], axis=2), axis=2)
    np.testing.assert_allclose(made, (0.18 + 0.16) ** 0.5 / norm)


def test_errors_of_complex_states():
    ys = jnp.full((1, 2, 3), 2j)
    assert_close(fd.metrics.roll_out_errors(ys + 1, ys), jnp.full((1, 2), 0.5))


def test_first_bad_jump():
    xs = np.zeros((4, 6, 2, 3))
    xs[1, 3, 0, 1] = np.nan
    xs[1, 5] = np.inf
    xs[2, 5, 1, 2] = np.inf
    xs = {"a": xs, "b": jnp.zeros((4, 6)).at[3, 1].set(-jnp.inf)}
    assert fd.metrics.first_bad_jump(xs).tolist() == [0, 3, 5, 1]


def test_drift_of_invariants():
    # A rotation keeps the radius; its first coordinate is known.
    ts = np.linspace(0, 3, 7)
    radius, rates = np.asarray([1.0, 2.0]), np.asarray([1.0, -0.5])
    angle = rates[:, None] * ts
    xs = radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    invariants = lambda x, args: {"energy": args * jnp.sum(x**2), "first": x[:1]}
    made = fd.metrics.invariant_drift(invariants, jnp.asarray(xs), jnp.asarray(rates))
    np.testing.assert_allclose(made["energy"], 0, atol=1e-14)
    np.testing.assert_allclose(made["first"], xs[..., :1] - radius[:, None, None])
    # And it grows with the state.
    grown = fd.metrics.invariant_drift(
        invariants, jnp.asarray(xs * np.exp(ts)[:, None]), jnp.asarray(rates)
    )
    expected = (rates * radius**2)[:, None] * (np.exp(2 * ts) - 1)
    np.testing.assert_allclose(grown["energy"], expected, rtol=1e-12)


# --- spectra --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 17])
def test_spectrum_of_waves(n):
    x = 2 * np.pi * np.arange(n) / n
    u = 0.5 + 3 * np.cos(2 * x + 0.3), np.sin(5 * x)
    made = fd.metrics.energy_spectrum(jnp.asarray(np.stack(u, axis=-1)))
    expected = np.zeros((n // 2 + 1, 2))
    expected[0, 0], expected[2, 0], expected[5, 1] = 0.125, 9 / 4, 1 / 4
    np.testing.assert_allclose(made, expected, atol=1e-14)


def test_spectrum_of_plane_waves():
    x, y = np.meshgrid(*2 * [2 * np.pi * np.arange(32) / 32], indexing="ij")
    u = 2 * np.cos(3 * x - 4 * y) + np.sin(7 * y)
    made = np.asarray(fd.metrics.energy_spectrum(jnp.asarray(u)[..., None]))[:, 0]
    expected = np.zeros_like(made)
    expected[5], expected[7] = 1, 1 / 4
    np.testing.assert_allclose(made, expected, atol=1e-14)


@pytest.mark.parametrize("grid", [(9,), (8, 6), (4, 5, 6)])
def test_spectrum_sums_to_the_energy(grid):
    x = jr.normal(jr.key(0), (*grid, 2))
    made = fd.metrics.energy_spectrum(x)
    expected = np.mean(np.square(x), axis=tuple(range(len(grid)))) / 2
    np.testing.assert_allclose(np.sum(made, axis=0), expected, rtol=1e-12)


def test_spectrum_does_not_depend_on_the_grid():
    wave = lambda n: jnp.cos(6 * jnp.pi * jnp.arange(float(n)) / n)[:, None]
    coarse, fine = (fd.metrics.energy_spectrum(wave(n)) for n in (12, 48))
    np.testing.assert_allclose(fine[: len(coarse)], coarse, atol=1e-14)


def test_gradient_of_a_spectrum():
    x, direction = jr.normal(jr.key(0), (2, 6, 6, 1))
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(fd.metrics.energy_spectrum(x))))
    _, made = jax.jvp(loss, (x,), (direction,))
    assert_close(made, finite_difference(loss, x, direction), 1e-8)
    # A field of zeros too.
    assert np.isfinite(jax.grad(loss)(jnp.zeros((6, 6, 1)))).all()


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: fd.metrics.energy_spectrum(jnp.zeros(8)), "one to three axes"),
        (lambda: fd.metrics.energy_spectrum(jnp.zeros((2,) * 5)), "use `jax.vmap`"),
        (
            lambda: fd.metrics.roll_out_errors(jnp.ones((2, 3)), jnp.ones((2, 4))),
            "must have the same shapes",
        ),
        (
            lambda: fd.metrics.roll_out_errors(jnp.ones(3), jnp.ones(3)),
            r"\(trajectories, times, ...\)",
        ),
        (
            lambda: fd.metrics.first_bad_jump(np.full((2, 3), np.nan)),
            "initial state of roll-out 0 is not finite",
        ),
        (
            lambda: fd.metrics.invariant_drift(
                lambda x, args: x, jnp.ones((2, 3, 1)), jnp.ones(3)
            ),
            "Roll-outs and conditions must be arrays",
        ),
    ],
)
def test_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call()
