"""Sets of images: every format read back, and damaged or hostile files refused."""

import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from helpers import without_type_checks
from PIL import Image

import flowdiffrax as fd
from flowdiffrax.images.sets import _cifar, _imagenet
from flowdiffrax.images.sets import _fashion_mnist as _idx

FILES = pathlib.Path(__file__).parents[1] / "files"


def pictures(number, height=32, width=32, channels=3, seed=0):
    """Random images, like none of their mirrors and transposes."""
    shape = (number, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def planes(image):
    """The values of an image as CIFAR orders them: all red ones, row by row, first."""
    height, width, channels = image.shape
    return [
        image[y, x, c]
        for c in range(channels)
        for y in range(height)
        for x in range(width)
    ]


def rows_of(images):
    return np.asarray([planes(image) for image in images], np.uint8)


def real_data(variable):
    """A path from the environment, for the few tests on real files."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to the path of the data")
    return pathlib.Path(os.environ[variable])


# --- what all sets have in common -----------------------------------------------------


def test_part_of_a_set():
    whole = fd.images.Images(pictures(5), np.arange(5), name="five")
    part = whole[1:3]
    assert len(part) == 2 and part.num_classes == 5 and part.name == "five"
    np.testing.assert_array_equal(part.images, whole.images[1:3])
    np.testing.assert_array_equal(whole[np.asarray([3, 0])].labels, [3, 0])
    assert repr(part) == "Images('five': 2 of 32x32x3, 5 classes)"


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i2"])
def test_labels_become_int32(dtype):
    images = fd.images.Images(pictures(3), np.asarray([2, 0, 1], dtype))
    assert images.labels.dtype == np.int32
    assert images.labels.tolist() == [2, 0, 1]


def test_classes_that_no_image_has():
    names = ("a", "b", "c")
    assert fd.images.Images(pictures(2), np.asarray([0, 1]), names).num_classes == 3
    assert fd.images.Images(pictures(2), np.asarray([0, 1])).num_classes == 2


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"images": pictures(2) / 255}, TypeError, "dtype uint8; got float64"),
        ({"images": pictures(2)[0]}, ValueError, "channels"),
        ({"images": pictures(0)}, ValueError, "empty"),
        ({"images": np.moveaxis(pictures(2), 3, 1)}, ValueError, "channels last"),
        ({"labels": np.asarray([0])}, ValueError, "one label per image"),
        ({"labels": np.asarray([0.0, 1.0])}, TypeError, "must be integers"),
        ({"labels": np.asarray([0, -1])}, ValueError, "got -1 at row 1"),
        ({"labels": np.asarray([3, 0]), "num_classes": 3}, ValueError, "got 3 at row 0"),
        (
            {"labels": np.asarray([0, 1]), "class_names": ("a",)},
            ValueError,
            r"range\(1\)",
        ),
        ({"num_classes": 2, "class_names": ("a",)}, ValueError, "one name per class"),
        # Beyond int32, where a careless conversion would wrap around to 1.
        (
            {"labels": np.asarray([0, 2**32 + 1]), "num_classes": 2},
            ValueError,
            "4294967297",
        ),
    ],
)
def test_what_is_no_set_of_images(settings, error, match):
    settings = {"images": pictures(2), "labels": np.asarray([0, 0]), **settings}
    with without_type_checks(), pytest.raises(error, match=match):
        fd.images.Images(**settings)


def test_import_reads_nothing():
    extras = {"PIL", "pyarrow", "grain"}
    code = f"import sys, flowdiffrax; print(sorted({extras!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- digits and emoji -----------------------------------------------------------------


def test_digits():
    # Counts and sum as scikit-learn's documentation and its copy of the data have them.
    digits = fd.images.digits()
    assert digits.images.shape == (1797, 8, 8, 1)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(digits.labels).tolist() == counts
    inked = np.round(digits.images / 255 * 16).astype(int)
    assert inked.sum() == 561718
    assert inked[0, 2, :, 0].tolist() == [0, 3, 15, 2, 0, 11, 8, 0]  # a zero
    assert digits.labels[:10].tolist() == list(range(10))
    assert digits.images.min() == 0 and digits.images.max() == 255


def test_digits_bring_their_licence():
    files = importlib.util.find_spec("flowdiffrax.images.sets").submodule_search_locations
    folder = pathlib.Path(files[0]) / "files"
    note = (folder / "digits.txt").read_text()
    assert "CC BY 4.0" in note
    assert hashlib.sha256((folder / "digits.npz").read_bytes()).hexdigest() in note


def test_emoji():
    emoji = fd.images.load_images(FILES / "twemoji-180.npz")
    assert emoji.images.shape == (180, 32, 32, 3)
    assert np.bincount(emoji.labels).tolist() == [20] * 9
    assert emoji.class_names[3] == "Food & Drink"
    # In colour, and on white.
    assert np.ptp(emoji.images.astype(int), axis=3).mean() > 30
    assert np.mean(emoji.images == 255) > 0.3
    note = (FILES / "twemoji.txt").read_text()
    assert "CC BY 4.0" in note
    values = emoji.images.tobytes() + emoji.labels.astype("<i4").tobytes()
    assert hashlib.sha256(values).hexdigest() in note


def test_part_of_the_emoji_is_not_all():
    with pytest.raises(ValueError, match="contents of sha256"):
        fd.images.twemoji(FILES / "twemoji-180.npz")


def test_emoji_from_their_source(tmp_path):
    source = real_data("FLOWDIFFRAX_TWEMOJI_SOURCE")
    spec = importlib.util.spec_from_file_location(
        "make_twemoji", FILES / "make_twemoji.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(source, tmp_path / "all.npz")
    emoji = fd.images.twemoji(tmp_path / "all.npz")
    counts = [169, 360, 159, 131, 218, 85, 264, 224, 263]
    assert np.bincount(emoji.labels).tolist() == counts
    script.main(source, tmp_path / "part.npz", per_class=20)
    part = fd.images.load_images(tmp_path / "part.npz")
    vendored = fd.images.load_images(FILES / "twemoji-180.npz")
    np.testing.assert_array_equal(part.images, vendored.images)


# --- CIFAR-10 -------------------------------------------------------------------------


def cifar_bodies(images, labels, size=3):
    """The six batches, three images each."""
    bodies = {}
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(size * k, size * k + size)
        records = np.column_stack([labels[part], rows_of(images[part])])
        bodies[f"{name}.bin"] = records.astype(np.uint8).tobytes()
    return bodies


def write_cifar(folder, packed, bodies):
    inner = "cifar-10-batches-bin"
    if not packed:
        (folder / inner).mkdir()
        for name, body in bodies.items():
            (folder / inner / name).write_bytes(body)
        return folder / inner
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        # Out of order, which must not change the order of the images.
        for name, body in [("readme.html", b"<html>"), *reversed(bodies.items())]:
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return archive


CIFAR = pictures(18)
CIFAR_LABELS = [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(packed, whole, tmp_path):
    place = write_cifar(tmp_path, packed, cifar_bodies(CIFAR, CIFAR_LABELS))
    path = tmp_path if whole else place
    train = fd.images.cifar10(path, checksums=False)
    np.testing.assert_array_equal(train.images, CIFAR[:15])
    assert train.labels.tolist() == CIFAR_LABELS[:15]
    assert train.class_names[3] == "cat" and train.name == "CIFAR-10 train (unverified)"
    test = fd.images.cifar10(path, "test", checksums=False)
    np.testing.assert_array_equal(test.images, CIFAR[15:])
    assert test.num_classes == 10


def md5(body):
    return hashlib.md5(body).hexdigest()


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_with_known_checksums(packed, tmp_path, monkeypatch):
    # Ten classes, twice each: four images in every batch.
    bodies = cifar_bodies(pictures(24), [*range(10)] * 2 + [0] * 4, size=4)
    place = write_cifar(tmp_path, packed, bodies)
    monkeypatch.setattr(_cifar, "_PER_CLASS", {"train": 2, "test": 0})
    if packed:
        monkeypatch.setattr(_cifar, "_MD5", md5(place.read_bytes()))
    assert repr(fd.images.cifar10(place)).startswith("Images('CIFAR-10 train': 20 of")
    # One label damaged in place, without a change in size.
    target = place if packed else place / "data_batch_1.bin"
    flip_a_bit(target, 0.5 if packed else 0)
    with pytest.raises(ValueError, match="md5" if packed else "images in the classes"):
        fd.images.cifar10(place)


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_ones_own_are_not_the_release(packed, tmp_path):
    place = write_cifar(tmp_path, packed, cifar_bodies(CIFAR, CIFAR_LABELS))
    with pytest.raises(ValueError, match="checksums=False"):
        fd.images.cifar10(place)


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_cifar(packed, tmp_path):
    place = write_cifar(tmp_path, packed, cifar_bodies(CIFAR, CIFAR_LABELS))
    target = place if packed else place / "data_batch_2.bin"
    target.write_bytes(target.read_bytes()[:-700])
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        fd.images.cifar10(place, checksums=False)


def test_cifar_labels_out_of_range(tmp_path):
    labels = [*CIFAR_LABELS[:4], 10, *CIFAR_LABELS[5:]]
    place = write_cifar(tmp_path, False, cifar_bodies(CIFAR, labels))
    with pytest.raises(ValueError, match=r"range\(10\); got 10 at row 4"):
        fd.images.cifar10(place, checksums=False)


def test_archive_without_a_batch(tmp_path):
    place = write_cifar(tmp_path, True, {"data_batch_1.bin": bytes(3073)})
    with pytest.raises(ValueError, match="it has no data_batch_2.bin"):
        fd.images.cifar10(place, checksums=False)


def test_cifar_with_a_batch_missing(tmp_path):
    place = write_cifar(tmp_path, False, cifar_bodies(CIFAR, CIFAR_LABELS))
    (place / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin"):
        fd.images.cifar10(place)


@pytest.mark.parametrize("checksums", [True, False])
def test_the_python_version_of_cifar_is_not_read(checksums, tmp_path):
    folder, archive = (
        tmp_path / "cifar-10-batches-py",
        tmp_path / "cifar-10-python.tar.gz",
    )
    folder.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({}))
    archive.write_bytes(b"")
    match = r"Fetch cifar-10-binary\.tar\.gz .* Python version, .* `parquet_images`"
    for path in (tmp_path, folder, archive):
        with pytest.raises(FileNotFoundError, match=match):
            fd.images.cifar10(path, checksums=checksums)


# --- ImageNet-32 ----------------------------------------------------------------------


def write_imagenet(folder, labels=(1000, 1, 7)):
    """Ten training batches and one for validation, a few images each."""
    images = pictures(22)
    for k in range(11):
        name = f"train_data_batch_{k + 1}" if k < 10 else "val_data"
        chosen = [labels[(2 * k + j) % len(labels)] for j in range(2)]
        data = rows_of(images[2 * k : 2 * k + 2])
        batch = {"data": data, "labels": np.asarray(chosen), "mean": data.mean(0)}
        np.savez(folder / f"{name}.npz", **batch)
    return images


def test_imagenet(tmp_path):
    images = write_imagenet(tmp_path)
    train = fd.images.imagenet32(tmp_path, checksums=False)
    np.testing.assert_array_equal(train.images, images[:20])
    # Ten comes after nine, and labels start at 0.
    assert train.labels[:4].tolist() == [999, 0, 6, 999]
    assert train.num_classes == 1000 and train.name == "ImageNet-32 train (unverified)"
    val = fd.images.imagenet32(tmp_path, "val", checksums=False)
    np.testing.assert_array_equal(val.images, images[20:])


def test_imagenet_with_known_checksums(tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    file = tmp_path / "val_data.npz"
    with pytest.raises(ValueError, match="md5"):
        fd.images.imagenet32(tmp_path, "val")
    monkeypatch.setattr(_imagenet, "_MD5S", {file.name: md5(file.read_bytes())})
    with pytest.raises(ValueError, match="2 images instead of 50000"):
        fd.images.imagenet32(tmp_path, "val")
    monkeypatch.setattr(_imagenet, "_NUM_IMAGES", {"val": 2})
    assert len(fd.images.imagenet32(tmp_path, "val")) == 2


@pytest.mark.parametrize("wrong", [0, 1001])
def test_imagenet_labels_out_of_range(wrong, tmp_path):
    write_imagenet(tmp_path, labels=(5, wrong))
    with pytest.raises(ValueError, match=rf"range\(1000\); got {wrong - 1} at row 1"):
        fd.images.imagenet32(tmp_path, checksums=False)


def test_imagenet_with_a_batch_missing(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train_data_batch_4.npz").unlink()
    with pytest.raises(FileNotFoundError, match="train_data_batch_4.npz"):
        fd.images.imagenet32(tmp_path)


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": [1] * 3},
        {"data": np.zeros((3, 3072), np.uint8)},
        {"data": np.full((3, 3072), 0.5), "labels": [1] * 3},
        # Three images of 64x64, which are twelve of 32x32.
        {"data": np.zeros((3, 12288), np.uint8), "labels": [1] * 3},
        {"data": np.zeros((3, 3072), np.uint8), "labels": [1] * 2},
    ],
)
def test_imagenet_of_another_shape(batch, tmp_path):
    np.savez(tmp_path / "val_data.npz", **batch)
    with pytest.raises(ValueError, match="not data and labels of 32x32 images"):
        fd.images.imagenet32(tmp_path, "val", checksums=False)


def test_the_pickles_of_imagenet_are_not_read(tmp_path):
    (tmp_path / "val_data").write_bytes(pickle.dumps({}))
    match = r"Fetch .*Imagenet32_val_npz\.zip .* pickles, which can run code"
    with pytest.raises(FileNotFoundError, match=match):
        fd.images.imagenet32(tmp_path, "val", checksums=False)


# --- Fashion-MNIST --------------------------------------------------------------------


def write_fashion(folder, images, labels, packed=True):
    bodies = {
        "t10k-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, *images.shape[:3])
        + images.tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, len(labels))
        + bytes(labels),
    }
    for name, body in bodies.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(body))
        else:
            (folder / name).write_bytes(body)
    return bodies


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(packed, tmp_path, monkeypatch):
    images = pictures(4, 5, 3, 1)
    bodies = write_fashion(tmp_path, images, [9, 0, 3, 3], packed)
    read = fd.images.fashion_mnist(tmp_path, "test", checksums=False)
    np.testing.assert_array_equal(read.images, images)
    assert read.labels.tolist() == [9, 0, 3, 3] and read.class_names[9] == "ankle boot"
    with pytest.raises(ValueError, match="md5"):
        fd.images.fashion_mnist(tmp_path, "test")
    monkeypatch.setattr(_idx, "_MD5S", {name: md5(body) for name, body in bodies.items()})
    assert len(fd.images.fashion_mnist(tmp_path, "test")) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: gzip.compress(body)[:-20],
        lambda body: gzip.compress(body[:-1]),
        lambda body: gzip.compress(body[:6]),
        lambda body: gzip.compress(b"\x00\x00\x09" + body[3:]),
        lambda body: b"not gzip",
        lambda body: b"",
    ],
)
def test_damaged_idx(damage, tmp_path):
    bodies = write_fashion(tmp_path, pictures(4, 5, 3, 1), [9, 0, 3, 3])
    name = "t10k-images-idx3-ubyte"
    (tmp_path / f"{name}.gz").write_bytes(damage(bodies[name]))
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        fd.images.fashion_mnist(tmp_path, "test", checksums=False)


def test_fashion_labels_out_of_range(tmp_path):
    write_fashion(tmp_path, pictures(2, 5, 3, 1), [0, 10])
    with pytest.raises(ValueError, match=r"range\(10\); got 10 at row 1"):
        fd.images.fashion_mnist(tmp_path, "test", checksums=False)


def test_real_fashion_mnist():
    folder = real_data("FLOWDIFFRAX_FASHION_MNIST")
    for split, per_class in [("train", 6000), ("test", 1000)]:
        images = fd.images.fashion_mnist(folder, split)
        assert np.bincount(images.labels).tolist() == [per_class] * 10


# --- NumPy's files --------------------------------------------------------------------

LABELS = np.asarray([2, 0, 1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    images, path = pictures(3), tmp_path / "mine.npz"
    save(path, images=images, labels=LABELS, class_names=["a", "b", "c"])
    read = fd.images.load_images(path)
    np.testing.assert_array_equal(read.images, images)
    assert read.labels.tolist() == [2, 0, 1]
    assert read.class_names == ("a", "b", "c") and read.name == "mine"


def test_npz_of_bare_arrays(tmp_path):
    images = pictures(3, channels=1)[..., 0]
    np.savez(tmp_path / "a.npz", images, LABELS)
    np.savez(tmp_path / "b.npz", images)
    assert fd.images.load_images(tmp_path / "a.npz").labels.tolist() == [2, 0, 1]
    read = fd.images.load_images(tmp_path / "b.npz")
    assert read.labels is None
    np.testing.assert_array_equal(read.images[..., 0], images)


def test_npy_is_mapped(tmp_path):
    np.save(tmp_path / "a.npy", pictures(3))
    read = fd.images.load_images(tmp_path / "a.npy")
    assert isinstance(read.images, np.memmap)
    np.testing.assert_array_equal(read.images, pictures(3))


def flip_a_bit(path, place=0.5):
    body = bytearray(path.read_bytes())
    body[int(place * len(body))] ^= 1
    path.write_bytes(body)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(save, damage, tmp_path):
    save(tmp_path / "a.npz", images=pictures(3), labels=LABELS)
    damage(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        fd.images.load_images(tmp_path / "a.npz")


class Calls:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, fn, *args):
        self.fn, self.args = fn, args

    def __reduce__(self):
        return self.fn, self.args


def test_npz_of_objects_is_not_unpickled(tmp_path):
    hostile = np.asarray([Calls(os.system, f"touch {tmp_path / 'ran'}")], object)
    np.savez(tmp_path / "a.npz", images=hostile)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        fd.images.load_images(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match="pickled"):
        fd.images.load_images(tmp_path / "b.npz")
    assert not (tmp_path / "ran").exists()


def test_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", x=pictures(3))
    with pytest.raises(ValueError, match=r"no array `images`; it has \['x'\]"):
        fd.images.load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("labels", [LABELS, None])
def test_saved_folder(labels, tmp_path):
    images = fd.images.Images(pictures(3), labels, num_classes=5, name="three")
    fd.images.save_images(tmp_path / "deep" / "set", images)
    read = fd.images.load_images(tmp_path / "deep" / "set")
    assert isinstance(read.images, np.memmap)
    np.testing.assert_array_equal(read.images, images.images)
    np.testing.assert_array_equal(read.labels, images.labels)
    assert (read.num_classes, read.class_names, read.name) == (5, None, "three")
    with pytest.raises(FileExistsError, match="exists"):
        fd.images.save_images(tmp_path / "deep" / "set", images)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]


def test_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dump", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fd.images.save_images(tmp_path / "set", fd.images.Images(pictures(3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "part, damage",
    [
        *itertools.product(["images.npy", "labels.npy"], [flip_a_bit, cut, empty]),
        *itertools.product(["images.json"], [cut, empty]),
    ],
)
def test_damaged_folder(part, damage, tmp_path):
    fd.images.save_images(tmp_path / "set", fd.images.Images(pictures(3), LABELS))
    damage(tmp_path / "set" / part)
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        fd.images.load_images(tmp_path / "set")


def test_folder_without_checksums(tmp_path):
    # Quicker on many gigabytes, and blind to a flipped bit.
    images = pictures(3)
    fd.images.save_images(tmp_path / "set", fd.images.Images(images, LABELS))
    flip_a_bit(tmp_path / "set" / "images.npy")
    read = fd.images.load_images(tmp_path / "set", checksums=False)
    assert np.sum(read.images != images) == 1 and read.labels.tolist() == [*LABELS]


def test_folder_with_a_part_missing(tmp_path):
    fd.images.save_images(tmp_path / "set", fd.images.Images(pictures(3), LABELS))
    (tmp_path / "set" / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match="labels.npy"):
        fd.images.load_images(tmp_path / "set")


# --- pictures -------------------------------------------------------------------------


def write_png(path, image, **options):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path, **options)


def encode(image, form="png"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def test_image_folder(tmp_path):
    images = pictures(4, 6, 5)
    # Neither written in order nor in the order of a listing.
    names = ["b/2.png", "a/x.PNG", "b/10.png", ".c/0.png"]
    for name, image in zip(names, images, strict=True):
        write_png(tmp_path / name, image)
    (tmp_path / "b" / "notes.txt").write_text("passed over")
    (tmp_path / "b" / ".hidden.png").write_text("passed over")
    read = fd.images.image_folder(tmp_path)
    np.testing.assert_array_equal(read.images, images[[1, 2, 0]])
    assert read.labels.tolist() == [0, 1, 1] and read.class_names == ("a", "b")


def test_folder_without_classes(tmp_path):
    write_png(tmp_path / "0.png", pictures(1, 6, 5)[0])
    read = fd.images.image_folder(tmp_path)
    assert read.images.shape == (1, 6, 5, 3) and read.labels is None


def test_modes_of_pictures(tmp_path):
    grey = pictures(1, 6, 5, 1)[0, ..., 0]
    write_png(tmp_path / "grey" / "0.png", grey)
    read = fd.images.image_folder(tmp_path / "grey", mode="L")
    np.testing.assert_array_equal(read.images[0, ..., 0], grey)
    coloured = fd.images.image_folder(tmp_path / "grey")
    np.testing.assert_array_equal(coloured.images[0], np.stack([grey] * 3, axis=-1))
    clear = pictures(1, 6, 5, 4)[0]
    write_png(tmp_path / "clear" / "0.png", clear)
    read = fd.images.image_folder(tmp_path / "clear", mode="RGBA")
    np.testing.assert_array_equal(read.images[0], clear)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        fd.images.image_folder(tmp_path / "clear", mode="CMYK")


@pytest.mark.parametrize(
    "other, match",
    [
        (
            pictures(1, 5, 6)[0],
            r"of one size; .*1.png has \(5, 6\), .* first has \(6, 5\)",
        ),
        (np.zeros((6, 5), np.uint16), "more than 8 bits"),
    ],
)
def test_pictures_that_do_not_go_together(other, match, tmp_path):
    write_png(tmp_path / "a" / "0.png", pictures(1, 6, 5)[0])
    write_png(tmp_path / "a" / "1.png", other)
    with pytest.raises(ValueError, match=match):
        fd.images.image_folder(tmp_path)


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_truncated_picture(form, tmp_path):
    (tmp_path / f"0.{form}").write_bytes(encode(pictures(1)[0], form)[:-300])
    with pytest.raises(ValueError, match=f"0.{form} is truncated, damaged"):
        fd.images.image_folder(tmp_path)


def test_class_without_pictures(tmp_path):
    write_png(tmp_path / "a" / "0.png", pictures(1)[0])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"without pictures: \['b'\]"):
        fd.images.image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no pictures"):
        fd.images.image_folder(tmp_path / "b")


# --- Parquet --------------------------------------------------------------------------

CLASS_LABEL = {"_type": "ClassLabel", "names": ["a", "b", "c"]}


def write_parquet(path, images, labels=None, column="img", features=None, **options):
    bodies = [body if isinstance(body, bytes) else encode(body) for body in images]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    structs = [{"bytes": body or None, "path": "a.png"} for body in bodies]
    columns = {column: arrow.array(structs, kind)}
    if labels is not None:
        is_text = isinstance(labels[0], str)
        kind = arrow.string() if is_text else arrow.int64()
        columns["label"] = arrow.array(labels, kind)
    table = arrow.table(columns)
    if features is not None:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    parquet.write_table(table, path, **options)


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet(column, tmp_path):
    images = pictures(3, 6, 5)
    features = {column: {"_type": "Image"}, "label": CLASS_LABEL}
    write_parquet(tmp_path / "a.parquet", images, [1, 0, 1], column, features)
    read = fd.images.parquet_images(tmp_path / "a.parquet")
    np.testing.assert_array_equal(read.images, images)
    assert read.labels.tolist() == [1, 0, 1]
    assert read.class_names == ("a", "b", "c") and read.name == "a"


def test_parquet_in_parts(tmp_path):
    images = pictures(5, 6, 5)
    write_parquet(tmp_path / "train-00001-of-2.parquet", images[3:], [0, 1])
    write_parquet(tmp_path / "train-00000-of-2.parquet", images[:3], [2, 2, 0])
    write_parquet(tmp_path / "test.parquet", images[:1], [1])
    read = fd.images.parquet_images(tmp_path)
    np.testing.assert_array_equal(read.images, images)
    assert read.labels.tolist() == [2, 2, 0, 0, 1] and read.class_names is None
    assert len(fd.images.parquet_images(tmp_path, "test")) == 1
    with pytest.raises(FileNotFoundError, match=r"no val\*.parquet"):
        fd.images.parquet_images(tmp_path, "val")


def test_parquet_without_labels(tmp_path):
    write_parquet(tmp_path / "a.parquet", pictures(2), features={"image": {}})
    assert fd.images.parquet_images(tmp_path / "a.parquet").labels is None


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"labels": [0, -1]}, "got -1 at row 1"),
        ({"labels": [0, 3], "features": {"label": CLASS_LABEL}}, r"range\(3\); got 3"),
        ({"labels": [0, None]}, "without a label"),
        ({"images": [encode(pictures(1)[0])[:-300]] * 2}, "row 0 is truncated, damaged"),
        ({"images": [encode(pictures(1)[0]), b""]}, "row 1 is truncated, damaged"),
        ({"images": [pictures(1)[0], pictures(1, 5)[0]]}, "of one size; .*, row 1 has"),
        ({"images": []}, "no rows"),
        ({"column": "picture"}, r"no column .*; it has \['picture'\]"),
    ],
)
def test_wrong_parquet(settings, match, tmp_path):
    write_parquet(tmp_path / "a.parquet", **{"images": pictures(2), **settings})
    with pytest.raises(ValueError, match=match):
        fd.images.parquet_images(tmp_path / "a.parquet")


def test_parquet_of_plain_bytes(tmp_path):
    table = arrow.table({"image": arrow.array([encode(pictures(1)[0])])})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must hold structs"):
        fd.images.parquet_images(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty])
def test_damaged_parquet(damage, tmp_path):
    # Bitmaps have no checksums of their own; statistics would be half of so small a file.
    path = tmp_path / "a.parquet"
    images = [encode(image, "bmp") for image in pictures(3)]
    options = {"write_page_checksum": True, "write_statistics": False}
    write_parquet(path, images, [0, 1, 2], compression="none", **options)
    damage(path)
    with pytest.raises(ValueError, match="truncated, damaged or not the expected"):
        fd.images.parquet_images(path)


def test_real_photographs():
    folder = real_data("FLOWDIFFRAX_CIFAR10_JPEG")
    for split, per_class in [("train", 5000), ("test", 1000)]:
        images = fd.images.parquet_images(folder, split)
        assert images.images.shape == (10 * per_class, 32, 32, 3)
        assert np.bincount(images.labels).tolist() == [per_class] * 10
        assert images.class_names[9] == "truck"
        # The means of CIFAR-10's training images, which JPEG hardly moves.
        mean = images.images.mean((0, 1, 2)) / 255
        np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=5e-3)


# --- what is not there ----------------------------------------------------------------

MISSING = {
    "cifar": (
        lambda path: fd.images.cifar10(path),
        ["cifar-10-binary.tar.gz", "170,052,171", "c32a1d4ab5d03f1284b67883e8d87530"]
        + ["cifar-10-python.tar.gz", "University of Toronto"],
    ),
    "imagenet": (
        lambda path: fd.images.imagenet32(path),
        ["Imagenet32_train_npz.zip", "3e3d1b7ddb901d59d1fbcba69b3676fa", "Chrabaszcz"],
    ),
    "fashion": (
        lambda path: fd.images.fashion_mnist(path),
        ["train-images-idx3-ubyte.gz", "f4a8712d7a061bf5bd6d2ca38dc4d50a", "Zalando"],
    ),
    "twemoji": (
        lambda path: fd.images.twemoji(path),
        ["emoji-datasource-twitter-16.0.0.tgz", "f64a530c63bca463", "make_twemoji.py"],
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_sets_say_what_to_fetch(kind, tmp_path):
    load, words = MISSING[kind]
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "nowhere")
    message = str(caught.value)
    for word in [*words, str(tmp_path / "nowhere"), "Nothing is downloaded"]:
        assert word in message


@pytest.mark.parametrize(
    "load", [fd.images.load_images, fd.images.image_folder, fd.images.parquet_images]
)
def test_missing_files(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "load", [fd.images.cifar10, fd.images.imagenet32, fd.images.fashion_mnist]
)
def test_unknown_split(load, tmp_path):
    with pytest.raises(ValueError, match="`split` must be one of"):
        load(tmp_path, "validation")


def test_folder_that_nobody_saved(tmp_path):
    with pytest.raises(FileNotFoundError, match="use `image_folder`"):
        fd.images.load_images(tmp_path)


@pytest.mark.parametrize("absent", ["PIL.Image", "pyarrow"])
def test_without_the_extra(absent, tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", pictures(1))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=r'pip install "flowdiffrax\[images\]"'):
        fd.images.parquet_images(tmp_path / "a.parquet")


def test_parquet_with_labels_of_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", pictures(2), ["cat", "dog"])
    with (
        without_type_checks(),
        pytest.raises(TypeError, match="`labels` must be integers"),
    ):
        fd.images.parquet_images(tmp_path / "a.parquet")
