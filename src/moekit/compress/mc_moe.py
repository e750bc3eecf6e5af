"""MC-MoE: one to three bits for each expert by what it matters, and the lighter slots of unimportant tokens skipped.

Paper: MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More, 2025 (n 82, arXiv 2410.06270).
Method: PMQ, per layer min sum_e phi_e^alpha w_e^beta eps_e,b^gamma over one width b of {1, 2, 3} per expert, bits =
    E * average, one expert of 3 bits and one of 2 at least; phi shares of choices, w shares of router probability, eps
    the Frobenius norm by which the MoE output moves if this expert alone is rounded; GPTQ, 1 bit is sign * mean|w|.
    ODP, the second slot is skipped where w2 / w1 < its median.
Uses: compress._bits, compress._skip, algebra.allocate_bits, algebra.gptq, kernels.rewrites.RatioSkip
Differs: all three exponents apply (the released solver puts alpha on eps and leaves gamma out), the budget is spent
    whole, eps takes the sample as one batch. Feedback also inside blocks of columns, which the paper turns off at so
    few bits: here outputs move half as far with it. For more than two slots a token stops at the first prefix whose
    tail weighs less than beta times as much, beta the median of this ratio after half of the slots. All layers skip
    (the paper: the 10 of 32 it harms least); skip sets the quantile, 0.5 the median. Tokens are protected by |h|_1
    alone: attention received is not known where experts run and, when decoding, not yet made. Attention keeps its
    precision.
Claim: Mixtral-8x7B at 2.54 bits loses 3.8 % of accuracy; skipping saves 15 % more activation for less than 0.6 %.
Shown: lab.experiments.mc_moe
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._bits import NEEDED, check_average, mixed
from moekit.compress._sample import Sample
from moekit.compress._skip import kept_share, ratio_skip, routed
from moekit.errors import OptionError
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class McMoE(LayerPlanner):
    """``bits`` is the average per weight over a layer's experts, more than 1 and at most 3.

    ``skip`` is the share of tokens that stop after half of their slots (0 skips nothing, 0.5 is the paper's), of which
    the share ``protect`` with the largest inputs never does. ``domains`` limits the text (default all).
    """

    bits: float = 2.5
    group_size: int = 64
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    skip: float = 0.0
    protect: float = 0.02
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDED

    def __post_init__(self) -> None:
        check_average("mc-moe", self.bits, self.group_size)
        for name in ("skip", "protect"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"mc-moe: {name}={getattr(self, name)} is a share of the tokens: give 0 to 1")

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        exponents = (self.alpha, self.beta, self.gamma)
        plan = mixed("mc-moe", layer, bank(), self.bits, self.group_size, exponents, self.domains)
        if not self.skip:
            return plan
        sample = Sample.of(layer, self.domains)
        skip = ratio_skip(sample, self.skip, self.protect)
        why = f"slots stop at a tail below {skip.ratio:.3g}, {kept_share(skip, sample):.1%} run"
        return routed(plan, skip, why)
