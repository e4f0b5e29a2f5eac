"""Where training ends: the fixed point of each objective, for linear maps on the line.

Between two Gaussians on the line every path, velocity and flow map is linear. A linear
map has residuals linear in (x0, x1), so that two paths, (base_std, 0) and
(0, target_std), give the mean of any squared residual without sampling; times are drawn
by Gauss quadrature. Newton's method finds where the mean gradient vanishes, which is
where training ends. The exact map has X_{0,1}(x) = (target_std / base_std) x.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import flowdiffrax as fd

TARGETS = (1.0, 0.5, 2.0)


class PolynomialMap(fd.AbstractFlowMap):
    """X_{s,t}(x) = x + (t - s) p(s, t) x with p a polynomial in Chebyshev form."""

    coefficients: jax.Array

    def jump(self, s, t, x, args):
        return x + (t - s) * self.average_velocity(s, t, x)

    def tangent(self, t, x, args):
        return self.average_velocity(t, t, x)

    def chord(self, s, t, x, args):
        powers = self.coefficients.shape
        wave = lambda t, n: jnp.cos(jnp.arange(1.0 * n) * jnp.arccos(0.98 * (2 * t - 1)))
        return wave(s, powers[0]) @ self.coefficients @ wave(t, powers[1]) * x


def gauss(n):
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


def slice_rule(n=24):
    """Start times on [0, 1], all jumps to 1."""
    s, w = gauss(n)
    return s, np.ones_like(s), w


def triangle_rule(n=10):
    """The triangle s < t, by gap and start."""
    gap, w_gap = gauss(n)
    share, w_share = gauss(n)
    gap, share = np.meshgrid(gap, share, indexing="ij")
    w = np.outer(w_gap, w_share) * 2 * (1 - gap)
    s = share * (1 - gap)
    return s.ravel(), (s + gap).ravel(), w.ravel()


def slopes(objective, shape, rule, diagonal=0.0):
    """X_{0,1}(1) where the objective's mean gradient vanishes, for each target."""
    s, t, w = map(jnp.asarray, rule)
    t_on, w_on = map(jnp.asarray, gauss(16))

    def mean_loss(coefficients, target_std):
        flow_map = PolynomialMap(coefficients)
        x0 = jnp.asarray([[1.0], [0.0]])
        x1 = jnp.stack([jnp.zeros(1), target_std[None]])

        def off(s, t, x0, x1):
            path = fd.LinearInterpolant()(x0, x1)
            return objective(flow_map, None, path, s, t)

        def on(t, x0, x1):
            path = fd.LinearInterpolant()(x0, x1)
            return objective.on_diagonal(flow_map, None, path, t)

        def over_paths(fn, *times):
            over_times = lambda x0, x1: jax.vmap(lambda *times: fn(*times, x0, x1))(
                *times
            )
            return jnp.sum(jax.vmap(over_times)(x0, x1), axis=0)

        loss = (1 - diagonal) * jnp.sum(w * over_paths(off, s, t))
        if diagonal > 0:
            loss = loss + diagonal * jnp.sum(w_on * over_paths(on, t_on))
        return loss

    @jax.jit
    @jax.vmap
    def newton(flat, target_std):
        def gradient(flat):
            return jax.grad(mean_loss)(flat.reshape(shape), target_std).ravel()

        # By finite differences: automatic ones stop where the gradient does.
        move = 1e-4 * jnp.eye(flat.size)
        moves = jnp.concatenate([0 * flat[None], move, -move])
        here, ahead, behind = jnp.split(
            jax.vmap(lambda move: gradient(flat + move))(moves), [1, 1 + flat.size]
        )
        jacobian = (ahead - behind).T / 2e-4
        # Least squares, because jumps on the triangle leave some polynomials undecided.
        step = jnp.linalg.lstsq(jacobian, here[0], rcond=1e-9)[0]
        end = PolynomialMap(flat.reshape(shape))(0.0, 1.0, jnp.ones(1))[0]
        return flat - step, jnp.linalg.norm(here), end

    flat = jnp.zeros((len(TARGETS), np.prod(shape)))
    for _ in range(7):
        flat, gradient, ends = newton(flat, jnp.asarray(TARGETS))
    assert jnp.max(gradient) < 1e-6
    return ends


def of(objective):
    """The objective without its weight, which would make residuals nonlinear."""
    return eqx.tree_at(lambda o: o.weight, objective, fd.weights.NoWeight())


def test_naive_eulerian_is_biased():
    # The values are of the boundary problem w'' = (s0 s1 / sigma^2)^2 w.
    made = slopes(fd.objectives.NaiveEulerian(), (16, 1), slice_rule())
    assert_close(made, jnp.asarray([0.38898, 0.24145, 0.56010]), 1e-4, 0)


# Objectives that learn jumps to 1 by themselves, and those that need all jumps.
TO_THE_END = {
    "ee": fd.objectives.StopGradientEulerian(),
    "ee-derivative": fd.objectives.StopGradientEulerian(
        stop_gradient=fd.objectives.StopGradient.DERIVATIVE
    ),
    "mean-flow": of(fd.objectives.MeanFlow()),
    "continuous-consistency": of(fd.objectives.ContinuousConsistency()),
}
ALL_JUMPS = {
    "ee": fd.objectives.StopGradientEulerian(),
    "mean-flow": of(fd.objectives.MeanFlow()),
    "improved-mean-flow": of(fd.objectives.ImprovedMeanFlow()),
    "lsd": fd.LagrangianSelfDistillation(),
    "lsd-derivative": fd.LagrangianSelfDistillation(
        stop_gradient=fd.objectives.StopGradient.DERIVATIVE
    ),
    "esd": fd.objectives.EulerianSelfDistillation(),
    "psd": fd.objectives.ProgressiveSelfDistillation(),
    "tvm": fd.objectives.TerminalVelocityMatching(),
}


@pytest.mark.parametrize("name", TO_THE_END)
def test_jumps_to_the_end_are_unbiased(name):
    made = slopes(TO_THE_END[name], (16, 1), slice_rule())
    assert_close(made, jnp.asarray(TARGETS), 2e-3, 0)


@pytest.mark.parametrize("name", ALL_JUMPS)
def test_all_jumps_are_unbiased(name):
    made = slopes(ALL_JUMPS[name], (7, 7), triangle_rule(), 0.5)
    assert_close(made, jnp.asarray(TARGETS), 1e-2, 0)
