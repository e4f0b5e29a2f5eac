"""The kit passes what is right, and catches and names what is wrong."""

import re
import subprocess
import sys
from collections.abc import Callable

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian_map, max_abs, tight_solve
from hypothesis import given
from mutate import assert_noticed

import flowdiffrax as fd
from flowdiffrax import testing

S, U, T, X = 0.15, 0.4, 0.85, jnp.asarray([0.8, -0.5])
FIELD = testing.KnownField([0.5, -0.4], [0.3, 0.6], shear=0.4, warp=0.3)
EXACT = FIELD.flow_map


class Decay(fd.AbstractFlowMap):
    """The flow of dx/dt = -x, and what is added to it."""

    error: Callable = eqx.field(static=True, default=lambda s, t, x: 0.0)

    def jump(self, s, t, x, args):
        return x * jnp.exp(s - t) + self.error(s, t, x)


def decay(t, x):
    return -x


# Mutants: a map, a field, a solver, a path or an estimator with one mistake. Each comes
# with the assertion that must catch it, and that must pass without the mistake.


class StopsState(fd.AbstractFlowMap):
    def jump(self, s, t, x, args):
        return EXACT(s, t, jax.lax.stop_gradient(x), args)


class WrongAverage(fd.AbstractFlowMap):
    def jump(self, s, t, x, args):
        return EXACT(s, t, x, args)

    def chord(self, s, t, x, args):
        return EXACT(s, t, x, args) - x


class SpuriousSemigroup(fd.AbstractFlowMap):
    """The identity, with the right velocity: it satisfies the semigroup identity."""

    def jump(self, s, t, x, args):
        return x

    def tangent(self, t, x, args):
        return FIELD(t, x, args)


@jax.custom_jvp
def scaled_clock(t):
    return t


@scaled_clock.defjvp
def _(primals, tangents):
    return primals[0], 1.1 * tangents[0]


class NegatedClock(fd.FlowMapSolver):
    """Takes Diffrax's clock for the true one."""

    def _start(self, terms, t0, t1, y0):
        s, t, y0, direction = super()._start(terms, t0, t1, y0)
        return direction * s, direction * t, y0, direction


class StraightLines(fd.FlowMapSolver):
    """Interpolates its steps by chords."""

    def _dense_info(self, t0, t1, y0, direction, args):
        return {"y0": y0, "y1": self.flow_map(direction * t0, direction * t1, y0, args)}

    interpolation_cls = diffrax.LocalLinearInterpolation


def late_grid(flow_map, x, ts, args):
    return fd.sample(flow_map, x, ts[1:], args)


def mirrored(s, t, x):
    # An involution: a round trip ends where it began.
    return EXACT(s, t, x) * jnp.where(s == t, 1, jnp.asarray([1.0, -1.0]))


def rounded_inside(s, t, x):
    narrow = lambda value: value.astype(jnp.float32)
    return EXACT(narrow(s), narrow(t), narrow(x)).astype(x.dtype)


def coarse_clock(s, t, x):
    round_off = lambda time: jnp.round(1000 * time) / 1000
    return EXACT(round_off(s), round_off(t), x)


def euler_step(s, t, x):
    return x + (t - s) * FIELD(s, x)


