"""The tensors around one layer's experts that have a row per expert: router weights, biases, tables of expert ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.checkpoint.shards import Lazy
from moekit.errors import PlanError
from moekit.plan.layer import Row
from moekit.plan.target import LayerTarget, is_bias

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer, RowTensor


def router_pieces(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Lazy]:
    """Every row tensor and id table of a layer.

    Raises:
        PlanError: a table or a tensor shared between layers cannot follow the plan.
    """
    pieces = {tensor.name: _rows(checkpoint, target, tensor) for tensor in target.layer.row_tensors}
    return pieces | {name: _table(checkpoint, target, name) for name in id_tables(checkpoint, target.layer)}


def id_tables(checkpoint: Checkpoint, layer: MoELayer) -> Iterator[str]:
    """Integer tables beside the router's weights: they hold expert ids (routing by token id)."""
    known = {row.name for row in layer.row_tensors}
    owners = {name.rpartition(".")[0] for name in known}
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[0] in owners and name not in known and not info.dtype.is_floating_point:
            yield name


def _unchanged(target: LayerTarget) -> bool:
    same = tuple(((e, 1.0),) for e in range(target.layer.num_experts))
    return target.rows == same and (target.own or -1 not in target.slots)


def _rows(checkpoint: Checkpoint, target: LayerTarget, tensor: RowTensor) -> Lazy:
    """Rows taken or blended, padding added, the tail behind them kept.

    A row that must never be chosen gets a bias of -inf in the stock layout; moekit's masks rows after loading.
    """
    info = checkpoint.tensors[tensor.name]
    if _unchanged(target):
        return Lazy(info.dtype, info.shape, lambda: target.read(checkpoint, tensor.name))
    if tensor.part is not None:
        raise PlanError(
            f"{tensor.name} holds the router rows of several modules of {target.layer.name}, which cannot be changed "
            "one by one; keep all router rows and use --format moekit"
        )
    axis = tensor.axis
    shape = (*info.shape[:axis], len(target.rows) + info.shape[axis] - tensor.rows, *info.shape[axis + 1 :])
    forbid = not target.own and is_bias(tensor.name)

    def make() -> Tensor:
        source = target.read(checkpoint, tensor.name).movedim(axis, 0)
        rows = [
            torch.full_like(source[0], float("-inf")) if forbid and slot < 0 else blend(source, row)
            for row, slot in zip(target.rows, target.slots, strict=True)
        ]
        return torch.cat([torch.stack(rows), source[tensor.rows :]]).movedim(0, axis).contiguous()

    return Lazy(info.dtype, shape, make)


def blend(source: Tensor, row: Row | None) -> Tensor:
    """One row of the output from the source's rows along axis 0, summed in float32; zeros for padding."""
    if not row:
        return torch.zeros_like(source[0])
    if len(row) == 1 and row[0][1] == 1.0:
        return source[row[0][0]]
    total = torch.zeros_like(source[0], dtype=torch.promote_types(source.dtype, torch.float32))
    for index, coefficient in row:
        total.add_(source[index].to(total.dtype), alpha=coefficient)
    return total.to(source.dtype)


def _table(checkpoint: Checkpoint, target: LayerTarget, name: str) -> Lazy:
    """Every id becomes the row that its expert's row went to."""
    info = checkpoint.tensors[name]
    if _unchanged(target):
        return Lazy(info.dtype, info.shape, lambda: checkpoint.read(name))
    place = torch.full((target.layer.num_experts,), -1, dtype=torch.int64)
    for index, row in enumerate(target.rows):
        if row and target.slots[index] >= 0:
            for source, _ in row:
                place[source] = index
    used = checkpoint.read(name).unique()
    lost = used[place[used.long()] < 0].tolist()
    if lost:
        raise PlanError(
            f"{name} sends tokens to expert {lost[0]} by their id, and the plan drops its router row; "
            f"keep the rows of all {len(used)} experts the table names"
        )
    return Lazy(info.dtype, info.shape, lambda: place[checkpoint.read(name).long()].to(info.dtype))
