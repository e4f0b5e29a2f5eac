"""Flow maps: residual form, integrated, composed, inverted, rescheduled."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    assert_close,
    finite_difference,
    gaussian_map,
    linear_map,
    max_abs,
    mlp_map,
    nonlinear_field,
    tight_solve,
    without_type_checks,
)

import flowdiffrax as fd

X = jnp.asarray([0.8, -0.5])


class Plain(fd.AbstractFlowMap):
    """A user's map, with `jump` only: X = x + h sin(x + s) + h^2 cos(t) x."""

    def jump(self, s, t, x, args):
        h = t - s
        return x + h * jnp.sin(x + s) + h**2 * jnp.cos(t) * x


# --- the base class -----------------------------------------------------------------


def test_default_velocity():
    v_tt = Plain().velocity(0.3, X)
    np.testing.assert_allclose(v_tt, np.sin(np.asarray(X) + 0.3), rtol=1e-12)


@pytest.mark.parametrize("s, t", [(0.2, 0.9), (0.9, 0.2), (0.4, 0.4 + 1e-7)])
def test_default_average_velocity(s, t):
    x = np.asarray(X)
    expected = np.sin(x + s) + (t - s) * np.cos(t) * x
    np.testing.assert_allclose(Plain().average_velocity(s, t, X), expected, rtol=1e-7)


def test_default_average_velocity_over_a_gap_below_the_precision_of_the_state():
    x = X.astype(jnp.float32)
    flow_map = Plain()
    found = flow_map.average_velocity(jnp.asarray(0.0), jnp.asarray(1e-234), x)
    np.testing.assert_array_equal(found, flow_map.velocity(jnp.asarray(1e-234), x))
    assert np.isfinite(found).all()


def test_default_average_velocity_on_diagonal_has_finite_gradients():
    gradient = jax.grad(lambda x: jnp.sum(Plain().average_velocity(0.3, 0.3, x)))(X)
    np.testing.assert_allclose(gradient, np.cos(np.asarray(X) + 0.3), rtol=1e-12)


def test_base_declares_no_time_range():
    assert Plain().time_range is None


class Recorder(fd.AbstractFlowMap):
    """Notes what its methods are given."""

    seen: list
    time_range = (0.0, 1.0)

    def jump(self, s, t, x, args):
        self.seen.append((s, t, args))
        return x

    def chord(self, s, t, x, args):
        self.seen.append((s, t, args))
        return x

    def tangent(self, t, x, args):
        self.seen.append((t, args))
        return x


@pytest.mark.parametrize(
    "s, t", [(0, 1), (0.25, 0.5), (np.float64(0.25), jnp.asarray(0.5, jnp.bfloat16))]
)
@pytest.mark.parametrize(
    "x, dtype",
    [
        (jnp.ones(2, jnp.float32), jnp.float32),
        (jnp.ones(2, jnp.bfloat16), jnp.float32),
        ({"a": jnp.ones(2), "b": jnp.ones(3, jnp.complex64)}, jnp.float64),
    ],
)
def test_methods_of_a_map_are_given_times_like_the_state(s, t, x, dtype):
    flow_map = Recorder([])
    flow_map(s, t, x, "a")
    flow_map.average_velocity(s, t, x, "b")
    flow_map.velocity(t, x, "c")
    jumped, averaged, moved = flow_map.seen
    assert jumped[2] == "a" and averaged[2] == "b" and moved[1] == "c"
    for given, value in [(jumped[0], s), (jumped[1], t), (averaged[1], t), (moved[0], t)]:
        assert isinstance(given, jax.Array) and given.shape == ()
        assert given.dtype == dtype and float(given) == float(value)


def test_times_outside_the_range_are_refused_by_every_method():
    flow_map = Recorder([])
    for call in (flow_map, flow_map.average_velocity):
        with pytest.raises(ValueError, match="leaves the time range"):
            call(0.5, 1.5, X)
    # No jump leaves a range.
    flow_map.velocity(1.5, X)
    assert len(flow_map.seen) == 1


def test_a_map_given_by_its_chord():
    class Chord(fd.flow_maps.AbstractChordFlowMap):
        def chord(self, s, t, x, args):
            return args * x + s + 2 * t

    flow_map = Chord()
    expected = np.asarray(X) + 0.5 * (3 * np.asarray(X) + 0.2 + 2 * 0.7)
    np.testing.assert_allclose(flow_map(0.2, 0.7, X, 3), expected, rtol=1e-12)
    moved = 3 * np.asarray(X) + 0.7 + 2 * 0.7
    np.testing.assert_allclose(flow_map.velocity(0.7, X, 3), moved, rtol=1e-12)


