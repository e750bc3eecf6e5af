"""MC#: one to three bits for each expert by what it matters, and a learned number of experts for each token.

Paper: MC#: Mixture Compressor for Mixture-of-Experts Large Models, 2025 (n 85, arXiv 2510.10962).
Method: PMQ (see mc_moe). OTP, a head per layer reads the token and its combine weights and chooses one of the masks
    that keep the 1, 2 ... K heaviest slots; m = softmax((log pi + Gumbel) / tau), tau falling, weighs the slots; loss
    KL(whole || masked) + lambda E[slots kept]; only heads are trained, and the argmax decides at inference.
Uses: compress._bits, compress._heads, kernels.rewrites.PrefixMask
Differs: a plan is made without running the model, so its heads are fitted layer by layer to the sample, to choose the
    least error of the layer's output plus price times the share of slots; compress._heads.train_heads trains them on
    from there through the whole model by the paper's loss, whole being the source model. Masks are the K prefixes; of
    the weights the logarithms are read, so that a ratio is a linear rule. Remaining weights keep their sum where the
    model's own always add up to the same. Attention keeps its precision.
Claim: DeepSeek-VL2 6.2 times smaller at 2.57 bits for 1.7 %; 20 % fewer activated experts for less than 1 %.
Shown: lab.experiments.mc_sharp
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._bits import NEEDED, check_average, mixed
from moekit.compress._checks import check_price
from moekit.compress._heads import fit_mask
from moekit.compress._sample import Sample
from moekit.compress._skip import kept_share, renormalises, routed
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class McSharp(LayerPlanner):
    """``bits`` is the average per weight over a layer's experts, more than 1 and at most 3.

    ``price`` is what running all slots rather than none costs, as a share of the output's mean square: the higher, the
    fewer slots run; 0 trains no heads. ``domains`` limits the text (default all).
    """

    bits: float = 2.5
    group_size: int = 64
    price: float = 0.05
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDED

    def __post_init__(self) -> None:
        check_average("mc-sharp", self.bits, self.group_size)
        check_price(self.name, self.price, "keeps every slot")

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        weights, sample = bank(), Sample.of(layer, self.domains)
        plan = mixed("mc-sharp", layer, weights, self.bits, self.group_size, domains=self.domains)
        if not self.price or sample.routing.expert.shape[1] == 1:
            return plan
        head = fit_mask(sample, weights, self.price, renormalise=renormalises(sample))
        return routed(plan, head, f"{kept_share(head, sample):.1%} of the slots run")
