"""Low rank among the ways to store an expert: what a rank takes, what it costs, and the experts as factors.

Every matrix of an expert becomes two factors by truncated SVD (``formats.lowrank``), in the dtype of the source. A
layer holds packed integers or factors, not both, so that the solver mixes either with experts left whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moekit.formats import DenseBank, LowRankBank

if TYPE_CHECKING:
    from moekit.checkpoint import MoELayer

SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
"""Bytes of the factors as a share of the matrix's: the ranks that are weighed."""


@dataclass(frozen=True, order=True)
class Rank:
    """An expert all of whose matrices are factors of this rank."""

    rank: int


def ranks_of(layer: MoELayer) -> tuple[Rank, ...]:
    """The ranks worth weighing in a layer, largest first: those that make its matrices [I, H] smaller."""
    rows, columns = layer.intermediate_size, layer.hidden_size
    wanted = (int(share * rows * columns / (rows + columns)) for share in SHARES)
    return tuple(Rank(rank) for rank in dict.fromkeys(wanted) if rank > 0)


def factor_nbytes(layer: MoELayer, rank: Rank, dtype: torch.dtype) -> int:
    """Bytes of one expert at a rank, biases included."""
    shape = layer.shape
    factors = matrices(layer) * rank.rank * (shape.hidden_size + shape.intermediate_size)
    rows = (1 + shape.gated) * shape.intermediate_size
    return (factors + (rows + shape.hidden_size) * shape.biased) * dtype.itemsize


def matrices(layer: MoELayer) -> int:
    """Matrices of one expert: gate, up and down, or the last two."""
    return 3 if layer.shape.gated else 2


def factored(bank: DenseBank, ranks: Sequence[Rank | None]) -> LowRankBank:
    """The experts as factors, one rank each; None leaves an expert whole."""
    return LowRankBank.factorise(bank, [None if rank is None else rank.rank for rank in ranks])


def truncated(bank: DenseBank, ranks: Sequence[Rank]) -> Iterator[tuple[Rank, LowRankBank]]:
    """The experts at one rank after another, from one decomposition: the first r columns and rows of the factors."""
    if not ranks:
        return
    most = factored(bank, [max(ranks)] * bank.num_experts)
    for each in ranks:
        kept = {name: _leading(name, tensor, each.rank) for name, tensor in most.stored.items()}
        yield each, replace(most, stored=kept, rank=dict.fromkeys(most.rank, (each.rank,) * bank.num_experts))


def _leading(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[:, :rank] if name.endswith(".left") else tensor[:rank] if name.endswith(".right") else tensor
