"""The training step and `fit`: falling loss, exact resumption, averages, divergence."""

import builtins
import itertools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import (
    OBJECTIVES,
    assert_close,
    linear_map,
    max_abs,
    without_type_checks,
)

import flowdiffrax as fd
from flowdiffrax._tree import all_finite

TEACHER = linear_map()
OPTIM, FAST, STILL = optax.adam(3e-3), optax.adam(1e-2), optax.sgd(0.0)


def small_map(seed=0, dtype=float, **kwargs):
    net = fd.nn.MLP(2, 16, 1, key=jr.key(seed), **kwargs)
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_array(leaf) else leaf
    return fd.FlowMap(jtu.tree_map(cast, net))


def batches(n=32, dtype=float):
    data = np.random.default_rng(0).standard_normal((200, 2)) + [1.0, -1.0]
    return fd.data.InterpolantBatches(fd.LinearInterpolant(), jnp.asarray(data, dtype), n)


def trajectories(n=32):
    ts = jnp.linspace(0.0, 1.0, 5)
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((100, 2)))
    ys = jnp.stack([jax.vmap(lambda x, t=t: TEACHER(0.0, t, x))(x0) for t in ts], axis=1)
    return fd.data.TrajectoryBatches(ts, ys, n)


def run(
    objective=fd.objectives.VelocityDistillation(), flow_map=None, source=None, **kwargs
):
    settings = {
        "num_steps": 4,
        "teacher": TEACHER.velocity,
        "key": jr.key(1),
        "progress": False,
        **kwargs,
    }
    optim = settings.pop("optim", OPTIM)
    return fd.train.fit(
        small_map() if flow_map is None else flow_map,
        objective,
        batches() if source is None else source,
        optim,
        **settings,
    )


def arrays(tree):
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def assert_equal(a, b):
    """Equal to the last bit."""
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for left, right in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(left, right)


LEARNING = {
    "flow-matching": (fd.FlowMatching(), None, batches),
    "lagrangian": (fd.LagrangianMapDistillation(), TEACHER.velocity, batches),
    "velocity": (fd.objectives.VelocityDistillation(), TEACHER.velocity, batches),
    "progressive": (fd.objectives.ProgressiveFlowMapMatching(), TEACHER, batches),
    "trajectory": (
        fd.TrajectoryMatching(times=fd.times.GridTimes(jnp.linspace(0.0, 1.0, 5))),
        None,
        trajectories,
    ),
    "roll-out": (
        fd.objectives.RollOutMatching(
            3, times=fd.times.GridTimes(jnp.linspace(0.0, 1.0, 5)), noise=0.01
        ),
        None,
        trajectories,
    ),
}


@pytest.mark.parametrize("name", LEARNING)
def test_loss_falls(name):
    objective, teacher, source = LEARNING[name]
    losses = []
    run(
        objective,
        source=source(64),
        teacher=teacher,
        num_steps=60,
        report_every=1,
        on_report=lambda state, report: losses.append(report["loss"]),
        optim=FAST,
    )
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    # Flow matching keeps its floor, the variance of the data's velocities.
    assert last < (0.9 if name == "flow-matching" else 0.5) * first


def test_one_compilation():
    counted = eqx.debug.assert_max_traces(lambda t, x, args: -x, max_traces=1)
    run(teacher=counted, num_steps=6, report_every=2)


def test_step_compiles_once():
    counted = eqx.debug.assert_max_traces(lambda t, x, args: -x, max_traces=1)
    step = fd.train.make_step(fd.objectives.VelocityDistillation(), OPTIM)
    state = fd.train.TrainState.create(small_map(), OPTIM, key=jr.key(0))
    source = batches()
    for _ in range(3):
        state, _ = step(state, source, counted)
    assert int(state.step) == int(state.opt_state[0].count) == 3


def test_resumed_run_is_the_unbroken_run(tmp_path):
    mixture = fd.objectives.Mixture(
        (fd.objectives.VelocityDistillation(), fd.FlowMatching()), (1.0, 1.0)
    )
    unbroken = run(mixture, num_steps=5)
    fd.train.save(tmp_path / "state", {}, run(mixture, num_steps=2))
    make = lambda config: fd.train.TrainState.create(small_map(9), OPTIM, key=jr.key(9))
    _, stopped = fd.train.load(tmp_path / "state", make)
    assert int(stopped.step) == 2
    assert_equal(run(mixture, flow_map=stopped, num_steps=5, key=None), unbroken)


