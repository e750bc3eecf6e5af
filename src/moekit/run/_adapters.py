"""Experts that replace others for some sequences: one stacked tensor of all, and a map from the base's numbers to it.

Shapes by suffix: T tokens, K slots, E base experts, P places for adapters, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.contract import PAD, Routing, weighted_sum
from moekit.errors import BudgetError, OptionError
from moekit.formats import DenseBank
from moekit.kernels import run
from moekit.run._virtual import Frames, VirtualRows

_PARTS = ("gate_up", "down", "gate_up_bias", "down_bias")
BASE = -1
"""The place of tokens that use no adapter."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """``experts[l]``: which experts of MoE layer l are replaced; ``banks[l]``: by what, in that order (None for none).

    Raises:
        OptionError: an expert named twice, or as many weights as there are not experts.
    """

    experts: tuple[tuple[int, ...], ...]
    banks: tuple[DenseBank | None, ...]

    def __post_init__(self) -> None:
        if len(self.experts) != len(self.banks):
            raise OptionError(f"an adapter names experts of {len(self.experts)} layers, weights of {len(self.banks)}")
        for layer, (experts, bank) in enumerate(zip(self.experts, self.banks, strict=True)):
            found = 0 if bank is None else bank.num_experts
            if len(set(experts)) != len(experts) or found != len(experts):
                raise OptionError(
                    f"layer {layer} of an adapter has weights of {found} experts for {list(experts)}: "
                    "expected one expert's weights for each, none named twice"
                )

    @property
    def largest(self) -> int:
        """The most experts it replaces in one layer."""
        return max(map(len, self.experts), default=0)


class AdaptedLayer:
    """The base's experts and those of up to ``places`` adapters of ``most`` each, stacked; memory for those there are.

    Slot ``E + place * most + i`` is the i-th expert of the adapter at ``place``; ``slot_PE`` int64 [P + 1, E] is the
    slot that stands for every base expert at each place, the base's own last.
    """

    def __init__(self, base: DenseBank, frames: Frames, places: int, most: int) -> None:
        self.num_experts, self.most = base.num_experts, most
        slots = base.num_experts + places * most
        parts = {name: tensor for name in _PARTS if (tensor := getattr(base, name)) is not None}
        self._rows = {
            name: VirtualRows(frames, slots, tensor.shape[1:], tensor.dtype) for name, tensor in parts.items()
        }
        stacked = {name: rows.tensor for name, rows in self._rows.items()}
        self.bank = DenseBank(**stacked, activation=base.activation)
        self._fill(range(base.num_experts), base)
        # The last row is the base's, so that BASE = -1 finds it.
        self.slot_PE = torch.arange(base.num_experts).repeat(places + 1, 1)
        self._held: dict[int, int] = {}

    @property
    def row_bytes(self) -> list[int]:
        """One expert's own bytes in each of the stacked tensors."""
        return [rows.row_bytes for rows in self._rows.values()]

    @property
    def held(self) -> list[int]:
        """The slots that hold an expert, in order."""
        firsts = [(self.num_experts + place * self.most, count) for place, count in sorted(self._held.items())]
        return [*range(self.num_experts), *(slot for first, count in firsts for slot in range(first, first + count))]

    def load(self, place: int, experts: Sequence[int], bank: DenseBank | None) -> None:
        """Bring an adapter's experts to a free place. Raises :class:`BudgetError`, and nothing has changed, for want
        of memory."""
        first = self.num_experts + place * self.most
        if bank is not None:
            self._fill(range(first, first + len(experts)), bank)
        self._held[place] = len(experts)
        self.slot_PE[place, list(experts)] = torch.arange(first, first + len(experts))

    def evict(self, place: int) -> None:
        """Give back what the adapter at ``place`` holds."""
        self.slot_PE[place] = torch.arange(self.num_experts)
        first = self.num_experts + place * self.most
        for slot in range(first, first + self._held.pop(place)):
            for rows in self._rows.values():
                rows.drop(slot)

    def rerouted(self, index_TK: Tensor, place_T: Tensor) -> Tensor:
        """Slots [T, K] of a routing on the base's experts; what names no expert (a sentinel, padding) is PAD."""
        used = (index_TK >= 0) & (index_TK < self.num_experts)
        slot_TK = self.slot_PE[place_T[:, None], index_TK.clamp(0, self.num_experts - 1)]
        return torch.where(used, slot_TK, PAD)

    def run(
        self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, place_T: Tensor, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """[T, H] of all tokens in one grouped call, whatever adapter each uses; the router's weights are untouched.

        A token's terms are added slot by slot, not in the order of stacked experts, which adapters would change.
        """
        routing = Routing(self.rerouted(index_TK, place_T), weight_TK)
        slots_TKH = finish(run(self.bank, x_TH, routing))
        used = routing.used[..., None]
        return weighted_sum(slots_TKH.where(used, 0), routing.with_weight(weight_TK * routing.used))

    def _fill(self, slots: range, bank: DenseBank) -> None:
        kept: list[tuple[VirtualRows, int]] = []
        try:
            for slot in slots:
                for rows in self._rows.values():
                    rows.keep(slot)
                    kept.append((rows, slot))
        except BudgetError:
            for rows, slot in kept:
                rows.drop(slot)
            raise
        for name, rows in self._rows.items():
            rows.tensor[slots.start : slots.stop].copy_(getattr(bank, name))