# --- FlowMap ------------------------------------------------------------------------


def scaling_net(s, t, x, args):
    """Works for all shapes and dtypes."""
    factor = s + 2 * t
    return jtu.tree_map(lambda leaf: factor.astype(leaf.dtype) * leaf, x)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 4), (0,)])
def test_any_shape(shape):
    x = jnp.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape)
    out = fd.FlowMap(scaling_net)(0.5, 0.25, x)
    assert_close(out, 0.75 * x)


def test_pytree_keeps_structure_and_dtypes():
    x = {"a": jnp.ones(2, jnp.float32), "b": (jnp.ones((1, 2), jnp.complex64),)}
    out = fd.FlowMap(scaling_net)(0.0, 0.5, x)
    assert_close(out, jtu.tree_map(lambda leaf: 1.5 * leaf, x), 1e-6)
    assert jtu.tree_map(jnp.result_type, out) == jtu.tree_map(jnp.result_type, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("time", [float, np.float64, jnp.float64, jnp.float32, int])
def test_state_keeps_its_dtype(dtype, time):
    x = jnp.ones(2, dtype)
    flow_map = fd.FlowMap(scaling_net)
    made = [flow_map(time(0), time(1), x), flow_map.velocity(time(1), x)]
    made += [flow_map.average_velocity(time(0), time(1), x)]
    assert [leaf.dtype for leaf in made] == [jnp.dtype(dtype)] * 3


def test_bfloat16_state_has_float32_times():
    seen = []

    def net(s, t, x, args):
        seen.append((s.dtype, t.dtype))
        return x

    fd.FlowMap(net)(0.1, 0.3, jnp.ones(2, jnp.bfloat16))
    assert seen == [(jnp.float32, jnp.float32)]


def test_velocity_is_the_net_at_equal_times():
    flow_map = mlp_map()
    t = jnp.asarray(0.3)
    assert_close(flow_map.velocity(0.3, X), flow_map.net(t, t, X, None))


def test_velocity_is_the_limit_of_the_chord():
    flow_map = mlp_map()
    h = 1e-6
    chord = (flow_map(0.3, 0.3 + h, X) - flow_map(0.3, 0.3 - h, X)) / (2 * h)
    # The chord's end moves, the net's arguments with it: an error of order h.
    assert_close(flow_map.velocity(0.3, X), chord, 1e-8, 1e-6)


def test_args_reach_the_net():
    flow_map = mlp_map()
    assert max_abs(flow_map(0.1, 0.7, X, X) - flow_map(0.1, 0.7, X)) > 1e-3


def test_rounded_times_are_within_the_range():
    flow_map = fd.FlowMap(scaling_net, time_range=(0.0, 1.0))
    end = sum([0.1] * 10) + 2e-16
    assert np.isfinite(flow_map(0.0, end, X)).all()


# --- ODEFlowMap ---------------------------------------------------------------------


class Field(eqx.Module):
    """`nonlinear_field` with a weight, and moved by `args`."""

    weight: jax.Array

    def __call__(self, t, x, args):
        return nonlinear_field(t, x, None) * self.weight + args * jnp.cos(3 * t)


def ode_map(weight=1.1):
    return fd.ODEFlowMap(Field(jnp.asarray(weight)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("s, t", [(0.15, 0.85), (0.9, 0.2)])
def test_integrated_map_is_the_solution(s, t):
    flow_map = ode_map()
    expected = tight_solve(flow_map.vector_field, s, t, X, 0.3).ys[0]
    assert_close(flow_map(s, t, X, 0.3), expected, 1e-9)


def test_integrated_map_at_equal_times():
    assert_close(ode_map()(0.3, 0.3, X, 0.1), X, 0, 0)


INPUTS = (jnp.asarray(0.2), jnp.asarray(0.9), X, jnp.asarray(0.3), jnp.asarray(1.1))


def integrated(s, t, x, args, weight):
    return ode_map(weight)(s, t, x, args)


@pytest.fixture(scope="module")
def derivatives():
    forward = jax.jit(lambda p, d: jax.jvp(integrated, p, d)[1])
    reverse = jax.jit(
        jax.grad(lambda p: jnp.sum(integrated(*p) * jnp.asarray([1.0, -2.0])))
    )
    value = jax.jit(lambda p: tight_solve(Field(p[4]), *p[:4]).ys[0])
    return forward, reverse, value


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("swap", [False, True])
def test_integrated_map_derivatives(derivatives, index, swap):
    inputs = (INPUTS[1], INPUTS[0], *INPUTS[2:]) if swap else INPUTS
    direction = [jnp.zeros_like(value) for value in inputs]
    direction[index] = jnp.ones_like(inputs[index]) * 0.7
    forward, reverse, value = derivatives
    expected = finite_difference(value, inputs, tuple(direction), 1e-4)
    made = forward(inputs, tuple(direction))
    assert_close(made, expected, 1e-6, 1e-6)
    gradient = sum(
        jnp.sum(g * d) for g, d in zip(reverse(inputs), direction, strict=True)
    )
    assert_close(gradient, expected @ jnp.asarray([1.0, -2.0]), 1e-6, 1e-6)


@pytest.mark.parametrize("args", [0.0, 0.5])
def test_integrated_map_moves_from_rest(derivatives, args):
    # A solve from s to t takes no step at s == t; its end would not seem to move.
    forward, *_ = derivatives
    s = jnp.asarray(0.3)
    inputs = (s, s, X, jnp.asarray(args), jnp.asarray(1.0))
    direction = jtu.tree_map(jnp.zeros_like, inputs)
    direction = (direction[0], jnp.ones(()), *direction[2:])
    expected = nonlinear_field(0.3, X, None) + args * np.cos(0.9)
    assert_close(forward(inputs, direction), expected, 1e-9)


@pytest.mark.slow
def test_gradient_of_a_jvp():
    flow_map = linear_map()
    exact = lambda x, t: jnp.sum(fd.lagrangian_residual(flow_map, other, 0.2, t, x) ** 2)
    other = lambda t, x, args: jnp.sin(x) * t
    tolerances = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 64}
    ode = fd.ODEFlowMap(flow_map.velocity, diffrax.Tsit5(), **tolerances)
    solved = lambda x, t: jnp.sum(fd.lagrangian_residual(ode, other, 0.2, t, x) ** 2)
    made, expected = (jax.jit(jax.grad(f, (0, 1)))(X, 0.9) for f in (solved, exact))
    assert_close(made, expected, 1e-7, 1e-7)


def test_vmap_of_mixed_directions():
    flow_map = fd.ODEFlowMap(nonlinear_field, rtol=1e-11, atol=1e-11)
    s, t = jnp.asarray([0.1, 0.9, 0.4, 0.0]), jnp.asarray([0.8, 0.3, 0.4, 1.0])
    x = jr.normal(jr.key(0), (4, 2))
    made = jax.jit(jax.vmap(flow_map))(s, t, x)
    for k in range(4):
        if s[k] == t[k]:
            expected = x[k]
        else:
            expected = tight_solve(nonlinear_field, s[k], t[k], x[k]).ys[0]
        assert_close(made[k], expected, 1e-9)


def test_integrated_pytree():
    field = lambda t, x, args: {"q": x["p"], "p": -x["q"] * (1 + t)}
    x = {"q": jnp.ones((2, 1)), "p": jnp.zeros((2, 1))}
    made = fd.ODEFlowMap(field, rtol=1e-11, atol=1e-11)(0.8, 0.1, x)
    assert_close(
        made, jtu.tree_map(lambda y: y[0], tight_solve(field, 0.8, 0.1, x).ys), 1e-9
    )


@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 3e-6), (jnp.bfloat16, 1e-2)])
def test_integrated_map_in_low_precision(dtype, tol):
    field = lambda t, x, args: -x * x + t.astype(x.dtype)
    flow_map = fd.ODEFlowMap(field)
    x = jnp.asarray([0.8, 0.25])
    made = flow_map(0.1, 0.9, x.astype(dtype))
    assert made.dtype == dtype
    expected = tight_solve(field, jnp.asarray(0.1), jnp.asarray(0.9), x).ys[0]
    np.testing.assert_allclose(made.astype(float), expected, rtol=tol)


