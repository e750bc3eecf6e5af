"""Compressed experts: half of a token's experts run, and a vector each stands in for the others.

Paper: Efficiently Editing Mixture-of-Experts Models with Compressed Experts, 2025 (n 73, arXiv 2503.00634).
Method: of the k slots the k_m heaviest run; of the others, each matrix reads its input times
    sum_a w_a / (sum_a w_a) theta[e_a] over auxiliary slots a, with a theta of its own for gate, up [E, H] and down
    [E, I], all beginning as ones; y = sum_m w_m E_m(x). Fine-tuned together with all weights.
Uses: compress._skip, train.recover, kernels.rewrites.AuxiliaryVectors, kernels.rewrites.ProjectionVectors
Differs: three vectors per expert, as the authors' code has them, with ``where=projections``; the default is one, on
    what gate and up read, which costs nothing to run and can be paged. Weights of the slots that run keep their sum
    where the model's own always add up to the same (the authors' do not), else they stay. The plan holds vectors of
    ones, with which it is top-k_m exactly: they mean something once trained, alone or with the experts around them
    (`moekit recover --train rewrite`), for the paper trains all of it.
Claim: OLMoE with 4 of 8 experts keeps 96 % of the fine-tuned quality, 4 points of 8 lost without vectors.
Shown: lab.experiments.compressed_experts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from moekit.compress._sample import NEEDS, Sample
from moekit.compress._skip import renormalises, routed
from moekit.errors import OptionError
from moekit.kernels.rewrites import AuxiliaryVectors, ProjectionVectors, Rewrite
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


@dataclass(frozen=True, kw_only=True)
class CompressedExperts(LayerPlanner):
    """``main`` slots of each token run; 0 means half of the model's, rounded up. The vectors of the others act
    ``where``: on the hidden state that the experts read, or on what each of their matrices reads (projections)."""

    main: int = 0
    where: Literal["hidden", "projections"] = "hidden"
    needs: ClassVar[frozenset[str]] = NEEDS

    def __post_init__(self) -> None:
        if self.main < 0:
            raise OptionError(f"compressed-experts: main={self.main} cannot be negative (0 is half of the slots)")

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        main, sample = self.main or -(-site.top_k // 2), Sample.of(layer)
        if main > site.top_k:
            raise OptionError(f"compressed-experts: main={main} of {site.top_k} slots is not possible")
        rows, hidden, keep = site.num_experts, sample.x_SH.shape[1], renormalises(sample)
        rewrite: Rewrite = AuxiliaryVectors(torch.ones(rows, hidden), main, renormalise=keep)
        if self.where == "projections":
            inner = bank().intermediate_size
            rewrite = ProjectionVectors.ones(rows, hidden, inner, main, renormalise=keep)
        what = "what every matrix reads" if self.where == "projections" else "the input"
        why = f"{main} of {site.top_k} slots run, the others rescale {what} (by ones until trained)"
        return routed(LayerPlan.identity(site.num_experts), rewrite, why)
