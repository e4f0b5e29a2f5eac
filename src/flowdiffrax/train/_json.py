"""What JSON can hold, and how two configurations differ."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plain(value: Any, name: str) -> Any:
    """Converts a value to strict JSON, which every reader accepts."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        # NumPy does not have bfloat16.
        value = np.asarray(value, np.float64 if is_float else None).tolist()
    if isinstance(value, list | tuple):
        return [plain(entry, name) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int | None):
        return value
    raise TypeError(f"`{name}` must be a number, or JSON; got {type(value).__name__}.")


def differences(found: Any, own: Any) -> str:
    if not (isinstance(found, dict) and isinstance(own, dict)):
        return f"{found} there, {own} here"
    absent = "absent"
    differing = [
        f"`{name}` is {found.get(name, absent)} there, {own.get(name, absent)} here"
        for name in sorted(found.keys() | own.keys())
        if found.get(name, absent) != own.get(name, absent)
    ]
    more = len(differing) - 3
    return "; ".join(differing[:3]) + (f"; and {more} more" if more > 0 else "")