MAPS = {
    "times swapped": (lambda s, t, x: EXACT(t, s, x), "tangent"),
    "factor t - s missing": (
        lambda s, t, x: x + EXACT.average_velocity(s, t, x),
        "starts_as_identity",
    ),
    "a velocity for a state": (
        lambda s, t, x: EXACT.average_velocity(s, t, x),
        "starts_as_identity",
    ),
    "direction lost": (
        lambda s, t, x: x + jnp.abs(t - s) * EXACT.average_velocity(s, t, x),
        "both_directions",
    ),
    "direction lost, by round trips": (
        lambda s, t, x: x + jnp.abs(t - s) * EXACT.average_velocity(s, t, x),
        "inverse",
    ),
    "state not differentiated": (StopsState(), "eulerian"),
    "state not differentiated, by volume": (StopsState(), "positive_jacobian"),
    "end time not differentiated": (
        lambda s, t, x: EXACT(s, jax.lax.stop_gradient(t), x),
        "lagrangian",
    ),
    "start time not differentiated": (
        lambda s, t, x: EXACT(jax.lax.stop_gradient(s), t, x),
        "eulerian",
    ),
    "factor missing in a derivative": (
        lambda s, t, x: EXACT(s, scaled_clock(t), x),
        "lagrangian",
    ),
    "float32 inside": (rounded_inside, "semigroup"),
    "clock in thousandths": (coarse_clock, "lagrangian"),
    "field at the start of the jump": (euler_step, "lagrangian"),
    "field at the start of the jump, by two jumps": (euler_step, "semigroup"),
    "a start that is not used": (lambda s, t, x: EXACT(0.0 * s, t, x), "semigroup"),
    "state clipped": (lambda s, t, x: EXACT(s, t, jnp.clip(x, -1, 1)), "inverse"),
    "space mirrored": (mirrored, "positive_jacobian"),
    "a spurious solution": (SpuriousSemigroup(), "lagrangian"),
    "average velocity apart": (WrongAverage(), "average_velocity"),
}
FIELDS = {
    "sign of the field": (lambda t, x: -FIELD(t, x), "tangent"),
    "clock of the field turned round": (lambda t, x: FIELD(1 - t, x), "lagrangian"),
    "field of another parameter": (
        testing.KnownField([0.5, -0.4], [0.3, 0.6], shear=0.4, warp=0.31),
        "eulerian",
    ),
}
SOLVERS = {
    "negated times": (NegatedClock(EXACT), "solver_equals_map"),
    "a grid that is off by one": (late_grid, "solver_equals_map"),
    "chords for dense output": (StraightLines(EXACT), "dense_output"),
}
LINEAR_PATH = fd.LinearInterpolant()(jnp.zeros(2), X)


class WrongRate(eqx.Module):
    """An interpolant whose derivative leaves out a coefficient's."""

    path: diffrax.AbstractPath

    def evaluate(self, t):
        return self.path.evaluate(t) + t**2 * (1 - t)

    def derivative(self, t):
        return self.path.derivative(t)


MATRIX = jnp.asarray([[1.0, 2.0], [0.5, 2.0]])


def trace_squared(key, other_key):
    """The square of a trace, by two Hutchinson estimates of it."""
    probes = (jr.rademacher(k, (2,), float) for k in (key, other_key))
    first, second = (z @ MATRIX @ z for z in probes)
    return first * second


TRACE_SQUARED = jnp.trace(MATRIX) ** 2
DRAWS = {
    "wrong interpolant derivative": (
        lambda path: testing.assert_path_derivative(path, [0.2, 0.7]),
        WrongRate(LINEAR_PATH),
        LINEAR_PATH,
    ),
    "a product of estimates with one probe": (
        lambda fn: testing.assert_unbiased(fn, TRACE_SQUARED, jr.key(0)),
        lambda key: trace_squared(key, jr.clone(key)),
        lambda key: trace_squared(*jr.split(key)),
    ),
    "probes of the wrong variance": (
        lambda fn: testing.assert_unbiased(fn, jnp.trace(MATRIX), jr.key(1)),
        lambda key: (z := jr.uniform(key, (2,), float, -1, 1)) @ MATRIX @ z,
        lambda key: 3 * (z := jr.uniform(key, (2,), float, -1, 1)) @ MATRIX @ z,
    ),
    "one key for noise and time": (
        lambda fn: testing.assert_independent(fn, jr.key(2)),
        lambda key: (jr.normal(key, (3,)), jr.uniform(jr.clone(key))),
        lambda key: (jr.normal(jr.fold_in(key, 0), (3,)), jr.uniform(jr.fold_in(key, 1))),
    ),
    "one key up to a sign": (
        lambda fn: testing.assert_independent(fn, jr.key(3)),
        lambda key: (
            z := jr.normal(jr.fold_in(key, 0)),
            z * jr.rademacher(jr.fold_in(key, 1), (), float),
        ),
        lambda key: (jr.normal(jr.fold_in(key, 0)), jr.normal(jr.fold_in(key, 1))),
    ),
}


def assert_at_a_jump(identity, flow_map, field=None, **settings):
    """The assertion of an identity, forwards and backwards."""
    assertion = getattr(testing, f"assert_{identity}")
    for s, t in ((S, T), (T, S)):
        x = EXACT(S, s, X)
        times = {"starts_as_identity": (s,), "semigroup": (s, U, t), "tangent": (t,)}
        fields = {"tangent", "lagrangian", "eulerian"}
        field_first = [FIELD if field is None else field] if identity in fields else []
        assertion(flow_map, *field_first, *times.get(identity, (s, t)), x, **settings)


ASSERTIONS = [
    "starts_as_identity",
    "semigroup",
    "inverse",
    "tangent",
    "lagrangian",
    "eulerian",
    "average_velocity",
    "both_directions",
    "positive_jacobian",
    "solver_equals_map",
    "dense_output",
]


