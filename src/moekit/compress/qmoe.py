"""QMoE: every expert ternary, most of its weights zero, stored in less than a bit each where enough of them are.

Paper: QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models, 2023 (n 48, arXiv 2310.16795).
Method: a weight becomes the least or the greatest of its row, or 0 (rounded at the halves). GPTQ with full feedback
    chooses, H = sum_t x_t x_t^T over the expert's tokens, at most 4 times the average number of them, damped by 0.1
    of the mean variance; rounding to nearest where there are none. A fixed dictionary of 2^16 runs codes the symbols.
Uses: compress._calibrated, algebra.gptq, formats.TernaryBank
Differs: experts with few tokens are damped more (compress._calibrated); tokens are a sample of the source model's
    states in each layer, not those that earlier compressed layers make.
Claim: a Switch Transformer of 1.6 trillion parameters in less than 160 GB, 0.8 bits each, with a minor loss.
Shown: lab.experiments.qmoe
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from moekit.algebra import TernaryMinMax
from moekit.compress._calibrated import Feedback, ternary
from moekit.compress._sample import NEEDS, Sample
from moekit.errors import OptionError
from moekit.plan import values
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class QMoE(LayerPlanner):
    """``damping`` is a share of the mean variance, ``most`` a multiple of the average number of tokens per expert;
    ``domains`` limits the text (default all)."""

    damping: float = 0.1
    most: float = 4.0
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise OptionError(f"qmoe: damping={self.damping} must be at least 0 (0.1 is the paper's)")
        if not self.most > 0:
            raise OptionError(f"qmoe: most={self.most} leaves no expert a token; give a multiple such as 4")

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        sample = capped(Sample.of(layer, self.domains), self.most)
        made, notes = ternary(sample, bank(), TernaryMinMax(), feedback=Feedback(damping=self.damping))
        rate = f"{made.zeros():.1%} of the weights zero, {made.bits_per_weight():.2f} bits each"
        whole = LayerPlan.identity(site.num_experts, why=f"all experts ternary: {rate}")
        return whole.valued(values.keep(made), notes)


def capped(sample: Sample, most: float) -> Sample:
    """The sample with at most ``most`` times the average number of tokens for each expert, its first ones."""
    limit = math.ceil(most * float(sample.count_E.mean()))
    expert_SK, weight_SK = sample.routing.expert.clone(), sample.routing.weight.clone()
    for e in range(sample.num_experts):
        beyond = sample.own(e).token_N[limit:]
        surplus_NK = expert_SK[beyond] == e
        expert_SK[beyond] = expert_SK[beyond].masked_fill(surplus_NK, -1)
        weight_SK[beyond] = weight_SK[beyond].masked_fill(surplus_NK, 0.0)
    return replace(sample, routing=replace(sample.routing, expert=expert_SK, weight=weight_SK))
