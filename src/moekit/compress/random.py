"""Random pruning: keep experts drawn at random, the baseline every score must beat.

Paper: none; the usual baseline.
Method: keep M of E experts per layer, drawn uniformly without looking (one draw per group where groups exist).
Uses: compress._select
Differs: nothing.
Claim: none; whatever does not beat it has learned nothing.
Shown: not tried
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.compress._select import check_keep, keep_best
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class Random(LayerPlanner):
    """``keep`` is a share or a number of experts per layer; ``seed`` makes the draw repeatable."""

    keep: float | int = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        place = int.from_bytes(hashlib.sha256(site.name.encode()).digest()[:4])
        drawn_E = np.random.default_rng([abs(self.seed), place]).random(site.num_experts)
        return keep_best(drawn_E, self.keep, site, why=f"a draw with seed {self.seed}")
