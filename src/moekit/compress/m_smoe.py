"""M-SMoE: merge every rarely used expert into the often used one with the most similar routing.

Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, 2024 (n 18, arXiv 2310.01334).
Method: usage f[e] = count(e) / sum of counts. Hidden units of every expert are aligned to the layer's expert 0.
    Dominant: the most used expert of each layer, and all with f above the (M * L)-th largest of all layers.
    The others join the dominant expert whose column of router logits has the highest cosine with theirs.
    W_group = sum f[e] W_e / sum f[e]; every member's router row stays and calls the merged expert.
Uses: algebra.align, algebra.cluster, plan.merge, compress._select
Differs: the training stage that follows in the paper (distillation) is not part of the plan.
Claim: up to 80 % less memory at nearly no loss on 8 tasks, after distillation; without it, large models suffer.
Shown: not tried
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moekit.algebra import align, assign_to_leaders, cosine_of_gram
from moekit.compress._select import check_keep, count_to_keep
from moekit.plan.document import Plan
from moekit.plan.merge import merged
from moekit.plan.planner import Evaluate, Method, Source, sites_of

if TYPE_CHECKING:
    from moekit.profile import Profile


@dataclass(frozen=True, kw_only=True)
class MSmoe(Method):
    """``keep`` is the share or number of distinct experts per layer on average; ``aligned`` orders units first."""

    keep: float | int = 0.5
    aligned: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"counts", "logit_gram"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        seen = self.observed(profile, source)
        sites = {site.name: site for site in sites_of(source) if not site.extra}
        usage = {name: _shares(seen[name].total("counts")) for name in sites}
        budget = sum(count_to_keep(self.keep, site) for site in sites.values())
        leaders = dominant(usage, budget)
        layers = {}
        for name, site in sites.items():
            similarity_EE = cosine_of_gram(seen[name].logit_gram)
            leader_E = assign_to_leaders(similarity_EE, leaders[name])
            orders = None
            if self.aligned and site.num_experts > len(leaders[name]):
                orders = dict(enumerate(align(source.bank(name)).numpy()))
            count = len(leaders[name])
            why = f"merges {site.num_experts} experts into {count} by routing similarity, weighted by usage"
            layers[name] = merged(leader_E, usage[name], orders, why)
        return self.made(layers, profile, source)


def dominant(usage: Mapping[str, np.ndarray], budget: int) -> dict[str, list[int]]:
    """The leaders of each layer. Usage counts as 1 for a layer's most used expert; the rest must beat the threshold.

    The comparison is strict, as in the paper's code, so one leader fewer than the budget (more under ties) comes out.
    """
    raised = {}
    for name, share_E in usage.items():
        raised[name] = share_E.copy()
        raised[name][np.argmax(share_E)] = 1.0
    ranked = np.sort(np.concatenate(list(raised.values())))[::-1]
    threshold = ranked[min(budget, len(ranked)) - 1] if budget < len(ranked) else -1.0
    return {name: np.flatnonzero((share_E > threshold) | (share_E == 1.0)).tolist() for name, share_E in raised.items()}


def _shares(count_E: np.ndarray) -> np.ndarray:
    return count_E / count_E.sum() if count_E.sum() > 0 else np.zeros_like(count_E)
