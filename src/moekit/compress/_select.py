"""Which experts to keep, given scores: per layer or over all layers at once, groups and protected ones respected."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from moekit.algebra import best, share_to_count
from moekit.errors import OptionError, PlanError
from moekit.plan.layer import LayerPlan
from moekit.plan.planner import Site


def check_keep(keep: float | int) -> None:
    """OptionError unless ``keep`` is a share above 0 and up to 1 (a float), or a number of at least 1 (an int)."""
    if isinstance(keep, int) and keep < 1:
        raise OptionError(f"keep={keep} keeps no expert; give a number of 1 or more, or a share such as 0.5")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        raise OptionError(f"keep={keep} is no share; give one above 0 and up to 1.0, or a whole number of experts")


def count_to_keep(keep: float | int, site: Site) -> int:
    """Experts to keep in one layer, a multiple of its groups. PlanError above E or below what the router needs."""
    count = share_to_count(keep, site.num_experts)
    count = -(-count // site.num_groups) * site.num_groups
    if count > site.num_experts:
        raise PlanError(f"layer {site.name}: keep={keep}, but it has only {site.num_experts} experts")
    if count < site.top_k:
        raise PlanError(
            f"layer {site.name}: keep={keep} leaves {count} of {site.num_experts} experts, fewer than the top-k of "
            f"{site.top_k}; keep at least {site.top_k}"
        )
    return count


def keep_best(
    score_E: np.ndarray, keep: float | int, site: Site, *, why: str, protected: Collection[int] = ()
) -> LayerPlan:
    """Keep the experts of highest score in one layer; ties go to the lower id.

    ``protected`` experts stay whatever they score; ids that are no routed expert's (shared ones) are ignored. PlanError
    where there are more of them than places.
    """
    count = count_to_keep(keep, site)
    guarded = _routed(protected, site)
    kept = best(score_E, count, protected=guarded, num_groups=site.num_groups)
    if lost := sorted(guarded - set(kept)):
        raise PlanError(
            f"layer {site.name}: keep={keep} leaves {count} of {site.num_experts} experts, too few for the "
            f"{len(guarded)} protected ones (expert {lost[0]} would go); keep at least {_least(guarded, site)}"
        )
    return LayerPlan.keep(kept, site.num_experts, why=f"keeps {count} of {site.num_experts} by {why}")


def keep_best_of_all(
    scores: Mapping[str, np.ndarray],
    keep: float | int,
    sites: Mapping[str, Site],
    *,
    why: str,
    protected: Mapping[str, Collection[int]] | None = None,
) -> dict[str, LayerPlan]:
    """Spend one budget (``keep`` of all experts, or on average per layer) where scores are highest, over all layers.

    Every layer keeps what its router needs and what is protected. The experts of a layer are taken in order of score,
    whole rounds of its groups at a time; scores of different layers must be comparable. PlanError where ``keep`` leaves
    fewer than that.
    """
    guarded = {name: _routed((protected or {}).get(name, ()), site) for name, site in sites.items()}
    counts = {name: max(count_to_keep(site.top_k, site), _least(guarded[name], site)) for name, site in sites.items()}
    left = sum(count_to_keep(keep, site) for site in sites.values()) - sum(counts.values())
    if left < 0:
        raise PlanError(
            f"keep={keep} leaves {sum(counts.values()) + left} experts over all layers, fewer than the "
            f"{sum(counts.values())} that routers need or that are protected; keep more"
        )

    def offer(position: int, name: str) -> tuple[float, int, str]:
        """The next round of a layer's experts, the best first in a heap; layers in order break ties."""
        step = sites[name].num_groups
        now, more = (
            best(scores[name], counts[name] + extra, protected=guarded[name], num_groups=step) for extra in (0, step)
        )
        return -float(np.mean(scores[name][sorted(set(more) - set(now))])), position, name

    heap = [offer(i, name) for i, (name, site) in enumerate(sites.items()) if counts[name] < site.num_experts]
    heapq.heapify(heap)
    while heap:
        _, position, name = heapq.heappop(heap)
        step = sites[name].num_groups
        if step <= left:
            counts[name], left = counts[name] + step, left - step
            if counts[name] < sites[name].num_experts:
                heapq.heappush(heap, offer(position, name))
    return {
        name: keep_best(scores[name], counts[name], site, why=why, protected=guarded[name])
        for name, site in sites.items()
    }


def _routed(protected: Collection[int], site: Site) -> set[int]:
    return {expert for expert in protected if 0 <= expert < site.num_experts}


def _least(guarded: Collection[int], site: Site) -> int:
    """Fewest experts a layer can keep with all of these among them, every group giving as many."""
    size = site.num_experts // site.num_groups
    return site.num_groups * max(Counter(expert // size for expert in guarded).values(), default=0)
