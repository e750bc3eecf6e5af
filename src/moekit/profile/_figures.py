"""What each statistic takes from a view: figures per token or slot, None where the model cannot give them.

Shapes by suffix: T tokens, K slots, E experts, B bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moekit.profile._view import View, one_hot
from moekit.profile.schema import RATIO_BINS
from moekit.profile.statistics import (
    ExpertMoments,
    Largest,
    LargestShared,
    Product,
    Room,
    Sampled,
    SlotSum,
    Statistic,
    TokenSum,
    Traced,
)


def _transition(view: View, num_previous: int) -> tuple[Tensor, Tensor] | None:
    return None if view.previous_TK is None else (one_hot(view.previous_TK, num_previous), view.chosen_TE)


def _probability(view: View) -> Tensor | None:
    return None if view.log_probability_TE is None else view.log_probability_TE.exp()


def _entropy(view: View) -> Tensor | None:
    log = view.log_probability_TE
    return None if log is None else -(log.exp() * log.clamp(min=-1e30)).sum(1)


def _selected(view: View) -> Tensor | None:
    log = view.log_probability_TE
    return None if log is None else log.gather(1, view.expert_TK.clamp(min=0)).double().exp()


def _strong_logit(view: View) -> Tensor | None:
    logits = view.logits_TE
    if logits is None:
        return None
    largest, expert = logits.max(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, expert, largest)


def _weight_ratio(view: View) -> Tensor | None:
    """[T, B] of 0 and 1; a token of fewer than two experts is in no bin."""
    if view.weight_TK.shape[1] < 2:
        return None
    largest = view.weight_TK.abs().topk(2, dim=1).values
    ratio = largest[:, 1] / largest[:, 0].clamp(min=1e-30)
    index = (ratio * RATIO_BINS).long().clamp(max=RATIO_BINS - 1)
    return one_hot(torch.where(view.used_TK.sum(1) > 1, index, -1)[:, None], RATIO_BINS)


def _contribution(view: View) -> Tensor | None:
    return None if view.change_T is None else view.change_T[:, None] * (view.weight_TK * view.norm_TK).double()


def _residual_energy(view: View) -> Tensor | None:
    return None if view.residual_TH is None else view.residual_TH.float().square().sum(1, dtype=torch.float64)


def _logits(view: View) -> tuple[Tensor, Tensor] | None:
    logits = view.logits_TE
    return None if logits is None else (logits, logits)


def make(name: str, room: Room) -> Statistic:
    """The statistic of that name (a key of ``schema.FIELDS``) for one layer."""
    makers: dict[str, Callable[[], Statistic]] = {
        "tokens": lambda: TokenSum(room, lambda v: torch.ones_like(v.cell_T, dtype=torch.float64)),
        "counts": lambda: SlotSum(room, lambda v: torch.ones_like(v.weight_TK)),
        "probability": lambda: TokenSum(room, _probability, room.num_experts),
        "selected_probability": lambda: SlotSum(room, _selected),
        "strong_logit": lambda: TokenSum(room, _strong_logit, room.num_experts),
        "weight": lambda: SlotSum(room, lambda v: v.weight_TK),
        "output_norm": lambda: SlotSum(room, lambda v: v.norm_TK),
        "gate_norm": lambda: SlotSum(room, lambda v: v.weight_TK.double() * v.norm_TK),
        "contribution": lambda: SlotSum(room, _contribution),
        "output_energy": lambda: SlotSum(room, lambda v: (v.weight_TK.double() * v.norm_TK).square()),
        "entropy": lambda: TokenSum(room, _entropy),
        "weight_ratio": lambda: TokenSum(room, _weight_ratio, RATIO_BINS),
        "residual_energy": lambda: TokenSum(room, _residual_energy),
        "max_abs_down": lambda: Largest(room, lambda v: v.max_abs_TK),
        "max_abs_shared": lambda: LargestShared(),
        "coactivation": lambda: Product(lambda v: (v.chosen_TE, v.chosen_TE)),
        "transition": lambda: Product(lambda v: _transition(v, room.num_previous)),
        "logit_gram": lambda: Product(_logits),
        "input_moments": lambda: Product(lambda v: (v.x_TH, v.x_TH)),
        "expert_moments": lambda: ExpertMoments(room),
        "hidden": lambda: Sampled(room, lambda v: v.read_TH, np.float32),
        "sample_expert": lambda: Sampled(room, lambda v: v.expert_TK, np.int32),
        "sample_weight": lambda: Sampled(room, lambda v: v.combine_TK, np.float32),
        "sample_logits": lambda: Sampled(room, lambda v: v.logits_TE, np.float32),
        "sample_domain": lambda: Sampled(room, lambda v: v.domain_T(room.num_domains), np.int32),
        "sample_priority": lambda: Sampled(room, lambda v: v.priority_T, np.uint64),
        "trace_expert": lambda: Traced(room.num_traced, lambda v: v.expert_TK, -1, np.int32),
        "trace_weight": lambda: Traced(room.num_traced, lambda v: v.weight_TK, 0.0, np.float32),
    }
    return makers[name]()
