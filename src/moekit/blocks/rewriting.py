"""Rewrites of a routing at work on live blocks of the stock class, where no stored experts hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bank import ExpertBank
from ..errors import PlanError
from ..formats import DenseBank
from ..kernels._drive import forward
from ..kernels.rewrites import Rewrite
from ..kernels.run import products_of
from ..kernels.scaled import LiveMatrices, scaled
from .block import MoEBlock
from .find import blocks


def attach(
    rewrite: Rewrite, block: MoEBlock, rows: Sequence[int] | None = None, bank: ExpertBank | None = None
) -> RemovableHandle:
    """Let a block's experts see the rewritten routing, until the handle's ``remove()``; gradients pass through.

    ``rows[r]`` is the block's router row that is row r to the rewrite; None if they are the same. ``bank`` holds the
    stored experts, for rewrites that choose among more than the block's own (``EXPANDS``): it then runs in
    their place, without gradients.

    Raises:
        PlanError: the stored experts would have to run in a block that normalises every expert's output, or a rewrite
            that scales inside experts in a block that weighs their inputs.
    """
    known = list(range(block.num_experts)) if rows is None else list(rows)
    there = torch.full((block.num_experts + 1,), -1)
    there[torch.tensor(known)] = torch.arange(len(known))
    back = torch.tensor([*known, known[0]])  # an unused slot: stock kernels know no id for it that all of them survive

    def routed(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_TH, index_TK, weight_TK = arguments
        renamed = there.to(index_TK.device)[index_TK.clamp(0, block.num_experts)]
        x, index, weight = rewrite(x_TH, renamed, weight_TK)
        return x.to(x_TH.dtype), index, weight

    def before(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, index, weight = routed(arguments)
        return x, back.to(index.device)[index], weight.masked_fill(index < 0, 0.0)

    if rewrite.INSIDE:
        return _inside(rewrite, block, there, back)
    if bank is None or not rewrite.EXPANDS:
        return block.experts.register_forward_pre_hook(before)
    if getattr(block.experts, "has_post_expert_norm", False):
        raise PlanError(f"{block.name} normalises what its experts return: apply the plan to measure it")
    products = products_of(rewrite.runs(bank))

    def instead(_: Any, arguments: tuple[Tensor, ...], __: Any) -> Tensor:
        return forward(products, *routed(arguments))

    return block.experts.register_forward_hook(instead)


def _inside(rewrite: Rewrite, block: MoEBlock, there: Tensor, back: Tensor) -> RemovableHandle:
    """The block's own weights, computed again with what each matrix reads scaled apart; gradients pass through."""
    if block.layout.weights_on_input:
        raise PlanError(f"{block.name} weighs what its experts read, which {rewrite.KIND} cannot follow")

    def instead(_: Any, arguments: tuple[Tensor, ...], __: Any) -> Tensor:
        x_TH, index_TK, weight_TK = arguments
        renamed = there.to(index_TK.device)[index_TK.clamp(0, block.num_experts)]
        scales = rewrite.scales(renamed, weight_TK)
        x, index, weight = rewrite(x_TH, renamed, weight_TK)
        own = torch.where(index < 0, -1, back.to(index.device)[index])
        bank = block.bank()
        assert isinstance(bank, DenseBank)
        return scaled(LiveMatrices(bank, block.layout.finish), x, own, weight, scales)

    return block.experts.register_forward_hook(instead)


@contextmanager
def attached(model: nn.Module, rewrites: Mapping[str, Rewrite]) -> Iterator[None]:
    """Rewrites at work on a live model's blocks, by name; their parameters are ``*.experts.rewrite.*`` of the model."""
    found = [block for block in blocks(model) if block.name in rewrites]
    handles = [attach(rewrites[block.name], block) for block in found]
    for block in found:
        block.experts.add_module("rewrite", rewrites[block.name])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in found:
            del block.experts._modules["rewrite"]
