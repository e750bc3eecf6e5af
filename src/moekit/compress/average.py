"""Averaging: put experts into random groups and keep each group's mean, the baseline every merge must beat.

Paper: none; the usual baseline of merging.
Method: M groups of E experts per layer, drawn without looking and of equal size up to one; W_group = sum f[e] W_e /
    sum f[e] with f the usage (or 1 for all); every member's router row stays and calls the mean.
Uses: plan.merge, compress._scores, compress._select
Differs: nothing.
Claim: none; whatever does not beat it has learned nothing from which experts it put together.
Shown: not tried
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from moekit.compress._scores import shares, summed
from moekit.compress._select import check_keep, count_to_keep
from moekit.plan.document import LayerPlan
from moekit.plan.merge import merged
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class Average(LayerPlanner):
    """``keep`` is the share or number of groups per layer; ``seed`` makes the draw repeatable; ``weights`` of the mean:
    how often experts are chosen, or all alike."""

    keep: float | int = 0.5
    seed: int = 0
    weights: Literal["usage", "uniform"] = "usage"
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        count = count_to_keep(self.keep, site)
        place = int.from_bytes(hashlib.sha256(site.name.encode()).digest()[:4])
        order = np.random.default_rng([abs(self.seed), place]).permutation(site.num_experts)
        leader_E = np.empty(site.num_experts, dtype=int)
        for group in np.array_split(order, count):
            leader_E[group] = group.min()
        share_E = shares(summed(layer, "counts")) if self.weights == "usage" else np.ones(site.num_experts)
        why = f"averages {site.num_experts} experts in {count} groups drawn with seed {self.seed}, by {self.weights}"
        return merged(leader_E, share_E, None, why)
