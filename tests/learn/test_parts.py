"""The parts that `learn_solver` is made of."""

import dataclasses
import os
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.integrate

import flowdiffrax as fd
from flowdiffrax.learn._folder import Folder
from flowdiffrax.learn._learn_solver import _identify
from flowdiffrax.learn._plan import check_conserved
from flowdiffrax.learn._probe import TEACHER_RTOL, _badness, probe
from flowdiffrax.learn._problem import make_problem
from flowdiffrax.learn._solvers import make_solver
from flowdiffrax.learn._teacher import cheaper_teacher


def units():
    ts = np.linspace(0.0, 2.0, 5)
    ys = np.exp(np.asarray(jr.normal(jr.key(0), (50, 5, 2)))) * [1.0, 1e-6]
    return fd.nn.LogUnits.of(ts, ys, np.asarray([True, True]))


def test_robust_difference_is_the_error_where_it_is_small():
    difference = fd.learn.RobustDifference(units(), 0.02)
    x = jnp.asarray([0.7, 2e-6])
    small = difference(x * (1 + 1e-5), x)
    # Relative errors; the sum of squares is their mean.
    np.testing.assert_allclose(small, 1e-5 / np.sqrt(2) * np.ones(2), rtol=1e-3)


def test_robust_difference_grows_like_a_root_where_it_is_large():
    difference = fd.learn.RobustDifference(units(), 0.02)
    x = jnp.asarray([0.7, 2e-6])
    for factor in (1e2, 1e4):
        large = difference(x * factor, x)
        expected = 2 * 0.02 * np.log(factor) / 2
        # Asymptotically the absolute error, less c.
        np.testing.assert_allclose(large**2, expected, rtol=0.02)
    with pytest.raises(ValueError, match="width"):
        fd.learn.RobustDifference(units(), 0.0)


def test_difference_of_trajectory_matching():
    path = fd.paths.TrajectoryPath(jnp.asarray([0.0, 1.0]), jnp.asarray([[2.0], [6.0]]))
    identity = fd.FlowMap(lambda s, t, x, args: 0 * x)
    loss = fd.TrajectoryMatching(
        weight=fd.weights.NoWeight(), difference=lambda x, y: jnp.log(x) - jnp.log(y)
    )(identity, None, path, 0.0, 1.0)
    np.testing.assert_allclose(loss, np.log(3.0) ** 2)
    with pytest.raises(TypeError, match="difference"):
        fd.TrajectoryMatching(difference=1.0)


def test_muon_orthogonalises_hidden_matrices_only():
    flow_map = fd.FlowMap(fd.nn.MLP(2, 8, 3, key=jr.key(0)))
    optim = fd.train.muon_and_adam(flow_map, 100, muon_rate=0.1, adam_rate=0.01)
    params = eqx.filter(flow_map, eqx.is_inexact_array)
    leaves = jax.tree_util.tree_leaves(params)
    keys = jr.split(jr.key(1), len(leaves))
    grads = [jr.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    grads = jax.tree_util.tree_structure(params).unflatten(grads)
    state = optim.init(params)
    for _ in range(3):  # the first rate of a warm-up is zero
        updates, state = optim.update(grads, state, params)
    for layer in updates.net.hidden:
        values = np.linalg.svd(layer.weight, compute_uv=False)
        assert values.max() / values.min() < 2.5
        assert np.abs(layer.bias).std() / np.abs(layer.bias).mean() < 1e-3  # Adam's signs
    first = np.linalg.svd(updates.net.first.weight, compute_uv=False)
    assert first.max() / first.min() > 2.5
    with pytest.raises(ValueError, match="muon_rate"):
        fd.train.muon_and_adam(flow_map, 100, muon_rate=0.0)
    with pytest.raises(TypeError, match="flow_map"):
        fd.train.muon_and_adam(optax.adam(1e-3), 100)


def test_rates_rise_and_fall():
    flow_map = fd.FlowMap(fd.nn.MLP(2, 4, 1, key=jr.key(0)))
    params = eqx.filter(flow_map, eqx.is_inexact_array)
    optim = fd.train.muon_and_adam(flow_map, 100, adam_rate=0.01)
    ones = jax.tree_util.tree_map(jnp.ones_like, params)
    state, sizes = optim.init(params), []
    for _ in range(101):
        updates, state = optim.update(ones, state, params)
        sizes.append(float(jnp.abs(updates.net.last.bias).max()))
    assert sizes[0] == 0 and np.argmax(sizes) == 2
    np.testing.assert_allclose(max(sizes), 0.01, rtol=1e-3)
    # Halfway down the cosine, and at its end.
    np.testing.assert_allclose(sizes[51], 0.005, rtol=1e-3)
    assert sizes[100] < 1e-8


def test_ravelled_map_is_the_map_of_vectors():
    matrix = jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])
    inner = fd.exact.LinearFlowMap(matrix)
    flow_map = fd.flow_maps.RavelledFlowMap(inner)
    x = {"a": jnp.asarray(0.3), "b": jnp.asarray([-0.8])}
    end = flow_map(0.2, 1.0, x)
    vector = inner(0.2, 1.0, jnp.asarray([0.3, -0.8]))
    np.testing.assert_allclose(jnp.append(end["a"], end["b"]), vector, rtol=1e-12)
    assert flow_map.time_range == inner.time_range
    np.testing.assert_allclose(
        flow_map.velocity(0.3, x)["b"], inner.velocity(0.3, jnp.asarray([0.3, -0.8]))[1:]
    )
    with pytest.raises(TypeError, match="AbstractFlowMap"):
        fd.flow_maps.RavelledFlowMap(lambda s, t, x, args: x)


