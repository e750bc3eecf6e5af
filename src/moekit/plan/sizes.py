"""Bytes of an output before it exists: of its weight files exactly, headers included, and in memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from moekit.checkpoint.shards import header_of, layout, split
from moekit.checkpoint.writer import MAX_SHARD_BYTES
from moekit.plan.document import Plan
from moekit.plan.produce import produce

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint


def plan_nbytes(plan: Plan, checkpoint: Checkpoint, format: str = "auto") -> int:
    """Bytes of the safetensors files that applying ``plan`` writes."""
    total = 0
    for unit in produce(checkpoint, plan, format).units:
        for run in split(layout(unit.tensors), MAX_SHARD_BYTES):
            total += len(header_of(run)) + sum(lazy.nbytes for _, lazy in run)
    return total


def source_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files that hold the source unchanged."""
    return plan_nbytes(Plan(source=checkpoint.fingerprint, layers={}), checkpoint)


def fixed_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of everything but the routed experts and router rows of the layers a plan can change."""
    layers = [layer for layer in checkpoint.moe_layers if not layer.extra]
    planned: Collection[str] = {
        name for layer in layers for tensor in layer.expert_tensors for name in tensor.stored.tensors.values()
    } | {row.name for layer in layers for row in layer.row_tensors}
    return sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in planned)
