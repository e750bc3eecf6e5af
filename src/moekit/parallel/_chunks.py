"""Sparse all-gather and reduce-scatter: chosen chunks go from the rank that owns them to others, and sums come back.

A chunk is one row of stacked tensors (an expert, or a slice of one). ``moves`` says which chunk goes where; ownership
and moves are known to every rank. What is gathered lies in the order of :func:`incoming`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.parallel._world import World
from moekit.parallel.exchange import bytes_of


class Move(NamedTuple):
    """A copy of ``chunk`` goes from ``source``, which owns it, to ``target``; sums of gradients go the other way."""

    source: int
    target: int
    chunk: int


def incoming(moves: Sequence[Move], rank: int) -> list[int]:
    """The chunks that a rank gathers, by source and then chunk."""
    return [move.chunk for move in sorted(moves) if move.target == rank]


@dataclass
class Arriving:
    """Tensors under way; :meth:`wait` is called once."""

    finish: Callable[[], list[Tensor]]

    def wait(self) -> list[Tensor]:
        return self.finish()


def start_gather(
    world: World, tensors: Sequence[Tensor], places: Mapping[int, int], moves: Sequence[Move], what: str = "weights"
) -> Arriving:
    """Begin the sparse all-gather of ``tensors`` [N, ..]; ``places`` is chunk -> row of the chunks held here.

    Gives as many tensors [M, ..] with the M chunks that come here. One message per pair of ranks and tensor.
    """
    sent = _by_peer(moves, source=world.rank)
    parcels = {target: [places[c] for c in chunks] for target, chunks in sent.items()}
    counts = {source: len(chunks) for source, chunks in _by_peer(moves, target=world.rank).items()}
    return _swap(world, [_pick(tensors, rows) for rows in parcels.values()], list(parcels), counts, tensors, what)


def start_reduce(
    world: World,
    foreign: Sequence[Tensor],
    into: Sequence[Tensor],
    places: Mapping[int, int],
    moves: Sequence[Move],
    what: str = "gradients",
) -> Arriving:
    """Begin the sparse reduce-scatter: ``foreign`` [M, ..], as gathered, is added to ``into`` [N, ..] of the owners.

    Waiting adds what arrived, in the order of ranks: sums, never means. Returns ``into``.
    """
    received = _by_peer(moves, target=world.rank)
    bounds, start = {}, 0
    for source, chunks in received.items():
        bounds[source] = slice(start, start + len(chunks))
        start += len(chunks)
    own = _by_peer(moves, source=world.rank)
    counts = {target: len(chunks) for target, chunks in own.items()}
    parcels = [[t[rows] for t in foreign] for rows in bounds.values()]
    arriving = _swap(world, parcels, list(bounds), counts, into, what)

    def finish() -> list[Tensor]:
        sums = arriving.wait()
        rows = [places[c] for chunks in own.values() for c in chunks]
        for total, part in zip(into, sums, strict=True):
            for row, value in zip(rows, part, strict=True):
                total[row] += value
        return list(into)

    return Arriving(finish)


def gather_chunks(
    world: World, tensors: Sequence[Tensor], places: Mapping[int, int], moves: Sequence[Move]
) -> list[Tensor]:
    """The sparse all-gather with gradients: its backward is the sparse reduce-scatter.

    Every rank enters the backward if what it gathered, be it nothing, is part of its loss.
    """
    anchor = tensors[0].new_zeros((), requires_grad=torch.is_grad_enabled())
    return list(_GatherChunks.apply(world, places, tuple(moves), anchor, *tensors))


class _GatherChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, world: World, places: Mapping[int, int], moves: Any, *tensors: Tensor) -> Any:
        ctx.world, ctx.places, ctx.moves = world, places, moves
        ctx.shapes = [t.shape for t in tensors[1:]]
        return tuple(start_gather(world, tensors[1:], places, moves).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        into = [g.new_zeros(shape) for g, shape in zip(grads, ctx.shapes, strict=True)]
        start_reduce(ctx.world, [g.contiguous() for g in grads], into, ctx.places, ctx.moves).wait()
        return None, None, None, None, *into


def _by_peer(moves: Sequence[Move], source: int | None = None, target: int | None = None) -> dict[int, list[int]]:
    """Chunks by target of what ``source`` sends, or by source of what ``target`` receives; in order."""
    if source is not None:
        chosen = sorted((m.target, m.chunk) for m in moves if m.source == source)
    else:
        chosen = sorted((m.source, m.chunk) for m in moves if m.target == target)
    return {peer: [chunk for _, chunk in group] for peer, group in groupby(chosen, key=lambda pair: pair[0])}


def _pick(tensors: Sequence[Tensor], rows: list[int]) -> list[Tensor]:
    """Rows of each tensor; neighbours are sent from where they lie."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return [t.detach()[rows[0] : rows[0] + len(rows)].contiguous() for t in tensors]
    return [t.detach()[torch.tensor(rows, device=t.device)] for t in tensors]


def _swap(
    world: World,
    parcels: Sequence[Sequence[Tensor]],
    targets: Sequence[int],
    counts: Mapping[int, int],
    like: Sequence[Tensor],
    what: str,
) -> Arriving:
    """Send each parcel to its target and receive ``counts`` rows from each source, in the shapes of ``like``."""
    total, start, work = sum(counts.values()), 0, []
    out = [t.new_empty(total, *t.shape[1:]) for t in like]
    for target, parcel in zip(targets, parcels, strict=True):
        level = world.grid.level(world.rank, target)
        for tensor in parcel:
            world.traffic.add(what, level, len(tensor), tensor.numel() * tensor.element_size())
            work.append(dist.P2POp(dist.isend, bytes_of(tensor), group=world.weights, group_peer=target))
    for source, count in counts.items():
        for tensor in out:
            work.append(
                dist.P2POp(dist.irecv, bytes_of(tensor[start : start + count]), group=world.weights, group_peer=source)
            )
        start += count
    doing = f"moving {what}"
    with world.waiting(doing):
        handles = dist.batch_isend_irecv(work) if work else []

    def finish() -> list[Tensor]:
        with world.waiting(doing):
            for handle in handles:
                handle.wait()
        return out

    return Arriving(finish)
