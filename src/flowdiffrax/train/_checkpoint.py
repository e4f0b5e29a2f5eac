import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._files import write_whole
from .._misc import check_callable

_FORMAT = 1


def save(path: str | os.PathLike, config: Any, tree: PyTree) -> None:
    """Writes a checkpoint: one line of JSON, then the arrays.

    The file appears whole or not at all: it is written beside its place and moved there,
    so that a run killed while saving keeps its last checkpoint.

    **Arguments:**

    - `path`: where to write; missing folders are made.
    - `config`: what is needed to rebuild the tree without its arrays; anything that
      JSON can hold.
    - `tree`: a map, a [`flowdiffrax.train.TrainState`][], or any PyTree. Its arrays,
      NumPy arrays and Python numbers are saved.

    **Raises:** `TypeError` for a configuration that JSON cannot hold.
    """
    path = pathlib.Path(path)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, tree)
    body = buffer.getvalue()
    header = {
        "format": _FORMAT,
        "config": config,
        "leaves": _describe(tree),
        "bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    try:
        line = json.dumps(header).encode() + b"\n"
    except TypeError as error:
        raise TypeError(
            f"`config` must be what JSON can hold, and comes before the tree: {error}."
        ) from error
    write_whole(path, line + body)


def load(path: str | os.PathLike, make: Callable[[Any], PyTree]) -> tuple[Any, PyTree]:
    """Reads a checkpoint.

    **Arguments:**

    - `path`: a file written by [`flowdiffrax.train.save`][].
    - `make`: called with the configuration, returns a tree of the same structure, whose
      arrays are then replaced. `equinox.filter_eval_shape` makes one without memory.

    **Returns:** the configuration and the tree.

    **Raises:** `FileNotFoundError` if there is no such file, and `ValueError` if it is
    no checkpoint, is damaged, is of a newer version, or holds arrays of other shapes or
    dtypes than `make` returns. What is no array, such as a network's scale, is for
    `make` to rebuild: keep it in the configuration.
    """
    check_callable(make, "make", "make(config)")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    line, newline, body = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
        file_format = int(header["format"])
        expected = header["bytes"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of flowdiffrax.") from error
    if file_format > _FORMAT:
        raise ValueError(
            f"{path} has format {file_format}, and this version of flowdiffrax reads up "
            f"to {_FORMAT}. Update flowdiffrax."
        )
    found = len(body), hashlib.sha256(body).hexdigest()
    if not newline or found != expected:
        raise ValueError(
            f"{path} is damaged: expected (bytes, sha256) {expected}; found {found}."
        )
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
            f"{len(leaves)}; first differences: {differing[:3] or 'in their number'}. "
            "Build the tree with the configuration that it was saved with."
        )
    return header["config"], eqx.tree_deserialise_leaves(io.BytesIO(body), like)


def _describe(tree: PyTree) -> list[str]:
    saved = (
        leaf
        for leaf in jtu.tree_leaves(tree)
        if eqx.is_array_like(leaf) or hasattr(leaf, "dtype")
    )
    return [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in saved]