def test_run_is_a_function_of_the_key():
    first, other = run(), run(key=jr.key(2))
    assert_equal(run(), first)
    weight = lambda state: state.flow_map.net.last.weight
    assert max_abs(weight(other) - weight(first)) > 0


def test_every_step_draws_anew():
    # Without learning, only the draws tell one step's loss from another's.
    losses = []
    run(
        optim=STILL,
        report_every=1,
        on_report=lambda state, report: losses.append(report["loss"]),
    )
    assert len(set(losses)) == 4


def test_finished_run_makes_no_step():
    state = run(num_steps=3)
    assert_equal(run(flow_map=state, num_steps=3, key=None), state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_any_kind_of_key(impl):
    assert int(run(num_steps=2, key=jr.key(0, impl=impl)).step) == 2


def test_callers_arrays_stay_alive():
    flow_map, key = small_map(), jr.key(3)
    state = run(flow_map=flow_map, key=key, num_steps=2)
    run(flow_map=state, key=None, num_steps=4)
    assert np.isfinite(max_abs(eqx.filter(flow_map, eqx.is_array)))
    assert np.isfinite(max_abs(eqx.filter(state.ema_map, eqx.is_array)))
    # The caller may start another run from the same key.
    with jax.debug_key_reuse(False):
        assert np.isfinite(jr.normal(key))


def test_float32_stays_float32():
    state = run(flow_map=small_map(dtype=jnp.float32), source=batches(8, jnp.float32))
    maps = (state.flow_map, state.ema_map)
    assert {leaf.dtype for leaf in arrays(maps)} == {jnp.dtype(jnp.float32)}


# --- moving average -----------------------------------------------------------------


def test_average_of_constant_weights():
    state = run(optim=STILL, num_steps=3, ema_decay=0.9)
    assert_close(state.ema_map.net.first.weight, small_map().net.first.weight, 1e-15)


@pytest.mark.parametrize(
    "ema_decay, decays", [(0.75, (1 / 10, 2 / 11, 1 / 4)), (0.15, (0.1, 0.15, 0.15))]
)
def test_average_by_hand(ema_decay, decays):
    # The average of the weights after each step; a young one forgets faster.
    weights = []
    state = run(
        num_steps=3,
        report_every=1,
        ema_decay=ema_decay,
        on_report=lambda state, report: weights.append(
            jnp.array(state.flow_map.net.last.bias)
        ),
    )
    average = small_map().net.last.bias
    for decay, new in zip(decays, weights, strict=True):
        average = decay * average + (1 - decay) * new
    assert_close(state.ema_map.net.last.bias, average)


def test_no_decay_is_the_last_weights():
    state = run(ema_decay=0.0)
    assert_close(state.ema_map.net.last.weight, state.flow_map.net.last.weight)


def test_several_averages():
    both = run(ema_decay=(0.75, 0.15))
    for average, decay in zip(both.ema_maps, (0.75, 0.15), strict=True):
        alone = run(ema_decay=decay).ema_map
        assert_close(arrays(average), arrays(alone))
    assert_equal(both.ema_map, both.ema_maps[0])


def test_averages_of_bfloat16_weights_move():
    # A thousandth of the way a step, which bfloat16 near 1 cannot take.
    flow_map = small_map(dtype=jnp.bfloat16)
    bias = lambda state: state.flow_map.net.last.bias
    create = fd.train.TrainState.create
    state = create(flow_map, optax.sgd(0.0), key=jr.key(0), teacher_decay=0.999)
    averages = lambda s: [
        s.averages[0].net.last.bias, s.teacher_average.net.last.bias
    ]  # fmt: skip
    ones = [jnp.ones(2, jnp.float32) for _ in range(2)]
    state = eqx.tree_at(averages, state, ones)
    moved = lambda s: (s.step, bias(s))
    state = eqx.tree_at(moved, state, (jnp.asarray(10**6), jnp.full(2, 2, jnp.bfloat16)))
    step = fd.train.make_step(
        fd.FlowMatching(), optax.sgd(0.0), ema_decay=0.999, teacher_decay=0.999
    )
    for _ in range(40):
        state, _ = step(state, batches(2, jnp.bfloat16))
    expected = 2 - 0.999**40
    for average in averages(state):
        np.testing.assert_allclose(average, expected, rtol=1e-5)
    # What is sampled has the precision of the map.
    assert state.ema_map.net.last.bias.dtype == jnp.bfloat16
    assert state.teacher_map.net.last.bias.dtype == jnp.bfloat16
    assert state.ema_map(0.0, 1.0, jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_grid_of_consistency_training_grows():
    grid = fd.times.doubling_schedule(4, 2, 8)
    objective = fd.objectives.Scheduled(
        lambda step: fd.objectives.ConsistencyTraining(
            fd.times.KarrasNeighbours(grid(step))
        )
    )
    state = run(objective, teacher=None)
    assert int(state.step) == 4 and int(state.skipped) == 0
    sizes = []
    for step in range(4):
        s, _ = objective.at(jnp.asarray(step)).times(jr.key(0), 200)
        sizes.append(len(set(np.asarray(s).round(12))))
    assert sizes == [2, 4, 8, 8]


# --- accumulation -------------------------------------------------------------------


def test_accumulating_the_same_batch_changes_nothing():
    # One pair of times, and a batch that no key changes.
    objective = fd.LagrangianMapDistillation(times=fd.times.GridTimes([0.0, 1.0]))
    paths = batches(8)(jr.key(5))
    once, thrice = (
        run(objective, source=lambda key: paths, accumulate=number) for number in (1, 3)
    )
    assert_close(arrays(thrice.flow_map), arrays(once.flow_map), 1e-12, 1e-12)


class Fixed(eqx.Module):
    """The same rows at every step."""

    x0: jax.Array
    x1: jax.Array

    def __call__(self, key):
        return jax.vmap(fd.LinearInterpolant())(self.x0, self.x1), None


@pytest.mark.parametrize(
    "size, number", [(5, 3), (1, 4), pytest.param(6, 2, marks=pytest.mark.slow)]
)
def test_accumulated_parts_are_one_batch(size, number):
    # Shares that no part of the batch can hold alone, and splits that are drawn.
    shares = 0.25, 0.75
    objective = fd.LagrangianSelfDistillation(
        fd.times.Stratified(fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.6))
    )
    if size > 1:
        drawn = fd.objectives.ProgressiveSelfDistillation(split=None)
        objective = fd.objectives.Mixture((drawn, objective), shares, (0.3, 2.0))
    x0, x1 = jr.normal(jr.key(8), (2, size * number, 2))
    # Row `r` of the whole is in part `r % number`.
    parts = tuple(Fixed(x0[i::number], x1[i::number]) for i in range(number))
    optim, states, losses = optax.sgd(0.1), [], []
    for source, accumulate in ((Fixed(x0, x1), 1), (parts, number)):
        step = fd.train.make_step(objective, optim, accumulate=accumulate)
        state = fd.train.TrainState.create(small_map(), optim, key=jr.key(0))
        state, _ = step(state, source)
        state, info = step(state, source)
        states.append(arrays(state.flow_map))
        losses.append({"loss": info.loss, "norm": info.grad_norm, **info.terms})
    assert_close(losses[1], losses[0], 1e-12, 1e-12)
    assert_close(states[1], states[0], 1e-12, 1e-12)


def test_nothing_need_be_skipped():
    assert int(run(fd.FlowMatching(), num_steps=1, max_skipped=0).step) == 1


def test_batch_of_one_is_refused_where_two_parts_are_needed():
    for objective in (
        fd.objectives.MeanFlow(),
        fd.objectives.ImprovedMeanFlow(),
        fd.objectives.AlphaFlow(),
    ):
        with pytest.raises(ValueError, match="A batch of 1 has no room"):
            run(objective, source=batches(1), num_steps=1)


def test_accumulated_batches_are_others():
    def spread(accumulate):
        losses = []
        run(
            source=batches(4),
            optim=STILL,
            num_steps=60,
            accumulate=accumulate,
            report_every=1,
            on_report=lambda state, report: losses.append(report["loss"]),
        )
        return np.std(losses)

    # Of the mean of sixteen, a fourth; 60 draws of each know it to 13 %.
    assert 2.4 < spread(1) / spread(16) < 6.5


# --- step ---------------------------------------------------------------------------


def test_sgd_step_by_hand():
    optim = optax.sgd(0.1)
    state = fd.train.TrainState.create(small_map(), optim, key=jr.key(0), ema_decay=0.9)
    paths, args = batches(8)(jr.key(5))
    objective = fd.objectives.VelocityDistillation()
    step = eqx.filter_jit(fd.train.update)
    new, info = step(
        state,
        objective,
        optim,
        TEACHER.velocity,
        paths,
        args,
        key=jr.key(6),
        ema_decay=0.9,
    )
    loss = eqx.filter_jit(
        lambda flow_map: fd.objectives.batch_loss(
            objective, flow_map, TEACHER.velocity, paths, args, key=jr.key(6)
        )[0]
    )
    grads = eqx.filter_grad(loss)(small_map())
    expected = small_map().net.last.bias - 0.1 * grads.net.last.bias
    assert_close(new.flow_map.net.last.bias, expected)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in arrays(grads)))
    assert_close(info.grad_norm, norm)
    assert_close(info.loss, loss(small_map()))


