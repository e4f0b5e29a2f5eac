"""Newton steps without matrices, for states of many entries."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from helpers import assert_close, max_abs, tight_solve, without_type_checks
from jax import lax

import flowdiffrax as fd
from flowdiffrax.estimates import Krylov, LinearisedError
from flowdiffrax.estimates._collocation import Miss
from flowdiffrax.estimates._krylov import KrylovLinearised
from flowdiffrax.estimates._newton import Linearised
from flowdiffrax.estimates._quadrature import radau
from flowdiffrax.estimates._transport import transport

SPANS = [(0.1, 0.8), (0.7, -0.1)]


def random_field(size, seed=0):
    inner, outer = jr.normal(jr.key(seed), (2, size, size)) / np.sqrt(size)
    return lambda t, x, args: outer @ jnp.tanh(inner @ x + t) - 0.1 * x**3


# The linear equations


@pytest.mark.parametrize(
    "s, t, size", [(0.7, -0.1, 20), pytest.param(0.1, 0.8, 3, marks=pytest.mark.slow)]
)
def test_the_same_as_with_matrices(s, t, size):
    field, x = random_field(size), jr.normal(jr.key(1), (size,))
    flow_map = lambda s, t, x, args: x + jnp.sin(t - s) * field(s, x, args)
    found = lambda how: jax.jit(
        lambda: LinearisedError(8, linear_solver=how).errors(flow_map, field, s, t, x)[1]
    )()
    dense, rough, close = map(found, (None, Krylov(), Krylov(rtol=1e-12)))
    # All equations as one matrix.
    shares, weights = radau(8).nodes, (t - s) * radau(8).from_start
    us = jnp.asarray(s + shares * (t - s))
    ys = jax.vmap(lambda u: flow_map(s, u, x, None))(us)
    slopes = jax.vmap(lambda u, y: field(u, y, None))(us, ys)
    jacobians = jax.vmap(lambda u, y: jax.jacfwd(field, 1)(u, y, None))(us, ys)
    matrix = np.eye(8 * size) - np.einsum("kj,jab->kajb", weights, jacobians).reshape(
        8 * size, 8 * size
    )
    defects = np.ravel(np.asarray(ys) - np.asarray(x) - weights @ slopes)
    error = np.linalg.solve(matrix, defects).reshape(8, size)[-1]
    assert_close(close, error, 1e-10 * max_abs(error))
    assert_close(rough, error, 1e-2 * max_abs(error))
    assert_close(dense, close, 1e-5 * max_abs(error))


def test_what_decays_within_an_interval_is_not_missing_at_its_end():
    # An implicit Euler step of the interval, for rates of decay of 1, 10 and 1000.
    decay, miss = jnp.asarray([1.0, 10.0, 1e3]), jnp.asarray([2.0, -3.0, 5.0])
    expected = np.asarray([0.6 / 1.3, 0.9 / 4.0, 1.5 / 301.0])
    at = Miss(None, None, jnp.asarray(0.3), jnp.asarray(0))
    dense = Linearised(-jnp.diag(decay)[None], transport(-jnp.diag(decay)[None]))
    implicit = lambda h, r: r / (1 + h * decay)
    paces = jnp.ones(1)
    matrix_free = KrylovLinearised(1e-3, 64, lambda x: x, paces, implicit)
    for linear in (dense, matrix_free):
        for found in linear.damped(at, miss, -miss):
            np.testing.assert_allclose(np.abs(found), expected, rtol=1e-12)


@pytest.mark.parametrize("s, t", SPANS)
def test_linear_odes_have_a_closed_form(s, t):
    matrix = jr.normal(jr.key(0), (40, 40)) / np.sqrt(40)
    x = jr.normal(jr.key(1), (40,))
    field = lambda t, x, args: matrix @ x
    flow_map = lambda s, t, x, args: x + jnp.sin(t - s) * (matrix @ x + 0.1)
    estimate = LinearisedError(10, linear_solver=Krylov(rtol=1e-12))
    found = jax.jit(lambda: estimate.errors(flow_map, field, s, t, x)[1])()
    error = flow_map(s, t, x, None) - jsl.expm((t - s) * matrix) @ x
    assert_close(found, error, 1e-9)


WAVES = 2 * np.pi * np.arange(33)


def by_waves(factor, u):
    return jnp.fft.irfft(lax.complex(factor, 0 * factor) * jnp.fft.rfft(u), n=64)


def diffusion(t, u, args):
    """u' = args u'' + cos(u) on 64 points of a periodic line, for two fields."""
    rates = -jnp.asarray(args) * WAVES**2
    return {k: by_waves(rates, u[k]) + jnp.cos(u[k]) for k in u}


def stiff_solve(h, r, args):
    return {k: by_waves(1 / (1 + h * args * WAVES**2), r[k]) for k in r}


