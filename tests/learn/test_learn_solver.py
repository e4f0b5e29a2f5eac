"""From a vector field to a validated map, in one call."""

import dataclasses
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Interrupting

import flowdiffrax as fd
from flowdiffrax.learn import LearnedSolver, _learn_solver, _learned, learn_solver
from flowdiffrax.learn._autonomous import depends_on_time
from flowdiffrax.learn._errors import scaled_errors
from flowdiffrax.learn._probe import probe
from flowdiffrax.learn._problem import make_problem
from flowdiffrax.testing.__main__ import main as check_map

# A quick training, so that only compilation takes time.
QUICK = dict(minutes=10, num_steps=300, pool_size=512, width=16, depth=2, progress=False)


def decay(t, x, args):
    """Two concentrations, one of which becomes the other, at a rate of `args`."""
    gone = args[0] * x[0]
    return jnp.stack([-gone, gone])


def draw(key):
    return jr.uniform(key, (2,), minval=0.5, maxval=2.0)


def draw_args(key):
    return jr.uniform(key, (1,), minval=0.5, maxval=1.5)


def exact_decay(h, x, args):
    left = x[..., :1] * np.exp(-h * args)
    return np.concatenate([left, x.sum(-1, keepdims=True) - left], axis=-1)


def pendulum(t, x, args):
    return {"angle": x["speed"], "speed": -jnp.sin(x["angle"]) + args["drive"] * t}


def draw_pendulum(key):
    angle, speed = jr.uniform(key, (2,), minval=-1.0)
    return {"angle": angle, "speed": speed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def learned(folder):
    return learn_solver(decay, draw, 0.0, 2.0, draw_args, run=folder, **QUICK)


@pytest.fixture(scope="module")
def fresh():
    keys = jr.split(jr.key(99), 128)
    return jax.vmap(draw)(keys), jax.vmap(draw_args)(jr.split(jr.key(98), 128))


# --- what comes out -------------------------------------------------------------------


def test_fresh_trajectories_are_more_exact_than_the_teacher(monkeypatch):
    """A map is not judged by a teacher that is as wrong as the one that it learned."""
    loose = lambda problem, facts, *_: dataclasses.replace(facts, rtol=1e-2)

    def stop(plan, pool, key):
        raise InterruptedError(pool)

    def error(pool):
        exact = [exact_decay(t, pool.ys[:, 0], pool.args) for t in pool.ts]
        return np.abs(pool.ys - np.stack(exact, axis=1)).max()

    fresh = []
    make = lambda maker, *given, **how: (
        fresh.append(call(maker, *given, **how)) or fresh[-1]
    )
    call = _learn_solver.PoolMaker.__call__
    monkeypatch.setattr(_learn_solver.PoolMaker, "__call__", make)
    monkeypatch.setattr(_learn_solver, "cheaper_teacher", loose)
    monkeypatch.setattr(_learn_solver, "build", stop)
    with pytest.raises(InterruptedError) as caught:
        learn_solver(decay, draw, 0.0, 2.0, draw_args, **QUICK)
    (learned_from,) = caught.value.args
    assert error(learned_from) > 1e-4
    assert error(fresh[0]) < 1e-5


def test_the_map_is_close_to_the_closed_form(learned, fresh):
    x, args = fresh
    ends = jax.vmap(learned.flow_map, (None, None, 0, 0))(0.0, 2.0, x, args)
    error = np.abs(ends / exact_decay(2.0, np.asarray(x), np.asarray(args)) - 1)
    assert np.quantile(error, 0.9) < 0.05
    # The validation was on other states, but from the same distribution.
    reported = learned.errors[0]
    assert 0.5 < np.quantile(error, 0.5) / reported.median < 2
    assert reported.median < reported.most < reported.worst


def test_it_runs_in_diffrax_from_any_time(learned):
    x, args = jnp.asarray([1.0, 1.0]), jnp.asarray([1.0])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(decay), fd.FlowMapSolver(learned.flow_map), 5.0, 6.0, 0.5, x, args
    )
    np.testing.assert_allclose(
        solution.ys[-1], exact_decay(1.0, np.asarray(x), np.asarray(args)), rtol=0.05
    )
    with pytest.raises(ValueError, match="time_range"):
        learned.flow_map(0.0, 3.0, x, args)


