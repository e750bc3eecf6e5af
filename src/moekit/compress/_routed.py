"""Merging by routing policy: rarely used experts join the often used one that the router scores most alike.

M-SMoE (arXiv 2310.01334), steps 1 to 6. Shapes by suffix: E experts, M stored experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moekit.algebra import align, assign_to_leaders, cosine_of_gram
from moekit.compress._scores import shares
from moekit.compress._select import count_to_keep
from moekit.plan.layer import LayerPlan
from moekit.plan.merge import merged
from moekit.plan.planner import Source, sites_of

if TYPE_CHECKING:
    from moekit.profile import LayerProfile

NEEDS = frozenset({"counts", "logit_gram"})
"""Statistics that :func:`merges` reads."""


def merges(
    seen: Mapping[str, LayerProfile], source: Source, keep: float | int, *, aligned: bool
) -> dict[str, Callable[[], LayerPlan]]:
    """What makes each layer's merge, with ``keep`` (a share or a number) experts per layer on average over all layers.

    ``aligned`` orders each layer's hidden units like those of its expert 0 first. PlanError where ``keep`` is more than
    a layer has or less than its router needs.
    """
    sites = {site.name: site for site in sites_of(source) if not site.extra}
    usage = {name: shares(seen[name].total("counts")) for name in sites}
    leaders = dominant(usage, sum(count_to_keep(keep, site) for site in sites.values()))

    def merge(name: str) -> LayerPlan:
        count, experts = len(leaders[name]), sites[name].num_experts
        similar_EE = cosine_of_gram(seen[name].logit_gram, f"the router logits of {name}")
        leader_E = assign_to_leaders(similar_EE, leaders[name])
        orders = dict(enumerate(align(source.bank(name)).numpy())) if aligned and experts > count else None
        why = f"merges {experts} experts into {count} by routing similarity, weighted by usage"
        return merged(leader_E, usage[name], orders, why)

    return {name: partial(merge, name) for name in sites}


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