def nan_late(t, x, args):
    # Not finite as soon as any weight has moved, by way of a step-dependent trigger.
    return x * jnp.nan


def test_bad_step_is_skipped():
    state = run(num_steps=2)
    before = jtu.tree_map(lambda leaf: np.array(leaf), eqx.filter(state, eqx.is_array))
    step = fd.train.make_step(fd.objectives.VelocityDistillation(), OPTIM)
    new, info = step(state, batches(), nan_late)
    assert not bool(info.is_finite)
    assert (int(new.step), int(new.skipped)) == (3, 1)
    assert_equal(eqx.filter(new.flow_map, eqx.is_array), before.flow_map)
    assert_equal(eqx.filter(new.ema_map, eqx.is_array), before.ema_map)
    assert_equal(eqx.filter(new.opt_state, eqx.is_array), before.opt_state)


class SquareRoot(eqx.Module):
    """A net whose value is finite at zero, and whose derivative is not."""

    weight: jax.Array

    def __call__(self, s, t, x, args):
        return jnp.sqrt(jnp.abs(self.weight)) * x


def test_gradient_that_is_not_finite():
    flow_map = fd.FlowMap(SquareRoot(jnp.asarray(0.0)))
    with pytest.raises(fd.train.TrainingDiverged, match="gradient"):
        run(flow_map=flow_map, num_steps=1)


