import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from .._tree import rows_not_finite

# Fewer would leave too few to hold out.
_FEWEST = 50


@dataclasses.dataclass(frozen=True)
class Simulations:
    """Simulations that can be learned from.

    **Attributes:**

    - `thetas`: the parameters, one row for each simulation.
    - `xs`: the observations: one row each, or sets of rows with zeros where `mask` is
      false.
    - `mask`: which rows of the sets are there; `None` if observations are vectors.
    - `num_dropped`: how many simulations were dropped, since they had failed.
    """

    thetas: Float[np.ndarray, "simulations size"]
    xs: Float[np.ndarray, "simulations ..."]
    mask: Bool[np.ndarray, "simulations rows"] | None
    num_dropped: int

    def take(self, index: Any) -> "Simulations":
        """Some of them."""
        mask = None if self.mask is None else self.mask[index]
        return Simulations(self.thetas[index], self.xs[index], mask, self.num_dropped)


def read_simulations(thetas: Any, xs: Any, mask: Any) -> Simulations:
    """Checks simulations, and drops those that failed.

    **Raises:** `ValueError` for shapes that do not match, too few simulations, or
    parameters that never vary.
    """
    thetas = _as_floats(thetas, "thetas")
    if thetas.ndim != 2 or thetas.shape[1] == 0:
        raise ValueError(
            "`thetas` has one row of parameters for each simulation; got shape "
            f"{thetas.shape}. For a single parameter, pass `thetas[:, None]`."
        )
    xs, mask = _as_observations(xs, mask)
    if len(xs) != len(thetas):
        raise ValueError(
            f"`thetas` and `xs` have one row for each simulation; got {len(thetas):,} "
            f"and {len(xs):,}."
        )
    # What is masked out is not read.
    xs = xs if mask is None else np.where(mask[..., None], xs, 0)
    bad = rows_not_finite((thetas, xs))
    kept = Simulations(thetas, xs, mask, int(bad.sum())).take(~bad)
    if len(kept.thetas) < _FEWEST:
        raise ValueError(
            f"At least {_FEWEST} simulations are needed; got {len(kept.thetas)}, and "
            f"{kept.num_dropped} more that are not finite."
        )
    constant = np.flatnonzero(kept.thetas.std(0) == 0)
    if constant.size > 0:
        raise ValueError(
            f"Parameters {constant.tolist()} are the same in all simulations. Leave them "
            "out of `thetas`."
        )
    return kept


def _as_floats(values: Any, name: str) -> Float[np.ndarray, "..."]:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"`{name}` must be real numbers; got {values.dtype}.")
    return values.astype(np.float64)


def _as_observations(xs: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors, or sets of one shape with their mask."""
    if isinstance(xs, Sequence):
        sets = [_as_floats(each, "xs") for each in xs]
        shapes = {each.shape for each in sets}
        if len({shape[1:] for shape in shapes}) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(
                "A list of `xs` has one set for each simulation, of shape (rows, size) "
                f"with the same size; got shapes {sorted(shapes)[:3]}."
            )
        if mask is not None:
            raise ValueError("A list of `xs` needs no `mask`: leave rows out instead.")
        most, size = max(shape[0] for shape in shapes), sets[0].shape[1]
        xs = np.zeros((len(sets), most, size))
        mask = np.zeros((len(sets), most), bool)
        for index, each in enumerate(sets):
            xs[index, : len(each)], mask[index, : len(each)] = each, True
        return xs, mask
    xs = _as_floats(xs, "xs")
    if xs.ndim not in (2, 3):
        raise ValueError(
            "`xs` has shape (simulations, size), or (simulations, rows, size) if an "
            f"observation is a set of rows; got {xs.shape}. Flatten images and series, "
            "or pass a summary of them."
        )
    if xs.ndim == 2:
        if mask is not None:
            raise ValueError("`mask` is for `xs` of shape (simulations, rows, size).")
        return xs, None
    mask = np.ones(xs.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != xs.shape[:2]:
        raise ValueError(
            f"`mask` has one entry for each row of a set, shape {xs.shape[:2]}; got "
            f"{mask.shape}."
        )
    return xs, mask
