"""Reads pickles of arrays, without running any code in them."""

import io
import math
import pickle
import re
from typing import Any

import numpy as np


def unpickle_arrays(body: bytes) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays, numbers, strings and lists of these.

    A pickle is a program that may call any function. This reader knows only the five
    names in the pickle of an array, and replaces each with its own code, so that not even
    NumPy's is run. It does not limit memory: first check the size and the checksum of a
    file from elsewhere.

    **Arguments:**

    - `body`: the pickle, of any protocol. Byte strings of Python 2 become strings.

    **Raises:** `ValueError` if the pickle asks for anything else, is damaged, or is not a
    dictionary.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(body), encoding="latin1").load()
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        # A damaged pickle may cause nearly any error.
        raise ValueError(f"not a complete pickle ({error!r})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"a pickled {type(tree).__name__} instead of a dictionary")
    unwrap = lambda leaf: leaf.array if isinstance(leaf, _Array) else leaf
    return {key: unwrap(leaf) for key, leaf in tree.items()}


class _Refused(pickle.UnpicklingError):
    pass


class _Dtype:
    """Stands in for `numpy.dtype`, and accepts only plain numbers."""

    def __init__(self, code: str, align: object = False, copy: object = True):
        del align, copy
        # Images need no objects, strings or structures.
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise _Refused(f"it holds values of the unsupported dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        # The state is the version, the byte order, and the parts of structured dtypes.
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray`, and accepts its pickled state."""

    array: np.ndarray

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, body = state
        self.array = _as_array(body, dtype, shape, "F" if is_fortran else "C")


def _as_array(body: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    # The byte strings of Python 2 arrive as text.
    body = body.encode("latin1") if isinstance(body, str) else body
    whole = (
        isinstance(body, bytes | bytearray)
        and isinstance(dtype, _Dtype)
        and isinstance(shape, tuple)
        and all(isinstance(length, int) and length >= 0 for length in shape)
        and len(body) == math.prod(shape) * dtype.dtype.itemsize
    )
    if not whole:
        raise _Refused("it holds an array whose parts do not fit together")
    return np.ndarray(shape, dtype.dtype, body, order=order).copy()


def _reconstruct(subtype: type, shape: tuple, code: object) -> _Array:
    del subtype, shape, code  # repeated in the state that follows
    return _Array()


def _frombuffer(body: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _as_array(body, dtype, shape, order)


def _encode(text: str, encoding: str) -> bytes:
    # Protocol 2 writes the bytes of Python 3 in this way.
    if encoding != "latin1":
        raise _Refused(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_CORES = ("core", "_core")


_KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    # NumPy 2 moved its modules; a pickle has the names of the version that wrote it.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORES},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in _CORES},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(
                f"the pickle asks for `{module}.{name}`, which arrays do not need; it "
                "was not called"
            )
        known = _KNOWN[module, name]
        # Return a new function each time, since a pickle may set attributes on it.
        return known if isinstance(known, type) else lambda *args: known(*args)