def test_check_for_finite_costs_as_much_a_leaf_however_many():
    # XLA used to copy the check of all leaves into the update of each one.
    def keep(leaves):
        is_finite = all_finite(leaves)
        return [jnp.where(is_finite, leaf, 0.0) for leaf in leaves]

    def length(num_leaves):
        lowered = jax.jit(keep).lower([jnp.ones(4)] * num_leaves)
        return lowered.compile().as_text().count("\n")

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert length(40) < 2.5 * length(20)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_divergence_carries_the_state():
    with pytest.raises(
        fd.train.TrainingDiverged, match="not finite in 2 of the last 2"
    ) as caught:
        run(teacher=nan_late, num_steps=4, report_every=2)
    assert_close(
        caught.value.state.flow_map.net.first.weight, small_map().net.first.weight
    )


# --- fit ----------------------------------------------------------------------------


def test_report():
    reports = []
    mixture = fd.objectives.Mixture(
        (fd.objectives.VelocityDistillation(), fd.FlowMatching()), (1.0, 1.0)
    )
    run(
        mixture,
        num_steps=5,
        report_every=2,
        on_report=lambda state, report: reports.append((int(state.step), report)),
    )
    assert [step for step, _ in reports] == [2, 4, 5]
    for step, report in reports:
        names = {"step", "loss", "grad_norm", "skipped", "seconds"}
        names |= {"examples_per_second"}
        assert set(report) == names | {"VelocityDistillation", "FlowMatching"}
        assert report["step"] == step
        half = (report["VelocityDistillation"] + report["FlowMatching"]) / 2
        np.testing.assert_allclose(report["loss"], half)
        assert all(isinstance(value, int | float) for value in report.values())