@pytest.mark.parametrize("identity", ASSERTIONS)
def test_right_map_passes(identity):
    # A function is not compiled for a single jump, but for a solver.
    is_solver = identity in ("solver_equals_map", "dense_output")
    assert_at_a_jump(identity, EXACT if is_solver else lambda s, t, x: EXACT(s, t, x))


def caught(identity, *args, **settings):
    with pytest.raises(testing.IdentityError) as info:
        assert_at_a_jump(identity, *args, **settings)
    (failure,) = info.value.failures
    assert failure.identity == identity and not abs(failure.defect) <= failure.tolerance
    return failure


@pytest.mark.parametrize("mutant", MAPS)
def test_wrong_map_is_caught(mutant):
    flow_map, identity = MAPS[mutant]
    caught(identity, flow_map)


@pytest.mark.parametrize("mutant", FIELDS)
def test_wrong_field_is_caught(mutant):
    field, identity = FIELDS[mutant]
    caught(identity, EXACT, field)


@pytest.mark.parametrize("mutant", SOLVERS)
def test_wrong_solver_is_caught(mutant):
    solver, identity = SOLVERS[mutant]
    caught(identity, EXACT, solver=solver)


def test_right_sampler_passes():
    assert_at_a_jump("solver_equals_map", EXACT, solver=fd.sample)


@pytest.mark.parametrize("mutant", DRAWS)
def test_wrong_draw_is_caught(mutant):
    assertion, wrong, right = DRAWS[mutant]
    assertion(right)
    with pytest.raises(AssertionError, match="often it is"):
        assertion(wrong)


WIDE = jr.normal(jr.key(9), (5, 5))
LINES = {
    "the path's rate": (
        "flowdiffrax.paths._base",
        "_, rates = jax.jvp(self.coefficients, (t,), (jnp.ones_like(t),))",
        "_, rates = jax.jvp(self.coefficients, (1 - t,), (jnp.ones_like(t),))",
        lambda: testing.assert_path_derivative(
            fd.paths.TrigonometricInterpolant()(jnp.zeros(2), X), 0.2
        ),
    ),
    "the grid of a composed map": (
        "flowdiffrax.flow_maps._composed",
        "jnp.arange(self.num_jumps + 1, dtype=s.dtype) / self.num_jumps",
        "jnp.arange(self.num_jumps + 1, dtype=s.dtype) / (self.num_jumps + 1)",
        lambda: testing.assert_lagrangian(fd.ComposedFlowMap(EXACT, 2), FIELD, S, T, X),
    ),
    "the direction of an integration": (
        "flowdiffrax.flow_maps._ode",
        "args=(s, t - s, start, args)",
        "args=(s, s - t, start, args)",
        lambda: testing.assert_lagrangian(
            fd.ODEFlowMap(FIELD), FIELD, S, T, X, atol=1e-4
        ),
    ),
    "the mean of a Gaussian": (
        "flowdiffrax.exact._gaussian",
        "centred = x - cast(mean_s)",
        "centred = x - cast(mean_t)",
        lambda: testing.assert_semigroup(gaussian_map(), S, U, T, X),
    ),
    "the direction of a solve": (
        "flowdiffrax.solvers._base",
        "return direction * t0, direction * t1, direction",
        "return t0, t1, direction",
        lambda: testing.assert_solver_equals_map(EXACT, T, S, X),
    ),
    "the grid of a scan": (
        "flowdiffrax.solvers._sample",
        "lax.scan(jump, x0, (grid[:-1], grid[1:]), unroll=unroll)",
        "lax.scan(jump, x0, (grid[1:-1], grid[2:]), unroll=unroll)",
        lambda: testing.assert_solver_equals_map(
            EXACT,
            S,
            T,
            X,
            solver=lambda *inputs: fd.sample(*inputs),  # as it is then
        ),
    ),
    "probes that made the sketch": (
        "flowdiffrax.likelihood._trace",
        "probes = _widen(signs[third:])",
        "probes = _widen(signs[:third])",
        lambda: testing.assert_unbiased(
            lambda key: fd.likelihood.HutchPlusPlus(3)(
                lambda z: WIDE @ z, jnp.zeros(5), key
            ),
            jnp.trace(WIDE),
            jr.key(4),
        ),
    ),
    "one key for both times": (
        "flowdiffrax.times._base",
        "first_key, second_key = jr.split(key)",
        "first_key, second_key = key, jr.clone(key)",
        lambda: testing.assert_independent(
            lambda key: fd.times.UniformSquare()(key, 1), jr.key(5)
        ),
    ),
}


