"""What one rank computes under a plan: the experts it stores, and those that came to it.

Shapes by suffix: R rows, H hidden size, U units stored here, M units that came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.kernels import run
from moekit.kernels._layer import Layer
from moekit.kernels.training import train
from moekit.parallel._chunks import incoming
from moekit.parallel._shards import assemble, first_slices
from moekit.parallel._stage import Stage
from moekit.parallel.dispatch import DispatchPlan

Foreign = Callable[[], Sequence[Tensor]]
"""Waits for the weights that come from other ranks, [M, ..] each."""


@dataclass(frozen=True)
class Local:
    """Ids of (expert, part) among the experts of each group, and the units they are put together from.

    Groups: what is stored here whole, run where it lies; what came whole; and, where a part has several slices, all of
    it put together.
    """

    own: list[int]
    came: list[int]
    slices: int
    per_part: int
    stored: dict[tuple[int, int], int]
    arrived: dict[tuple[int, int], int]
    joined: dict[tuple[int, int], list[int]]

    @classmethod
    def of(cls, plan: DispatchPlan, rank: int) -> Local:
        slices = plan.layout.slices
        own, came = plan.layout.own(rank), incoming(plan.moves, rank)
        here = {(p.expert, p.part) for p in plan.pieces if p.rank == rank and p.start < p.stop}
        made = cls(own, came, slices, slices // plan.parts, {}, {}, {})
        for expert, part in sorted(here):
            units = plan.units(expert, part)
            if len(units) > 1:
                held = {unit: place for place, unit in enumerate([*own, *came])}
                made.joined[expert, part] = [held[unit] for unit in units]
            elif units[0] in own:
                made.stored[expert, part] = own.index(units[0])
            else:
                made.arrived[expert, part] = came.index(units[0])
        return made

    def rows(self, bank: DenseBank, foreign: Foreign, x_RH: Tensor, stage: Stage) -> Tensor:
        """Outputs [R, H] of the received rows. Foreign weights are waited for only when they are needed."""
        groups: list[Tensor] = []
        if self.stored:
            groups += _group(lambda: self._bias_once(bank, self.own), x_RH, stage, self.stored)
        if self.arrived:
            groups += _group(lambda: self._bias_once(_with(bank, foreign()), self.came), x_RH, stage, self.arrived)
        if self.joined:
            ids = {name: place for place, name in enumerate(self.joined)}
            groups += _group(lambda: self._join(bank, foreign()), x_RH, stage, ids)
        return sum(groups[1:], groups[0]) if groups else x_RH

    def _join(self, bank: DenseBank, foreign: Sequence[Tensor]) -> DenseBank:
        """Every part computed here, from the slices stored here and those that came."""
        pairs = zip(bank.tensors().values(), foreign, strict=True)
        both = self._bias_once(_with(bank, [torch.cat(pair) for pair in pairs]), [*self.own, *self.came])
        order = torch.tensor([place for places in self.joined.values() for place in places], device=bank.down.device)
        return assemble(_with(both, [t.index_select(0, order) for t in both.tensors().values()]), self.per_part)

    def _bias_once(self, bank: DenseBank, units: list[int]) -> DenseBank:
        if self.slices == 1 or bank.down_bias is None:
            return bank
        return replace(bank, down_bias=bank.down_bias * first_slices(units, self.slices).to(bank.down_bias))


def _with(bank: DenseBank, tensors: Sequence[Tensor]) -> DenseBank:
    return replace(bank, **dict(zip(bank.tensors(), tensors, strict=True)))


def _group(bank: Callable[[], DenseBank], x_RH: Tensor, stage: Stage, ids: dict[tuple[int, int], int]) -> list[Tensor]:
    """Outputs of the rows of one group, zero for other rows; nothing where no row is the group's."""
    if not any((expert, part) in ids for expert, part, _ in stage.segments):
        return []
    index = stage.named(ids, x_RH.device).unsqueeze(1)
    ones = x_RH.new_ones(len(x_RH), 1)
    if torch.is_grad_enabled():
        return [train(Layer.of_bank(bank()), x_RH, index, ones)]
    return [run(bank(), x_RH, Routing(index, ones)).squeeze(1)]
