"""UNCURL: cluster experts by how alike the router scores them on a task's text, align their units, merge by usage.

Paper: Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning, 2024 (n 52,
    arXiv 2409.01483).
Method: affinity A[i, j] = (cos(Z[:, i], Z[:, j]) + 1) / 2 of the columns of router logits over the task's tokens;
    spectral clustering into E / r clusters; hidden units of each cluster aligned to those of its most used member;
    W_cluster = sum f[e] W_e / sum f[e], f how often they are chosen.
Uses: algebra.cluster, algebra.align, plan.merge, compress._scores, compress._select
Differs: the text read leaves open the affinity, the reference of the alignment and the router. Decided: as above, and
    all E router rows stay, those of a cluster calling the merged expert; ``router=mean`` makes one row of each cluster,
    the mean weighted by usage, which stock files hold. The fine-tuning that follows is not part of the plan.
Claim: halved, a large SMoE matches a smaller one trained from scratch after the same fine-tuning; quartered, sometimes.
Shown: lab.experiments.uncurl
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from moekit.algebra import align, cosine_of_gram, spectral
from moekit.compress._scores import shares, summed
from moekit.compress._select import check_keep, count_to_keep
from moekit.plan.document import LayerPlan
from moekit.plan.merge import merged
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile

ALIKE = 1e-9
"""Affinities that differ by less tell no expert from another."""


@dataclass(frozen=True, kw_only=True)
class Uncurl(LayerPlanner):
    """``keep`` is the share or number of clusters per layer (the paper's r = 2, 4, 8 are 0.5, 0.25, 0.125); ``aligned``
    orders units first; ``router`` keeps all rows, or one mean row per cluster."""

    keep: float | int = 0.5
    aligned: bool = True
    router: Literal["rows", "mean"] = "rows"
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"counts", "logit_gram"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        count, share_E = count_to_keep(self.keep, site), shares(summed(layer, "counts"))
        if count == site.num_experts:
            return LayerPlan.identity(count, why="keeps all experts")
        similar_EE = cosine_of_gram(layer.logit_gram, f"the router logits of {layer.name}")
        affinity_EE = (np.clip(similar_EE, -1.0, 1.0) + 1) / 2
        found = spectral(affinity_EE, count, seed=self.seed)
        clusters = [np.flatnonzero(found.labels == label) for label in range(count)]
        leader_E = np.empty(site.num_experts, dtype=int)
        for members in clusters:
            leader_E[members] = members[np.argmax(share_E[members])]
        orders = aligned_to(leader_E, bank()) if self.aligned else None
        plan = merged(leader_E, share_E, orders, why_of(site, count, affinity_EE, found.settled))
        return plan if self.router == "rows" else with_mean_rows(plan, share_E)


def aligned_to(leader_E: np.ndarray, bank: DenseBank) -> dict[int, np.ndarray]:
    """Orders of hidden units that align every expert to the leader it joins."""
    orders: dict[int, np.ndarray] = {}
    for leader in sorted(set(leader_E.tolist())):
        members = np.flatnonzero(leader_E == leader).tolist()
        if len(members) > 1:
            found = align(bank.select(members), reference=members.index(leader))
            orders.update(zip(members, found.numpy(), strict=True))
    return orders


def with_mean_rows(plan: LayerPlan, share_E: np.ndarray) -> LayerPlan:
    """The same experts with one router row each: the mean of their rows, weighted like their weights."""
    rows = []
    for slot in range(len(plan.experts)):
        members = [e for e, called in enumerate(plan.slots) if called == slot]
        weight = share_E[members] if share_E[members].sum() > 0 else np.ones(len(members))
        rows.append(tuple((e, float(w)) for e, w in zip(members, weight / weight.sum(), strict=True) if w > 0))
    return replace(plan, rows=tuple(rows), slots=tuple(range(len(rows))), why=f"{plan.why}; one mean router row each")


def why_of(site: Site, count: int, affinity_EE: np.ndarray, settled: bool) -> str:
    why = f"merges {site.num_experts} experts into {count} by spectral clustering of router logits, weighted by usage"
    others = affinity_EE[~np.eye(len(affinity_EE), dtype=bool)]
    if np.ptp(others) <= ALIKE:
        why += "; all experts are scored alike, so the clusters mean nothing"
    return why if settled else f"{why}; the clusters had not settled"