# The library's own lines, one of them wrong at a time; each compiles everything anew.
@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_wrong_line_of_the_library_is_caught(line, monkeypatch):
    module, right, wrong, notices = LINES[line]
    jax.clear_caches()
    notices()
    assert_noticed(monkeypatch, module, right, wrong, notices)


# Messages and shrinking


def test_message_says_what_where_and_by_how_much():
    x = jnp.asarray([0.0, 1.0])
    with pytest.raises(testing.IdentityError) as info:
        testing.assert_lagrangian(EXACT, lambda t, x: FIELD(t, x) + 0.25, S, T, x)
    (failure,) = info.value.failures
    assert failure.defect == pytest.approx(0.25)
    assert failure.times == {"s": S, "t": T} and failure.tolerance < 1e-9
    message = str(info.value)
    assert "`lagrangian` does not hold: d/dt X_{s,t}(x) = b_t(X_{s,t}(x))" in message
    assert "off by 0.25, where" in message and "s = 0.15, t = 0.85" in message
    assert "often it is: " in message
    line = "assert_lagrangian(flow_map, vector_field, 0.15, 0.85, "
    assert f"{line}jnp.asarray([0., 1.], jnp.float64))" in message


def test_line_of_the_message_repeats_the_failure():
    x = {"a": jnp.asarray([[0.1, 2.0]], jnp.bfloat16), "b": (jnp.asarray(1 / 3),)}
    flow_map = lambda s, t, x: jax.tree_util.tree_map(lambda leaf: leaf + 1, x)
    with pytest.raises(testing.IdentityError) as info:
        testing.assert_starts_as_identity(flow_map, 0.5, x)
    (failure,) = info.value.failures
    with pytest.raises(testing.IdentityError) as again:
        eval(failure.command(), {**vars(testing), "flow_map": flow_map, "jnp": jnp})
    assert str(again.value) == str(info.value)
    repeated = again.value.failures[0].x
    assert jax.tree_util.tree_all(
        jax.tree_util.tree_map(lambda a, b: bool(jnp.all(a == b)), repeated, x)
    )


def test_message_of_a_batch_names_the_worst_row_and_entry():
    x = {"p": jnp.zeros((4, 2, 3))}
    wrong = lambda s, t, x: {"p": x["p"].at[1, 2].add(jnp.where(t > 0.6, t, 0.0))}
    with pytest.raises(testing.IdentityError, match=r"row 2, s = 0.9") as info:
        testing.assert_starts_as_identity(wrong, jnp.asarray([0.1, 0.7, 0.9, 0.8]), x)
    (failure,) = info.value.failures
    assert (failure.row, failure.entry) == (2, "['p'][1, 2]")
    assert failure.x["p"].shape == (2, 3)


def test_not_finite_is_no_defect_of_zero():
    for bad in (jnp.nan, jnp.inf):
        wrong = lambda s, t, x, bad=bad: x + bad
        with pytest.raises(testing.IdentityError, match="off by (nan|inf)"):
            testing.assert_semigroup(wrong, S, U, T, X)


def test_folded_space_has_a_determinant():
    with pytest.raises(testing.IdentityError, match="the determinant is -1,|is -1\n"):
        testing.assert_positive_jacobian(
            lambda s, t, x: x * jnp.asarray([1.0, -1]), S, T, X
        )
    with pytest.raises(testing.IdentityError, match="zero or undefined"):
        testing.assert_positive_jacobian(lambda s, t, x: 0 * x, S, T, X)


def test_counterexamples_are_simple():
    # Wrong for jumps that start late, and large first entries only.
    late = Decay(lambda s, t, x: jnp.where((s >= 0.5) & (x[0] > 1), 0.1, 0.0))
    with pytest.raises(testing.IdentityError) as info:
        testing.check(late, state=X, identities=["starts_as_identity"], seed=0)
    (failure,) = info.value.failures
    assert failure.times["s"] == 0.5
    assert failure.x.tolist() == [1.1, 0.0]


def test_every_broken_identity_is_reported():
    wrong = Decay(lambda s, t, x: 0.1 * (t - s) ** 2)
    with pytest.raises(testing.IdentityError) as info:
        testing.check(wrong, decay, state=X, identities=ASSERTIONS[:5], seed=7)
    broken = {failure.identity for failure in info.value.failures}
    # On the diagonal it is right.
    assert broken == {"semigroup", "inverse", "lagrangian"}
    assert "3 of 5 identities do not hold" in str(info.value)
    assert "check(..., seed=7)" in str(info.value)