def test_integrated_python_number():
    assert_close(fd.ODEFlowMap(lambda t, x, args: -x)(0.0, 1.0, 1.0), np.exp(-1.0), 1e-7)


# --- wrappers -----------------------------------------------------------------------


@pytest.mark.parametrize("num_jumps", [1, 2, 5])
@pytest.mark.parametrize("s, t", [(0.1, 0.8), (0.8, 0.1)])
def test_composition_is_a_loop(num_jumps, s, t):
    flow_map = mlp_map()
    expected, h = X, (t - s) / num_jumps
    for k in range(num_jumps):
        expected = flow_map(s + k * h, s + (k + 1) * h, expected, X)
    assert_close(fd.ComposedFlowMap(flow_map, num_jumps)(s, t, X, X), expected, 1e-13)


def test_composition_of_an_exact_map_changes_nothing():
    flow_map = gaussian_map()
    assert_close(fd.ComposedFlowMap(flow_map, 7)(0.9, 0.0, X), flow_map(0.9, 0.0, X))


def test_composition_ends_on_time():
    # A third of 0.9 and a tenth have no binary fraction: the last bit must fit anyway.
    last = []
    net = lambda s, t, x, args: (
        jax.debug.callback(lambda t: last.append(float(t)), t) or x
    )
    fd.ComposedFlowMap(fd.FlowMap(net), 7)(0.1, 0.9, X).block_until_ready()
    jax.effects_barrier()
    assert max(last) == 0.9


