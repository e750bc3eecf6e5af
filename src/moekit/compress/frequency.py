"""Frequency pruning: keep the experts that are chosen most often.

Paper: none; the usual baseline.
Method: I[e] = number of tokens with e among their top-k; keep the top M per layer.
Uses: compress._scores, compress._select
Differs: nothing.
Claim: none; often hard to beat on the text it was counted on.
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
class Frequency(LayerPlanner):
    """``keep`` is a share or a number of experts per layer; ``domains`` limits the text that counts (default all)."""

    keep: float | int = 0.5
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        return keep_best(summed(layer, "counts", self.domains), self.keep, site, why="how often they are chosen")
