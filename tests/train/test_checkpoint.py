"""Checkpoints: round trips, and files that are missing, damaged or of something else."""

import json
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flowdiffrax as fd

# In JSON, and in JSON within JSON.
FORMATS = {
    ".fdx": (b'"format": 2', b'"format": 9'),
    ".safetensors": (rb"\"format\": 2", rb"\"format\": 9"),
}


def network(width=8, seed=0):
    return fd.nn.MLP(2, width, 2, key=jr.key(seed))


@pytest.fixture(params=["map.fdx", "map.safetensors"])
def saved(tmp_path, request):
    path = tmp_path / "run" / request.param
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


@pytest.mark.parametrize("name", ["tree", "tree.safetensors"])
def test_round_trip_of_all_kinds_of_leaves(tmp_path, name):
    tree = {
        "bfloat16": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "integers": jnp.arange(3, dtype=jnp.int32),
        "flags": jnp.asarray([True, False]),
        "empty": jnp.zeros((0, 3)),
        "numpy": np.arange(2.0),
        "python": (1.25, 3, True),
    }
    if name == "tree":  # safetensors has no double complex numbers
        tree["complex"] = jnp.asarray([1 + 2j])
    numbers = {key: tree[key] for key in tree if key not in ("flags", "python")}
    blank = jtu.tree_map(lambda leaf: 0 * leaf, numbers)
    blank |= {"flags": jnp.zeros(2, bool), "python": (0.0, 0, False)}
    fd.train.save(tmp_path / name, None, tree)
    _, loaded = fd.train.load(tmp_path / name, lambda config: blank)
    assert_same(loaded, tree)
    assert [type(leaf) for leaf in loaded["python"]] == [float, int, bool]


def keys(seed):
    key = lambda impl: jr.key(seed, impl=impl)
    return {"key": key("threefry2x32"), "row": jr.split(key("rbg"), 3), "x": jnp.ones(2)}


@pytest.mark.parametrize("name", ["tree", "tree.safetensors"])
@pytest.mark.parametrize("of_shapes", [False, True])
def test_round_trip_of_random_keys(tmp_path, name, of_shapes):
    fd.train.save(tmp_path / name, None, keys(3))
    blank = lambda config: (
        eqx.filter_eval_shape(lambda: keys(0)) if of_shapes else keys(0)
    )
    _, loaded = fd.train.load(tmp_path / name, blank)
    expected = keys(3)
    assert jtu.tree_map(lambda leaf: leaf.dtype, loaded) == jtu.tree_map(
        lambda leaf: leaf.dtype, expected
    )
    draw = lambda tree: (jr.normal(tree["key"]), jax.vmap(jr.normal)(tree["row"]))
    assert_same(draw(loaded), draw(expected))


def test_random_key_of_another_kind(tmp_path):
    fd.train.save(tmp_path / "key", None, jr.key(0))
    with pytest.raises(ValueError, match=r"key<fry>\[\] in the file, key<rbg>\[\]"):
        fd.train.load(tmp_path / "key", lambda config: jr.key(0, impl="rbg"))


@pytest.mark.parametrize("name", ["state", "state.safetensors"])
def test_round_trip_of_a_state(tmp_path, name):
    optim = optax.adam(1e-3)
    create = lambda seed: fd.train.TrainState.create(
        fd.FlowMap(network(seed=seed)), optim, key=jr.key(seed)
    )
    fd.train.save(tmp_path / name, {}, create(0))
    _, loaded = fd.train.load(tmp_path / name, lambda config: create(1))
    assert_same(loaded, create(0))


def test_load_without_memory(saved):
    shape_only = lambda config: eqx.filter_eval_shape(
        fd.nn.MLP, 2, config["width"], 2, key=jr.key(1)
    )
    assert_same(fd.train.load(saved, shape_only)[1], network())


def test_first_line_is_json(tmp_path):
    saved = tmp_path / "map.fdx"
    fd.train.save(saved, {"width": 8}, network())
    header = json.loads(saved.read_bytes().split(b"\n")[0])
    assert header["config"] == {"width": 8}
    assert "float64[8, 2]" not in header["leaves"] and "float64[2, 8]" in header["leaves"]


def test_saving_again_replaces(saved):
    fd.train.save(saved, {"width": 4}, network(4))
    assert_same(fd.train.load(saved, make)[1], network(4))


