"""M-SMoE: merge every rarely used expert into the often used one with the most similar routing.

Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, 2024 (n 18, arXiv 2310.01334).
Method: usage f[e] = count(e) / sum of counts. Hidden units of every expert are aligned to the layer's expert 0.
    Dominant: the most used expert of each layer, and all with f above the (M * L)-th largest of all layers.
    The others join the dominant expert whose column of router logits has the highest cosine with theirs.
    W_group = sum f[e] W_e / sum f[e]; every member's router row stays and calls the merged expert.
Uses: compress._routed, algebra.align, algebra.cluster, plan.merge
Differs: the training stage that follows in the paper (distillation) is not part of the plan.
Claim: up to 80 % less memory at nearly no loss on 8 tasks, after distillation; without it, large models suffer.
Shown: lab.experiments.m_smoe
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._layers import made
from moekit.compress._routed import NEEDS, merges
from moekit.compress._select import check_keep
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate, Method, Source

if TYPE_CHECKING:
    from moekit.profile import Profile


@dataclass(frozen=True, kw_only=True)
class MSmoe(Method):
    """``keep`` is the share or number of distinct experts per layer on average; ``aligned`` orders units first."""

    keep: float | int = 0.5
    aligned: bool = True
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        return made(self, merges(seen, source, self.keep, aligned=self.aligned), profile, source)