def test_report_of_the_time(monkeypatch):
    # A clock that goes on by one whenever it is read: at the start, when the steps begin,
    # and at each report, whose own time does not count as time of steps.
    clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("flowdiffrax.train._fit.time", clock)
    reports = []
    run(
        num_steps=3,
        source=batches(8),
        accumulate=5,
        report_every=2,
        on_report=lambda state, report: reports.append(report),
    )
    assert [report["seconds"] for report in reports] == [2, 4]
    assert [report["examples_per_second"] for report in reports] == [2 * 8 * 5, 8 * 5]


@pytest.mark.parametrize(
    "every, most, counts, ends",
    [
        (10, 3, [(10, 3), (20, 3)], False),
        (10, 3, [(10, 3), (20, 4)], True),
        (1, 100, [(1, 1)], True),  # no good step at all
        (1, 100, [(1, 0), (2, 1), (3, 2)], False),
        (2, 100, [(2, 1), (4, 3)], True),  # none since the last report
        (5, 100, [(5, 0), (6, 1)], False),  # the last report, of one step
        (5, 0, [(5, 0)], False),
        (5, 0, [(5, 1)], True),
    ],
)
def test_when_a_run_has_diverged(every, most, counts, ends):
    from flowdiffrax.train._fit import _Reports

    state = fd.train.TrainState.create(small_map(), OPTIM, key=jr.key(0))
    reports = _Reports(state, every, most, 1)
    made = [{"step": a, "skipped": b, "loss": 1.0, "grad_norm": 1.0} for a, b in counts]
    for report in made[:-1]:
        reports.check(state, report)
    if not ends:
        return reports.check(state, made[-1])
    with pytest.raises(fd.train.TrainingDiverged, match="not finite in") as error:
        reports.check(state, made[-1])
    assert error.value.state is state


def test_conditions_are_learned():
    # The data lie where their label says: a map without labels could not tell.
    labels = jnp.asarray([[-1.0], [1.0]]).repeat(50, axis=0)
    source = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), labels * jnp.ones((1, 2)), 64, args=labels
    )
    flow_map = small_map(args_size=1)
    state = run(
        fd.FlowMatching(), flow_map, source, num_steps=80, teacher=None, ema_decay=0.0,
        optim=FAST,
    )  # fmt: skip
    velocity = lambda label: state.ema_map.velocity(
        0.3, jnp.zeros(2), jnp.asarray([label])
    )
    assert (velocity(1.0) > 0.5).all() and (velocity(-1.0) < -0.5).all()


def test_fit_without_tqdm(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert int(run(num_steps=2, progress=True).step) == 2


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    run(num_steps=2, progress=True, report_every=1)
    assert "2/2" in capsys.readouterr().err


# --- schedules, learned weights, averages as teachers --------------------------------


def test_schedule_is_a_function_of_the_step():
    seen = []

    class Seen(fd.objectives.AbstractObjective):
        value: jax.Array
        times: fd.times.AbstractTimes = fd.times.Diagonal()
        weight: fd.weights.AbstractWeight = fd.weights.NoWeight()

        def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None):
            return self.value + 0 * fd.FlowMatching()(flow_map, None, path, s, t)

    objective = fd.objectives.Scheduled(lambda step: Seen(2.0 * step.astype(float)))
    run(
        objective, report_every=1, on_report=lambda _, report: seen.append(report["loss"])
    )
    assert seen == [0, 2, 4, 6]


def test_scheduled_gap_compiles_once():
    rise = optax.linear_schedule(0.1, 1.0, 4)

    def objective(step):
        with jax.numpy_dtype_promotion("standard"):
            gap = rise(step)
        return fd.objectives.FlowMapMatching(fd.times.UniformSquare(max_gap=gap))

    counted = eqx.debug.assert_max_traces(objective, max_traces=2)
    state = run(fd.objectives.Scheduled(counted), num_steps=4)
    assert int(state.step) == 4