@pytest.mark.slow
def test_default_identities_are_those_that_apply():
    flow_map = lambda s, t, x: x * jnp.exp(t - s)
    found = testing.check(flow_map, state=jnp.zeros(65), max_examples=2)
    assert {*ASSERTIONS} - {*found} == {"tangent", "positive_jacobian"}
    found = testing.check(
        flow_map, lambda t, x: x, state=jnp.zeros(2), ordered=True, max_examples=2
    )
    assert {*ASSERTIONS} - {*found} == {"inverse", "both_directions"}


def test_a_map_that_cannot_be_called_says_so_once():
    calls = []

    def broken(s, t, x):
        calls.append(s)
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer") as info:
        testing.check(broken, state=X, identities=["inverse"])
    assert len(calls) < 5
    assert any("At (s, u, t) = " in note for note in info.value.__notes__)


# Strategies


@given(
    testing.time_triples(-1.0, 3.0),
    testing.time_pairs(0.0, 2.0, ordered=True, gap=0.25),
    testing.time_triples(ordered=False),
)
def test_times_are_as_asked(anywhere, rising, falling):
    assert all(-1 <= time <= 3 for time in anywhere)
    assert 0 <= rising[0] and rising[1] <= 2 and rising[1] - rising[0] >= 0.25 - 1e-12
    assert 1 >= falling[0] >= falling[1] >= falling[2] >= 0


def test_times_meet_on_and_near_the_diagonal():
    seen = []

    @hypothesis.settings(max_examples=200, derandomize=True)
    @given(testing.time_pairs())
    def look(pair):
        seen.append(pair[1] - pair[0])

    look()
    gaps = np.abs(seen)
    assert np.sum(gaps == 0) > 5 and np.sum((gaps > 0) & (gaps < 2e-2)) > 5
    assert np.sum(gaps > 0.1) > 20 and 20 < np.sum(np.asarray(seen) > 0) < 180


@given(
    testing.states(st.sampled_from([(), (0,), (2, 3)]), testing.dtypes(), bound=1.0),
    testing.states_like({"a": X, "b": jax.ShapeDtypeStruct((), jnp.float16)}),
    testing.pytrees(jnp.float32),
)
def test_states_are_as_asked(x, like, tree):
    assert x.shape in [(), (0,), (2, 3)] and jnp.issubdtype(x.dtype, jnp.inexact)
    values = np.asarray(x).astype(complex)
    assert np.all(np.abs(values.real) <= 1) and np.all(np.abs(values.imag) <= 1)
    assert like["a"].shape == (2,) and like["b"].dtype == jnp.float16
    leaves = jax.tree_util.tree_leaves(tree)
    assert leaves and all(leaf.dtype == jnp.float32 for leaf in leaves)


@given(
    testing.states_like(X, bound=0.5),
    testing.pytrees(bound=0.25, max_leaves=2),
    testing.gaussian_flows((3,), interpolants=[fd.paths.TrigonometricInterpolant()]),
    testing.vector_fields((4,)),
)
@hypothesis.settings(max_examples=4)
def test_what_is_drawn_keeps_to_its_settings(like, tree, flow, field):
    leaves = jax.tree_util.tree_leaves(tree)
    assert np.max(np.abs(like)) <= 0.5 and len(leaves) <= 2
    parts = [part for leaf in leaves for part in (leaf.real, leaf.imag)]
    assert all(np.all(np.abs(part) <= 0.25) for part in parts)
    assert flow.interpolant == fd.paths.TrigonometricInterpolant()
    assert flow(0.2, 0.9, jnp.zeros(3)).shape == (3,)
    assert field(0.2, jnp.zeros(4), None).shape == (4,)


def test_standard_errors_that_are_allowed():
    # A mean that is off by eight, and a correlation of seven: of 400 draws of a normal
    # number, whose mean is known to a twentieth.
    off = lambda key: jr.normal(key) + 8 / 20
    allowed = lambda sigmas: testing.assert_unbiased(
        off, 0.0, jr.key(0), num_draws=400, sigmas=sigmas
    )
    allowed(12.0)
    with pytest.raises(AssertionError, match="5 are allowed"):
        allowed(5.0)

    def related(key):
        a, b = jr.normal(key, (2,))
        return a, 0.35 * a + np.sqrt(1 - 0.35**2) * b

    allowed = lambda sigmas: testing.assert_independent(
        related, jr.key(0), num_draws=400, sigmas=sigmas
    )
    allowed(12.0)
    with pytest.raises(AssertionError, match="not independent"):
        allowed(4.0)


