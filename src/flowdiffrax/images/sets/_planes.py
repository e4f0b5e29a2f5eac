"""The layout that CIFAR-10 and ImageNet-32 share: one image per row, plane by plane."""

import pathlib

import numpy as np
from jaxtyping import UInt8

from ._files import damaged
from ._unpickle import unpickle_arrays

PIXELS = 3 * 32 * 32


def read_pickle(path: pathlib.Path, body: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and labels of a pickled batch."""
    try:
        batch = unpickle_arrays(body)
    except ValueError as error:
        raise damaged(path, error) from error
    return check_batch(path, batch)


def check_batch(path: pathlib.Path, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and labels of a batch, after checking that it has them."""
    if not {"data", "labels"} <= batch.keys():
        raise damaged(path, f"it holds {sorted(map(str, batch))}, not data and labels")
    data, labels = batch["data"], np.asarray(batch["labels"])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise damaged(path, "its data are not an array of uint8")
    if data.shape[1:] != (PIXELS,) or labels.shape != data.shape[:1]:
        raise damaged(path, f"data of shape {data.shape}, labels of {labels.shape}")
    return data, labels


def channels_last(rows: UInt8[np.ndarray, "n pixels"]) -> np.ndarray:
    """Views rows as images. Each row holds the red, the green and the blue plane."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