def test_args_in_units_of_their_own():
    ts = np.linspace(0.0, 1.0, 3)
    ys = np.asarray(jr.normal(jr.key(0), (500, 3, 1)))
    args = np.stack([10 ** np.linspace(-3, 3, 500), np.linspace(4.0, 6.0, 500)], axis=1)
    found = fd.nn.LogUnits.of(ts, ys, args=args).args
    # Over decades by the logarithm, and else by the standard deviation.
    assert found.is_positive.tolist() == [True, False]
    z = jax.vmap(found.state)(jnp.asarray(args))
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.diff(z[:, 0]), jnp.diff(z[:, 0])[0], rtol=1e-3)


def test_relaxation_net_with_a_time():
    net = fd.nn.RelaxationMLP(units(), 8, 2, time_range=(1.0, 3.0), key=jr.key(0))
    x = jnp.asarray([0.5, 1e-6])
    early, late = net(1.0, 1.5, x), net(2.0, 2.5, x)
    assert not np.allclose(early[0], late[0])
    still = fd.nn.RelaxationMLP(units(), 8, 2, key=jr.key(0))
    np.testing.assert_allclose(still(1.0, 1.5, x)[0], still(2.0, 2.5, x)[0], rtol=1e-12)


def test_a_field_that_indexes_by_numpy_arrays_without_float64():
    code = """
import jax, jax.numpy as jnp, numpy as np
from flowdiffrax.learn._problem import make_problem

x0 = jnp.ones((60, 2)) * jnp.array([1.0, 3.0])
for compiled in ("never", "before", "itself"):
    index = np.array([1, 0])
    field = lambda t, x, args, index=index: x[index]
    if compiled == "itself":
        field = jax.jit(field)
    if compiled != "never":
        jax.jit(field)(0.0, x0[0], None)
    problem = make_problem(field, x0, 0.0, 1.0, None, False)
    x, _ = problem.draw(jax.random.key(0), 2)
    rates = problem.rates(np.zeros(len(x)), x, None)
    assert rates.tolist() == [[3.0, 1.0]] * len(x), compiled
    problem.give_back()
    one = jnp.array([1.0, 3.0])
    assert field(0.0, one, None).tolist() == [3.0, 1.0], compiled
    assert jax.jit(field)(0.0, one, None).dtype == jnp.float32, compiled
"""
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, env=environment)


def test_exported_jump_does_not_extrapolate(tmp_path):
    pytest.importorskip("flatbuffers")
    net = lambda s, t, x, args: (jnp.ones_like(x), jnp.zeros_like(x))
    flow_map = fd.flow_maps.RelaxationFlowMap(net, time_range=(0.0, 1.0))
    path = tmp_path / "jump.bin"
    fd.learn.export_jump(flow_map, jnp.ones(2), batch_size=3, path=path)
    jump = jax.export.deserialize(bytearray(path.read_bytes())).call
    np.testing.assert_allclose(jump(0.2, 1.0, jnp.ones((3, 2))), np.exp(-0.8), rtol=1e-6)
    assert jnp.isnan(jump(0.2, 1.1, jnp.ones((3, 2)))).all()


def solve_stiff(field, x0, t1, solver):
    """The end and the number of steps, at the tolerance of a teacher."""
    with jax.enable_x64(True):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            t1,
            None,
            jnp.asarray(x0),
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-11),
            max_steps=2048,
            throw=False,
        )
        return np.asarray(solution.ys[0]), int(solution.stats["num_steps"])


def robertson(t, x, args):
    first, second, third = 0.04 * x[0], 3e7 * x[1] ** 2, 1e4 * x[1] * x[2]
    return jnp.stack([third - first, first - second - third, second])


def exchange(t, x, args):
    """Rates so large that their rounding errors are larger than any tolerance."""
    there, back = 1e12 * x[0], 1e12 * x[1]
    return jnp.stack([back - there, there - back - x[1]])