def test_no_other_files(saved):
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        fd.train.load(tmp_path / "nothing", make)


@pytest.mark.parametrize(
    "content", [b"", b"weights", b"[1, 2]\n", b"{}\n", b"\x80\n\x00"]
)
@pytest.mark.parametrize("name", ["file", "file.safetensors"])
def test_not_a_checkpoint(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        fd.train.load(tmp_path / name, make)


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


def test_newer_format(saved):
    saved.write_bytes(saved.read_bytes().replace(*FORMATS[saved.suffix], 1))
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


def test_safetensors_are_read_by_others(tmp_path):
    from safetensors import numpy as others

    fd.train.save(tmp_path / "map.safetensors", {}, fd.FlowMap(network()))
    arrays = others.load_file(tmp_path / "map.safetensors")
    assert {*arrays} == {
        f"net.{layer}.{kind}"
        for layer in ("first", "hidden.0", "last")
        for kind in ("weight", "bias")
    }
    weight = network().first.weight
    np.testing.assert_array_equal(arrays["net.first.weight"], weight)


def test_safetensors_of_others(tmp_path):
    from safetensors import numpy as others

    others.save_file({"weight": np.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of flowdiffrax"):
        fd.train.load(tmp_path / "theirs.safetensors", make)


def test_safetensors_under_other_names(tmp_path):
    fd.train.save(tmp_path / "map.safetensors", {}, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"no array named b; it has \['a'\]"):
        fd.train.load(tmp_path / "map.safetensors", lambda config: {"b": jnp.ones(2)})


def test_safetensors_without_complex_numbers(tmp_path):
    with pytest.raises(TypeError, match="Cast, or save under a name"):
        fd.train.save(tmp_path / "map.safetensors", {}, jnp.asarray([1 + 2j]))
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r'pip install "flowdiffrax\[safetensors\]"'):
        fd.train.save(tmp_path / "map.safetensors", {}, network())


@pytest.mark.parametrize("tree", [{"a.b": 1.0, "a": {"b": 2.0}}, {"__metadata__": 1.0}])
def test_safetensors_of_names_that_clash(tmp_path, tree):
    with pytest.raises(ValueError, match="Two arrays would be named"):
        fd.train.save(tmp_path / "tree.safetensors", None, tree)


def test_safetensors_of_another_dtype(tmp_path):
    fd.train.save(tmp_path / "map.safetensors", None, {"a": np.arange(3, dtype="f4")})
    with pytest.raises(ValueError, match="first differences"):
        fd.train.load(tmp_path / "map.safetensors", lambda config: {"a": np.zeros(3)})


@pytest.mark.parametrize("name", ["map.fdx", "map.safetensors"])
def test_numbers_of_numpy(tmp_path, name):
    tree = {"whole": np.int64(2**40), "single": np.float32(1.5)}
    blank = {"whole": np.int64(0), "single": np.float32(0)}
    fd.train.save(tmp_path / name, None, tree)
    _, loaded = fd.train.load(tmp_path / name, lambda config: blank)
    assert loaded == tree
    assert all(type(loaded[key]) is type(value) for key, value in tree.items())


def test_changed_configuration(saved):
    content = saved.read_bytes()
    changed = content.replace(b"width", b"wihth", 1)
    assert changed != content
    saved.write_bytes(changed)
    with pytest.raises(ValueError, match="is damaged"):
        fd.train.load(saved, lambda config: network())


def test_keys_that_are_the_same_in_json(tmp_path):
    with pytest.raises(ValueError, match="the same in JSON"):
        fd.train.save(tmp_path / "map.fdx", {1: "a", "1": "b"}, network())
    fd.train.save(tmp_path / "map.fdx", {1: (2, 3)}, network())
    assert fd.train.load(tmp_path / "map.fdx", lambda c: network())[0] == {"1": [2, 3]}


def test_class_that_makes_the_tree(tmp_path):
    class Model(eqx.Module):
        rate: jax.Array

        def __init__(self, config):
            self.rate = jnp.zeros(config["size"])

    fd.train.save(tmp_path / "map.fdx", {"size": 3}, Model({"size": 3}))
    assert fd.train.load(tmp_path / "map.fdx", Model)[1].rate.shape == (3,)
