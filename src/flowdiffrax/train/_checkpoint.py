"""One file for a configuration and a tree: safetensors, with JSON as its metadata."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from .._check import check_callable
from .._io import write_whole
from ._json import differences
from ._leaves import describe, impl, is_array, is_key, is_saved, key_numbers

_FORMAT = 1

# Every version of safetensors stores these, and its NumPy reader returns them. Arrays of
# other dtypes are stored as bytes.
_DTYPES = {"bool", "bfloat16", "float16", "float32", "float64"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}


def save(path: str | os.PathLike, config: Any, tree: PyTree) -> None:
    """Writes a checkpoint, which is a file in the safetensors format.

    The write is atomic: the file is written under a temporary name and then moved into
    place, so a run that is killed while saving keeps its last checkpoint. Nothing is
    pickled.

    Other libraries can read the file. Each array is named by its path in the tree, such
    as `net.first.weight`. If that name is taken, underscores are appended. Random keys
    are stored as their numbers. Arrays of dtypes that safetensors may lack, such as
    complex numbers and float8, are stored as bytes, in one more dimension. The metadata
    `flowdiffrax` is JSON: the configuration, the shapes and dtypes, and a checksum.

    **Arguments:**

    - `path`: the file to write, such as `map.safetensors`. Missing folders are created.
    - `config`: the settings needed to rebuild the tree without its arrays. It must be
      serialisable as JSON, and is returned as JSON stores it: tuples become lists, and
      dictionary keys become strings.
    - `tree`: a map, a [`flowdiffrax.train.TrainState`][], or any PyTree. Its JAX and
      NumPy arrays, random keys and Python numbers are saved.

    **Raises:** `TypeError` if `config` cannot be stored as JSON, or an array holds Python
    objects; `ValueError` if two keys of `config` become the same string.
    """
    try:
        text = json.dumps(config)
    except TypeError as error:
        raise TypeError(
            f"`config` must be serialisable as JSON, and comes before the tree: {error}."
        ) from error
    if json.dumps(json.loads(text)) != text:
        raise ValueError(
            "`config` has keys that are the same in JSON, which turns all keys into "
            f"strings: {text}."
        )
    leaves = _by_name(eqx.filter(tree, is_saved))
    header = {"format": _FORMAT, "config": config, "leaves": _describe(leaves)}
    # Safetensors needs contiguous arrays.
    as_numpy = lambda leaf: np.asarray(key_numbers(leaf), order="C")
    arrays = {name: as_numpy(leaf) for name, leaf in leaves.items()}
    metadata = json.dumps({**header, "sha256": _digest(header, arrays)})
    stored = {
        name: array if str(array.dtype) in _DTYPES else array[..., None].view(np.uint8)
        for name, array in arrays.items()
    }
    content = safetensors.numpy.save(stored, {"flowdiffrax": metadata})
    write_whole(pathlib.Path(path), content)


def load(path: str | os.PathLike, make: Callable[[Any], PyTree]) -> tuple[Any, PyTree]:
    """Reads a checkpoint.

    **Arguments:**

    - `path`: a file written by [`flowdiffrax.train.save`][].
    - `make`: a function that takes the configuration and returns a tree of the same
      structure. The arrays of this tree are replaced by the saved ones. Use
      `equinox.filter_eval_shape` to build it without allocating memory.

    **Returns:** the configuration and the tree.

    Everything that is not saved, such as the `scale` of a network, is rebuilt by `make`,
    so keep it in the configuration.

    **Raises:** `FileNotFoundError` if the file does not exist; `ValueError` if it is not
    a checkpoint, is damaged, was written by a newer version, or holds arrays of other
    names, shapes or dtypes than `make` returns.
    """
    check_callable(make, "make", "make(config)", may_be_class=True)
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    header, arrays = _read(path)
    config = header["config"]
    like, rest = eqx.partition(make(config), is_saved)
    leaves = _by_name(like)
    if _describe(leaves) != header["leaves"]:
        raise ValueError(
            f"The tree that `make` returned does not match {path}: "
            f"{differences(header['leaves'], _describe(leaves))}. Build the tree with "
            "the configuration that it was saved with."
        )
    filled = [_fill(leaf, arrays[name]) for name, leaf in leaves.items()]
    return config, eqx.combine(jtu.tree_structure(like).unflatten(filled), rest)


def saved_config(path: pathlib.Path) -> Any:
    """The configuration in a checkpoint whose tree is not needed.

    **Raises:** `ValueError` as `load`.
    """
    return _read(path)[0]["config"]


def _by_name(tree: PyTree) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jtu.tree_leaves_with_path(tree):
        name = jtu.keystr(path, simple=True, separator=".") or "array"
        # Safetensors reserves a name, and `{"a.b": ..., "a": {"b": ...}}` has one twice.
        while name in leaves or name == "__metadata__":
            name += "_"
        leaves[name] = leaf
    return leaves


def _as_array(leaf: Any) -> Any:
    return leaf if is_array(leaf) else np.asarray(leaf)


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    return describe({name: _as_array(leaf) for name, leaf in leaves.items()}, {})


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    # Sorted, since safetensors orders arrays by dtype.
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header without its checksum, and the bytes of each array."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]["flowdiffrax"]
        header = json.loads(metadata)
        digest, file_format = header.pop("sha256"), int(header["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint of flowdiffrax.") from error
    if file_format != _FORMAT:
        raise ValueError(
            f"{path} has format {file_format}, and this version of flowdiffrax reads "
            f"{_FORMAT}. Update flowdiffrax."
        )
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    arrays = {name: np.frombuffer(entry["data"], np.uint8) for name, entry in found}
    if _digest(header, arrays) != digest:
        raise ValueError(f"{path} is damaged: its contents do not match its checksum.")
    return header, arrays


def _fill(like: Any, content: np.ndarray) -> Any:
    """The saved leaf, of the type of `like`, which has its shape and dtype."""
    if is_key(like):
        numbers = jax.eval_shape(jr.key_data, like)
        return jr.wrap_key_data(_fill(numbers, content), impl=impl(like))
    wanted = _as_array(like)
    array = content.view(wanted.dtype).reshape(wanted.shape)
    if isinstance(like, np.ndarray):
        return array.copy()
    if is_array(like):
        return jnp.asarray(array)
    return array[()] if isinstance(like, np.generic) else type(like)(array.item())
