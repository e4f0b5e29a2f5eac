import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._check import check_callable
from .._io import import_extra, write_whole

_FORMAT = 2


_SAFETENSORS = ".safetensors"


def save(path: str | os.PathLike, config: Any, tree: PyTree) -> None:
    """Writes a checkpoint: one line of JSON, then the arrays.

    The write is atomic: the file is written under a temporary name and then moved into
    place, so a run that is killed while saving keeps its last checkpoint. Nothing is
    pickled.

    **Arguments:**

    - `path`: the file to write. Missing folders are created. If the name ends in
      `.safetensors`, the file has that format, which other libraries can read: each
      array is named by its path in the tree, such as `net.first.weight`, and the JSON is
      stored as metadata. This needs safetensors:
      `pip install "flowdiffrax[safetensors]"`.
    - `config`: the settings needed to rebuild the tree without its arrays. It must be
      serialisable as JSON, and is returned as JSON stores it: tuples become lists, and
      dictionary keys become strings.
    - `tree`: a map, a [`flowdiffrax.train.TrainState`][], or any PyTree. Its JAX and
      NumPy arrays, random keys and Python numbers are saved.

    **Raises:** `TypeError` if `config` cannot be stored as JSON, or an array cannot be
    stored as safetensors (complex128, for example); `ValueError` if two keys of `config`
    become the same string, or two arrays get the same name in safetensors; `ImportError`
    if safetensors is needed but not installed.
    """
    path = pathlib.Path(path)
    header = {"format": _FORMAT, "config": config, "leaves": _describe(tree)}
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
    to_bytes = _to_safetensors if path.suffix == _SAFETENSORS else _to_lines
    write_whole(path, to_bytes(header, jtu.tree_map(_key_numbers, tree)))


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
    shapes or dtypes than `make` returns; `ImportError` for a `.safetensors` file if
    safetensors is not installed.
    """
    check_callable(make, "make", "make(config)", may_be_class=True)
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    from_bytes = _from_safetensors if path.suffix == _SAFETENSORS else _from_lines
    header, fill = from_bytes(path, path.read_bytes())
    like = make(header["config"])
    leaves = _describe(like)
    if leaves != header["leaves"]:
        differing = [
            f"{saved} in the file, {own} in `make`"
            for saved, own in zip(header["leaves"], leaves, strict=False)
            if saved != own
        ]
        raise ValueError(
            f"{path} holds {len(header['leaves'])} leaves and `make` returned "
            f"{len(leaves)}; first differences: {differing[:3] or 'only the number'}. "
            "Build the tree with the configuration that it was saved with."
        )
    filled = fill(jtu.tree_map(_key_numbers, like))
    return header["config"], jtu.tree_map(_as_key, filled, like)


def _is_saved(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) or hasattr(leaf, "dtype")


def _describe(tree: PyTree) -> list[str]:
    saved = filter(_is_saved, jtu.tree_leaves(tree))
    dtype = lambda leaf: leaf.dtype if _is_key(leaf) else jnp.result_type(leaf)
    return [f"{dtype(leaf)}{list(jnp.shape(leaf))}" for leaf in saved]


def _is_key(leaf: Any) -> bool:
    is_jax = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return is_jax and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_numbers(leaf: Any) -> Any:
    """Replaces a random key by its numbers, and returns other leaves unchanged."""
    if not _is_key(leaf):
        return leaf
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.eval_shape(jr.key_data, leaf) if is_shape else jr.key_data(leaf)


def _as_key(leaf: Any, like: Any) -> Any:
    return jr.wrap_key_data(leaf, impl=like.dtype._impl.name) if _is_key(like) else leaf


def _read_header(path: pathlib.Path, text: str | bytes) -> dict[str, Any]:
    """**Raises:** `ValueError` for an invalid header or an unsupported version."""
    try:
        header = json.loads(text)
        file_format = int(header["format"])
        _ = header["bytes"], header["sha256"], header["config"], header["leaves"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of flowdiffrax.") from error
    if file_format != _FORMAT:
        cure = "Update flowdiffrax." if file_format > _FORMAT else "Save it again."
        raise ValueError(
            f"{path} has format {file_format}, and this version of flowdiffrax reads "
            f"{_FORMAT}. {cure}"
        )
    return header


def _digest(header: dict[str, Any], body: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([header["config"], header["leaves"]]).encode())
    digest.update(body)
    return {"bytes": len(body), "sha256": digest.hexdigest()}


def _check_digest(path: pathlib.Path, header: dict[str, Any], body: bytes) -> None:
    found = _digest(header, body)
    expected = {name: header[name] for name in found}
    if found != expected:
        raise ValueError(f"{path} is damaged: expected {expected}; found {found}.")


# The default format: a line of JSON, followed by Equinox's serialisation.


def _to_lines(header: dict[str, Any], tree: PyTree) -> bytes:
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, tree)
    body = buffer.getvalue()
    return json.dumps({**header, **_digest(header, body)}).encode() + b"\n" + body


def _from_lines(path: pathlib.Path, content: bytes) -> tuple[dict[str, Any], Callable]:
    line, _, body = content.partition(b"\n")
    header = _read_header(path, line)
    _check_digest(path, header, body)
    return header, lambda like: eqx.tree_deserialise_leaves(io.BytesIO(body), like)


# Safetensors. We read raw bytes, since its NumPy reader does not support bfloat16.


def _name(path: jtu.KeyPath) -> str:
    return jtu.keystr(path, simple=True, separator=".") or "array"


def _to_safetensors(header: dict[str, Any], tree: PyTree) -> bytes:
    safetensors = import_extra("safetensors", "safetensors", "save")
    for_numpy = import_extra("safetensors.numpy", "safetensors", "save")
    leaves, _ = jtu.tree_flatten_with_path(tree)
    arrays = {}
    for path, leaf in leaves:
        if _is_saved(leaf):
            name = _name(path)
            if name in (*arrays, "__metadata__"):
                raise ValueError(
                    f"Two arrays would be named {name!r}, or safetensors reserves that "
                    f"name. Save under a name that does not end in `{_SAFETENSORS}`."
                )
            arrays[name] = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    as_bytes = {name: array.tobytes() for name, array in arrays.items()}
    header = {**header, **_digest(header, _in_order(as_bytes))}
    try:
        return for_numpy.save(arrays, {"flowdiffrax": json.dumps(header)})
    except (KeyError, safetensors.SafetensorError) as error:
        raise TypeError(
            f"Safetensors does not support every dtype: {error}. Cast, or save under a "
            f"name that does not end in `{_SAFETENSORS}`."
        ) from error


def _from_safetensors(
    path: pathlib.Path, content: bytes
) -> tuple[dict[str, Any], Callable]:
    safetensors = import_extra("safetensors", "safetensors", "load")
    length = int.from_bytes(content[:8], "little")
    try:
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]["flowdiffrax"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of flowdiffrax.") from error
    header = _read_header(path, metadata)
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    arrays = {name: bytes(array["data"]) for name, array in found}
    _check_digest(path, header, _in_order(arrays))

    def read(key_path, leaf):
        if not _is_saved(leaf):
            return leaf
        name = _name(key_path)
        if name not in arrays:
            raise ValueError(
                f"{path} has no array named {name}; it has {sorted(arrays)[:5]}, ... "
                "Build the tree with the configuration that it was saved with."
            )
        has_dtype = hasattr(leaf, "dtype")
        dtype = np.dtype(leaf.dtype) if has_dtype else np.asarray(leaf).dtype
        if len(arrays[name]) != dtype.itemsize * math.prod(jnp.shape(leaf)):
            raise ValueError(
                f"{path} holds {len(arrays[name])} bytes for {name}, but `make` returned "
                f"{dtype} of shape {jnp.shape(leaf)}. For a saved number or NumPy array, "
                "it must return one of the same dtype."
            )
        array = np.frombuffer(arrays[name], dtype).reshape(jnp.shape(leaf))
        if not has_dtype:
            return array.item()
        if isinstance(leaf, np.generic):
            return array[()]
        return array.copy() if isinstance(leaf, np.ndarray) else jnp.asarray(array)

    return header, lambda like: jtu.tree_map_with_path(read, like)


def _in_order(arrays: dict[str, bytes]) -> bytes:
    """All names and arrays, in an order independent of the order in the file."""
    return b"".join(name.encode() + arrays[name] for name in sorted(arrays))
