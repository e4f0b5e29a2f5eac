"""Splines through several states: SciPy, closed forms of Gaussians, and bad input."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, finite_difference, tight_solve, without_type_checks
from scipy import interpolate, linalg

import flowdiffrax as fd

DAYS = (0.0, 2.0, 5.0, 9.0)
SPLINES = {"linear": fd.paths.LinearSpline, "cubic": fd.paths.CubicSpline}
both = pytest.mark.parametrize("name", SPLINES)


def states(seed=0, num=4):
    return np.random.default_rng(seed).normal(size=(num, 3))


def scipy_spline(name, ts, xs):
    if name == "cubic":
        return interpolate.CubicSpline(ts, xs, bc_type="natural")
    return interpolate.make_interp_spline(ts, xs, k=1)


@both
@pytest.mark.parametrize(
    "ts", [(0.0, 1.0), (-1.0, 0.5, 7.0), DAYS, (1e3, 1003.0, 1009.0)]
)
def test_against_scipy(name, ts):
    xs = states(num=len(ts))
    path, expected = SPLINES[name](ts)(jnp.asarray(xs)), scipy_spline(name, ts, xs)
    times = np.linspace(ts[0], ts[-1], 38)[1:-1]
    assert_close(jax.vmap(path.evaluate)(times), expected(times))
    assert_close(jax.vmap(path.derivative)(times), expected(times, 1))
    assert (path.t0, path.t1) == (ts[0], ts[-1])


@both
@pytest.mark.parametrize("t", [0.3, 1.9, 4.4, 8.7])
def test_derivative_by_differences(name, t):
    path = SPLINES[name](DAYS)(jnp.asarray(states()))
    expected = finite_difference(path.evaluate, jnp.asarray(t), jnp.ones(()))
    assert_close(path.derivative(t), expected, 1e-7, 1e-7)


@both
def test_it_passes_through_its_states(name):
    xs = jnp.asarray(states())
    path = SPLINES[name](DAYS)(xs)
    for k, t in enumerate(DAYS):
        assert_close(path.evaluate(t), xs[k])
    assert_close(path.evaluate(2.0, 9.0), xs[3] - xs[1])


def test_both_sides_of_a_corner():
    xs = states()
    path = fd.paths.LinearSpline(DAYS)(jnp.asarray(xs))
    assert_close(path.derivative(2.0), (xs[1] - xs[0]) / 2)
    assert_close(path.derivative(2.0, left=False), (xs[2] - xs[1]) / 3)
    # There is only one side at each end.
    assert_close(path.derivative(0.0), (xs[1] - xs[0]) / 2)
    assert_close(path.derivative(9.0, left=False), (xs[3] - xs[2]) / 4)


def test_two_times_are_the_linear_interpolant():
    x0, x1 = map(jnp.asarray, states(num=2))
    line = fd.LinearInterpolant()(x0, x1)
    for spline in SPLINES.values():
        path = spline((0, 1))(jnp.stack([x0, x1]))
        assert_close(path.evaluate(0.3), line.evaluate(0.3))
        assert_close(path.derivative(0.3), line.derivative(0.3))


@both
def test_it_is_nan_outside(name):
    path = SPLINES[name](DAYS)(jnp.asarray(states()))
    for t in (-0.01, 9.01):
        assert np.isnan(path.evaluate(t)).all() and np.isnan(path.derivative(t)).all()


def test_times_that_rounding_moved_outside_are_inside():
    # In float32, 0.1 + (0.7 - 0.1) is above 0.7.
    xs = jnp.asarray(states(num=3), jnp.float32)
    path = fd.paths.CubicSpline((0.1, 0.2, 0.7))(xs)
    t = np.nextafter(np.float32(0.7), np.float32(1))
    assert_close(path.evaluate(t), xs[-1], 1e-5, 1e-5)
    assert np.isfinite(path.derivative(t)).all()


def test_leaves_keep_their_dtypes():
    xs = {"a": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.ones((4,), jnp.complex64)}
    path = fd.paths.CubicSpline(DAYS)(xs)
    for out in (path.evaluate(3.0), path.derivative(3.0)):
        assert out["a"].dtype == jnp.bfloat16 and out["b"].dtype == jnp.complex64
        assert out["a"].shape == (2,) and out["b"].shape == ()


# --- Gaussians ------------------------------------------------------------------------

MEANS = np.array([[0.0, 0.0], [1.0, -0.5], [1.5, 1.0], [-0.5, 2.0]])
COVS = np.array(
    [
        [[1.0, 0.3], [0.3, 0.5]],
        [[0.6, -0.2], [-0.2, 1.2]],
        [[2.0, 0.5], [0.5, 0.4]],
        [[0.3, 0.0], [0.0, 0.9]],
    ]
)


def transport(first, second):
    """The matrix of the optimal transport map between centred Gaussians."""
    root = linalg.sqrtm(first).real
    inverse = np.linalg.inv(root)
    return inverse @ linalg.sqrtm(root @ second @ root).real @ inverse


# From a member of the first Gaussian to its image in each; none commutes with the next.
MATRICES = [np.eye(2)]
for _k in range(3):
    MATRICES.append(transport(COVS[_k], COVS[_k + 1]) @ MATRICES[-1])


def chains(number=5):
    x0 = np.random.default_rng(3).multivariate_normal(MEANS[0], COVS[0], number)
    images = [(x0 - MEANS[0]) @ M.T + m for M, m in zip(MATRICES, MEANS, strict=True)]
    return jnp.asarray(np.stack(images, axis=1))


def exact_velocity(name):
    """b_t(x) = (dM/dt) M^-1 (x - c) + dc/dt, by the derivative of SciPy's spline."""

    def moments(t):
        spline = scipy_spline(name, DAYS, np.eye(4))
        values = []
        for order in (0, 1):
            weights = spline(t, order)
            values += [np.tensordot(weights, MATRICES, 1), weights @ MEANS]
        return tuple(values)

    shape = [jax.ShapeDtypeStruct(each, float) for each in ((2, 2), (2,))]

    def velocity(t, x, args):
        t = jnp.asarray(t, float)
        M, c, dM, dc = jax.pure_callback(moments, (*shape, *shape), t)
        return dM @ jnp.linalg.solve(M, x - c) + dc

    return velocity


