"""A plan's rewrites of routing on a live model of the stock class, before any checkpoint holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moekit.blocks import MoEBlock
from moekit.kernels.rewrites import Rewrite, allocate_rewrite
from moekit.plan.layer import LayerPlan


def rewrite_of(plan: LayerPlan, hidden_size: int) -> Rewrite | None:
    """The rewrite a layer's plan asks for, with its numbers; None where it asks for none."""
    values = plan.rewrite
    if values is None:
        return None
    rewrite = allocate_rewrite(values.describe, len(plan.rows), hidden_size, "cpu")
    rewrite.load_state_dict({name: values.tensor(name) for name in rewrite.state_dict()})
    return rewrite.eval()


def attach(rewrite: Rewrite, block: MoEBlock, rows: Sequence[int] | None = None) -> RemovableHandle:
    """Let a block's experts see the rewritten routing, until the handle's ``remove()``; gradients pass through.

    ``rows[r]`` is the block's router row that is row r to the rewrite; None if they are the same.
    """
    known = list(range(block.num_experts)) if rows is None else list(rows)
    there = torch.full((block.num_experts + 1,), -1)
    there[torch.tensor(known)] = torch.arange(len(known))
    back = torch.tensor([*known, block.num_experts])  # stock kernels know an unused slot by the id E, not by -1

    def before(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_TH, index_TK, weight_TK = arguments
        device = index_TK.device
        renamed = there.to(device)[index_TK.clamp(0, block.num_experts)]
        x, index, weight = rewrite(x_TH, renamed, weight_TK)
        return x.to(x_TH.dtype), back.to(device)[index], weight

    return block.experts.register_forward_pre_hook(before)
