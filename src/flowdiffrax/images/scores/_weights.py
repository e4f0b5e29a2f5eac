"""Reads files of network weights as NumPy arrays, without torch or running any code."""

import hashlib
import io
import json
import math
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..._io import StrPath
from ..sets._arrays import read_npz
from ..sets._files import damaged
from ..sets._unpickle import unpickle_arrays

Arrays = dict[str, np.ndarray]


# Five times the largest known file of a feature network.
_MAX_BYTES = 1 << 29


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


_LEGACY_VERSION = 1001


# The largest depth of nested dictionaries.
_MAX_DEPTH = 8


_STORAGES = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
}


_SAFETENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}


class Weights(NamedTuple):
    """The arrays of a file by name, and the file's sha256.

    Names in nested dictionaries are joined by dots.
    """

    arrays: Arrays
    sha256: str


class _Refused(pickle.UnpicklingError):
    pass


def read_weights(path: StrPath, cure: str) -> Weights:
    """Reads a file of weights in any supported format.

    The formats are torch's state dictionaries, in a zip or in the older form; `.npz`;
    safetensors; and pickles of nested dictionaries of NumPy arrays. The first bytes of
    the file decide which one it is.

    **Arguments:**

    - `path`: the file. A name that ends like `-6726825d.pth` contains, by torch's
      convention, the start of the file's sha256, which is checked.
    - `cure`: which file to fetch instead, for error messages.

    **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged,
    too large, in another format, or holds more than arrays.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no weights at {path}. {cure} Nothing is downloaded automatically."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise damaged(path, f"{path.stat().st_size} bytes", cure)
    body = path.read_bytes()
    sha256 = hashlib.sha256(body).hexdigest()
    expected = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if expected is not None and not sha256.startswith(expected[1]):
        raise damaged(path, f"sha256 {sha256}, but its name says {expected[1]}", cure)
    try:
        arrays = dict(_flat(_reader(body, path)()))
    except _Refused as error:
        raise ValueError(f"{path} was not read: {error}. {cure}") from None
    except Exception as error:
        # A damaged file may cause nearly any error.
        raise damaged(path, repr(error), cure) from error
    return Weights(arrays, sha256)


def check_shapes(
    path: StrPath, arrays: Arrays, shapes: dict[str, tuple[int, ...]], cure: str
) -> None:
    """Checks that the arrays have exactly these names and shapes.

    **Raises:** `ValueError` if they do not, or if a value is not finite.
    """
    missing = [name for name in shapes if name not in arrays]
    extra = [name for name in arrays if name not in shapes]
    wrong = [
        f"{name} of {arrays[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    faults = [("it lacks", missing), ("it also holds", extra), ("it has", wrong)]
    told = [f"{what} {_listed(names)}" for what, names in faults if names]
    if told:
        raise ValueError(f"{path} is for another network: {'; '.join(told)}. {cure}")
    not_finite = [name for name in shapes if not np.isfinite(arrays[name]).all()]
    if not_finite:
        raise damaged(path, f"values that are not finite in {_listed(not_finite)}", cure)


def _listed(names: list[str], room: int = 4) -> str:
    more = f" and {len(names) - room} more" if len(names) > room else ""
    return ", ".join(names[:room]) + more


def _reader(body: bytes, path: pathlib.Path) -> Callable[[], Any]:
    if body[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            names = [pathlib.PurePosixPath(name) for name in archive.namelist()]
            sizes = sum(member.file_size for member in archive.infolist())
        if sizes > 2 * _MAX_BYTES:
            raise _Refused(f"it unpacks to {sizes} bytes")
        if any(name.name == "constants.pkl" or "code" in name.parts for name in names):
            raise _Refused("it is a TorchScript program, not a state dictionary")
        if any(name.name == "data.pkl" for name in names):
            return lambda: _read_torch_zip(body)
        return lambda: read_npz(path)
    if body[8:9] == b"{":
        return lambda: _read_safetensors(body)
    if body[:1] == b"\x80" and _is_legacy(body):
        return lambda: _read_torch_legacy(body)
    if body[:1] in (b"\x80", b"(", b"}", b"c"):
        return lambda: _read_pickle(body)
    raise _Refused("it is not a zip, pickle or safetensors file")


def _flat(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or depth > _MAX_DEPTH:
        raise _Refused(f"it holds a {type(tree).__name__} where arrays are expected")
    for key, leaf in tree.items():
        # Inside a pickle, a stand-in for an array has the array as an attribute.
        leaf = getattr(leaf, "array", leaf)
        if isinstance(leaf, np.ndarray):
            yield f"{prefix}{key}", leaf
        else:
            yield from _flat(leaf, f"{prefix}{key}.", depth + 1)


def _read_pickle(body: bytes) -> dict[str, Any]:
    try:
        return unpickle_arrays(body)
    except ValueError as error:
        raise _Refused(str(error)) from None


def _read_safetensors(body: bytes) -> Arrays:
    (size,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + size])
    values = memoryview(body)[8 + size :]
    arrays = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _SAFETENSORS:
            raise _Refused(f"{name} has the unsupported dtype {about['dtype']}")
        start, stop = about["data_offsets"]
        if not 0 <= start <= stop <= len(values):
            raise ValueError(f"{name} ends at byte {stop} of {len(values)}")
        flat = np.frombuffer(values[start:stop], _SAFETENSORS[about["dtype"]])
        arrays[name] = flat.reshape(about["shape"]).copy()
    return arrays


# --- torch: a pickle that refers to separate storages ----------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage that has not been read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, storages: dict[str, bytes]) -> np.ndarray:
        storage, offset, shape, strides = self
        body = storages[storage.key]
        whole = (
            all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
            and len(shape) == len(strides)
            and len(body) == storage.size * storage.dtype.itemsize
            # No tensor of a state dictionary repeats a value of its storage.
            and math.prod(shape) <= storage.size
            and (0 in shape or self._last() < storage.size)
        )
        if not whole:
            raise ValueError(f"a tensor of shape {shape} does not fit in its storage")
        flat = np.frombuffer(body, storage.dtype)[offset:]
        steps = tuple(stride * flat.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()

    def _last(self) -> int:
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((length - 1) * stride for length, stride in steps)


class _Dict(dict):
    """Stands in for `OrderedDict`, and drops its attributes, the versions of modules."""

    def __setstate__(self, state: object):
        del state


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    del rest  # the gradient flag and hooks
    if not isinstance(storage, _Storage):
        raise _Refused("it holds a tensor without a storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *rest: Any) -> Any:
    del rest
    return tensor


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _TorchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) in _KNOWN:
            known = _KNOWN[module, name]
            # Return a new function each time, since a pickle may set attributes on it.
            return lambda *args: known(*args)
        raise _Refused(
            f"it asks for `{module}.{name}`, which was not called: it is a whole pickled "
            "module, or something other than a dictionary of tensors"
        )

    def persistent_load(self, pid: Any, /) -> Any:
        # ("storage", type, key, device, length); the older form adds views of storages.
        kind, code, key, _, size, *view = pid
        known = kind == "storage" and code in _STORAGES.values()
        if not known or not isinstance(size, int) or (view and view[0] is not None):
            raise _Refused(f"it refers to {pid!r}")
        return _Storage(str(key), np.dtype(code), size)


def _resolve(tree: Any, storages: dict[str, bytes], depth: int = 0) -> Any:
    if isinstance(tree, dict) and depth <= _MAX_DEPTH:
        return {key: _resolve(leaf, storages, depth + 1) for key, leaf in tree.items()}
    return tree.of(storages) if isinstance(tree, _Tensor) else tree


def _read_torch_zip(body: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        inside = {tuple(name.split("/", 1))[-1]: name for name in archive.namelist()}
        if archive.read(inside.get("byteorder", inside["data.pkl"]))[:3] == b"big":
            raise _Refused("it was written on a big-endian machine")
        tree = _TorchUnpickler(io.BytesIO(archive.read(inside["data.pkl"]))).load()
        parts = [key for key in inside if key.startswith("data/")]
        storages = {key[5:]: archive.read(inside[key]) for key in parts}
    return _resolve(tree, storages)


def _is_legacy(body: bytes) -> bool:
    try:
        return _TorchUnpickler(io.BytesIO(body)).load() == _LEGACY_MAGIC
    except Exception:
        # What cannot be read is not the magic number.
        return False


def _read_torch_legacy(body: bytes) -> Any:
    file = io.BytesIO(body)
    load = lambda: _TorchUnpickler(file).load()
    _, version, system, tree = load(), load(), load(), load()
    if version != _LEGACY_VERSION or not system.get("little_endian", True):
        raise _Refused(f"it has version {version}, from a machine with {system}")
    sizes: dict[str, int] = {}
    for tensor in _tensors(tree):
        sizes[tensor.storage.key] = tensor.storage.dtype.itemsize
    storages = {}
    for key in load():
        (number,) = struct.unpack("<q", file.read(8))
        # `_Tensor.of` compares lengths, so a truncated file does not pass.
        storages[str(key)] = file.read(max(0, number) * sizes.get(str(key), 0))
    return _resolve(tree, storages)


def _tensors(tree: Any, depth: int = 0) -> Iterator[_Tensor]:
    if isinstance(tree, dict) and depth <= _MAX_DEPTH:
        for leaf in tree.values():
            yield from _tensors(leaf, depth + 1)
    elif isinstance(tree, _Tensor):
        yield tree
