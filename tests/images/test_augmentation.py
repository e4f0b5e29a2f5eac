"""EDM's augmentation, against NumPy and SciPy at given parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, without_type_checks
from scipy import ndimage, signal

import flowdiffrax as fd
from flowdiffrax.images import Augmentation, AugmentationParameters, _augmentation
from flowdiffrax.nn._condition import Condition
from flowdiffrax.velocities import AugmentationArgs

HEIGHT, WIDTH = 8, 10
ALL = Augmentation(shift=True)
AFFINE_OFF = dict(zoom=False, rotate=False, stretch=False, move=False)
# The decomposition filter sym6, from its table.
TAPS = _augmentation._SYM6


def parameters(n, seed=0, **given):
    """Those of a batch, with everything that there is, or what is given and nothing."""
    rng = np.random.default_rng(seed)
    drawn = {
        "mirror": rng.integers(0, 2, n),
        "flip": rng.integers(0, 2, n),
        "shift": rng.uniform(-1, 1, (n, 2)),
        "zoom": rng.normal(size=n),
        "angle": rng.uniform(-np.pi, np.pi, n),
        "stretch": rng.normal(size=n),
        "axis": rng.uniform(-np.pi, np.pi, n),
        "move": rng.normal(size=(n, 2)),
    }
    if given:
        drawn = {name: np.zeros_like(value) for name, value in drawn.items()} | given
    return AugmentationParameters(
        **{name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}
    )


def images(n, seed=0, channels=2):
    shape = (n, HEIGHT, WIDTH, channels)
    values = np.random.default_rng(seed).uniform(-1, 1, shape)
    return jnp.asarray(values, jnp.float32)


def in_steps(image, p):
    """EDM's pipeline on one image, with SciPy's filters and interpolation."""
    image = image[:, ::-1] if p.mirror else image
    image = image[::-1] if p.flip else image
    right, up = np.round(p.shift * [WIDTH / 8, HEIGHT / 8]).astype(int)
    # Continue by reflection on all sides, and cut out another part.
    wide = np.pad(image, [(4, 4), (4, 4), (0, 0)], "reflect")
    image = wide[4 + up : 4 + up + HEIGHT, 4 - right : 4 - right + WIDTH]
    # Where a point of the image goes, by one thing after another.
    turn = lambda a: np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    long = 2 ** (0.2 * p.stretch)
    stretched = turn(p.axis) @ np.diag([long, 1 / long]) @ turn(-p.axis)
    there = np.eye(3)
    there[:2, :2] = stretched @ turn(p.angle) * 2 ** (0.2 * p.zoom)
    there[:2, 2] = p.move * [WIDTH / 8, HEIGHT / 8]
    back = np.linalg.inv(there)
    return np.stack([_warped(channel, back) for channel in np.moveaxis(image, -1, 0)], -1)


def _warped(channel, back):
    rows, columns = HEIGHT - 1, WIDTH - 1
    wide = np.pad(channel, [(rows, rows), (columns, columns)], "reflect")
    double = wide
    for axis in (0, 1):
        # Of the whole convolution, what lies in the middle.
        whole = signal.upfirdn(TAPS, double, up=2, axis=axis)
        double = np.take(whole, 5 + np.arange(2 * double.shape[axis]), axis)
    # Half pixels of the result, with three pixels more on each side, from its centre.
    ys = (np.arange(2 * (HEIGHT + 6)) + 0.5) / 2 - (HEIGHT + 6) / 2
    xs = (np.arange(2 * (WIDTH + 6)) + 0.5) / 2 - (WIDTH + 6) / 2
    x, y = np.meshgrid(xs, ys)
    # EDM takes the filters' shift by a quarter of a pixel out and in again.
    x, y, _ = np.einsum(
        "ij,jyx->iyx", back, np.stack([x + 0.25, y + 0.25, np.ones_like(x)])
    )
    at = (
        2 * (y - 0.25) + double.shape[0] / 2 - 0.5,
        2 * (x - 0.25) + double.shape[1] / 2 - 0.5,
    )
    fine = ndimage.map_coordinates(double, at, order=1, mode="grid-constant")
    for axis in (0, 1):
        whole = signal.upfirdn(TAPS[::-1], fine, down=1, axis=axis)
        fine = np.take(whole, 12 + 2 * np.arange(fine.shape[axis] // 2 - 6), axis)
    return fine


# --- images ---------------------------------------------------------------------------


def test_against_scipy():
    n = 12
    p, given = parameters(n), images(n)
    found = eqx.filter_jit(ALL.apply)(given, p)
    of = lambda i: jax.tree.map(lambda leaf: np.asarray(leaf[i]), p)
    expected = np.stack([in_steps(np.asarray(given[i]), of(i)) for i in range(n)])
    assert_close(found, expected, 2e-4)


def test_filter():
    # What makes it an orthogonal wavelet, with as many vanishing moments as it can have.
    shifted = [TAPS[2 * k :] @ TAPS[: 12 - 2 * k] for k in range(6)]
    assert_close(np.array(shifted), np.eye(6)[0], 1e-10)
    places = np.arange(12) - 5.5
    moments = [TAPS * (-1.0) ** np.arange(12) @ places**k for k in range(6)]
    assert_close(np.array(moments), np.zeros(6), 1e-7)


def test_nothing_is_the_image():
    given = images(3)
    same = parameters(3, mirror=np.zeros(3))
    assert_close(eqx.filter_jit(ALL.apply)(given, same), given, 1e-6)


def test_by_whole_pixels():
    # These need no interpolation. (Quarter turns do: the filter is not symmetric.)
    square = images(1)[:, :, :8]
    p = parameters(1, move=np.array([[1.0, 2.0]]))
    assert_close(
        eqx.filter_jit(ALL.apply)(square, p)[:, 2:, 1:], square[:, :-2, :-1], 1e-5
    )


def test_only_flips_move_no_value():
    only = Augmentation(zoom=False, rotate=False, stretch=False, move=False)
    p = parameters(2, mirror=np.array([1, 0]), flip=np.array([1, 1]))
    given = images(2)
    expected = np.stack([given[0, ::-1, ::-1], given[1, ::-1]])
    np.testing.assert_array_equal(only.apply(given, p), expected)
    assert only.size == only.labels(p, given.shape).shape[1] == 2


# --- labels ---------------------------------------------------------------------------


def test_labels_by_hand():
    p = parameters(
        1,
        mirror=np.array([1]),
        shift=np.array([[0.5, -1.0]]),
        zoom=np.array([-0.3]),
        angle=np.array([np.pi / 3]),
        stretch=np.array([2.0]),
        axis=np.array([np.pi / 2]),
        move=np.array([[0.1, 0.2]]),
    )
    # Of 10 pixels, half of an eighth is 0.6, which is one pixel of 1.25.
    expected = [1, 0, 0.8, -1, -0.3, -0.5, 3**0.5 / 2, 0, 2, 0.1, 0.2]
    assert_close(ALL.labels(p, (HEIGHT, WIDTH, 3)), np.array([expected]), 1e-6)
    # As EDM has it on CIFAR-10, and as MeanFlow has it.
    assert Augmentation().size == 9
    assert Augmentation(flip=False, rotate=False).size == 6


def test_rates():
    n, aug = 20_000, Augmentation(0.12, shift=True)
    p = aug.draw(jr.key(0), n)
    shares = {name: float(jnp.mean(leaf != 0)) for name, leaf in vars(p).items()}
    expected = dict.fromkeys(shares, 0.12) | {"mirror": 0.5, "flip": 0.06, "axis": 0.5}
    for name, share in shares.items():
        deviation = (expected[name] * (1 - expected[name]) / n) ** 0.5
        assert abs(share - expected[name]) < 4 * deviation, name
    happened = p.zoom[p.zoom != 0]
    assert abs(float(jnp.std(happened)) - 1) < 0.06
    # One coin for both coordinates, and another for each transformation.
    np.testing.assert_array_equal(p.move[:, 0] != 0, p.move[:, 1] != 0)
    both = jnp.mean((p.zoom != 0) & (p.angle != 0))
    assert abs(float(both) - 0.12**2) < 4 * (0.12**2 / n) ** 0.5


def test_what_is_off_is_never_drawn():
    aug = Augmentation(1.0, mirror=False, flip=False, rotate=False, move=False)
    p = aug.draw(jr.key(0), 50)
    assert not any(jnp.any(leaf) for leaf in (p.mirror, p.flip, p.angle, p.move, p.shift))
    assert jnp.all(p.zoom != 0) and jnp.all(p.stretch != 0)


@pytest.mark.parametrize("settings", [{}, AFFINE_OFF], ids=["affine", "whole pixels"])
def test_half_precision_images_move_as_far(settings):
    # In bfloat16, shifts by whole pixels and angles would be rounded.
    aug = Augmentation(1.0, shift=True, **settings)
    images = jr.normal(jr.key(1), (8, HEIGHT, WIDTH, 2), jnp.bfloat16)
    run = jax.jit(lambda images: aug(jr.key(0), images))
    moved, labels = run(images)
    exact, same_labels = run(images.astype(jnp.float32))
    assert moved.dtype == jnp.bfloat16
    assert_close(moved, exact.astype(jnp.bfloat16), 0, 0)
    assert_close(labels, same_labels, 0, 0)


def test_one_image():
    with without_type_checks():
        with pytest.raises(ValueError, match=r"For one image, use `image\[None\]`"):
            Augmentation()(jr.key(0), jnp.zeros((4, 4, 1)))


def test_rate_outside():
    with pytest.raises(ValueError, match="`rate` must be in"):
        Augmentation(1.2)


# --- in batches and networks ----------------------------------------------------------


def labelled(n=6):
    values = np.random.default_rng(0).integers(0, 256, (n, HEIGHT, WIDTH, 2), np.uint8)
    return fd.images.Images(values, np.arange(n))


@eqx.filter_jit
def drawn(source, key, batch_size):
    return source(key, batch_size)


def test_batches_carry_the_labels():
    aug = Augmentation(0.5)
    source = fd.images.DeviceImages(labelled(), augmentation=aug)
    points, args = drawn(source, jr.key(0), 5)
    assert isinstance(args, AugmentationArgs) and args.labels.shape == (5, 9)
    plain, labels = drawn(fd.images.DeviceImages(labelled()), jr.key(0), 5)
    np.testing.assert_array_equal(args.condition, labels)
    untouched = jnp.all(args.labels == 0, axis=1)
    assert_close(points[untouched], plain[untouched], 1e-6)
    assert float(jnp.max(jnp.abs(points - plain))) > 0.1
    # A function of the key, and without labels too.
    unlabelled = fd.images.DeviceImages(labelled().images, augmentation=aug)
    again, args = drawn(unlabelled, jr.key(0), 5)
    assert_close(again, points, 1e-6)
    assert args.condition is None


def test_dropped_conditions_keep_the_labels():
    source = fd.images.DeviceImages(labelled(), augmentation=Augmentation(0.5))
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), source, 8)
    dropping = fd.data.ConditionDropout(batches, null=6, rate=1.0)
    draw = eqx.filter_jit(lambda batches, key: batches(key)[1])
    kept, args = draw(batches, jr.split(jr.key(1), 3)[0]), draw(dropping, jr.key(1))
    assert args.condition.tolist() == [6] * 8
    np.testing.assert_array_equal(args.labels, kept.labels)


@pytest.mark.parametrize("preserving", [False, True])
def test_labels_in_the_condition(preserving):
    make = Condition(
        8, 8, 2, True, True, 1.0, augment_size=3, preserving=preserving, key=jr.key(0)
    )
    value = eqx.filter_jit(lambda condition, args: condition(0.1, 0.7, args))
    labels = jnp.array([1.0, -0.5, 0.2])
    both = AugmentationArgs(1, labels)
    # At the start, they change nothing; their weights have a gradient.
    np.testing.assert_array_equal(value(make, both), value(make, 1))
    grads = eqx.filter_grad(lambda condition: jnp.sum(value(condition, both)))(make)
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(grads.augmentation))

    leaves = lambda condition: jax.tree.leaves(condition.augmentation)
    grown = eqx.tree_at(leaves, make, replace_fn=lambda leaf: leaf + 0.5)
    assert jnp.max(jnp.abs(value(grown, both) - value(grown, 1))) > 0.1
    # Zeros, as in sampling, are as good as none.
    zeros = AugmentationArgs(1, jnp.zeros(3))
    np.testing.assert_array_equal(value(grown, zeros), value(grown, 1))
    guided = fd.velocities.GuidanceArgs(both, 2.0)
    assert jnp.max(jnp.abs(value(grown, guided) - value(grown, both))) > 1e-3


@pytest.mark.parametrize("name", ["UNet", "MagnitudePreservingUNet", "DiT"])
def test_networks_take_labels(name):
    sizes = (2, 8, 1) if name == "DiT" else (8, (1,), 1)
    make = lambda: getattr(fd.nn, name)((4, 4, 1), *sizes, augment_size=3, key=jr.key(0))
    net = eqx.filter_eval_shape(make)
    shapes = [leaf.shape[:1] for leaf in jax.tree.leaves(net.condition.augmentation)]
    assert shapes[0] == (3,)


def test_guidance_keeps_the_labels():
    args = AugmentationArgs(1, jnp.array([1.0, -0.5]))
    x, seen = jnp.zeros(2), []

    def velocity(t, x, args):
        seen.append(args)
        return x

    fd.velocities.ClassifierFreeGuidance(2, 3.0)(velocity, 0.1, x, args)
    assert [int(args.condition) for args in seen] == [1, 2]
    assert all(args.labels is seen[0].labels for args in seen)


def test_network_without_labels():
    net = fd.nn.UNet((4, 4, 1), 8, (1,), 1, key=jr.key(0))
    args = AugmentationArgs(None, jnp.zeros(3))
    with pytest.raises(ValueError, match="AugmentationArgs`, with `augment_size`"):
        net(0.0, 1.0, jnp.zeros((4, 4, 1)), args)
