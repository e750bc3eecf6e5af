"""Which way the experts of a block are paged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.checkpoint.reader import Reader
from moekit.kernels import Arrivals, BankExperts
from moekit.run._banks import PagedBank, check_packed, packed_charge, packed_parameters
from moekit.run._layers import PagedExperts, charge, check, stacked
from moekit.run.store import Tier


@runtime_checkable
class Paged(Tier, Protocol):
    """A tier that kernels compute with: (hidden [T, H], experts [T, K], weights [T, K], arrivals) -> [T, H]."""

    run: Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor]


def paged(checkpoint: Checkpoint, reader: Reader, layer: MoELayer, block: MoEBlock) -> Paged:
    """The experts of a block on disk, and the places they are brought to."""
    kind = PagedBank if isinstance(block.experts, BankExperts) else PagedExperts
    return kind(checkpoint, reader, layer, block)


def paged_parameters(block: MoEBlock) -> list[str]:
    """The parameters of a block's experts module that are paged.

    Raises:
        UnsupportedModelError: its experts cannot be.
    """
    if isinstance(block.experts, BankExperts):
        check_packed(block)
        return packed_parameters(block)
    check(block)
    return list(stacked(block.experts))


def largest(block: MoEBlock) -> int:
    """The most memory that one expert of a block takes."""
    return packed_charge(block) if isinstance(block.experts, BankExperts) else charge(block)


def used(index_TK: Tensor, num_experts: int) -> list[int]:
    """The distinct experts of a routing, in order."""
    experts = torch.unique(index_TK)
    return experts[(experts >= 0) & (experts < num_experts)].tolist()
