"""A plan, or one of several chunks of it, as one rank carries it out: which rows go where, and what each row is.

Shapes by suffix: W ranks, E experts, S rows of this rank sorted by expert, N rows sent (S times the plan's parts), R
rows received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.parallel.dispatch import Counts, DispatchPlan, Piece


@dataclass(frozen=True)
class Stage:
    """``sent`` int64 [N]: which sorted row each sent row is; ``rows`` [W][W]: the table of the exchange;
    ``segments``: (expert, part, rows) of what is received, in order.
    """

    sent: Tensor
    rows: list[list[int]]
    segments: list[tuple[int, int, int]]

    @classmethod
    def of(
        cls, plan: DispatchPlan, counts: Counts, rank: int, chunk: int = 0, chunks: int = 1, stay: bool | None = None
    ) -> Stage:
        """``chunk`` of ``chunks`` takes that share of every piece: chunks are disjoint and together the whole plan.

        ``stay`` True takes only rows that stay on their rank, False only those that leave it.
        """
        world = plan.layout.world
        first = _starts(counts)
        local = [0] * plan.layout.num_experts
        for e in range(plan.layout.num_experts):
            local[e] = (local[e - 1] + counts[rank][e - 1]) if e else 0
        rows = [[0] * world for _ in range(world)]
        sent: list[list[tuple[int, int]]] = [[] for _ in range(world)]
        segments: list[list[tuple[int, int, int]]] = [[] for _ in range(world)]
        for piece in sorted(plan.pieces):
            start, stop = _cut(piece, chunk, chunks)
            for source in range(world):
                base = first[source][piece.expert]
                low, high = max(start, base), min(stop, base + counts[source][piece.expert])
                if low >= high or stay not in (None, source == piece.rank):
                    continue
                rows[source][piece.rank] += high - low
                if source == rank:
                    here = local[piece.expert] - base
                    sent[piece.rank].append((here + low, here + high))
                if piece.rank == rank:
                    segments[source].append((piece.expert, piece.part, high - low))
        spans = [torch.arange(low, high) for target in sent for low, high in target]
        index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)
        return cls(index, rows, [segment for source in segments for segment in source])

    def named(self, ids: dict[tuple[int, int], int], device: torch.device) -> Tensor:
        """int64 [R]: the id of each received row's (expert, part); -1 where it has none."""
        names = torch.tensor([ids.get((e, p), -1) for e, p, _ in self.segments], dtype=torch.int64)
        repeats = torch.tensor([count for _, _, count in self.segments], dtype=torch.int64)
        return names.repeat_interleave(repeats).to(device)


def _starts(counts: Counts) -> list[list[int]]:
    """[W][E]: where each rank's tokens begin in the range of each expert."""
    reached = [0] * len(counts[0])
    starts = []
    for row in counts:
        starts.append(reached)
        reached = [a + b for a, b in zip(reached, row, strict=True)]
    return starts


def _cut(piece: Piece, chunk: int, chunks: int) -> tuple[int, int]:
    size = piece.stop - piece.start
    return piece.start + size * chunk // chunks, piece.start + size * (chunk + 1) // chunks
