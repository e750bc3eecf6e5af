"""Router-probability pruning: keep the experts the router gives most probability to.

Paper: none; the usual baseline.
Method: I[e] = sum_t p[t, e], the router's probability before top-k; keep the top M per layer.
Uses: compress._scores, compress._select
Differs: nothing.
Claim: none; also known as gate-score pruning.
Shown: not tried
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._scores import summed
from moekit.compress._select import check_keep, keep_best
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class RouterProbability(LayerPlanner):
    """``keep`` is a share or a number of experts per layer; ``domains`` limits the text that counts (default all)."""

    keep: float | int = 0.5
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"probability"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        return keep_best(
            summed(layer, "probability", self.domains), self.keep, site, why="the probability the router gives them"
        )