def learned_objective():
    return fd.objectives.Mixture(
        (
            fd.FlowMatching(weight=fd.weights.LearnedWeight(4)),
            fd.FlowMatching(weight=fd.weights.LearnedWeight(3)),
        ),
        (3.0, 1.0),
    )


@pytest.mark.slow
def test_learned_weights_are_trained_and_saved(tmp_path):
    objective = learned_objective()
    state = run(objective, teacher=None, num_steps=6)
    assert [w.coefficients.shape[-1] for w in state.learned] == [4, 3]
    assert all(max_abs(w) > 1e-4 for w in state.learned)
    fd.train.save(tmp_path / "state.safetensors", None, state)
    like = lambda _: fd.train.TrainState.create(
        small_map(), OPTIM, key=jr.key(1), objective=objective
    )
    _, loaded = fd.train.load(tmp_path / "state.safetensors", like)
    again = run(objective, flow_map=loaded, teacher=None, num_steps=8)
    assert_equal(arrays(again), arrays(run(objective, teacher=None, num_steps=8)))


def test_teacher_is_an_average_of_the_map():
    # After one step the average with decay d has moved 1 - d of the way, or 9/10.
    before = arrays(small_map())
    for decay, moved in ((0.99, 0.9), (0.04, 0.96)):
        state = run(
            fd.objectives.ProgressiveSelfDistillation(),
            teacher=None,
            num_steps=1,
            teacher_decay=decay,
        )
        new, average = arrays(state.flow_map), arrays(state.teacher_map)
        for old, end, mean in zip(before, new, average, strict=True):
            np.testing.assert_allclose(mean, old + moved * (end - old), atol=1e-12)


def test_teacher_is_seen_by_the_objective():
    class Teacher(fd.objectives.AbstractObjective):
        times: fd.times.AbstractTimes = fd.times.Diagonal()
        weight: fd.weights.AbstractWeight = fd.weights.NoWeight()

        def __call__(self, flow_map, teacher, path, s, t, args=None, *, key=None):
            gap = teacher.net.last.bias - flow_map.net.last.bias
            return jnp.sum(gap**2) + fd.FlowMatching()(flow_map, None, path, s, t)

    losses = []
    run(
        fd.objectives.Mixture((Teacher(), fd.FlowMatching()), (1.0, 1.0)),
        teacher=None,
        teacher_decay=0.9,
        report_every=1,
        on_report=lambda _, report: losses.append(report["Teacher"]),
    )
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_distillation_without_data():
    draw = lambda key, n: jr.normal(key, (n, 2))
    for states in (draw, jr.normal(jr.key(0), (50, 2))):
        source = fd.data.StateBatches(states, 16)
        state = run(fd.objectives.free_flow(), source=source)
        assert np.isfinite(max_abs(eqx.filter(state.flow_map, eqx.is_array)))


# --- every objective ----------------------------------------------------------------


def test_every_objective_is_listed():
    names = {
        name
        for name in dir(fd.objectives)
        if isinstance(getattr(fd.objectives, name), type)
        and issubclass(getattr(fd.objectives, name), fd.objectives.AbstractObjective)
        and not name.startswith("Abstract")
    }
    assert names == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_in_float32(name):
    # A step of the default batch, whose gradient reaches every weight.
    teacher = {"velocity": TEACHER.velocity, "map": TEACHER, None: None}[OBJECTIVES[name]]
    objective = getattr(fd.objectives, name)()
    source = batches(dtype=jnp.float32)
    if name in ("TrajectoryMatching", "RollOutMatching"):
        cast = lambda leaf: leaf.astype(jnp.float32)
        source = jtu.tree_map(cast, trajectories())
    flow_map = small_map(dtype=jnp.float32)
    # The last layer starts at zero, and would keep the others from having a gradient.
    last = lambda m: (m.net.last.weight, m.net.last.bias)
    flow_map = eqx.tree_at(last, flow_map, replace_fn=lambda w: w + 0.1)
    state = fd.train.TrainState.create(flow_map, optax.sgd(0.1), key=jr.key(0))
    new, info = fd.train.make_step(objective, optax.sgd(0.1))(state, source, teacher)
    assert bool(info.is_finite) and info.loss.dtype == jnp.float32
    for old, moved in zip(arrays(flow_map), arrays(new.flow_map), strict=True):
        assert old.dtype == moved.dtype and np.any(old != moved)


