"""Options that several methods have in common, held against what they can be."""

from __future__ import annotations

from moekit.errors import OptionError


def check_group_size(method: str, group_size: int) -> None:
    """OptionError unless so many weights can share a scale."""
    if group_size < 1:
        raise OptionError(f"{method}: group_size={group_size} must be positive; 64 and 128 are usual")


def check_price(method: str, price: float, free: str) -> None:
    """OptionError for what running more costs, unless it is a number from 0 up; ``free`` is what 0 does."""
    if not 0 <= price < float("inf"):
        raise OptionError(f"{method}: price={price} must be at least 0 (0 {free})")
