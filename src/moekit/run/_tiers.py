"""Which way the experts of a block are paged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.checkpoint.reader import Reader
from moekit.formats import NestedBank
from moekit.kernels import Arrivals, BankExperts
from moekit.run._banks import PagedBank, check_packed, packed_charge, packed_parameters
from moekit.run._layers import PagedExperts, charge, check, stacked
from moekit.run._planes import PagedPlanes
from moekit.run._tier import Tier


@runtime_checkable
class Paged(Tier, Protocol):
    """A tier that kernels compute with: (hidden [T, H], experts [T, K], weights [T, K], arrivals) -> [T, H]."""

    run: Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor]

    def wanted(self, index_TK: Tensor) -> list[int]: ...
    def places(self, experts: Sequence[int]) -> Sequence[int]: ...
    def foreseen(self, experts: Sequence[int]) -> Sequence[int]: ...
    def chosen(self, index_TK: Tensor) -> Tensor: ...
    def scored(self, score_E: Sequence[float]) -> Sequence[float]: ...


def paged(checkpoint: Checkpoint, reader: Reader, layer: MoELayer, block: MoEBlock) -> Paged:
    """The experts of a block on disk, and the places they are brought to."""
    if not isinstance(block.experts, BankExperts):
        return PagedExperts(checkpoint, reader, layer, block)
    nested = isinstance(block.experts.bank, NestedBank)
    return (PagedPlanes if nested else PagedBank)(checkpoint, reader, layer, block)


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
