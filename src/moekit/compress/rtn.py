"""RTN: every expert at fewer bits, rounded to the nearest point of a grid per group of weights.

Paper: none; the usual baseline of weight quantisation.
Method: per group of consecutive inputs, q = round((w - min) / scale), scale = (max - min) / (2^bits - 1).
Uses: formats.PackedBank
Differs: nothing.
Claim: 8 bits cost nothing measurable, 4 bits little on large models.
Shown: not tried
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.compress._checks import check_group_size
from moekit.errors import OptionError
from moekit.plan.check import BITS
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class Rtn(LayerPlanner):
    """``bits`` per weight (8, 4, 3 or 2; 16 leaves experts as they are) in groups of ``group_size`` weights."""

    bits: int = 8
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"rtn: bits={self.bits} is a precision no format has; use one of {BITS}")
        check_group_size(self.name, self.group_size)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        whole = LayerPlan.identity(site.num_experts, why=f"all experts at {self.bits} bits")
        return whole.with_bits(self.bits, self.group_size)
