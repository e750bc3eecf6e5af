"""One small bank of every stored format, by name, for the tests that all formats must pass."""

from __future__ import annotations

from banks import make

from moekit.formats import WIDTHS, DenseBank, LatentBank, LowRankBank, NestedBank, PackedBank, TernaryBank

MADE = {
    "packed": lambda dense: PackedBank.quantise(dense, list(WIDTHS), 8),
    "low-rank": lambda dense: LowRankBank.factorise(dense, [1, 3, None, 5, 4, 2], 0),
    "low-rank and rows": lambda dense: LowRankBank.factorise(dense, {"gate": 2, "up": 3, "down": 1}, 3),
    "latent": lambda dense: LatentBank.factorise(dense, 2, 7),
    "latent down": lambda dense: LatentBank.factorise(dense, [1, 0, 0, 2, 2, 1], 7, share_down=5),
    "nested": lambda dense: NestedBank.quantise(dense, [2, 3, 4, 2, 5, 8], 2, [8, 4, 16, 8, 8, 3]),
    "ternary": lambda dense: TernaryBank.quantise(dense),
}


def bank_of(name: str, dense: DenseBank | None = None, **kind):
    """Six experts of 16 x 8 in a format, and what they were made from."""
    dense = dense or make(6, 16, 8, **kind)
    return MADE[name](dense), dense