def test_inverse_undoes():
    flow_map = gaussian_map()
    there = flow_map(0.1, 0.8, X)
    assert_close(fd.InverseFlowMap(flow_map)(0.1, 0.8, there), X)


def test_inverse_passes_args():
    flow_map = mlp_map()
    made = fd.InverseFlowMap(flow_map)(0.1, 0.8, X, X)
    assert_close(made, flow_map(0.8, 0.1, X, X))


def test_wrappers_keep_the_time_range():
    flow_map = fd.FlowMap(scaling_net, time_range=(-1.0, 3.0))
    wrapped = [fd.ComposedFlowMap(flow_map, 2), fd.InverseFlowMap(flow_map)]
    assert [w.time_range for w in wrapped] == [(-1.0, 3.0)] * 2


# --- change of schedule -------------------------------------------------------------

SCHEDULES = {
    "linear": fd.LinearInterpolant(),
    "trigonometric": fd.paths.TrigonometricInterpolant(),
    "vp": fd.paths.VariancePreservingInterpolant(),
    "ve": fd.paths.VarianceExplodingInterpolant(0.02, 5.0),
    "quadratic": fd.paths.Interpolant(lambda t: (1 - t) ** 2, lambda t: t * (2 - t)),
}
SWITCHES = [
    ("linear", "trigonometric"),
    ("trigonometric", "quadratic"),
    ("linear", "vp"),
    ("vp", "trigonometric"),
    ("ve", "linear"),
    ("vp", "ve"),
]


def rescheduled(source, target):
    source, target = SCHEDULES[source], SCHEDULES[target]
    return fd.RescheduledFlowMap(gaussian_map(source), source, target), gaussian_map(
        target
    )


@pytest.mark.parametrize("source, target", SWITCHES)
@pytest.mark.parametrize("s, t", [(0.3, 0.9), (0.85, 0.4), (0.5, 0.5)])
def test_rescheduled_gaussian(source, target, s, t):
    made, exact = rescheduled(source, target)
    assert_close(made(s, t, X), exact(s, t, X), 1e-9, 1e-9)


@pytest.mark.parametrize("source, target", SWITCHES)
def test_rescheduled_derivatives(source, target):
    made, exact = rescheduled(source, target)
    value = lambda ends: exact(ends[0], ends[1], X)
    ends, direction = (jnp.asarray(0.35), jnp.asarray(0.8)), (jnp.ones(()), -jnp.ones(()))
    expected = finite_difference(value, ends, direction)
    got = jax.jvp(lambda *ends: made(*ends, X), ends, direction)[1]
    assert_close(got, expected, 1e-6, 1e-6)


def test_rescheduled_second_derivative():
    made, exact = rescheduled("linear", "vp")
    slope = lambda t: jax.jvp(lambda t: exact(0.3, t, X), (t,), (jnp.ones(()),))[1]
    expected = finite_difference(slope, jnp.asarray(0.8), jnp.ones(()))
    got = jax.jit(jax.jacfwd(jax.jacrev(lambda t: made(0.3, t, X))))(0.8)
    assert_close(got, expected, 1e-6, 1e-6)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_rescheduled_velocity_at_the_ends(t):
    made, exact = rescheduled("linear", "trigonometric")
    assert_close(made.velocity(t, X), exact.velocity(t, X), 1e-9)


