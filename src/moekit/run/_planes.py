"""Experts stored as nested bit planes, read plane by plane: the base, and what a token's width adds to it.

A place is one level of one expert: ``expert * levels + level``, level 0 the base. Logits are those of the model with
all planes in memory. Shapes by suffix: T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.checkpoint.reader import Reader
from moekit.formats import NestedBank
from moekit.kernels import BankExperts
from moekit.kernels.rewrites import BitWidths
from moekit.run._banks import StoredRows, check_packed, own_tensors
from moekit.run._planes_order import plane_order


class PagedPlanes(StoredRows):
    """The levels of the experts of one :class:`BankExperts` on nested planes, a row each.

    A kernel's expert is one at one width where heads choose it (:class:`BitWidths`), else one at all its levels.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader, layer: MoELayer, block: MoEBlock) -> None:
        module = block.experts
        assert isinstance(module, BankExperts)
        check_packed(block)
        bank = module.bank
        assert isinstance(bank, NestedBank)
        self.levels = max(bank.bits) - bank.base_bits + 1
        rows: list[list[str]] = [[] for _ in range(bank.num_experts * self.levels)]
        for expert in range(bank.num_experts):
            for name in own_tensors(bank, expert):
                rows[expert * self.levels + _level(name, bank.base_bits)].append(name)
        super().__init__(reader, layer, bank, rows)
        self.run = module.arriving(self.bank)
        self._slots = module.slots
        top = [bits - bank.base_bits for bits in bank.bits]
        if isinstance(module.rewrite, BitWidths):
            levels = [width - bank.base_bits for width in module.rewrite.widths]
            self._runs = [(expert, level) for expert in range(bank.num_experts) for level in levels]
        else:
            self._runs = list(enumerate(top))
        self._id = {run: number for number, run in enumerate(self._runs)}
        self._expert = torch.tensor([*(expert for expert, _ in self._runs), -1])

    @property
    def unit(self) -> int:
        each = range(0, self.num_experts, self.levels)
        return max(sum(self.charge[first : first + self.levels]) for first in each)

    def wanted(self, index_TK: Tensor) -> list[int]:
        """In the order that serves the most tokens soonest."""
        return [expert * self.levels + level for expert, level in plane_order(self._demand(index_TK))]

    def lowered(self, index_TK: Tensor, there: Collection[int], most: int) -> Tensor:
        """The routing with slots narrowed so that at most ``most`` levels above bases are not among the places
        ``there``, those that serve the most tokens first. A slot never runs below the narrowest width of the heads.
        """
        ceiling: dict[int, int] = {}
        for expert, level in plane_order(self._demand(index_TK)):
            if level and ceiling.get(expert, 0) == level - 1:
                missing = expert * self.levels + level not in there
                if missing and most <= 0:
                    continue
                most -= missing
                ceiling[expert] = level
        table = torch.arange(len(self._runs) + 1)
        table[-1] = -1
        for number, (expert, level) in enumerate(self._runs):
            possible = [low for low in range(level, -1, -1) if (expert, low) in self._id]
            table[number] = self._id[expert, next((o for o in possible if o <= ceiling.get(expert, 0)), possible[-1])]
        return table[torch.where(self._known(index_TK), index_TK, len(self._runs))]

    def chosen(self, index_TK: Tensor) -> Tensor:
        return self._expert[torch.where(self._known(index_TK), index_TK, len(self._runs))]

    def _known(self, index_TK: Tensor) -> Tensor:
        return (index_TK >= 0) & (index_TK < len(self._runs))

    def _demand(self, index_TK: Tensor) -> np.ndarray:
        """Int [E, L]: how many slots run each expert at each level."""
        count = np.bincount(index_TK[self._known(index_TK)].cpu().numpy(), minlength=len(self._runs))
        demand_EL = np.zeros((self.num_experts // self.levels, self.levels), dtype=np.int64)
        for tokens, (expert, level) in zip(count.tolist(), self._runs, strict=True):
            demand_EL[expert, level] += tokens
        return demand_EL

    def places(self, experts: Sequence[int]) -> Sequence[int]:
        levels: dict[int, int] = {}
        for expert, level in (self._runs[one] for one in experts):
            levels[expert] = max(level, levels.get(expert, 0))
        return [expert * self.levels + level for expert, top in levels.items() for level in range(top + 1)]

    def foreseen(self, experts: Sequence[int]) -> Sequence[int]:
        """The bases: which width a token will want is not foreseen."""
        stored = experts if self._slots is None else [self._slots[row] for row in experts if self._slots[row] >= 0]
        return [expert * self.levels for expert in stored]

    def scored(self, score_E: Sequence[float]) -> Sequence[float]:
        """Each level half as much as the one it adds to: whoever has the one below needs it no more often."""
        return [score / 2**level for score in score_E for level in range(self.levels)]


def _level(name: str, base_bits: int) -> int:
    """Of a tensor, ``N.part.signB`` or ``N.part.stepB``; the base has other leaves."""
    leaf = name.rpartition(".")[2]
    return int(leaf[4:]) - base_bits if leaf.startswith(("sign", "step")) else 0
