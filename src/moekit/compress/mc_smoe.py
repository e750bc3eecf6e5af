"""MC-SMoE: merge by routing policy, then keep of every merged matrix a low-rank part and a few whole rows.

Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, 2024 (arXiv 2310.01334, the
    second half of n 18).
Method: the merge of m-smoe; then per matrix W = L R + S with L = U_r sqrt(S_r), R = sqrt(S_r) V_r^T, and of the
    remainder S only the share ``rows`` of its rows. In the paper L, R and S are trained by distillation while rows of
    least |w * grad|, smoothed, are pruned on a cubic schedule to a tenth:
    :func:`train_merged` and ``train.RowPruning`` do that.
Uses: compress._routed, compress._factors, formats.LowRankBank, train.parametrise, train.schedule
Differs: the plan, which sees no gradients, keeps the rows of S with the largest norms, and as many in every matrix. A
    matrix that factors would not shrink stays whole.
Claim: up to 80 % less memory and 20 % less compute at nearly no loss on 8 tasks, after distillation.
Shown: lab.experiments.mc_smoe
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.compress._factors import biases, matrices, shrinks
from moekit.compress._layers import made
from moekit.compress._routed import NEEDS, merges
from moekit.compress._select import check_keep
from moekit.errors import OptionError
from moekit.formats import DenseBank, Factors, LowRankBank
from moekit.plan import values
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.planner import Evaluate, Method, Source
from moekit.plan.recombine import recombined
from moekit.train.forms import LowRankSparse, Tied
from moekit.train.parametrise import held, parametrise

if TYPE_CHECKING:
    from moekit.profile import Profile


@dataclass(frozen=True, kw_only=True)
class McSmoe(Method):
    """``keep`` is the share or number of distinct experts per layer on average, ``rank`` that of each matrix, ``rows``
    the share of the remainder's rows that are kept; ``aligned`` orders units before merging."""

    keep: float | int = 0.5
    rank: int = 32
    rows: float = 0.1
    aligned: bool = True
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.rank < 1:
            raise OptionError(f"mc-smoe: rank={self.rank} is not possible; give 1 or more")
        if not 0 <= self.rows <= 1:
            raise OptionError(f"mc-smoe: rows={self.rows} is a share of the rows; give 0 to 1")

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        merging = merges(self.observed(profile, source), source, self.keep, aligned=self.aligned)
        makers = {name: partial(self._layer, merge, partial(source.bank, name)) for name, merge in merging.items()}
        return made(self, makers, profile, source)

    def _layer(self, merge: Callable[[], LayerPlan], bank: Callable[[], DenseBank]) -> LayerPlan:
        plan = merge()
        dense = recombined(bank(), plan)
        one = matrices(dense.expert(0))
        rows = {part: round(self.rows * len(matrix)) for part, matrix in one.items()}
        small = [part for part, matrix in one.items() if shrinks(matrix, self.rank, rows[part])]
        if not small:
            return replace(plan, why=f"{plan.why}; rank {self.rank} makes no matrix smaller")
        rank = {part: self.rank if part in small else None for part in one}
        rows = {part: count if part in small else 0 for part, count in rows.items()}
        why = f"{', '.join(small)} as rank {self.rank} and {self.rows:.0%} of the remainder's rows"
        return plan.valued(values.keep(LowRankBank.factorise(dense, rank, rows)), why)


class Merged(LowRankSparse):
    """Low rank plus rows of the stored experts, each used by all router rows that call it."""

    def __init__(self, slots: Sequence[int], rank: int) -> None:
        super().__init__(rank)
        self._tied, self.slots = Tied(slots), list(slots)

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        return super().hold(*self._tied.hold(weight_ERK))

    def forward(self, *held: Tensor) -> Tensor:
        return super().forward(*held)[self.slots]


def train_merged(block: MoEBlock, plan: LayerPlan, rank: int) -> None:
    """Let the experts of a live block, merged already, be trained as the paper does, those of a group as one.

    Raises OptionError for a rank above full rank, UnsupportedModelError for experts that are not kept in stacks.
    """
    parametrise(block, partial(Merged, plan.slots, rank))


def trained_bank(block: MoEBlock, dtype: torch.dtype) -> LowRankBank:
    """What :func:`train_merged` and training have made of the stored experts."""
    experts: list[dict[str, Factors | Tensor]] = []
    slots: list[int] = []
    for part, form, (left, right, rest) in held(block):
        kept, slots = cast(Merged, form).keep, cast(Merged, form).slots
        experts = experts or [{} for _ in kept]
        for index, made_of in enumerate(experts):
            rows = kept[index].nonzero()[:, 0]
            whole = (rows, rest[index, rows].detach()) if len(rows) else ()
            made_of[part] = Factors(left[index].detach(), right[index].detach(), *whole)
    bank = block.bank()
    beside = biases(bank.expert(slots.index(slot)) for slot in range(len(experts)))
    return LowRankBank.from_factors(experts, dtype=dtype, activation=bank.activation, biases=beside)