FIELDS = {
    "a": jnp.sin(2 * np.pi * jnp.arange(64.0) / 64),
    "b": jnp.cos(6 * np.pi * jnp.arange(64.0) / 64) ** 2,
}


class Diffused(eqx.Module):
    """The linear part exactly and the rest roughly, then NaN if `is_nan`."""

    amount: jax.Array
    is_nan: jax.Array

    def __call__(self, s, t, u, args):
        decay = jnp.exp(-(t - s) * args * WAVES**2)

        def one(u):
            y = by_waves(decay, u + self.amount * (t - s) * jnp.cos(u))
            return jnp.where(self.is_nan, jnp.nan, y)

        return {k: one(v) for k, v in u.items()}


def diffused(amount=1.0, is_nan=False):
    return Diffused(jnp.asarray(amount), jnp.asarray(is_nan))


def test_stiff_part_is_solved_for():
    jump = diffused(), diffusion, 0.0, 0.5, FIELDS, jnp.asarray(1.0)
    exact = diffrax.diffeqsolve(
        diffrax.ODETerm(diffusion),
        diffrax.Kvaerno5(),
        0.0,
        0.5,
        1e-3,
        FIELDS,
        jnp.asarray(1.0),
        stepsize_controller=diffrax.PIDController(1e-8, 1e-8),
    ).ys
    error = {k: v - exact[k][0] for k, v in diffused()(*jump[2:]).items()}
    estimate = LinearisedError(8, linear_solver=Krylov(stiff_solve))
    end, found = jax.jit(lambda: estimate(*jump))()
    assert_close(end, diffused()(*jump[2:]), 1e-12)
    size = max_abs(error["a"])
    assert size > 0.05
    for k in FIELDS:
        assert_close(found[k], jnp.abs(error[k]), 0.1 * size)
    # The largest rate is 40,000 a unit of time: without, it does not converge.
    _, unknown = jax.jit(lambda: LinearisedError(8, linear_solver=Krylov())(*jump))()
    assert all(np.isposinf(unknown[k]).all() for k in unknown)


def test_graded_nodes():
    # Decays over four decades of time.
    rates = jnp.geomspace(1.0, 1e4, 5)
    field = lambda t, x, args: -rates * x
    flow_map = lambda s, t, x, args: (
        x * jnp.exp(-rates * (t - s)) + 1e-3 * jnp.tanh(t - s)
    )
    jump = flow_map, field, 0.0, 1.0, jnp.ones(5)
    error = flow_map(*jump[2:], None) - jnp.exp(-rates)
    solver = Krylov(lambda h, r, args: r / (1 + h * rates))
    estimate = LinearisedError(24, is_graded=True, linear_solver=solver)
    _, found, gap = jax.jit(lambda: estimate.errors(*jump))()
    assert_close(found, error, 0.05 * max_abs(error))
    assert max_abs(gap) < 0.1 * max_abs(error)


def test_derivatives_that_are_not_found_are_nan():
    # No defect at the equilibrium, so that only its derivatives are to be solved for.
    field, still = random_field(20), lambda s, t, x, args: x
    steady = lambda t, x, args: field(0 * t, x, args) - field(0 * t, 0 * x, args)

    @jax.jit
    def slope(how):
        estimate = LinearisedError(6, linear_solver=how)
        error = lambda x: estimate.errors(still, steady, 0.0, 1.0, x)[1]
        return jax.jvp(error, (jnp.zeros(20),), (jnp.ones(20),))

    value, tangent = slope(Krylov(max_products=2))
    assert max_abs(value) == 0 and np.isnan(tangent).all()
    value, tangent = slope(Krylov())
    assert max_abs(value) == 0 and 0 < max_abs(tangent) < np.inf


# In solvers


def solve(
    flow_map, u=FIELDS, *, field=diffusion, args=0.02, tol=1e-4, ts=(0.0, 1.0), **how
):
    t0, t1 = ts
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        fd.HybridSolver(flow_map, **how),
        t0,
        t1,
        2 * (t1 - t0),
        u,
        args,
        stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
        max_steps=20_000,
        throw=False,
    )


@eqx.filter_jit
def solve_diffusion(flow_map, args):
    sol = solve(flow_map, args=args, linear_solver=Krylov(stiff_solve))
    return {k: v[0] for k, v in sol.ys.items()}, sol.solver_state


@pytest.fixture(scope="module")
def truth():
    @jax.jit
    def run(tol, dt0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(diffusion),
            diffrax.Tsit5(),
            0.0,
            1.0,
            dt0,
            FIELDS,
            jnp.asarray(0.02),
            stepsize_controller=diffrax.PIDController(tol, tol),
            max_steps=20_000,
        ).ys

    ends = run(1e-9, 1e-3), run(1e-4, 2.0)
    exact, classical = ({k: v[0] for k, v in ys.items()} for ys in ends)
    return exact, max(max_abs(exact[k] - classical[k]) for k in exact)