def test_transport_maps_have_the_right_images():
    for M, cov in zip(MATRICES, COVS, strict=True):
        assert_close(M @ COVS[0] @ M.T, cov)


@both
@pytest.mark.parametrize("t", [0.7, 3.1, 8.2])
def test_rates_are_the_velocity_of_the_gaussians(name, t):
    # The curves of a chain never meet, so the velocity at a state is that of its curve.
    spline, velocity = SPLINES[name](DAYS), exact_velocity(name)
    for xs in chains():
        path = spline(xs)
        assert_close(path.derivative(t), velocity(t, path.evaluate(t), None), 1e-9, 1e-9)


@pytest.mark.parametrize("ends", [(0.0, 9.0), (9.0, 2.0), (5.0, 0.0)])
def test_the_flow_carries_each_gaussian_to_the_others(ends):
    # Natural cubic velocities are smooth enough for a solver of high order.
    s, t = ends
    xs = chains(1)[0]
    start, end = xs[DAYS.index(s)], xs[DAYS.index(t)]
    solution = tight_solve(exact_velocity("cubic"), s, t, start, max_steps=10_000)
    assert_close(solution.ys[0], end, 1e-6, 1e-6)


class AffineMap(fd.AbstractFlowMap):
    """The exact map in JAX, with the weights of the library's spline."""

    spline: fd.paths.AbstractSpline
    error: float = 0.0
    time_range = (DAYS[0], DAYS[-1])

    def moments(self, t):
        weights = self.spline.weights(t)
        return jnp.tensordot(weights, jnp.asarray(MATRICES), 1), weights @ MEANS

    def jump(self, s, t, x, args):
        (M_s, c_s), (M_t, c_t) = self.moments(s), self.moments(t)
        return M_t @ jnp.linalg.solve(M_s, x - c_s) + c_t + self.error * (t - s)


TIMES = fd.times.OnInterval(fd.times.UniformSquare(), DAYS[0], DAYS[-1])
SELF_TAUGHT = fd.times.OnInterval(
    fd.times.DiagonalMixture(fd.times.UniformSquare(), 0.5), DAYS[0], DAYS[-1]
)
LEARNERS = {
    "FlowMatching": TIMES,
    "FlowMapMatching": TIMES,
    "LagrangianSelfDistillation": SELF_TAUGHT,
    "EulerianSelfDistillation": SELF_TAUGHT,
    "ProgressiveSelfDistillation": SELF_TAUGHT,
    "MeanFlow": TIMES,
    "TerminalVelocityMatching": SELF_TAUGHT,
}


@both
@pytest.mark.parametrize("learner", LEARNERS)
def test_objectives_are_zero_on_the_exact_map_alone(name, learner):
    # No curves cross, so even flow matching has no variance left.
    spline = SPLINES[name](DAYS)
    batches = fd.data.SplineBatches(spline, chains(16), 8)
    objective = getattr(fd.objectives, learner)(
        times=LEARNERS[learner], weight=fd.weights.NoWeight()
    )
    paths, args = batches(jr.key(0))
    loss = lambda error: fd.objectives.batch_loss(
        objective, AffineMap(spline, error), None, paths, args, key=jr.key(1)
    )[0]
    assert loss(0.0) < 1e-16
    assert loss(0.1) > 1e-3


# --- what is refused ------------------------------------------------------------------

BAD_TIMES = {
    "one": ((3.0,), ValueError, "at least two finite times that rise"),
    "none": ((), ValueError, "at least two finite times"),
    "falling": ((0.0, 5.0, 2.0), ValueError, "Sort the snapshots by their times"),
    "equal": ((0.0, 2.0, 2.0), ValueError, "that rise"),
    "NaN": ((0.0, np.nan, 2.0), ValueError, "finite"),
    "infinite": ((0.0, np.inf), ValueError, "finite"),
    "a number": (4, ValueError, "a row of times"),
    "a table": (((0.0, 1.0), (2.0, 3.0)), ValueError, "a row of times"),
    "words": (("Monday", "Friday"), TypeError, "a row of times"),
}


@both
@pytest.mark.parametrize("bad", BAD_TIMES)
def test_bad_times(name, bad):
    ts, error, message = BAD_TIMES[bad]
    with without_type_checks(), pytest.raises(error, match=message):
        SPLINES[name](ts)


def test_traced_times():
    with without_type_checks(), pytest.raises(TypeError, match="not traced"):
        jax.jit(lambda ts: fd.paths.CubicSpline(ts).weights(0.5))(jnp.arange(3.0))


@pytest.mark.parametrize("xs", [jnp.ones((3, 2)), jnp.ones(()), {}])
def test_states_that_do_not_match_the_times(xs):
    with pytest.raises(ValueError, match="a leading axis of 4"):
        fd.paths.CubicSpline(DAYS)(xs)