def test_choices_follow_the_problem(learned):
    plan = learned.plan
    assert plan.form == "relaxation" and plan.solver == "Tsit5"
    assert plan.is_autonomous and plan.is_positive.tolist() == [True, True]
    # The total is conserved, and by the map to rounding.
    ratio = plan.invariants[0, 0] / plan.invariants[0, 1]
    assert plan.invariants.shape == (1, 2) and abs(ratio - 1) < 1e-9
    x = jnp.asarray([1.3, 0.4])
    end = learned.flow_map(0.0, 1.7, x, jnp.asarray([0.9]))
    assert abs(end.sum() - 1.7) < 1e-14


def test_table(learned):
    text = str(learned)
    assert f"{learned.errors[0].median:.3%}" in text and "kFLOP a jump" in text
    assert "512 trajectories" in text and learned.num_dropped == 0
    assert [cost.batch_size for cost in learned.costs] == [64, 1024]
    assert len(learned.history) == 20 and learned.history[-1]["step"] == 300
    # An early error is larger than the last.
    assert learned.history[0]["error"] > 2 * learned.history[-1]["error"]
    # At least the multiplications of two layers and of the hidden one.
    num_inputs = learned.parts.flow_map.flow_map.net.first.in_features
    assert 2 * 16 * (num_inputs + 16 + 4) < learned.flops < 10_000


def test_solves_are_classical(learned):
    tight = [row for row in learned.solves if row.rtol <= 1e-4]
    assert all(row.median < 1e-3 for row in tight)
    assert {row.solver for row in learned.solves} == {"Bosh3", "Tsit5"}
    for cost in learned.costs:
        assert cost.solve.median <= learned.errors[0].median


def test_save_and_load(learned, fresh, tmp_path):
    path = tmp_path / "map.safetensors"
    learned.save(path)
    loaded = LearnedSolver.load(path)
    assert str(loaded) == str(learned) and str(loaded.plan) == str(learned.plan)
    given = 0.1, 0.9, fresh[0][0], fresh[1][0]
    assert (loaded.flow_map(*given) == learned.flow_map(*given)).all()
    np.testing.assert_array_equal(loaded.fresh["exact"], learned.fresh["exact"])
    assert loaded.parts is None