def two_parts(size, bad=jnp.inf):
    """A draw of two parts, the second one `bad` where the first is large."""

    def draw(key):
        first, second = jr.split(key)
        a = jr.normal(first)
        return a, jnp.where(a > 2, bad, jr.normal(second, (size,)))

    return draw


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_draws_that_are_not_finite_are_not_independent(bad):
    with pytest.raises(AssertionError, match=r"Part 1 is not finite in \d+ of 4096"):
        testing.assert_independent(two_parts(3, bad), jr.key(0))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: testing.time_pairs(gap=2.0), "`gap` must fit"),
        (lambda: testing.time_pairs(1.0, 0.0), "`gap` must fit"),
        (lambda: testing.check(EXACT, state=X, identities=["lipschitz"]), "lipschitz"),
        (lambda: testing.check(EXACT, state={"a": X[:0]}), "no entries"),
        (lambda: testing.assert_inverse(EXACT, jnp.zeros((2, 2)), 1.0, X), "scalars"),
        (lambda: testing.assert_inverse(EXACT, jnp.zeros(3), 1.0, X), "leading axis"),
        (lambda: testing.defect_report(EXACT, states=X[None], num_times=1), "least 2"),
        (lambda: testing.assert_independent(jr.normal, jr.key(0)), "tuple of two"),
        (lambda: testing.assert_independent(two_parts(2), jr.key(0), num_draws=1), "2;"),
        (lambda: testing.assert_unbiased(jr.normal, 0.0, jr.key(0), num_draws=0), "2;"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@eqx.filter_jit
def integrated(field, s, t, x):
    return tight_solve(field, s, t, x).ys[0]


@hypothesis.settings(max_examples=4)
@given(testing.vector_fields(), testing.time_pairs(gap=0.1), testing.states(2))
def test_known_flows_are_what_diffrax_integrates(field, times, x):
    truth = integrated(field, *map(jnp.asarray, times), x)
    assert max_abs(field.flow_map(*times, x) - truth) < 1e-8 * (1 + max_abs(truth))


@pytest.mark.slow
@given(testing.vector_fields((3, 1)), testing.gaussian_flows(3))
def test_drawn_flows_satisfy_all(field, gaussian):
    names = ["semigroup", "inverse", "tangent", "lagrangian", "eulerian"]
    for flow_map, like in ((field.flow_map, jnp.zeros((3, 1))), (gaussian, jnp.zeros(3))):
        x = like.at[1].set(-1.5).at[2].set(0.5)
        testing.assert_identities(
            flow_map, flow_map.velocity, S, U, T, x, identities=names
        )
    assert "KnownField(growth=[" in repr(field)


# Anyone's maps


class Foreign(eqx.Module):
    """A network with a signature of its own."""

    mlp: eqx.nn.MLP

    def __call__(self, inputs, *, times):
        return self.mlp(jnp.concatenate([inputs, times]))


NETWORK = Foreign(eqx.nn.MLP(4, 2, 16, 1, activation=jnp.tanh, key=jr.key(0)))


def flax_like(params, times, x):
    hidden = jnp.tanh(params["in"] @ jnp.concatenate([times, x]))
    return x + (times[1] - times[0]) * (params["out"] @ hidden)


PARAMS = {"in": jr.normal(jr.key(1), (8, 4)), "out": jr.normal(jr.key(2), (2, 8))}


def numpy_map(s, t, x):
    # The flow of dx/dt = cos(t) x, without any JAX.
    return np.exp(np.sin(s) * -1 + np.sin(t)) * np.asarray(x)


FOREIGN = {
    "a network of Equinox": lambda s, t, x: (
        x + (t - s) * NETWORK(x, times=jnp.stack([s, t]))
    ),
    "a closure over parameters": lambda s, t, x: flax_like(PARAMS, jnp.stack([s, t]), x),
    "compiled": jax.jit(
        lambda s, t, x, args=None: flax_like(PARAMS, jnp.stack([s, t]), x)
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks(name):
    # Untrained: they start as the identity, and are no flows.
    testing.assert_starts_as_identity(FOREIGN[name], S, X)
    testing.assert_average_velocity(FOREIGN[name], S, T, X)
    with pytest.raises(testing.IdentityError, match="`semigroup` does not hold"):
        testing.assert_semigroup(FOREIGN[name], S, U, T, X)
    # What is learned is asked for no more than its accuracy.
    testing.assert_semigroup(FOREIGN[name], S, U, T, X, atol=100.0)


def test_check_of_a_foreign_network():
    flow_map = FOREIGN["a closure over parameters"]
    names = ["starts_as_identity", "semigroup"]
    settings = {"state": X, "identities": names, "seed": 0}
    defects = testing.check(flow_map, atol={"semigroup": 30.0}, **settings)
    assert defects["starts_as_identity"] == 0 and defects["semigroup"] > 0.1
    with pytest.raises(testing.IdentityError, match="1 of 2 identities") as info:
        testing.check(flow_map, **settings)
    (failure,) = info.value.failures
    assert failure.worst is not None
    assert failure.worst.defect == pytest.approx(defects["semigroup"])


@pytest.mark.parametrize(
    "identity",
    [
        "semigroup",
        "lagrangian",
        pytest.param("solver_equals_map", marks=pytest.mark.slow),
    ],
)
def test_functions_outside_of_jax(identity):
    field = lambda t, x: np.cos(t) * np.asarray(x)
    testing.check(numpy_map, field, state=X, identities=[identity], max_examples=5)
    wrong = lambda s, t, x: numpy_map(s, t, x) + 0.01 * np.asarray(t - s)
    fields = [field] if identity == "lagrangian" else []
    times = (S, U, T) if identity == "semigroup" else (S, T)
    assertion = getattr(testing, f"assert_{identity}")
    assertion(numpy_map, *fields, *times, X)
    if identity != "solver_equals_map":
        with pytest.raises(testing.IdentityError):
            assertion(wrong, *fields, *times, X)


def test_weights_that_change_in_place_are_seen():
    weights = [0.0]
    flow_map = lambda s, t, x: x + weights[0]
    testing.assert_starts_as_identity(flow_map, S, X)
    testing.check(flow_map, state=X, identities=["starts_as_identity"], max_examples=3)
    weights[0] = 1.0
    for assertion in (
        lambda: testing.assert_starts_as_identity(flow_map, S, X),
        lambda: testing.check(flow_map, state=X, identities=["starts_as_identity"]),
    ):
        with pytest.raises(testing.IdentityError):
            assertion()


def test_conditions_are_passed_on():
    flow_map = lambda s, t, x, rate: x * jnp.exp(rate * (t - s))
    field = lambda t, x, rate: rate * x
    rates = jnp.asarray([0.5, -1.0])
    s, x = jnp.asarray([0.1, 0.9]), jnp.stack([X, -X])
    testing.assert_lagrangian(flow_map, field, s, 0.4, x, rates)
    testing.assert_eulerian(flow_map, field, 0.4, s, x, rates)
    with pytest.raises(testing.IdentityError, match="row 1"):
        testing.assert_lagrangian(
            lambda s, t, x, rate: flow_map(s, t, x, jnp.maximum(rate, 0)),
            field,
            s,
            0.4,
            x,
            rates,
        )


def test_output_unlike_the_state():
    with pytest.raises(ValueError, match="the shape of the state"):
        testing.assert_semigroup(lambda s, t, x: x[None], S, U, T, X)
    with pytest.raises(TypeError, match="the dtype of the state"):
        testing.assert_semigroup(lambda s, t, x: x.astype(jnp.float32), S, U, T, X)


@jax.custom_vjp
def no_forward_mode(x):
    return jnp.tanh(x)


no_forward_mode.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))


def test_without_forward_mode():
    # The flow of dx/dt = cosh(x) sinh(x), from sinh(x_t) / cosh(x_t) growing.
    flow_map = lambda s, t, x: jnp.arctanh(jnp.exp(t - s) * no_forward_mode(x))
    field = lambda t, x: jnp.cosh(x) * jnp.sinh(x)
    s, t, x = 0.1, 0.3, jnp.asarray([0.3, -0.2])
    with pytest.raises(TypeError, match="custom_vjp"):
        testing.assert_eulerian(flow_map, field, s, t, x)
    differences = fd.objectives.FiniteDifference(1e-5)
    testing.assert_eulerian(flow_map, field, s, t, x, jvp=differences)
    with pytest.raises(testing.IdentityError):
        testing.assert_eulerian(flow_map, lambda t, x: x, s, t, x, jvp=differences)


def test_one_direction_only():
    # Right forwards, and at rest backwards.
    flow_map = lambda s, t, x: Decay()(s, jnp.maximum(s, t), x)
    testing.check(flow_map, state=X, identities=["semigroup"], ordered=True)
    with pytest.raises(testing.IdentityError, match="`semigroup` does not hold"):
        testing.check(flow_map, state=X, identities=["semigroup"])


# Reports


def test_report_is_what_metrics_say():
    wrong = Decay(lambda s, t, x: (t - s) * 0.1 * t)
    states = jr.normal(jr.key(0), (8, 2))
    report = testing.defect_report(wrong, decay, states=lambda t: states, num_times=3)
    s, t = jnp.full(8, 0.5), jnp.full(8, 1.0)
    field = lambda t, x, args: decay(t, x)
    truth = fd.metrics.defects(wrong, field, s, t, states, states)
    for name in ("lagrangian", "eulerian", "semigroup", "inverse"):
        assert report.by_times[name][1, 2] == pytest.approx(getattr(truth, name))
        assert np.max(report.worst_by_times[name]) >= np.max(report.by_times[name])
    assert report.by_times["tangent"][2, 2] == pytest.approx(truth.tangent)
    assert np.isnan(report.by_times["tangent"][1, 2])
    assert report.rms["starts_as_identity"] == 0
    # The tangent defect is 0.1 t sqrt(2), known by hand, and worst at the end.
    row = next(line for line in str(report).splitlines() if line.startswith("tangent"))
    _, rms, worst, s, t = row.split()
    assert float(worst) == pytest.approx(0.1 * 2**0.5, rel=1e-2)
    assert float(rms) == pytest.approx(0.1 * (2 * 1.25 / 3) ** 0.5, rel=1e-2)
    assert float(s) == float(t) == 1


def test_report_carries_states_and_sees_nan():
    report = testing.defect_report(
        Decay(lambda s, t, x: jnp.where((s == 1) & (t == 0), jnp.nan, 0.0)),
        states=jnp.tile(X, (3, 1)),
        num_times=3,
        identities=["starts_as_identity", "semigroup", "tangent"],
    )
    assert "tangent" not in report.rms and np.isnan(report.rms["semigroup"])
    assert report.table().splitlines()[2].split()[2:] == ["nan", "1", "0"]
    assert report.rms["starts_as_identity"] < 1e-12


def test_report_plots():
    figures = pytest.importorskip("matplotlib.figure")
    times, diagonal = np.linspace(0, 1, 3), np.where(np.eye(3) == 1, 0.0, np.nan)
    values = {"tangent": diagonal, "semigroup": np.arange(9.0).reshape(3, 3)}
    report = testing.DefectReport(times, values, values)
    figure = report.plot()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [*values]
    (mesh,) = panels[1].collections
    np.testing.assert_allclose(
        np.asarray(mesh.get_array()).reshape(3, 3),
        values["semigroup"].T,
        atol=1e-37,
    )
    with pytest.raises(ValueError, match="zip"):
        report.plot(figures.Figure().subplots())


# As a package


def run_python(code):
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True
    )


