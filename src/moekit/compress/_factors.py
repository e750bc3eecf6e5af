"""Experts as factors: their matrices one by one, and which of these a rank makes smaller.

Shapes by suffix: R rows, C columns, I hidden units, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from moekit.bank import ExpertWeights

Matrices = Mapping[str, Tensor]
"""By part: "gate" (if gated) and "up" [I, H], "down" [H, I]."""


def matrices(weights: ExpertWeights) -> dict[str, Tensor]:
    """The matrices of one expert, views of its weights."""
    parts = weights.gate_up.split(weights.down.shape[1])
    return {**dict(zip(("gate", "up")[-len(parts) :], parts, strict=True)), "down": weights.down}


def biases(experts: Iterable[ExpertWeights]) -> list[dict[str, Tensor]]:
    """What banks of factors take as ``biases``; empty for a family without."""
    found = [(w.gate_up_bias, w.down_bias) for w in experts]
    return [{"gate_up": first, "down": second} for first, second in found if first is not None and second is not None]


def shrinks(matrix: Tensor, rank: int, rows: int = 0) -> bool:
    """Whether factors of this rank, with so many whole rows beside them, hold fewer numbers than the matrix [R, C]."""
    height, width = matrix.shape
    return rank * (height + width) + rows * width < height * width
