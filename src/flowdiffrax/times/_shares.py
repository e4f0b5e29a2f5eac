def split_by_shares(size: int, shares: tuple[float, ...]) -> list[slice]:
    """Splits `size` rows into consecutive slices in proportion to the shares.

    **Raises:** `ValueError` if a share gets no row.
    """
    ends = [round(size * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    slices = [slice(low, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]
    if any(part.start == part.stop for part in slices):
        raise ValueError(
            f"A batch of {size} is too small for the shares {shares}: one of them gets "
            "nothing. Use a larger batch or fewer shares."
        )
    return slices


def check_shares(shares: tuple[float, ...], number: int, of: str) -> None:
    """**Raises:** `ValueError` unless there is one positive share for each part."""
    if len(shares) != number or number == 0:
        raise ValueError(
            f"There must be one share for each of the {of}, and at least one; got "
            f"{number} {of} and {len(shares)} shares."
        )
    if min(shares) <= 0:
        raise ValueError(f"`shares` must be positive; got {shares}.")
