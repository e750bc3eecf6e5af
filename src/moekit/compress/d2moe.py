"""D2MoE: each expert stored once as nested bit planes, and a head per expert that says how many a token needs.

Paper: D^2MoE: Dual Routing and Dynamic Scheduling for Efficient On-Device MoE-based LLM Serving, 2025 (n 68, arXiv
    2504.15299).
Method: base of b bits per group, W_1 = (Q - z) s; planes W_k = W_{k-1} + s_k sign(W - W_{k-1}), s_k the least squares
    of the outputs; GPTQ hands errors on between blocks of 128 columns, one plane after another. A linear head per
    expert picks the width whose argmax it is, trained on sum_x [loss + alpha sum_k p_k b_k], all else frozen.
Uses: algebra.nested, formats.NestedBank, compress._heads, kernels.rewrites.BitWidths; run._planes when it is paged
Differs: heads are fitted layer by layer to the sample, to choose the least squared error that a width adds to the
    layer's output plus price per bit, not end to end on the model's loss; so no gradient has to pass the argmax. No
    capacity per width. Base and planes are in groups of 64 unless told otherwise. `moekit run` reads planes in the
    paper's order (HEBF), but kernels wait for all that a batch needs, so what the order saves is modelled only.
Claim: as accurate as 8 bits at up to 53 % less memory and 1.39 times the throughput of EdgeMoE.
Shown: lab.experiments.d2moe
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moekit.algebra import Asymmetric, as_planes, nested
from moekit.compress._calibrated import damping, joined
from moekit.compress._checks import check_group_size, check_price
from moekit.compress._heads import fit_widths, mean_width
from moekit.compress._sample import NEEDS, Sample, expert_moments
from moekit.compress._skip import routed
from moekit.errors import OptionError
from moekit.formats import NestedBank
from moekit.plan import values
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile

BASES, WIDEST = (1, 2, 3, 4), 8


@dataclass(frozen=True, kw_only=True)
class D2MoE(LayerPlanner):
    """``bits`` is the widest an expert can be read at, ``base`` the narrowest (1 to 4).

    ``price`` is what one more bit must save of the squared error, as a share of the output's mean square: the higher,
    the narrower tokens run; 0 runs all at their widest, without heads. ``domains`` limits the text (default all).
    """

    bits: int = 4
    base: int = 2
    group_size: int = 64
    price: float = 0.0005
    domains: tuple[str, ...] = ()
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        if self.base not in BASES or not self.base <= self.bits <= WIDEST:
            raise OptionError(
                f"d2moe: planes from base={self.base} to bits={self.bits} cannot be: a base has 1 to 4 bits, and "
                f"bits lie between it and {WIDEST}"
            )
        check_group_size(self.name, self.group_size)
        check_price(self.name, self.price, "runs all at the widest")

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        weights, sample = bank(), Sample.of(layer, self.domains)
        made, notes = planes(sample, weights, self.bits, self.base, self.group_size)
        plan = LayerPlan.identity(site.num_experts, why=f"all experts nested, {self.base} to {self.bits} bits")
        plan = plan.valued(values.keep(made), notes)
        if not self.price or self.bits == self.base:
            return plan
        head, few = fit_widths(sample, weights, made, self.price)
        unsure = f", too few tokens to tell: {', '.join(map(str, few))}" if few else ""
        return routed(plan, head, f"{mean_width(head, sample):.3g} bits per slot{unsure}")


def planes(sample: Sample, bank: DenseBank, bits: int, base: int, group_size: int) -> tuple[NestedBank, str]:
    """All experts as nested planes calibrated on their tokens, and a line on what happened."""
    banks: list[Any] = []
    back: set[int] = set()
    for moments in expert_moments(sample, bank):
        for place, (e, tokens) in enumerate(zip(moments.experts, moments.tokens, strict=True)):
            expert, made = bank.expert(e), {}
            for part, weight, hessian_KK in (
                ("gate_up", expert.gate_up, moments.input_CHH[place]),
                ("down", expert.down, moments.unit_CII[place]),
            ):
                level = damping(len(hessian_KK), tokens)
                grid = Asymmetric(bits=base, group_size=group_size)
                found = nested(weight, grid, bits - base, hessian_KK, damping=level)
                made[part] = as_planes(found)
                back |= {e} if any(report.fallbacks for report in found.reports) else set()
            biases = (
                [{"gate_up": expert.gate_up_bias, "down": expert.down_bias}] if bank.gate_up_bias is not None else []
            )
            kind = {"dtype": bank.dtype, "activation": bank.activation, "biases": biases}
            banks.append(NestedBank.from_planes([made], base, group_size, **kind))
    notes = f"on {len(sample)} sampled tokens"
    named = f"; a level rounded to nearest (no inputs, or no better): {', '.join(map(str, sorted(back)))}"
    return joined(banks), notes + (named if back else "")