def test_rescheduled_in_float32():
    made, exact = rescheduled("vp", "trigonometric")
    out = made(0.2, 0.9, X.astype(jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact(0.2, 0.9, X), rtol=3e-5)


@pytest.mark.parametrize("source", ["vp", "ve"])
def test_rescheduled_clock_stays_in_range(source):
    # These sources never reach the base of the linear schedule, nor VE the data.
    flow_map = fd.FlowMap(scaling_net, time_range=(0.0, 1.0))
    made = fd.RescheduledFlowMap(flow_map, SCHEDULES[source], SCHEDULES["linear"])
    assert np.isfinite(made(0.0, 1.0, X)).all()


def test_rescheduled_from_a_source_that_stops_short():
    # At its base end VP keeps a trace of data: the map starts from there.
    made, exact = rescheduled("vp", "linear")
    assert_close(made(0.0, 0.9, X), exact(0.0, 0.9, X), 0, 0.03)


def test_time_range_of_arrays():
    # Static fields must be plain numbers, or nothing that holds the map compiles twice.
    ts = jnp.linspace(0.0, 1.0, 5)
    flow_map = fd.FlowMap(scaling_net, time_range=(ts[0], np.float32(1)))
    assert flow_map.time_range == (0.0, 1.0)
    assert all(type(end) is float for end in flow_map.time_range)


# --- refusals -----------------------------------------------------------------------

UNIT = {"time_range": (0.0, 1.0)}
SINE = fd.LinearInterpolant(latent=fd.paths.SineSquaredLatent())


def jump(net, x=X, s=0.0, t=1.0, **settings):
    return fd.FlowMap(net, **settings)(s, t, x)


def inverse():
    return fd.InverseFlowMap(gaussian_map())


@pytest.mark.parametrize(
    "act, error, match",
    [
        (lambda: jump(lambda s, t, x, args: (x, x)), ValueError, "structure of the stat"),
        (
            lambda: jump(lambda s, t, x, args: x[None]),
            ValueError,
            r"\(2,\); got \(1, 2\).*`jax.vmap`",
        ),
        (
            lambda: jax.jit(lambda x: jump(lambda s, t, x, args: x[:1], x))(X),
            ValueError,
            "shape of the state",
        ),
        (
            lambda: jump(
                lambda s, t, x, args: x.astype(jnp.float64), X.astype(jnp.float32)
            ),
            TypeError,
            "float32; got float64.*astype",
        ),
        (lambda: jump(scaling_net, jnp.arange(3)), TypeError, "floating-point"),
        (
            lambda: fd.lagrangian_residual(
                gaussian_map(), lambda t, x, args: x[:, None], 0.2, 0.7, jnp.zeros(2)
            ),
            ValueError,
            "`teacher` must return the shape",
        ),
        (
            lambda: jump(scaling_net, X, -0.1, 0.5, **UNIT),
            ValueError,
            r"leaves the time range.*\[0.0, 1.0\]",
        ),
        (
            lambda: jump(scaling_net, X, 1.1, 0.5, **UNIT),
            ValueError,
            "leaves the time ra",
        ),
        (
            lambda: fd.ODEFlowMap(nonlinear_field, **UNIT)(0.0, 1.5, X),
            ValueError,
            "leaves the time range",
        ),
        (
            lambda: fd.FlowMap(scaling_net, time_range=(1.0, 0.0)),
            ValueError,
            "low < high; got",
        ),
        (
            lambda: fd.ODEFlowMap(nonlinear_field, time_range=(0.5, 0.5)),
            ValueError,
            "low < high; got",
        ),
        (lambda: fd.FlowMap(3), TypeError, "must be a callable"),
        (lambda: fd.ODEFlowMap(3), TypeError, "must be a callable"),
        (lambda: fd.ComposedFlowMap(3, 2), TypeError, "must be a callable"),
        (lambda: fd.InverseFlowMap(3), TypeError, "must be a callable"),
        (
            lambda: fd.RescheduledFlowMap(3, fd.LinearInterpolant(), SINE),
            TypeError,
            "must be a callable",
        ),
        (
            lambda: fd.RescheduledFlowMap(gaussian_map(), fd.LinearInterpolant(), SINE),
            ValueError,
            "without latent",
        ),
        (
            lambda: fd.ODEFlowMap(nonlinear_field, max_steps=0),
            ValueError,
            "`max_steps` must be at least 1; got 0",
        ),
        (
            lambda: fd.ODEFlowMap(lambda t, x, args: x**2, max_steps=64)(0.0, 2.0, X),
            RuntimeError,
            "max",
        ),
        (
            lambda: fd.ComposedFlowMap(gaussian_map(), 0),
            ValueError,
            "`num_jumps` must be at least 1; got 0",
        ),
        (lambda: fd.ComposedFlowMap(inverse(), 2), TypeError, "run the map itself from"),
        (lambda: fd.FlowMapSolver(inverse()), TypeError, "run the map itself from"),
        (lambda: fd.sample(inverse(), X, 2), TypeError, "run the map itself from"),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()
