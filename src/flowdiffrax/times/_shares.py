from collections.abc import Sequence

from .._check import check_positive


def split_by_shares(size: int, shares: tuple[float, ...]) -> list[slice]:
    """Splits `size` rows into consecutive slices in proportion to the shares.

    **Raises:** `ValueError` if a share gets no row.
    """
    ends = [round(size * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    slices = [slice(low, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]
    if any(part.start == part.stop for part in slices):
        raise ValueError(f"A batch of {size} is too small for the shares {shares}.")
    return slices


def check_shares(shares: tuple[float, ...], parts: Sequence) -> None:
    """**Raises:** `ValueError` unless there is one positive share for each part."""
    check_one_each("share", shares, parts)
    check_positive(shares, "shares")


def check_one_each(name: str, numbers: Sequence, parts: Sequence) -> None:
    """**Raises:** `ValueError` without one number for each part, or without parts."""
    have, need = len(numbers), len(parts)
    if have != need or need == 0:
        raise ValueError(f"Expected one {name} for each part; got {have} for {need}.")