@pytest.mark.parametrize(
    "flow_map, is_jump",
    [(diffused(), True), (diffused(-3.0), False), (diffused(is_nan=True), False)],
    ids=["rough", "wrong", "nan"],
)
def test_solver(truth, flow_map, is_jump):
    exact, worst = truth
    ys, state = solve_diffusion(flow_map, jnp.asarray(0.02))
    assert max(max_abs(ys[k] - exact[k]) for k in exact) < 3 * worst + 1e-7
    assert (state.num_learned > 0) == is_jump


def lattice(t, x, args):
    return args * (jnp.roll(x, 1) - jnp.roll(x, -1)) - jnp.sin(x)


def along_lattice(s, t, x, args):
    """Runge and Kutta's classical step."""
    h = t - s
    a = lattice(s, x, args)
    b = lattice(s, x + h / 2 * a, args)
    c = lattice(s, x + h / 2 * b, args)
    return x + h / 6 * (a + 2 * b + 2 * c + lattice(s, x + h * c, args))


XS = jnp.sin(jnp.arange(80.0).reshape(2, 40))


@eqx.filter_jit
def solve_lattice(ts, args):
    run = lambda x: solve(
        along_lattice, x, field=lattice, args=args, ts=ts, linear_solver=Krylov()
    )
    sol = jax.vmap(run)(XS)
    return sol.ys[:, 0], sol.solver_state.num_learned


@pytest.mark.parametrize("ts", [(0.0, 1.0), (1.0, 0.0)])
def test_batch_in_both_directions(ts):
    ys, num_learned = solve_lattice(tuple(map(jnp.asarray, ts)), jnp.asarray(0.5))
    assert num_learned.tolist() == [1, 1]
    for x, y in zip(XS, ys, strict=True):
        end = tight_solve(lattice, *ts, x, jnp.asarray(0.5)).ys[0]
        assert max_abs(along_lattice(*ts, x, 0.5) - end) > 1e-3
        assert_close(y, end, 1e-5)


@pytest.mark.slow
def test_without_one_large_states_are_not_corrected():
    sol = solve(along_lattice, XS[0], field=lattice, args=0.5)
    assert sol.solver_state.num_classical > 0


@pytest.mark.slow
def test_gradients_of_a_corrected_jump():
    @jax.jit
    def gradient(x, args):
        def total(x, args):
            sol = solve(
                along_lattice, x, field=lattice, args=args, linear_solver=Krylov()
            )
            return jnp.sum(sol.ys[0] ** 2), sol.solver_state.num_learned

        return jax.grad(total, (0, 1), has_aux=True)(x, args)

    (by_x, by_args), num_learned = gradient(XS[0], jnp.asarray(0.5))
    assert num_learned == 1
    exact = lambda x, args: jnp.sum(tight_solve(lattice, 0.0, 1.0, x, args).ys[0] ** 2)
    true_x, true_args = jax.grad(exact, (0, 1))(XS[0], jnp.asarray(0.5))
    assert_close(by_x, true_x, 1e-4)
    assert_close(by_args, true_args, 1e-3)


@pytest.mark.slow
def test_solve_batch():
    how = {"rtol": 1e-4, "atol": 1e-4, "linear_solver": Krylov()}
    ts = jnp.asarray([0.0, 1.0])
    run = lambda x: fd.solve_batch(along_lattice, lattice, ts, x, 0.5, **how)
    sol = jax.jit(run)(XS)
    assert sol.is_learned.all()
    end = tight_solve(lattice, 0.0, 1.0, XS[0], 0.5).ys[0]
    assert_close(sol.ys[0, 1], end, 1e-5)


# What cannot be done


def test_bad_arguments():
    wrong = pytest.raises(TypeError, match="`stiff_solve` must be a callable")
    with without_type_checks(), wrong:
        Krylov(1.0)  # pyright: ignore
    with pytest.raises(ValueError, match="`rtol` must be in \\(0, 1\\); got 2"):
        Krylov(rtol=2.0)
    with pytest.raises(ValueError, match="`max_products` must be at least 2; got 1"):
        Krylov(max_products=1)
    kinds = LinearisedError, lambda **how: fd.HybridSolver(along_lattice, **how)
    for kind in kinds:
        wrong = pytest.raises(TypeError, match=r"such as `estimates.Krylov\(\)`; got str")
        with without_type_checks(), wrong:
            kind(linear_solver="gmres")
    estimate = LinearisedError(linear_solver=Krylov(lambda h, r, args: r[:1]))
    with pytest.raises(ValueError, match="`stiff_solve` must return the shape"):
        estimate(along_lattice, lattice, 0.0, 1.0, XS[0], 0.5)
    with pytest.raises(TypeError, match="takes real arrays"):
        estimate(along_lattice, lattice, 0.0, 1.0, XS[0].astype(complex), 0.5)
