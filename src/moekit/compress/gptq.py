"""GPTQ: every expert at fewer bits, each rounding error made up for by the columns still to come.

Paper: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2023 (arXiv 2210.17323).
Method: per expert and matrix W, H = sum_t x_t x_t^T over the tokens the expert gets; column by column, the rounding
    error divided by the diagonal of U, U^T U = (H + damping)^-1, is taken out of the later columns along U's row.
    The baseline of calibrated quantisation: one width for all experts, every token counts the same.
Uses: compress._calibrated, algebra.gptq, formats.PackedBank
Differs: the inputs of down are those of the unrounded gate and up, and each layer's those of the source model;
    experts with few tokens are damped more (compress._calibrated), without which they come out worse than rounded.
Claim: 3 to 4 bits at little loss where rounding to nearest loses much.
Shown: not tried
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._calibrated import Feedback, check_bits, packed
from moekit.compress._sample import NEEDS, Sample
from moekit.plan import values
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class Gptq(LayerPlanner):
    """``bits`` per weight (8, 4, 3, 2 or 1) in groups of ``group_size``; ``domains`` limits the text (default all)."""

    bits: int = 4
    group_size: int = 64
    damping: float = 0.01
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        check_bits("gptq", [self.bits], self.group_size)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        feedback = Feedback(damping=self.damping)
        made, notes = packed(Sample.of(layer, self.domains), bank(), self.bits, self.group_size, feedback=feedback)
        whole = LayerPlan.identity(site.num_experts, why=f"all experts at {self.bits} bits by GPTQ")
        return whole.valued(values.keep(made), notes)
