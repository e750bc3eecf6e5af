"""Do stored experts look like what the plan says they were made of, where their exact numbers cannot be computed again?

Values that a method computed (calibrated rounding, factors) follow from calibration text that an output does not hold.
What can be shown without it: every matrix of every stored expert points the way of its own sources more than that of
any other expert of the layer, and its gate is like a gate, its up like an up. That finds experts that were swapped,
zeroed or mispaired; it does not find a single changed weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moekit.formats import DenseBank
from moekit.plan.layer import StoredExpert
from moekit.plan.recombine import recombined_expert
from moekit.plan.target import LayerTarget

if TYPE_CHECKING:
    from moekit.bank import ExpertWeights
    from moekit.checkpoint import Checkpoint

ROWS = 64
"""Rows of each matrix that are compared, spread evenly."""
SAME = 0.999
"""Source experts more alike than this cannot be told apart."""


class _Look(NamedTuple):
    """Sampled rows of one expert by matrix, flat and of length one (zeros stay zeros)."""

    matrices: dict[str, Tensor]

    @classmethod
    def of(cls, weights: ExpertWeights) -> _Look:
        size = weights.down.shape[1]
        halves = ("gate", "up") if weights.gate_up.shape[0] == 2 * size else ("up",)
        parts = dict(zip(halves, weights.gate_up.split(size), strict=True)) | {"down": weights.down}
        return cls({name: _direction(matrix) for name, matrix in parts.items()})


def unlike(source: Checkpoint, output: Checkpoint, target: LayerTarget) -> Iterator[str]:
    """One line per stored expert of a layer that does not look like what it should be made of."""
    name, layer = target.layer.name, target.layer
    looks = [_Look.of(source.bank(name, [e]).expert(0)) for e in range(layer.num_experts)]
    for index, stored in enumerate(target.experts):
        if stored is None:
            continue
        found = _Look.of(output.bank(name, [index]).expert(0))
        claimed = _claimed(source, target, stored)
        for matrix, direction in found.matrices.items():
            own = float(direction @ claimed.matrices[matrix])
            if not own > _best_other(direction, matrix, claimed, looks, stored):
                yield (
                    f"layer {name}: the {matrix} matrix of stored expert {index} is no more like its source "
                    f"{_shown(stored)} than like others"
                )
                break


def _claimed(source: Checkpoint, target: LayerTarget, stored: StoredExpert) -> _Look:
    sources = sorted({e for e, _ in stored.parts})
    bank: DenseBank = source.bank(target.layer.name, sources)
    local = StoredExpert(tuple((sources.index(e), c) for e, c in stored.parts), orders=stored.orders)
    return _Look.of(recombined_expert(bank, local))


def _best_other(direction: Tensor, matrix: str, claimed: _Look, looks: list[_Look], stored: StoredExpert) -> float:
    """The greatest cosine with the same matrix of an expert that has no part in it, or with its own other matrices."""
    mine = {e for e, _ in stored.parts}
    best = 0.0
    for expert, look in enumerate(looks):
        if expert not in mine and float(look.matrices[matrix] @ claimed.matrices[matrix]) < SAME:
            best = max(best, float(direction @ look.matrices[matrix]))
    for other, rows in claimed.matrices.items():
        if other != matrix and rows.shape == direction.shape:
            best = max(best, float(direction @ rows))
    return best


def _direction(matrix: Tensor) -> Tensor:
    rows = torch.linspace(0, matrix.shape[0] - 1, min(ROWS, matrix.shape[0])).long()
    flat = matrix[rows].float().flatten()
    return flat / flat.norm().clamp(min=1e-30)


def _shown(stored: StoredExpert) -> str:
    return " + ".join(str(e) for e, _ in stored.parts)
