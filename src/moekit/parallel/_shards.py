"""A rank's share of a bank: whole experts, or slices of their intermediate size, and how they become experts again.

A slice keeps its gate rows before its up rows, so that it is itself an expert of a smaller width. Outputs of the slices
of an expert add up; its output bias is kept by slice 0 alone, where it is added once.
Shapes by suffix: E experts, U units (slices of experts), I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moekit.formats import DenseBank
from moekit.parallel._chunks import Move, incoming, start_gather
from moekit.parallel._errors import ParallelError
from moekit.parallel._world import World
from moekit.parallel.dispatch import Layout


def shard(bank: DenseBank, layout: Layout, rank: int) -> DenseBank:
    """The units that a rank stores, in the order of ``layout.own(rank)``, as a bank of its own (it may be empty).

    Raises ParallelError where the bank has another number of experts, or its width does not divide into slices.
    """
    if bank.num_experts != layout.num_experts:
        raise ParallelError(f"the layout is for {layout.num_experts} experts, but the bank has {bank.num_experts}")
    own, slices = layout.own(rank), layout.slices
    if bank.intermediate_size % slices:
        raise ParallelError(f"an intermediate size of {bank.intermediate_size} does not divide into {slices} slices")
    return _cut(bank, slices).select(own)


def _cut(bank: DenseBank, slices: int) -> DenseBank:
    """[E * slices] units; the inverse of :func:`assemble`."""
    if slices == 1:
        return bank
    units, gates, width = bank.num_experts * slices, 2 if bank.activation.gated else 1, bank.intermediate_size // slices

    def apart(tensor: Tensor) -> Tensor:
        """[E, G, ..] -> [E * slices, G / slices, ..], gate rows of a slice before its up rows."""
        rest = tensor.shape[2:]
        return tensor.reshape(-1, gates, slices, width, *rest).transpose(1, 2).reshape(units, gates * width, *rest)

    down = bank.down.reshape(-1, bank.hidden_size, slices, width).transpose(1, 2)
    bias = bank.down_bias
    if bias is not None:
        bias = bias.repeat_interleave(slices, 0) * first_slices(range(units), slices).to(bias)
    return replace(
        bank,
        gate_up=apart(bank.gate_up),
        down=down.reshape(units, bank.hidden_size, width),
        gate_up_bias=None if bank.gate_up_bias is None else apart(bank.gate_up_bias),
        down_bias=bias,
    )


def first_slices(units: Sequence[int], slices: int) -> Tensor:
    """float32 [U, 1]: 1 for the slice of an expert that keeps its output bias, 0 for the others."""
    return torch.tensor([float(unit % slices == 0) for unit in units]).view(-1, 1)


def assemble(bank: DenseBank, slices: int) -> DenseBank:
    """Experts [U / slices] from neighbouring slices [U]: widths side by side, output biases summed."""
    if slices == 1:
        return bank
    units = bank.num_experts // slices
    gates = 2 if bank.activation.gated else 1

    def side_by_side(tensor: Tensor) -> Tensor:
        """[U, G, ..] -> [U / slices, slices * G, ..], gate rows of all slices first."""
        rows, rest = tensor.shape[1] // gates, tensor.shape[2:]
        return tensor.reshape(units, slices, gates, rows, *rest).transpose(1, 2).reshape(units, -1, *rest)

    width = bank.intermediate_size
    down = bank.down.reshape(units, slices, bank.hidden_size, width).transpose(1, 2)
    return replace(
        bank,
        gate_up=side_by_side(bank.gate_up),
        down=down.reshape(units, bank.hidden_size, slices * width),
        gate_up_bias=None if bank.gate_up_bias is None else side_by_side(bank.gate_up_bias),
        down_bias=None if bank.down_bias is None else bank.down_bias.reshape(units, slices, -1).sum(1),
    )


def unshard(world: World, layout: Layout, own: DenseBank) -> DenseBank:
    """The whole bank on every rank, as :func:`shard` cut it; a collective call."""
    whole = dict(zip(own.tensors(), collect(world, layout, list(own.tensors().values())), strict=True))
    return assemble(replace(own, **whole), layout.slices)


@torch.no_grad()
def collect(world: World, layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """All units [U, ..] on every rank, from the units that each rank stores, in order; a collective call."""
    moves = [Move(o, rank, u) for u, o in enumerate(layout.owner) for rank in range(world.size) if rank != o]
    places = {unit: place for place, unit in enumerate(layout.own(world.rank))}
    came = start_gather(world, tensors, places, moves, "checkpoint").wait()
    held = [*places, *incoming(moves, world.rank)]
    order = torch.tensor(sorted(range(len(held)), key=held.__getitem__), device=tensors[0].device)
    return [torch.cat(pair)[order] for pair in zip(tensors, came, strict=True)]


@torch.no_grad()
def reshard(world: World, old: Layout, new: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a rank stores under ``new``, in order, from what it stores under ``old``: only what changes hands travels.

    For weights, and alike for stacked optimiser state. A collective call; raises ParallelError for other experts.
    """
    if (old.world, len(old.owner), old.slices) != (new.world, len(new.owner), new.slices):
        raise ParallelError("the two layouts differ in more than who stores what: ranks, experts or slices")
    moves = [Move(a, b, u) for u, (a, b) in enumerate(zip(old.owner, new.owner, strict=True)) if a != b]
    places = {unit: place for place, unit in enumerate(old.own(world.rank))}
    came = start_gather(world, tensors, places, moves, "resharding").wait()
    held = {unit: place for place, unit in enumerate([*places, *incoming(moves, world.rank)])}
    order = torch.tensor([held[u] for u in new.own(world.rank)], dtype=torch.int64, device=tensors[0].device)
    return [torch.cat(pair)[order] for pair in zip(tensors, came, strict=True)]