def test_kvaerno5_rejects_few_steps():
    solver = make_solver("Kvaerno5")
    x0, t1 = np.array([1.0, 0.0, 0.0]), 1e4
    end, num_steps = solve_stiff(robertson, x0, t1, solver)
    exact = scipy.integrate.solve_ivp(
        lambda t, x: np.asarray(robertson(t, x, None)),
        (0, t1),
        x0,
        "Radau",
        rtol=1e-9,
        atol=1e-14,
    )
    np.testing.assert_allclose(end, exact.y[:, -1], rtol=1e-4)
    by_default = solve_stiff(robertson, x0, t1, diffrax.Kvaerno5())[1]
    assert num_steps < by_default / 2
    end, _ = solve_stiff(exchange, np.array([1.0, 0.0]), 1.0, solver)
    np.testing.assert_allclose(end, np.exp(-0.5) / 2, rtol=1e-4)


def test_a_fast_solver_that_fails_is_not_taken():
    good = np.ones((32, 5, 2))
    bad = good.copy()
    bad[:10] = np.nan
    tried = [(0.1, "fast", bad, None), (5.0, "slow", good, None)]
    assert min(tried, key=_badness)[1] == "slow"
    # One failure of 32 says little.
    bad[1:10] = 1.0
    assert min(tried, key=_badness)[1] == "fast"


@pytest.fixture(scope="module")
def stiff():
    # The first decays, and the second follows it at once.
    field = lambda t, x, args: jnp.stack([-x[0], 1e4 * (x[0] - x[1])])
    draw = lambda key: jr.uniform(key, (2,), minval=0.5)
    problem = make_problem(field, draw, 0.0, 1.0, None, False)
    return problem, dataclasses.replace(probe(problem, jr.key(0)), solve_seconds=1.0)


@pytest.mark.parametrize("only_solver", [True, False])
def test_a_cheaper_teacher_is_exact_enough(stiff, only_solver):
    problem, facts = stiff
    assert facts.is_stiff and facts.rtol == TEACHER_RTOL
    # All that there can be are solved in time, or as many as are plenty.
    for num, seconds in ((10, 11.0), (10**9, 1e5)):
        assert cheaper_teacher(problem, facts, num, seconds, only_solver) is facts
    found = cheaper_teacher(problem, facts, 10**9, 11.0, only_solver)
    assert found.rtol > TEACHER_RTOL and found.solve_seconds < 1
    if only_solver:
        assert found.solves is facts.solves
    x0 = facts.ys[:, 0]
    ys, _ = found.solves(x0, None, [0.0, 1.0], found.rtol, facts.ranges)
    exact = x0[:, :1] * np.exp(-1.0) * [1, 1 / (1 - 1e-4)]
    np.testing.assert_allclose(ys[:, -1], exact, rtol=1e-3)
    # One that is not exact enough is not taken.
    wrong = dataclasses.replace(facts, ys=facts.ys * 1.01)
    wrong.ys[:, 0] = x0
    assert cheaper_teacher(problem, wrong, 10**9, 11.0, only_solver) is wrong


def test_problems_are_told_apart(tmp_path):
    """Fields that differ in sign, or only at later times, are not one problem."""
    x0 = jr.normal(jr.key(0), (64, 2))
    pulse = lambda t: jnp.where(t > 0.5, 1.0, 0.0)
    fields = {
        "decay": lambda t, x, args: -x,
        "growth": lambda t, x, args: x,
        "decay, and a pulse": lambda t, x, args: pulse(t) - x,
    }

    def stated(field):
        problem = make_problem(field, x0, 0.0, 1.0, None, False)
        return _identify(problem, jr.key(1), 1.0)

    Folder(tmp_path, stated(fields["decay"]))
    Folder(tmp_path, stated(lambda t, x, args: -1 * x))
    for name in ("growth", "decay, and a pulse"):
        with pytest.raises(ValueError, match=r"another problem .* \['rates'\] differ"):
            Folder(tmp_path, stated(fields[name]))


def test_which_invariants_are_conserved():
    x = np.random.default_rng(0).uniform(1.0, 2.0, (20, 9))
    still = np.broadcast_to(np.full((20, 1), 0.1), x.shape)
    ys = np.stack([x, 3 - x + 1e-8 * x**2, still], axis=2)
    ys[4, 2, 0] = np.nan
    good = np.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [2.0, 2.0, -1.0]])
    check_conserved(good, ys, 0.01)
    check_conserved(good[:0], ys, 0.01)
    for wrong in ([1.0, -1.0, 0.0], [1.0, 1.1, 0.0], [0.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"`invariants\[1\]` is not conserved"):
            check_conserved(np.asarray([good[0], wrong]), ys, 0.01)