def test_imports_without_hypothesis():
    code = """
import sys
import flowdiffrax
assert not {"flowdiffrax.testing", "hypothesis"} & {*sys.modules}
sys.modules["hypothesis"] = None
from flowdiffrax import testing
testing.assert_starts_as_identity(lambda s, t, x: x, 0.1, [0.5, 1.0])
testing.times()
"""
    done = run_python(code)
    assert 'pip install "flowdiffrax[testing]"' in done.stderr.splitlines()[-1]


def test_failing_example_says_how_to_repeat_it():
    wrong = Decay(lambda s, t, x: (t - s) ** 2)

    phases = [hypothesis.Phase.generate]  # not the simplest example: any

    @hypothesis.settings(print_blob=True, phases=phases, database=None)
    @given(testing.time_triples(gap=0.5), testing.states(2))
    def fails(times, x):
        testing.assert_semigroup(wrong, *times, x)

    with pytest.raises(testing.IdentityError, match="to repeat: .*asarray") as info:
        fails()
    said = "\n".join(info.value.__notes__)
    # "Falsifying example", or "failing test case" in newer versions.
    assert re.search(r"F(alsify|ail)ing .*: fails\(\s*times=\(", said)
    assert "@reproduce_failure(" in said
    # Of the traceback, pytest shows what is the user's.
    shown = [entry for entry in info.traceback if not entry.ishidden(info)]
    assert not any("_assert.py" in str(entry.path) for entry in shown)


def test_profiles():
    quick, thorough = map(hypothesis.settings.get_profile, ("quick", "thorough"))
    assert quick.derandomize and not thorough.derandomize and thorough.print_blob
    assert thorough.max_examples > quick.max_examples
