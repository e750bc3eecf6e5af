"""Uni-MoE: experts are trained apart, each on its own mix of modalities, then put together under a new router.

Paper: Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts, 2024 (n 55, arXiv 2405.11273).
Method: 1. encoders and language model frozen, a connector per modality learns to speak to the model. 2. A branch for
    every mix: all tokens pass one expert, a copy of the feed-forward layer, which learns with the connectors. 3. The
    branches' experts in one MoE layer with a new router: top-2, weights a softmax over the chosen; all modalities.
Uses: blocks (edit, put), parallel._shards; copies of a dense layer are build's upcycling, training is train.loop
Differs: whole experts and connectors are trained where the paper trains low-rank additions to them. Branches may be
    models in one process, or ranks of their own that exchange nothing until the experts are gathered.
Claim: less bias between modalities and better generalisation than dense counterparts tuned on the same data.
Shown: lab.experiments.uni_moe
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock, blocks
from moekit.contract import PAD, Context, RouterEdit, Routing
from moekit.errors import OptionError
from moekit.formats import DenseBank
from moekit.parallel._errors import ParallelError
from moekit.parallel._shards import collect
from moekit.parallel._world import World
from moekit.parallel.dispatch import Layout

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def branch(model: nn.Module, expert: int) -> Iterator[nn.Module]:
    """While open, every token passes this one expert of every layer with weight 1: the model is dense again.

    Raises :class:`OptionError` for an expert that a layer does not have.
    """
    with ExitStack() as stack:
        for block in blocks(model):
            if not 0 <= expert < block.num_experts:
                raise OptionError(f"{block.name} has no expert {expert}: choose one of 0 to {block.num_experts - 1}")
            stack.enter_context(block.edit(_only(expert)))
        yield model


def _only(expert: int) -> RouterEdit:
    def alone(expert_TK: Tensor, context: Context) -> Tensor:
        made = torch.full_like(expert_TK, PAD)
        made[:, 0] = expert
        return made

    def whole(routing: Routing, context: Context) -> Routing:
        return routing.with_weight(routing.used.to(routing.weight.dtype))

    return RouterEdit(after_select=alone, after_weigh=whole)


@torch.no_grad()
def assemble(branches: Sequence[Model]) -> Model:
    """A copy of the first branch whose expert e is that of branch e, in every layer; everything else is the first's.

    Raises :class:`OptionError` unless there is one branch for every expert, all of one shape.
    """
    made = copy.deepcopy(branches[0])
    found = [blocks(one) for one in branches]
    for at, block in enumerate(blocks(made)):
        if block.num_experts != len(branches):
            raise OptionError(
                f"{block.name} has {block.num_experts} experts for {len(branches)} branches: one for each"
            )
        parts = [_tensors(one[at]) for one in found]
        if any([t.shape for t in part] != [t.shape for t in parts[0]] for part in parts):
            raise OptionError(f"{block.name} differs in shape between branches: branch all of them from one model")
        stacked = [torch.stack([t[e] for e, t in enumerate(same)]) for same in zip(*parts, strict=True)]
        _put(block, stacked)
    return made


@torch.no_grad()
def gather(model: nn.Module, world: World) -> None:
    """In place, on every rank: expert e of every layer becomes that of the rank it belongs to; a collective call.

    Ranks own equal runs of experts and sent nothing before: each expert goes once to every other rank. Raises
    ParallelError where there are fewer experts than ranks.
    """
    for block in blocks(model):
        if block.num_experts < world.size:
            raise ParallelError(
                f"{block.name} has {block.num_experts} experts for {world.size} ranks: one each at least"
            )
        layout = Layout.contiguous(block.num_experts, world.size)
        own = layout.own(world.rank)
        _put(block, collect(world, layout, [t[own].contiguous() for t in _tensors(block)]))


def _tensors(block: MoEBlock) -> list[Tensor]:
    return list(_bank(block).tensors().values())


def _bank(block: MoEBlock) -> DenseBank:
    bank = block.bank()
    assert isinstance(bank, DenseBank), block.name
    return bank


def _put(block: MoEBlock, tensors: Sequence[Tensor]) -> None:
    bank = _bank(block)
    block.put(replace(bank, **dict(zip(bank.tensors(), tensors, strict=True))))
