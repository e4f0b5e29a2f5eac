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


def triangle_rule(n=12):
    """The triangle s < t, by gap and start."""
    gap, w_gap = gauss(n)
    share, w_share = gauss(n)
    gap, share = np.meshgrid(gap, share, indexing="ij")
    w = np.outer(w_gap, w_share) * 2 * (1 - gap)
    s = share * (1 - gap)
    return s.ravel(), (s + gap).ravel(), w.ravel()


def fixed_point(objective, target_std, shape, rule, diagonal=0.0, teacher=None):
    """The map at which the objective's mean gradient vanishes."""
    x0, x1 = jnp.asarray([[1.0], [0.0]]), jnp.asarray([[0.0], [target_std]])
    s, t, w = map(jnp.asarray, rule)
    t_on, w_on = map(jnp.asarray, gauss(16))

    def mean_loss(coefficients):
        flow_map = PolynomialMap(coefficients)

        def off(s, t, x0, x1):
            path = fd.LinearInterpolant()(x0, x1)
            return objective(flow_map, teacher, path, s, t)

        def on(t, x0, x1):
            path = fd.LinearInterpolant()(x0, x1)
            return objective.on_diagonal(flow_map, teacher, path, t)

        over_paths = lambda fn, times: sum(
            jax.vmap(fn, (0,) * len(times) + (None, None))(*times, x0[i], x1[i])
            for i in range(2)
        )
        loss = (1 - diagonal) * jnp.sum(w * over_paths(off, (s, t)))
        if diagonal > 0:
            loss = loss + diagonal * jnp.sum(w_on * over_paths(on, (t_on,)))
        return loss

    gradient = lambda flat: jax.grad(mean_loss)(flat.reshape(shape)).ravel()

    @jax.jit
    def newton(flat):
        # By finite differences: automatic ones stop where the gradient does.
        moves = 1e-4 * jnp.eye(flat.size)
        ahead, behind = (
            jax.vmap(gradient)(flat[None] + moves),
            jax.vmap(gradient)(flat[None] - moves),
        )
        jacobian = (ahead - behind).T / 2e-4
        # Least squares, because jumps on the triangle leave some polynomials undecided.
        return flat - jnp.linalg.lstsq(jacobian, gradient(flat), rcond=1e-9)[0]

    flat = jnp.zeros(np.prod(shape))
    for _ in range(6):
        flat = newton(flat)
    assert jnp.linalg.norm(jax.jit(gradient)(flat)) < 1e-6
    return PolynomialMap(flat.reshape(shape))


def slope(flow_map):
    return float(flow_map(jnp.asarray(0.0), jnp.asarray(1.0), jnp.ones(1))[0])


def of(objective):
    """The objective without its weight, which would make residuals nonlinear."""
    return eqx.tree_at(lambda o: o.weight, objective, fd.weights.NoWeight())


@pytest.mark.parametrize(
    "target_std, biased", [(1.0, 0.38898), (0.5, 0.24145), (2.0, 0.56010)]
)
def test_naive_eulerian_is_biased(target_std, biased):
    # The values are of the boundary problem w'' = (s0 s1 / sigma^2)^2 w.
    flow_map = fixed_point(
        fd.objectives.NaiveEulerian(), target_std, (16, 1), slice_rule()
    )
    assert abs(slope(flow_map) - biased) < 1e-4


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


@pytest.mark.parametrize("target_std", TARGETS)
@pytest.mark.parametrize("name", TO_THE_END)
def test_jumps_to_the_end_are_unbiased(name, target_std):
    flow_map = fixed_point(TO_THE_END[name], target_std, (16, 1), slice_rule())
    assert abs(slope(flow_map) - target_std) < 2e-3


@pytest.mark.parametrize("target_std", TARGETS)
@pytest.mark.parametrize("name", ALL_JUMPS)
def test_all_jumps_are_unbiased(name, target_std):
    objective = ALL_JUMPS[name]
    flow_map = fixed_point(objective, target_std, (9, 9), triangle_rule(), 0.5)
    assert abs(slope(flow_map) - target_std) < 1e-2
