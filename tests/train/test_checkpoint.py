"""Checkpoints: round trips, and files that are missing, damaged or of something else."""

import enum
import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import flowdiffrax as fd


def network(width=8, seed=0):
    return fd.nn.MLP(2, width, 2, key=jr.key(seed))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run" / "map.safetensors"
    fd.train.save(path, {"width": 8}, network())
    return path


def make(config):
    return network(config["width"], seed=1)


def assert_same(a, b):
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for left, right in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        assert jnp.result_type(left) == jnp.result_type(right)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_round_trip(saved):
    config, loaded = fd.train.load(saved, make)
    assert config == {"width": 8}
    assert_same(loaded, network())


def assert_reads_back(path, tree, blank):
    fd.train.save(path, None, tree)
    loaded = fd.train.load(path, lambda config: blank)[1]
    assert_same(loaded, tree)
    # A `ShapeDtypeStruct` stands for a JAX array.
    types = lambda tree: [type(leaf) for leaf in jtu.tree_leaves(tree)]
    assert types(loaded) == types(tree)


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


def test_types_of_leaves(tmp_path):
    tree = {
        "jax": jnp.arange(3, dtype=jnp.int32),
        "flags": jnp.asarray([True, False]),
        "scalar": jnp.asarray(2.5),
        "empty": (jnp.zeros((0, 3)), np.zeros(0)),
        "numpy": np.arange(6.0).reshape(2, 3).T,
        "numpy scalars": (np.int64(2**40), np.float32(1.5), np.float64(0.5), np.True_),
        "python": (1.25, 3, True, 1 - 2j, Colour.BLUE),
        "unsaved": None,
    }
    blank = tree | {
        "jax": jnp.zeros(3, jnp.int32),
        "flags": jnp.zeros(2, bool),
        "scalar": jnp.zeros(()),
        "numpy": np.zeros((3, 2)),
        "numpy scalars": (np.int64(0), np.float32(0), np.float64(0), np.False_),
        "python": (0.0, 0, False, 0j, Colour.RED),
    }
    assert_reads_back(tmp_path / "tree", tree, blank)
    loaded = fd.train.load(tmp_path / "tree", lambda config: blank)[1]
    loaded["numpy"][0, 0] = 1.0  # NumPy arrays may be changed


DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["float8_e4m3b11fnuz", "int4", "uint8", "complex64", "complex128"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_dtypes(tmp_path, dtype, shape):
    tree = {"a": jnp.full(shape, 1.5).astype(dtype), "b": np.ones(shape, dtype)}
    if "complex" in dtype:
        tree["a"] = tree["a"] * tree["a"].dtype.type(1j)
    blank = {"a": jax.ShapeDtypeStruct(shape, dtype), "b": np.zeros(shape, dtype)}
    assert_reads_back(tmp_path / "tree", tree, blank)
    others = safetensors.numpy.load_file(tmp_path / "tree")
    own = lambda name: others[name].view(dtype).reshape(shape)
    assert_same({"a": own("a"), "b": own("b")}, tree)


@pytest.mark.parametrize("dtype", [">f4", "U3", "datetime64[s]"])
def test_dtypes_of_numpy(tmp_path, dtype):
    tree = np.asarray([1, 20], "i8").astype(dtype)
    fd.train.save(tmp_path / "tree", None, tree)
    loaded = fd.train.load(tmp_path / "tree", lambda config: np.zeros_like(tree))[1]
    assert loaded.dtype == tree.dtype
    np.testing.assert_array_equal(loaded, tree)


@pytest.mark.parametrize("leaf", [np.asarray([print]), 2**70])
def test_python_objects_are_not_pickled(tmp_path, leaf):
    with pytest.raises(TypeError):
        fd.train.save(tmp_path / "tree", None, leaf)
    assert list(tmp_path.iterdir()) == []


def keys(seed):
    key = lambda impl: jr.key(seed, impl=impl)
    return {"key": key("threefry2x32"), "row": jr.split(key("rbg"), 3), "x": jnp.ones(2)}


@pytest.mark.parametrize("of_shapes", [False, True])
def test_round_trip_of_random_keys(tmp_path, of_shapes):
    fd.train.save(tmp_path / "tree", None, keys(3))
    blank = lambda config: (
        eqx.filter_eval_shape(lambda: keys(0)) if of_shapes else keys(0)
    )
    _, loaded = fd.train.load(tmp_path / "tree", blank)
    expected = keys(3)
    assert jtu.tree_map(lambda leaf: leaf.dtype, loaded) == jtu.tree_map(
        lambda leaf: leaf.dtype, expected
    )
    draw = lambda tree: (jr.normal(tree["key"]), jax.vmap(jr.normal)(tree["row"]))
    assert_same(draw(loaded), draw(expected))


def test_random_key_of_another_kind(tmp_path):
    fd.train.save(tmp_path / "key", None, jr.key(0))
    with pytest.raises(ValueError, match=r"key<fry>\[\] there, key<rbg>\[\] here"):
        fd.train.load(tmp_path / "key", lambda config: jr.key(0, impl="rbg"))


def test_round_trip_of_a_state(tmp_path):
    optim = optax.adam(1e-3)
    create = lambda seed: fd.train.TrainState.create(
        fd.FlowMap(network(seed=seed)), optim, key=jr.key(seed)
    )
    fd.train.save(tmp_path / "state", {}, create(0))
    _, loaded = fd.train.load(tmp_path / "state", lambda config: create(1))
    assert_same(loaded, create(0))


def test_load_without_memory(saved):
    shape_only = lambda config: eqx.filter_eval_shape(
        fd.nn.MLP, 2, config["width"], 2, key=jr.key(1)
    )
    assert_same(fd.train.load(saved, shape_only)[1], network())


def test_saving_again_replaces(saved):
    fd.train.save(saved, {"width": 4}, network(4))
    assert_same(fd.train.load(saved, make)[1], network(4))


def test_no_other_files(saved):
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        fd.train.load(tmp_path / "nothing", make)


def file_with(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", b"weights", b"[1, 2]\n", b"\x80\n\x00", file_with([]), file_with({})]
    + [file_with({"__metadata__": {"flowdiffrax": text}}) for text in ("", "[]", "{}")],
)
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        fd.train.load(tmp_path / "file", make)


def test_file_of_another_library(tmp_path):
    safetensors.numpy.save_file({"weight": np.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of flowdiffrax"):
        fd.train.load(tmp_path / "theirs.safetensors", make)


@pytest.mark.parametrize("keep", [-1, -100])
def test_truncated(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged"):
        fd.train.load(saved, make)


def test_truncated_within_the_header(saved):
    saved.write_bytes(saved.read_bytes()[:40])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        fd.train.load(saved, make)


def test_one_bit_flipped(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged"):
        fd.train.load(saved, make)


def test_no_flipped_bit_goes_undetected(tmp_path):
    tree, path = {"a": np.arange(3.0), "b": np.ones(2, "i4")}, tmp_path / "tree"
    fd.train.save(path, {"width": 8}, tree)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            config, loaded = fd.train.load(path, lambda config: tree)
        except ValueError:
            continue
        # Some bits, such as those of padding, have no meaning.
        assert config == {"width": 8}
        assert_same(loaded, tree)


def test_newer_format(saved):
    old, new = rb"\"format\": 1", rb"\"format\": 9"  # JSON within JSON
    assert old in saved.read_bytes()
    saved.write_bytes(saved.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match="has format 9, .* Update flowdiffrax"):
        fd.train.load(saved, make)


@pytest.mark.parametrize(
    "other",
    [
        lambda: network(9),
        lambda: fd.nn.MLP(2, 8, 3, key=jr.key(0)),
        lambda: jtu.tree_map(
            lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, network()
        ),
    ],
    ids=["shapes", "number", "dtypes"],
)
def test_wrong_structure(saved, other):
    with pytest.raises(ValueError, match="Build the tree with the configuration"):
        fd.train.load(saved, lambda config: other())


def test_configuration_that_is_not_json(saved):
    with pytest.raises(TypeError, match="JSON"):
        fd.train.save(saved, {"activation": jax.nn.gelu}, network(4))
    assert_same(fd.train.load(saved, make)[1], network())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_save_leaves_the_old_file(saved, monkeypatch, step):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        fd.train.save(saved, {"width": 4}, network(4))
    monkeypatch.undo()
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert_same(fd.train.load(saved, make)[1], network())


def test_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fd.train.save(saved, {"width": 4}, network(4))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_others_read_it(tmp_path):
    path = tmp_path / "map.safetensors"
    fd.train.save(path, {"width": 8}, fd.FlowMap(network()))
    arrays = safetensors.numpy.load_file(path)
    assert {*arrays} == {
        f"net.{layer}.{kind}"
        for layer in ("first", "hidden.0", "last")
        for kind in ("weight", "bias")
    }
    weight = network().first.weight
    np.testing.assert_array_equal(arrays["net.first.weight"], weight)
    with safetensors.safe_open(path, "np") as file:
        header = json.loads(file.metadata()["flowdiffrax"])
    assert header["config"] == {"width": 8}
    assert header["leaves"]["net.first.weight"] == "float64[8, 20]"


@pytest.mark.parametrize(
    "tree, names",
    [
        ({"a.b": 1.0, "a": {"b": 2.0}}, {"a.b", "a.b_"}),
        ({"a.b": 1.0, "a": {"b": 2.0, "b_": 3.0}}, {"a.b", "a.b_", "a.b__"}),
        ({"__metadata__": 1.0}, {"__metadata___"}),
        (1.0, {"array"}),
    ],
)
def test_names_are_distinct(tmp_path, tree, names):
    assert_reads_back(tmp_path / "tree", tree, jtu.tree_map(lambda leaf: 0.0, tree))
    assert {*safetensors.numpy.load_file(tmp_path / "tree")} == names


@pytest.mark.parametrize(
    "other, expected",
    [
        ({"b": np.zeros(3)}, r"`a` is float32\[3\] there, absent here; `b` is absent"),
        ({"a": np.zeros(3)}, r"`a` is float32\[3\] there, float64\[3\] here"),
        ({"a": 1.0}, r"`a` is float32\[3\] there, float64\[\] here"),
    ],
)
def test_differences_are_named(tmp_path, other, expected):
    fd.train.save(tmp_path / "tree", None, {"a": np.arange(3, dtype="f4")})
    with pytest.raises(ValueError, match=expected):
        fd.train.load(tmp_path / "tree", lambda config: other)


def test_changed_configuration(saved):
    content = saved.read_bytes()
    changed = content.replace(b"width", b"wihth", 1)
    assert changed != content
    saved.write_bytes(changed)
    with pytest.raises(ValueError, match="is damaged"):
        fd.train.load(saved, lambda config: network())


def test_keys_that_are_the_same_in_json(tmp_path):
    with pytest.raises(ValueError, match="the same in JSON"):
        fd.train.save(tmp_path / "map.safetensors", {1: "a", "1": "b"}, network())
    fd.train.save(tmp_path / "map.safetensors", {1: (2, 3)}, network())
    assert fd.train.load(tmp_path / "map.safetensors", lambda c: network())[0] == {
        "1": [2, 3]
    }


def test_class_that_makes_the_tree(tmp_path):
    class Model(eqx.Module):
        rate: jax.Array

        def __init__(self, config):
            self.rate = jnp.zeros(config["size"])

    fd.train.save(tmp_path / "map.safetensors", {"size": 3}, Model({"size": 3}))
    assert fd.train.load(tmp_path / "map.safetensors", Model)[1].rate.shape == (3,)
