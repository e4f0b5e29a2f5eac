"""Batches of images, drawn on the device or streamed from the host."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import assert_close, without_type_checks
from jax.flatten_util import ravel_pytree
from scipy import stats

import flowdiffrax as fd
from flowdiffrax.data._stream import _order

# --- scaling --------------------------------------------------------------------------


def test_scaling():
    x = fd.images.from_uint8(np.asarray([0, 51, 255], np.uint8))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, [-1, -0.6, 1], atol=1e-7)


def test_scaling_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    there_and_back = fd.images.to_uint8(fd.images.from_uint8(values))
    np.testing.assert_array_equal(there_and_back, values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_values_beyond_the_range_are_clipped(dtype):
    x = jnp.asarray([-7.0, -1.0, 0.003, 1.0, 1e30], dtype)
    assert fd.images.to_uint8(x).tolist() == [0, 0, 128, 255, 255]


def test_scaling_what_is_scaled_already():
    with without_type_checks(), pytest.raises(TypeError, match="scales uint8; got float"):
        fd.images.from_uint8(jnp.ones(3))


# --- on the device --------------------------------------------------------------------


def labelled(number=7, height=4, width=3, channels=2):
    """Images that tell their label, and where in the image each value stands."""
    place = np.arange(height * width * channels).reshape(1, height, width, channels)
    images = (place + 30 * np.arange(number)[:, None, None, None]).astype(np.uint8)
    return fd.images.Images(images, np.arange(number))


def test_images_come_with_their_labels():
    images = labelled()
    points, labels = fd.images.DeviceImages(images)(jr.key(0), 50)
    assert points.shape == (50, 4, 3, 2) and points.dtype == jnp.float32
    assert set(np.asarray(labels)) == set(range(7))
    expected = images.images[np.asarray(labels)] / np.float32(127.5) - 1
    assert_close(points, expected, 1e-6)


def test_flips_mirror_left_and_right():
    images = labelled()
    draw = fd.images.DeviceImages(images, flip=True)
    points, labels = draw(jr.key(0), 4000)
    rows = images.images[np.asarray(labels)]
    values = np.asarray(fd.images.to_uint8(points))
    kept = (values == rows).all((1, 2, 3))
    mirrored = (values == rows[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    # 4,000 fair coins: four standard errors.
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    plain, plain_labels = fd.images.DeviceImages(images)(jr.key(0), 4000)
    assert_close(plain_labels, labels)
    assert_close(plain[kept], points[kept])


def test_images_without_labels():
    images = fd.images.Images(labelled().images)
    points, labels = fd.images.DeviceImages(images)(jr.key(0), 5)
    assert labels is None and points.shape[0] == 5


def test_all_images_in_order():
    images = labelled()
    source = fd.images.DeviceImages(images.images, images.labels, draw=False)
    points, labels = source(jr.key(0), 7)
    assert_close(labels, jnp.arange(7, dtype=jnp.int32))
    assert_close(fd.images.to_uint8(points), images.images)
    with pytest.raises(ValueError, match="all 7 images; got `batch_size` 6"):
        source(jr.key(0), 6)


def test_images_stay_small_on_the_device():
    images = labelled()
    batches = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), fd.images.DeviceImages(images), 8
    )
    arrays = jax.tree_util.tree_leaves(eqx.filter(batches, eqx.is_array))
    assert sum(array.nbytes for array in arrays) == images.images.nbytes + 4 * 7


@pytest.mark.parametrize(
    "images, labels, error, match",
    [
        (np.zeros((2, 3, 3, 1)), None, TypeError, "must be of dtype uint8; got float64"),
        (np.zeros((2, 3, 3), np.uint8), None, ValueError, r"got \(2, 3, 3\)"),
        (np.zeros((0, 3, 3, 1), np.uint8), None, ValueError, "not be empty"),
        (np.zeros((2, 3, 32, 32), np.uint8), None, ValueError, "its channels last"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2), TypeError, "must be integers"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int), ValueError, "one label"),
        (labelled(), np.zeros(7, int), ValueError, "do not pass `labels`"),
    ],
)
def test_what_is_no_image(images, labels, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        fd.images.DeviceImages(images, labels)


# --- paths ----------------------------------------------------------------------------


def on_device(batch, flip=True):
    return fd.images.DeviceImages(*batch, flip=flip, draw=False)


def batches_of(source, batch_size=6):
    return fd.data.InterpolantBatches(fd.LinearInterpolant(), source, batch_size)


def test_paths_of_images():
    images = labelled()
    paths, labels = batches_of(fd.images.DeviceImages(images))(jr.key(0))
    assert paths.x0.shape == paths.x1.shape == (6, 4, 3, 2)
    assert paths.x0.dtype == paths.x1.dtype == jnp.float32
    rows = images.images[np.asarray(labels)]
    np.testing.assert_array_equal(fd.images.to_uint8(paths.x1), rows)


def test_batches_are_a_function_of_seed_and_step():
    batches = batches_of(fd.images.DeviceImages(fd.images.digits()), 64)
    draw = lambda seed, step: batches(jr.fold_in(jr.key(seed), step))
    assert_close(draw(0, 5)[0].x1, draw(0, 5)[0].x1)
    for seed, step in [(0, 6), (1, 5)]:
        assert bool((draw(seed, step)[0].x1 != draw(0, 5)[0].x1).any())


def test_batches_under_jit():
    batches = batches_of(fd.images.DeviceImages(labelled(), flip=True))
    paths, labels = eqx.filter_jit(lambda batches, key: batches(key))(batches, jr.key(3))
    expected = batches(jr.key(3))
    assert_close(labels, expected[1])
    assert_close(paths.x1, expected[0].x1, 1e-6)


def test_labels_reach_couplings_and_dropout():
    source = fd.images.DeviceImages(labelled())
    coupled = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), source, 6, coupling=fd.paths.OptimalTransportCoupling()
    )
    dropped = fd.data.ConditionDropout(coupled, null=7, rate=1.0)
    _, labels = dropped(jr.key(0))
    assert labels.tolist() == [7] * 6


def test_points_of_a_function_with_conditions():
    def draw(key, batch_size):
        x1 = {"a": jr.normal(key, (batch_size, 2))}
        return fd.data.ConditionedPoints(x1, x1["a"] ** 2)

    paths, args = batches_of(draw)(jr.key(0))
    assert_close(args, paths.x1["a"] ** 2)


def test_a_pair_of_points_is_no_condition():
    draw = lambda key, batch_size: (jnp.ones((batch_size, 2)), jnp.zeros((batch_size,)))
    paths, args = batches_of(draw)(jr.key(0))
    assert args is None and paths.x0[1].shape == (6,)


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, s, t, x, label):
        given = jnp.stack([s, t, label.astype(x.dtype)]).astype(x.dtype)
        return self.mlp(jnp.concatenate([x.ravel(), given])).reshape(x.shape)


def image_map(size=24):
    mlp = eqx.nn.MLP(size + 3, size, 16, 1, key=jr.key(0), dtype=jnp.float32)
    return fd.FlowMap(Net(mlp))


def test_training_on_images():
    settings = {"num_steps": 40, "progress": False, "report_every": 40}
    losses = []
    fd.train.fit(
        image_map(),
        fd.FlowMatching(),
        batches_of(fd.images.DeviceImages(labelled(), flip=True), 64),
        optax.adam(1e-2),
        key=jr.key(1),
        on_report=lambda state, report: losses.append(report["loss"]),
        **settings,
    )
    # The velocity of an untrained map is near 0, and its loss that of predicting 0.
    paths, _ = batches_of(fd.images.DeviceImages(labelled()), 512)(jr.key(2))
    untrained = float(jnp.mean(jnp.sum((paths.x1 - paths.x0) ** 2, (1, 2, 3))))
    assert losses[-1] < 0.8 * untrained


def train_on_stream(images, num_steps, state, step):
    start = int(state.step)
    batches = fd.data.stream(images, 4, seed=3, start=start)
    for _, batch in zip(range(start, num_steps), batches, strict=False):
        state, _ = step(state, batches_of(on_device(batch), 4))
    return state


def test_training_on_a_stream_compiles_once_and_resumes():
    objective, optim = fd.FlowMatching(), optax.adam(1e-3)
    step = fd.train.make_step(objective, optim)
    create = lambda: fd.train.TrainState.create(image_map(), optim, key=jr.key(1))
    unbroken = train_on_stream(labelled(), 6, create(), step)
    broken = train_on_stream(labelled(), 2, create(), step)
    broken = train_on_stream(labelled(), 6, broken, step)
    assert int(unbroken.step) == 6
    weights = lambda state: ravel_pytree(eqx.filter(state.flow_map, eqx.is_array))[0]
    assert_close(weights(broken), weights(unbroken), 0, 0)


def fit_to_stream(num_steps, *, batch_size=4, begun=None, **settings):
    """The same run by `fit`, from a stream of its own."""
    make = lambda batch: batches_of(on_device(batch), batch_size)
    traced = []
    settings = {"num_threads": 2} | settings
    accumulate = settings.pop("accumulate", 1)
    batches = fd.data.StreamBatches(labelled(), batch_size, make, seed=3, **settings)

    class Counted(fd.FlowMatching):
        def on_diagonal(self, *args, **kwargs):
            traced.append(1)
            return super().on_diagonal(*args, **kwargs)

    state = fd.train.fit(
        image_map() if begun is None else begun,
        Counted(),
        batches,
        optax.adam(1e-3),
        num_steps=num_steps,
        key=jr.key(1),
        accumulate=accumulate,
        progress=False,
        report_every=num_steps,
    )
    return ravel_pytree(eqx.filter(state.flow_map, eqx.is_array))[0], state, len(traced)


def test_fit_on_a_stream():
    optim = optax.adam(1e-3)
    step = fd.train.make_step(fd.FlowMatching(), optim)
    state = fd.train.TrainState.create(image_map(), optim, key=jr.key(1))
    by_hand = train_on_stream(labelled(), 6, state, step)
    weights, _, traces = fit_to_stream(6)
    assert_close(
        weights, ravel_pytree(eqx.filter(by_hand.flow_map, eqx.is_array))[0], 0, 0
    )
    assert traces == 1
    _, begun, _ = fit_to_stream(2)
    assert_close(fit_to_stream(6, begun=begun)[0], weights, 0, 0)


def test_batches_of_a_stream_are_placed():
    placed = []

    def place(arrays):
        placed.append(arrays)
        return jax.device_put(arrays)

    batches = fd.data.StreamBatches(labelled(), 4, lambda batch: batch, num_threads=2)
    batch = next(batches.each_step(0, place=place))
    for made, given in zip(batch, placed[0], strict=True):
        np.testing.assert_array_equal(made, given)


def test_accumulated_stream_gives_each_batch_once():
    # Each of the two parts of a step sees images of its own: all seven in three steps of
    # two, were one batch seen twice, would not have their turn.
    seen = []

    def make(batch):
        seen.append(np.asarray(batch[1]))
        return batches_of(on_device(batch), 1)

    batches = fd.data.StreamBatches(labelled(), 1, make, seed=3)
    steps = batches.each_step(2, accumulate=2)
    pairs = [next(steps) for _ in range(3)]
    assert all(len(pair) == 2 for pair in pairs)
    expected = first(fd.data.stream(labelled(), 1, seed=3, start=4), 6)
    np.testing.assert_array_equal(np.stack(seen[:6]), expected)
    found = [[one.data.labels[0] for one in pair] for pair in pairs]
    np.testing.assert_array_equal(np.ravel(found), np.ravel(expected))


def test_accumulated_stream_trains_like_one_batch():
    # No randomness, so that only the split of the batch differs.
    base = lambda key, x1: jnp.zeros_like(x1)
    objective = fd.LagrangianMapDistillation(times=fd.times.GridTimes([0.0, 1.0]))

    def weights(batch_size, accumulate):
        interpolant = fd.LinearInterpolant()
        make = lambda batch: fd.data.InterpolantBatches(
            interpolant, on_device(batch, flip=False), batch_size, base=base
        )
        batches = fd.data.StreamBatches(labelled(), batch_size, make, seed=3)
        state = fd.train.fit(
            image_map(),
            objective,
            batches,
            optax.sgd(0.1),
            num_steps=2,
            teacher=lambda t, x, args: -x,
            key=jr.key(1),
            accumulate=accumulate,
            progress=False,
        )
        return ravel_pytree(eqx.filter(state.flow_map, eqx.is_array))[0]

    assert_close(weights(2, 3), weights(6, 1), 1e-6, 1e-6)


@pytest.mark.parametrize(
    "images, batch_size, make, error, match",
    [
        (labelled(), 4, None, TypeError, "`make` must be"),
        (labelled(), 0, len, ValueError, "`batch_size` must be at least 1"),
        ("images", 4, len, TypeError, "arrays, memory maps, .* got str"),
    ],
)
def test_bad_stream_batches(images, batch_size, make, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        fd.data.StreamBatches(images, batch_size, make)


# --- streams --------------------------------------------------------------------------


def first(batches, number):
    """The labels of the first batches of a stream."""
    return np.stack([next(batches)[1] for _ in range(number)])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 23])
def test_every_image_once_an_epoch(batch_size):
    images = labelled()
    number = -(-21 // batch_size)
    seen = first(fd.data.stream(images, batch_size), number).ravel()[:21].reshape(3, 7)
    assert (np.sort(seen, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in seen}) == 3


def test_streamed_images_come_with_their_labels():
    images = labelled()
    x, labels = next(fd.data.stream(images, 5))
    assert x.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(x, images.images[labels])


def test_stream_without_labels():
    x, labels = next(fd.data.stream(fd.images.Images(labelled().images), 5))
    assert labels is None and x.shape == (5, 4, 3, 2)


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_stream_from_a_step(start):
    later = first(fd.data.stream(labelled(), 4, start=start), 3)
    near = start - 1
    earlier = first(fd.data.stream(labelled(), 4, start=near), 4)
    np.testing.assert_array_equal(later, earlier[1:])


def test_stream_from_a_state_of_grain():
    stream = lambda: fd.data.stream(labelled(), 4, seed=1)
    batches = stream()
    first(batches, 3)
    state = batches.get_state()
    expected = first(batches, 3)
    resumed = stream()
    resumed.set_state(state)
    np.testing.assert_array_equal(first(resumed, 3), expected)


def test_seeds_give_different_orders():
    orders = [first(fd.data.stream(labelled(20), 20, seed=seed), 1) for seed in range(3)]
    assert len({tuple(order[0]) for order in orders}) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_a_batch(count):
    images = labelled()
    parts = [
        first(fd.data.stream(images, 6, process_index=k, process_count=count), 4)
        for k in range(count)
    ]
    expected = first(fd.data.stream(images, 6), 4)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


def test_threads_do_not_change_the_order():
    one = first(fd.data.stream(labelled(), 4, num_threads=1, prefetch=1), 20)
    many = first(fd.data.stream(labelled(), 4, num_threads=8, prefetch=16), 20)
    np.testing.assert_array_equal(one, many)


def test_order_is_the_same_everywhere():
    # Written down once, so that no version of NumPy changes a run that is resumed.
    assert _order(0, 8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert _order(5, 8, 1000).tolist() == [7, 1, 2, 4, 0, 3, 6, 5]


def test_orders_are_even():
    # The place of each of 8 images in 4,000 epochs: chi-squared at one in ten thousand.
    # The rows and columns of such a table are fixed, which leaves 7 x 7 free.
    orders = np.stack([_order(1, 8, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, k], minlength=8) for k in range(8)])
    chi_squared = ((counts - 500) ** 2 / 500).sum() * 7 / 8
    assert stats.chi2.sf(chi_squared, 49) > 1e-4


def test_stream_of_mapped_images(tmp_path):
    images = labelled()
    fd.images.save_images(tmp_path / "set", images)
    mapped = fd.images.load_images(tmp_path / "set")
    x, labels = next(fd.data.stream(mapped, 5))
    assert not isinstance(x, np.memmap)
    np.testing.assert_array_equal(x, images.images[labels])


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"process_index": 0, "process_count": 3}, "no equal share for process 0 of 3"),
        ({"process_index": 2, "process_count": 2}, "no equal share for process 2 of 2"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_bad_streams(settings, match):
    settings = {"batch_size": 4, **settings}
    with pytest.raises(ValueError, match=match):
        fd.data.stream(labelled(), **settings)


def test_stream_without_grain(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'pip install "flowdiffrax\[train\]"'):
        fd.data.stream(labelled(), 4)