def test_network_scale_from_data():
    # A NumPy or JAX scalar would break the cache of compiled steps.
    for scale in (np.std([1.0, 2.0]), jnp.asarray(0.5)):
        with without_type_checks():
            assert type(fd.nn.MLP(2, 8, 1, scale=scale, key=jr.key(0)).scale) is float


# --- refusals ---------------------------------------------------------------------------


def make_step(objective=fd.FlowMatching(), **settings):
    return fd.train.make_step(objective, OPTIM, **settings)


def step_of_a_plain_state(objective, **settings):
    state = fd.train.TrainState.create(small_map(), OPTIM, key=jr.key(1))
    return make_step(objective, **settings)(state, batches())


REFUSALS = {
    "negative decay": (
        lambda: make_step(ema_decay=-0.1),
        ValueError,
        "`ema_decay` must be in",
    ),
    "decay of one": (
        lambda: make_step(ema_decay=(0.9, 1.0)),
        ValueError,
        "`ema_decay` must be in",
    ),
    "no decay": (lambda: run(ema_decay=()), ValueError, "a decay or more"),
    "no batches": (lambda: make_step(accumulate=0), ValueError, "at least 1; got 0"),
    "part of a batch": (
        lambda: make_step(accumulate=1.5),
        TypeError,
        "an integer; got 1.5",
    ),
    "batches for other parts": (
        lambda: run(source=(batches(), batches()), accumulate=3),
        ValueError,
        "must be one function or 3; got 2",
    ),
    "no steps": (lambda: run(num_steps=0), ValueError, "`num_steps` must be at least 1"),
    "no reports": (
        lambda: run(report_every=0),
        ValueError,
        "`report_every` must be at least 1",
    ),
    "fewer than no skipped steps": (
        lambda: run(max_skipped=-1),
        ValueError,
        "`max_skipped` must be at least 0",
    ),
    "no devices": (lambda: run(parallel=3), TypeError, "`train.DataParallel` or `None`"),
    "conditions of other rows": (
        lambda: run(source=lambda key: (batches(8)(key)[0], jnp.zeros(7))),
        ValueError,
        "one common leading axis",
    ),
    "no pair": (
        lambda: run(source=lambda key: jnp.ones((4, 2))),
        TypeError,
        "must return a pair",
    ),
    "no paths": (
        lambda: run(source=lambda key: (jnp.ones((4, 2)), None)),
        TypeError,
        "must return a pair",
    ),
    "names that a report has": (
        lambda: run(on_report=lambda state, report: {"loss": 0.0}),
        ValueError,
        r"returned \['loss'\], which a report has already",
    ),
    "state with other averages": (
        lambda: run(
            flow_map=fd.train.TrainState.create(small_map(), OPTIM, key=jr.key(0)),
            ema_decay=(0.9, 0.99),
        ),
        ValueError,
        r"`ema_decay` differs: \(0.9, 0.99\) in .* \(0.999,\) in .*ema_decay=ema_decay\)",
    ),
    "state with another kind of average": (
        lambda: run(
            flow_map=fd.train.TrainState.create(small_map(), OPTIM, key=jr.key(0)),
            ema_decay=fd.train.PowerAverage(0.1),
        ),
        ValueError,
        r"`ema_decay` differs: \(PowerAverage\(sigma_rel=0.1\),\) in the step",
    ),
    "state without learned weights": (
        lambda: step_of_a_plain_state(learned_objective()),
        ValueError,
        "2 learned weights in the step, and 0 learned weights in the state",
    ),
    "state without the average that teaches": (
        lambda: step_of_a_plain_state(fd.objectives.Shortcut(), teacher_decay=0.9),
        ValueError,
        "`teacher_decay` differs: 0.9 in the step, and None in the state",
    ),
    "two teachers": (
        lambda: run(teacher_decay=0.9),
        ValueError,
        "another one was given",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, error, match = REFUSALS[name]
    with without_type_checks(), pytest.raises(error, match=match):
        make()