def test_report_draws_one_figure(learned, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    path = tmp_path / "out" / "report.png"
    assert learned.report(path) == learned.report() == str(learned)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_exported_jump_runs_in_another_process(learned, fresh, tmp_path):
    pytest.importorskip("flatbuffers")
    x, args = fresh[0][:8], fresh[1][:8]
    path = tmp_path / "jump.bin"
    fd.learn.export_jump(learned.flow_map, x[0], args[0], batch_size=8, path=path)
    np.savez(tmp_path / "given.npz", x=x, args=args)
    code = (
        "import jax, sys; jax.config.update('jax_enable_x64', True);"
        "import numpy as np; from jax import export;"
        "jump = export.deserialize(open('jump.bin', 'rb').read()).call;"
        "given = np.load('given.npz');"
        "np.save('ends.npy', jump(0.0, 2.0, given['x'], given['args']));"
        "assert 'flowdiffrax' not in sys.modules and 'equinox' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ends = jax.vmap(learned.flow_map, (None, None, 0, 0))(0.0, 2.0, x, args)
    np.testing.assert_allclose(np.load(tmp_path / "ends.npy"), ends, rtol=1e-6)


def test_states_of_any_structure_and_time(unmeasured):
    learned = learn_solver(
        pendulum,
        draw_pendulum,
        1.0,
        2.0,
        lambda key: {"drive": jr.uniform(key)},
        **QUICK | dict(num_steps=200, solver=diffrax.Tsit5()),
    )
    assert not learned.plan.is_autonomous and not learned.plan.is_positive.any()
    x = {"angle": jnp.asarray(0.3), "speed": jnp.asarray(-0.2)}
    args = {"drive": jnp.asarray(0.5)}
    end = learned.flow_map(1.0, 2.0, x, args)
    exact = fd.ODEFlowMap(pendulum)(1.0, 2.0, x, args)
    assert abs(end["angle"] - exact["angle"]) < 0.1
    assert abs(end["speed"] - exact["speed"]) < 0.1
    with pytest.raises(ValueError, match="time_range"):
        learned.flow_map(0.0, 1.5, x, args)


def test_what_is_given_is_taken(unmeasured, tmp_path):
    rotate = lambda t, x, args: jnp.stack([x[1], -x[0]])
    ts = np.asarray([0.0, 0.1, 0.4, 0.8, 1.2, 1.5])
    given = dict(ts=ts, is_positive=False, batch_size=256, both_directions=True)
    given |= dict(solver=diffrax.Dopri8(), invariants=np.zeros((0, 2)))
    x0 = np.asarray(jr.normal(jr.key(0), (300, 2)))
    learned = learn_solver(rotate, x0, 0.0, 1.5, **QUICK | given | dict(num_steps=900))
    plan = learned.plan
    # A fifth is held out.
    assert learned.num_trajectories == 240
    assert plan.solver == "Dopri8" and plan.form == "residual"
    assert plan.ts.tolist() == ts.tolist() and plan.batch_size == 256
    assert plan.reasons["width"] == plan.reasons["batch_size"] == "given"
    assert "given" in str(plan)
    assert isinstance(learned.flow_map, fd.NormalisedFlowMap)
    x = jnp.asarray([0.6, -0.3])
    for h in (1.2, -1.2):
        turned = jnp.asarray(
            [jnp.cos(h) * x[0] + jnp.sin(h) * x[1], jnp.cos(h) * x[1] - jnp.sin(h) * x[0]]
        )
        np.testing.assert_allclose(learned.flow_map(0.0, h, x), turned, atol=0.1)
    # Its units are saved as well, and can be read in another precision.
    learned.save(tmp_path / "map.safetensors")
    given = 0.1, 0.9, x.astype(jnp.float32)
    with jax.enable_x64(False):
        loaded = LearnedSolver.load(tmp_path / "map.safetensors")
        ends = loaded.flow_map(*given), loaded.trained(*given)
    np.testing.assert_allclose(ends[0], learned.flow_map(*given), rtol=1e-5)
    np.testing.assert_allclose(ends[1], learned.trained(*given), rtol=1e-5)
    # The command knows its states, times and directions.
    line = [str(tmp_path / "map.safetensors"), "--num-points", "64", "--budget"]
    assert check_map([*line, "0.3"]) == 0 and check_map([*line, "1e-9"]) == 1
    fd.train.save(tmp_path / "other", {}, x)
    with pytest.raises(ValueError, match="not one of a learned solver"):
        LearnedSolver.load(tmp_path / "other")


# --- interruption ---------------------------------------------------------------------


def test_interrupted_and_resumed(learned, unmeasured, tmp_path, monkeypatch):
    settings = QUICK | dict(progress=True, run=tmp_path)
    stream = Interrupting("step 150")
    monkeypatch.setattr(sys, "stderr", stream)
    stopped = learn_solver(decay, draw, 0.0, 2.0, draw_args, **settings)
    assert any("stopped" in line for line in stream.lines)
    assert 150 <= stopped.history[-1]["step"] < 300
    before = len(stream.lines)
    resumed = learn_solver(decay, draw, 0.0, 2.0, draw_args, **settings)
    # Only the rest is trained, but its history is whole. Choices that depend on measured
    # seconds are not made again.
    again = "".join(stream.lines[before:])
    assert "step 15 of" not in again and "looking at" not in again
    assert "chosen before" in again and str(resumed.plan) == str(stopped.plan)
    assert len(resumed.history) == 20
    # As if it had never been stopped.
    given = 0.0, 1.0, jnp.asarray([1.0, 0.7]), jnp.asarray([1.2])
    assert (resumed.flow_map(*given) == learned.flow_map(*given)).all()
    with pytest.raises(ValueError, match=r"another problem.*\['t1'\]"):
        learn_solver(decay, draw, 0.0, 1.0, draw_args, **settings)
    with pytest.raises(ValueError, match=r"another problem.*\['rates'\]"):
        learn_solver(
            lambda *given: 2 * decay(*given), draw, 0.0, 2.0, draw_args, **settings
        )
    with pytest.raises(ValueError, match=r"\['num_steps'\]"):
        learn_solver(decay, draw, 0.0, 2.0, draw_args, **settings | dict(num_steps=9))
    for name in ("trajectories.npz", "problem.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged. Delete its folder"):
            learn_solver(decay, draw, 0.0, 2.0, draw_args, **settings)
        path.write_bytes(whole)


def test_interrupted_without_a_run(unmeasured, monkeypatch):
    # One start in twenty blows up.
    def field(t, x, args):
        return jnp.where(x > 1.9, x**3, -x)

    stream = Interrupting("step 150")
    monkeypatch.setattr(sys, "stderr", stream)
    x0 = jr.uniform(jr.key(0), (400, 1), minval=0.5, maxval=2.0)
    settings = QUICK | dict(progress=True, solver=diffrax.Tsit5())
    stopped = learn_solver(field, x0, 0.0, 1.0, **settings)
    assert 150 <= stopped.history[-1]["step"] < 300
    # The map with the least error so far.
    best = min(stopped.history, key=lambda row: row["error"])
    assert 0.2 < stopped.errors[0].median / best["median"] < 5
    assert 0 < stopped.num_dropped < 60
    assert any(f"dropped {stopped.num_dropped} of" in line for line in stream.lines)


def test_interrupted_in_the_comparison(learned, folder, monkeypatch):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_learned, "scan_tolerances", press)
    # The training is over, and not repeated.
    again = learn_solver(decay, draw, 0.0, 2.0, draw_args, run=folder, **QUICK)
    assert again.solves == () and {cost.solve for cost in again.costs} == {None}
    assert again.errors == learned.errors and "1 " in again.report()


# --- what is found out ----------------------------------------------------------------


def kinetics(t, x, args):
    """Stiff: a fast equilibrium, and a slow loss."""
    fast = 1e6 * (x[0] - x[1])
    return jnp.stack([-fast, fast - x[1], x[1]])


@pytest.mark.parametrize(
    "field, size, positive, stiff",
    [
        (lambda t, x, a: jnp.stack([x[1], -x[0]]), 2, [False, False], False),
        # The second is negative where the first is large.
        (lambda t, x, a: jnp.stack([-x[0], 1 - x[0]]), 2, [True, False], False),
        (kinetics, 3, [True, True, True], True),
    ],
)
def test_positive_and_stiff(field, size, positive, stiff):
    x0 = lambda key: jr.uniform(key, (size,), minval=0.1, maxval=3.0)
    facts = probe(make_problem(field, x0, 0.0, 5.0, None, False), jr.key(0))
    assert facts.is_positive.tolist() == positive
    assert facts.is_stiff is stiff and facts.is_autonomous


def test_growth_and_contraction():
    # x grows by exp(2), y shrinks by exp(-3): the singular values, in units of the
    # largest sizes, which for both are those of a square.
    field = lambda t, x, args: jnp.stack([x[1] + 0 * x[0], -x[0] + 0 * x[1]])
    x0 = lambda key: jr.uniform(key, (2,), minval=-1.0)
    facts = probe(make_problem(field, x0, 0.0, 1.0, None, False), jr.key(0))
    assert 0.7 < facts.contraction <= facts.growth < 1.4
    field = lambda t, x, args: jnp.asarray([2.0, -3.0]) * x
    facts = probe(make_problem(field, x0, 0.0, 1.0, None, False), jr.key(0))
    # In units of their largest sizes, which the first takes at the end.
    largest = facts.scale
    np.testing.assert_allclose(facts.growth, np.exp(2.0), rtol=1e-2)
    np.testing.assert_allclose(facts.contraction, np.exp(-3.0), rtol=2e-2)
    assert largest[0] > 3 and largest[1] <= 1


@pytest.mark.parametrize(
    "field, depends",
    [
        (lambda t, x, args: -x, False),
        (lambda t, x, args: -x * t, True),
        # A pulse that no look at a few times would find.
        (lambda t, x, args: jnp.where(jnp.abs(t - 0.1234) < 1e-9, x, -x), True),
        (lambda t, x, args: jax.jit(lambda t, x: -x)(t, x), False),
        (lambda t, x, args: jax.jit(lambda t, x: -x * t)(t, x), True),
        (lambda t, x, args: jnp.sin(t) * 0 + t - t + x, True),
        (lambda t, x, args: jax.lax.fori_loop(0, 3, lambda i, y: y * 0.5, x), False),
        (lambda t, x, args: jax.lax.fori_loop(0, 3, lambda i, y: y * t, x), True),
        (eqx.filter_jit(lambda t, x, args: x), False),
    ],
)
def test_depends_on_time(field, depends):
    problem = make_problem(field, lambda key: jr.normal(key, (2,)), 0.0, 1.0, None, False)
    assert depends_on_time(problem) is depends


def test_args_are_shared_or_one_for_each():
    x0 = jr.uniform(jr.key(0), (40, 2), minval=0.5)
    rates = jr.uniform(jr.key(1), (40, 1))
    shared = make_problem(decay, x0, 0.0, 1.0, rates[0], False)
    assert shared.args_size == 0
    each = make_problem(decay, x0, 0.0, 1.0, rates, True)
    x, args = each.draw(jr.key(2), 10)
    # Rows stay together.
    index = [int(np.argmin(np.abs(np.asarray(x0) - row).sum(1))) for row in x]
    np.testing.assert_allclose(args, rates[jnp.asarray(index)])
    assert len(set(index)) == 10
    # What is held out is never trained on.
    x, _ = each.draw(jr.key(2), 100)
    held_out, _ = each.draw(jr.key(2), 100, held_out=True)
    assert len(x) == 32 and len(held_out) == 8
    assert not set(map(tuple, x)) & set(map(tuple, held_out))


# --- what is refused ------------------------------------------------------------------


def unlike(t, x, args):
    return x[:1]


def not_finite(t, x, args):
    return jnp.log(x - 10)


def cast(t, x, args):
    return x.astype(jnp.float32)


def explode(t, x, args):
    return 1e3 * x**2


def sinking(t, x, args):
    return -2 - x


ROWS = np.ones((40, 2))
GIVEN = dict(vector_field=lambda t, x, a: -x, x0=ROWS, t0=0.0, t1=1.0)


@pytest.mark.parametrize(
    "changed, error, match",
    [
        (dict(vector_field=unlike), ValueError, r"`vector_field` must return the shape"),
        (dict(vector_field=cast), TypeError, r"`vector_field` must return the dtype"),
        (dict(vector_field=lambda x: x), TypeError, r"vector_field\(t, x, args\)"),
        (dict(vector_field=not_finite), ValueError, "must be finite; it is not at 32 of"),
        (dict(vector_field=explode), ValueError, "can solve this problem"),
        (dict(t1=0.0), ValueError, "`t0` must be less than `t1`"),
        (dict(t1=float("nan")), ValueError, "both finite"),
        (dict(t0=2e9, t1=2e9 + 100), ValueError, "`t0=0` and `t1=100`, and add 2000"),
        (dict(x0=np.full((40, 2), np.nan)), ValueError, "must be finite; 32 of 32"),
        (dict(x0=np.ones((1, 2))), ValueError, "1 initial states, which is too few"),
        (dict(x0=np.ones((40, 2), int)), TypeError, "int"),
        (dict(x0=np.ones((40, 2), complex)), TypeError, "`x0` must have real leaves"),
        (
            dict(
                vector_field=lambda t, x, a: -x * a.real,
                args=lambda k: jnp.ones(2, complex),
            ),
            TypeError,
            "`args` must have real leaves",
        ),
        (dict(x0=lambda: 1), TypeError, r"x0\(key\)"),
        (dict(args=None, args_per_example=True), ValueError, "needs `args`"),
        (dict(args=np.ones((3, 1)), args_per_example=True), ValueError, "each of the 40"),
        (dict(minutes=0), ValueError, "`minutes`"),
        (dict(solver="Tsit5"), TypeError, "solver"),
        (
            dict(is_positive=True, vector_field=lambda t, x, a: -1 - x),
            ValueError,
            "posit",
        ),
    ],
)
def test_bad_input(changed, error, match):
    with pytest.raises(error, match=match):
        learn_solver(**GIVEN | QUICK | changed)


@pytest.fixture(scope="module")
def facts():
    return probe(make_problem(*GIVEN.values(), None, False), jr.key(0))


@pytest.mark.parametrize(
    "changed, match",
    [
        (dict(form="other"), "must be one of"),
        (dict(form="relaxation", both_directions=True), "forward jumps"),
        (dict(ts=[0.0, 2.0]), "rise from `t0` = 0 to `t1` = 1"),
        (dict(invariants=np.ones((1, 3))), r"shape \(invariants, 2\)"),
        (dict(invariants=np.ones((1, 2))), r"`invariants\[0\]` is not conserved"),
        (dict(width=0), "`width`"),
        (dict(minutes=0.01, num_steps=None), "no time left to train"),
    ],
)
def test_bad_choices(facts, changed, match, monkeypatch):
    # They are refused after a look at the solutions.
    monkeypatch.setattr(_learn_solver, "probe", lambda *given: facts)
    with pytest.raises(ValueError, match=match):
        learn_solver(**GIVEN | QUICK | changed)


# --- awkward units --------------------------------------------------------------------


@pytest.mark.parametrize("centre, size", [(1e6, 1.0), (-300.0, 1e-3)])
def test_the_teacher_resolves_entries_that_vary_little(centre, size):
    def field(t, x, args):
        angle, speed = (x - centre) / size
        return size * jnp.stack([speed, -angle])

    draw = lambda key: centre + size * jr.uniform(key, (2,), minval=-1.0)
    facts = probe(make_problem(field, draw, 0.0, 3.0, None, False), jr.key(0))
    start, end = (facts.ys[:, [0, -1]].swapaxes(0, 1) - centre) / size
    exact = start @ np.asarray([[np.cos(3), -np.sin(3)], [np.sin(3), np.cos(3)]])
    np.testing.assert_allclose(end, exact, atol=1e-3)
    assert abs(facts.growth - 1) < 1e-3 and abs(facts.contraction - 1) < 1e-3


def test_entries_that_vary_little_or_not_at_all(unmeasured):
    def field(t, x, args):
        return jnp.stack([1e5 - x[0], 0 * x[1], 0 * x[2], -x[3]])

    def draw(key):
        near, other = jr.uniform(key, (2,), minval=0.5, maxval=1.5)
        return jnp.stack([1e5 + near, 1.5, 0.0, other])

    learned = learn_solver(field, draw, 0.0, 2.0, solver=diffrax.Tsit5(), **QUICK)
    assert learned.plan.is_positive.all()
    x = jax.vmap(draw)(jr.split(jr.key(9), 64))
    ends = jax.vmap(learned.flow_map, (None, None, 0))(0.0, 2.0, x)
    np.testing.assert_allclose(ends[:, 0] - 1e5, (x[:, 0] - 1e5) * np.exp(-2), atol=0.1)
    np.testing.assert_allclose(ends[:, 1:3] + 0 * x[:, 1:3], x[:, 1:3], atol=1e-4)
    # A map of 1e5 to 1e5 is no success: errors are in units of what varies.
    exact = np.full((4, 1), 1e5) + np.linspace(-1, 1, 4)[:, None]
    given = np.ones(1, bool), np.full(1, 1e5), np.ones(1)
    assert scaled_errors(np.full((4, 1), 1e5), exact, *given).max() > 0.05
    assert learned.errors[0].most < 0.1
