"""What decides how many slots of a token run: thresholds read off a sample, and the rule a family's weights follow.

Shapes by suffix: S sampled tokens, K slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moekit.compress._sample import Sample
from moekit.kernels.rewrites import RatioSkip, Rewrite
from moekit.plan import values
from moekit.plan.document import LayerPlan

SAME = 2**-6
"""Relative spread below which the weights of all tokens count as adding up to the same: bfloat16, in which most models
run, has 8 bits, so that what adds up to 1 does so give or take a last bit or two."""


def renormalises(sample: Sample) -> bool:
    """Whether a token's combine weights always add up to the same, so that those of fewer slots have to as well."""
    sums = sample.routing.weight.sum(1)
    return bool((sums.max() - sums.min()) <= SAME * sums.abs().max())


def tail_ratio(sample: Sample, share: float) -> float:
    """The quantile ``share`` over tokens of the lighter slots' weight over the heavier ones', w2 / w1 for two.

    Of K slots the first K / 2, rounded up, are the heavier ones. 0 where there is only one.
    """
    heavy = sample.routing.weight.float().sort(dim=1, descending=True).values
    half = -(-heavy.shape[1] // 2)
    ratio_S = heavy[:, half:].sum(1) / heavy[:, :half].sum(1).clamp(min=1e-20)
    return float(ratio_S.quantile(share)) if share > 0 else 0.0


def protected_norm(sample: Sample, share: float) -> float | None:
    """The L1 norm that a ``share`` of the inputs reach; None for none of them."""
    return float(sample.x_SH.abs().sum(1).quantile(1 - share)) if share > 0 else None


def ratio_skip(sample: Sample, share: float, protect: float) -> RatioSkip:
    """Skipping that stops after half of the slots, or earlier, for a ``share`` of the tokens."""
    ratio = tail_ratio(sample, share)
    return RatioSkip(ratio, protected_norm(sample, protect), renormalise=renormalises(sample))


@torch.no_grad()
def kept_share(rewrite: Rewrite, sample: Sample) -> float:
    """Slots that run, as a share of all that were chosen."""
    _, index_SK, _ = rewrite(sample.x_SH, sample.routing.expert, sample.routing.weight)
    return float((index_SK >= 0).sum() / (sample.routing.expert >= 0).sum().clamp(min=1))


def routed(plan: LayerPlan, rewrite: Rewrite, why: str) -> LayerPlan:
    """The layer with its routing rewritten."""
    kept = values.keep_rewrite(rewrite.describe(), rewrite.state_dict())
    return replace(plan, rewrite=kept, why="; ".join(part for part in (plan.why, why) if part))
