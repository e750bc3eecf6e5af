"""A limit on the tokens that an expert takes while a model trains, and who is left out where more were routed to it.

Dropped slots are unused before anything is weighed, so that a router that normalises does so over what is kept.
Shapes by suffix: T tokens, K slots, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock, blocks
from moekit.contract import PAD, Context, RouterEdit
from moekit.parallel._errors import ParallelError


def capacity_of(tokens: int, top_k: int, num_experts: int, factor: float, least: int = 4) -> int:
    """ceil(factor * T K / E), but not below ``least``."""
    return max(least, math.ceil(factor * tokens * top_k / num_experts))


def kept(expert_TK: Tensor, num_experts: int, capacity: int, draw: torch.Generator | None = None) -> Tensor:
    """Expert ids [T, K], PAD in the slots that are dropped: every expert keeps at most ``capacity`` slots.

    Without ``draw`` the first in order are kept: first choices of all tokens before second choices, each in the order
    of tokens. With it, so many at random, every slot routed to the expert alike.
    """
    tokens, width = expert_TK.shape
    flat = expert_TK.t().reshape(-1)
    if draw is None:
        order = torch.arange(len(flat))
    else:
        order = torch.rand(len(flat), generator=draw).argsort()
    names = torch.where(flat < 0, num_experts, flat).cpu()[order]
    by_expert = names.argsort(stable=True)
    sorted_names = names[by_expert]
    start = torch.searchsorted(sorted_names, sorted_names)
    place = torch.empty_like(names)
    place[order[by_expert]] = torch.arange(len(flat)) - start
    return flat.masked_fill(place.to(flat.device) >= capacity, PAD).view(width, tokens).t()


@contextmanager
def dropping(
    model: nn.Module, factor: float, *, least: int = 4, draw: torch.Generator | None = None
) -> Iterator[list[MoEBlock]]:
    """While open, every MoE block that is in training mode drops what is beyond the capacity of its batch.

    Raises ParallelError for a factor that is not above 0.
    """
    if factor <= 0:
        raise ParallelError(f"a capacity factor of {factor:g} leaves no tokens: give one above 0, such as 1.0")
    found = blocks(model)
    with ExitStack() as stack:
        for block in found:
            stack.enter_context(block.edit(RouterEdit(after_select=_drop(block, factor, least, draw))))
        yield found


def _drop(
    block: MoEBlock, factor: float, least: int, draw: torch.Generator | None
) -> Callable[[Tensor, Context], Tensor]:
    def drop(expert_TK: Tensor, context: Context) -> Tensor:
        if not block.module.training:
            return expert_TK
        tokens, width = expert_TK.shape
        capacity = capacity_of(tokens, width, block.num_experts, factor, least)
        return kept(expert_TK, block.num_experts, capacity, draw)

    return drop
