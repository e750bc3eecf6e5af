"""What runs where: who stores which part of which expert, which tokens go to which rank, which weights move there.

The tokens of one expert are counted over all ranks: rank 0's first, each rank's in its own order. A plan cuts that
range [0, load) into pieces and gives each to a rank. Every rank makes the same plan from the same gathered counts, so
plans must be pure and deterministic; nothing else is ever agreed upon.

An expert may be stored in ``slices`` of its intermediate size, each on a rank of its own; ``parts`` of the plan (a
divisor) says into how many partial sums its output is cut: each token then goes to one rank for every part, and the
rank needs the ``slices / parts`` slices of that part. Without slices both are 1.
Shapes by suffix: W ranks, E experts, U units (expert e, slice j: unit e * slices + j).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from moekit.parallel._chunks import Move
from moekit.parallel._errors import ParallelError

Counts = Sequence[Sequence[int]]
"""[W][E]: rows of each rank for each expert."""


@dataclass(frozen=True)
class Layout:
    """Who stores what, and who keeps its optimiser state: ``owner`` [U] is a rank for every unit."""

    world: int
    owner: tuple[int, ...]
    slices: int = 1

    def __post_init__(self) -> None:
        if self.slices < 1 or not self.owner or len(self.owner) % self.slices:
            raise ParallelError(f"{len(self.owner)} units are no whole number of experts in {self.slices} slices each")
        wrong = [rank for rank in self.owner if not 0 <= rank < self.world]
        if wrong:
            raise ParallelError(f"this layout is for {max(wrong) + 1} or more ranks, but there are {self.world}")

    @classmethod
    def contiguous(cls, num_experts: int, world: int) -> Layout:
        """Plain expert parallelism: the first experts on rank 0 and so on, counts as even as they can be."""
        return cls(world, tuple(e * world // num_experts for e in range(num_experts)))

    @property
    def num_experts(self) -> int:
        return len(self.owner) // self.slices

    def own(self, rank: int) -> list[int]:
        """The units that a rank stores, in the order in which it stores them."""
        return [unit for unit, owner in enumerate(self.owner) if owner == rank]

    @cached_property
    def fingerprint(self) -> int:
        """63 bits, equal where layouts are."""
        text = repr((self.world, self.owner, self.slices)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class Piece(NamedTuple):
    """Tokens [start, stop) of ``expert`` are computed by ``rank``, which does ``part`` of the expert."""

    expert: int
    part: int
    start: int
    stop: int
    rank: int


@dataclass(frozen=True)
class DispatchPlan:
    """``pieces`` in any order; ``copies`` are (unit, rank) held beyond what the pieces need (replicas made before)."""

    layout: Layout
    pieces: tuple[Piece, ...]
    parts: int = 1
    copies: tuple[tuple[int, int], ...] = ()

    def units(self, expert: int, part: int) -> range:
        """The units that one part of an expert is made of."""
        slices = self.layout.slices
        each = slices // self.parts
        first = expert * slices + part * each
        return range(first, first + each)

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Which weights travel: what a rank computes with or holds a copy of, and does not own."""
        wanted = {(unit, p.rank) for p in self.pieces if p.start < p.stop for unit in self.units(p.expert, p.part)}
        owner = self.layout.owner
        return tuple(sorted(Move(owner[u], rank, u) for u, rank in wanted | set(self.copies) if owner[u] != rank))

    def rows(self) -> list[int]:
        """[W]: rows that each rank computes."""
        total = [0] * self.layout.world
        for piece in self.pieces:
            total[piece.rank] += piece.stop - piece.start
        return total

    def check(self, counts: Counts) -> DispatchPlan:
        """The plan itself, if it does what these counts ask for.

        Raises ParallelError: another number of ranks or experts, parts that do not divide the slices, a rank or expert
        that does not exist, a token that is computed never or twice.
        """
        layout = self.layout
        if len(counts) != layout.world:
            raise ParallelError(
                f"this plan is for {layout.world} ranks, but {len(counts)} take part: make it for the ranks there are"
            )
        if any(len(row) != layout.num_experts for row in counts):
            raise ParallelError(f"this plan is for {layout.num_experts} experts, the routing for {len(counts[0])}")
        if self.parts < 1 or layout.slices % self.parts:
            raise ParallelError(f"experts stored in {layout.slices} slices cannot be computed in {self.parts} parts")
        for unit, rank in self.copies:
            if not (0 <= unit < len(layout.owner) and 0 <= rank < layout.world):
                raise ParallelError(f"the plan copies unit {unit} to rank {rank}, and one of them does not exist")
        covered: dict[tuple[int, int], list[Piece]] = {}
        for piece in self.pieces:
            if not (0 <= piece.expert < layout.num_experts and 0 <= piece.rank < layout.world):
                raise ParallelError(f"the plan names expert {piece.expert} on rank {piece.rank}, which does not exist")
            if piece.start < piece.stop:
                covered.setdefault((piece.expert, piece.part), []).append(piece)
        loads = [sum(column) for column in zip(*counts, strict=True)]
        for expert, load in enumerate(loads):
            for part in range(self.parts):
                _check_cover(expert, load, sorted(covered.pop((expert, part), []), key=lambda p: p.start))
        if covered:
            expert, part = next(iter(covered))
            raise ParallelError(f"the plan computes part {part} of expert {expert}, which has {self.parts} parts")
        return self


Planner = Callable[[Counts, Layout], DispatchPlan]
"""What makes a plan of gathered counts: pure and deterministic, since every rank calls it alone."""


def native(counts: Counts, layout: Layout) -> DispatchPlan:
    """Plain expert parallelism: every token goes where its expert (every slice of it) is stored, no weight moves."""
    loads = [sum(column) for column in zip(*counts, strict=True)]
    pieces = (
        Piece(expert, part, 0, load, layout.owner[expert * layout.slices + part])
        for expert, load in enumerate(loads)
        for part in range(layout.slices)
        if load
    )
    return DispatchPlan(layout, tuple(pieces), parts=layout.slices)


def _check_cover(expert: int, load: int, pieces: Sequence[Piece]) -> None:
    reached = 0
    for piece in pieces:
        if piece.start != reached:
            what = "twice" if piece.start < reached else "by nobody"
            first = min(piece.start, reached)
            raise ParallelError(f"token {first} of expert {expert} is computed {what}: the plan's pieces must tile it")
        reached = piece.stop
    if reached != load:
        raise ParallelError(f"expert {expert} has {load} tokens, the plan's pieces cover {reached} of them")
