"""How many groups a layer has: in llm-awq's first and second format padded, and not stored."""

from __future__ import annotations

from torch import Tensor

PADDED_GROUP_SIZES = (128, 64, 32, 256)
"""Those that upstream's `calculate_zeros_width` knows (any multiple of 128), likeliest first."""
OCTET = 8


def zero_width(k: int, group_size: int) -> int:
    """Upstream's `calculate_zeros_width`: an eighth of the groups that scales have room for."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    width = -(-(k // group_size) // OCTET)
    return -(-width // multiple) * multiple


def padded_groups(k: int) -> list[int]:
    """Every number of groups, padding included, that a layer of K inputs may have."""
    sizes = (size for size in PADDED_GROUP_SIZES if k % size == 0)
    return sorted({OCTET * zero_width(k, size) for size in sizes})


def infer_group_size(scales: Tensor, in_features: int) -> int:
    """The group size of padded scales.

    The number of rows leaves one candidate nearly always; small layers, where padding makes two
    sizes equal, are told apart by how many rows are not padding.

    Args:
        scales: (groups and padding, N).

    Raises:
        ValueError: no group size fits.
    """
    rows = scales.shape[0]
    fitting = [
        size
        for size in PADDED_GROUP_SIZES
        if in_features % size == 0 and rows == OCTET * zero_width(in_features, size)
    ]
    if len(fitting) > 1:
        used = int((scales != 0).any(dim=1).sum())
        fitting = [size for size in fitting if in_features // size == used]
    if not fitting:
        raise ValueError(
            f"scales {tuple(scales.shape)} fit no group size of {sorted(PADDED_GROUP_SIZES)} for "
            f"{in_features} inputs"
        )
    return fitting[0]


def group_size_of(in_features: int, groups: int) -> int:
    """The group size of scales without padding.

    Raises:
        ValueError: the inputs do not divide into so many groups.
    """
    if groups < 1 or in_features % groups:
        raise ValueError(f"{in_features} inputs do not divide into {groups} groups")
    return in_features // groups


def allowed_groups(in_features: int, found: tuple[int, ...]) -> list[int]:
    """Numbers of groups, without padding, that a header may have.

    Any group size will do. A number that does not divide the inputs is answered with the usual
    ones, for the message to suggest.

    Args:
        found: the number of groups in the header; empty for a tensor without dimensions.
    """
    if found and found[0] > 0 and in_features % found[0] == 0:
        return [found[0]]
    return [in_features // size for size in (128, 64, 32) if in_features % size == 0]
