"""The arithmetic of stock routers: a few parameters say how logits become a choice of experts and their weights.

Every top-k router of transformers but a handful is one :class:`Recipe`: scores from logits, a bias that serves the
choice only, a limit to groups of experts, and normalised, scaled weights. Shapes by suffix: T tokens, K slots,
E experts, C columns of the logits (E, or more where a router has classes beyond its experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import PAD

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a router goes from logits [T, C] to ids and weights [T, K].

    ``activation``: logits to scores. ``ranked``: whether "scores" or "logits" are ranked, after the selection bias
    called ``bias_name`` is added. ``groups``: (number of groups, groups kept), scored by "top2" (sum of the two best)
    or "max"; experts outside the kept groups rank at ``fill``. ``weights``: "scores" of the chosen, or "softmax" over
    their logits alone. ``normalise``: None, ("sum", eps), ("clamp", least sum) or ("norm", p). ``scale`` multiplies
    last, and with it the parameter called ``expert_scale``, one factor per expert. ``widen``: scores are computed in
    float32 at least, else in the dtype of the logits.
    """

    top_k: int
    activation: str = "softmax"
    ranked: str = "scores"
    bias_name: str | None = None
    groups: tuple[int, int] | None = None
    group_score: str = "top2"
    fill: float = -math.inf
    weights: str = "scores"
    normalise: tuple[str, float] | None = None
    scale: float = 1.0
    expert_scale: str | None = None
    widen: bool = True

    def scores(self, logits: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32) if self.widen else logits.dtype
        return ACTIVATIONS[self.activation](logits.to(dtype))

    def select(self, logits: Tensor, bias: Tensor | None = None, edit: Tensor | None = None) -> Tensor:
        """Ids [T, K] of the highest ranked; PAD where only forbidden ones (-inf in logits or edit) were left.

        ``bias`` [C] is the family's own selection bias, ``edit`` [E] or [T, E] the caller's, both added before groups
        are formed.
        """
        scores = self.scores(logits)
        ranked = logits.to(scores.dtype) if self.ranked == "logits" else scores
        if bias is not None:
            ranked = ranked + bias.to(ranked.dtype)
        forbidden = logits == -math.inf
        if edit is not None:
            edit = F.pad(edit.to(ranked), (0, logits.shape[-1] - edit.shape[-1]))
            ranked, forbidden = ranked + edit, forbidden | (edit == -math.inf)
        if self.groups is not None:
            ranked = self._limit(ranked, forbidden)
        ranked = ranked.masked_fill(forbidden, -math.inf)
        expert = ranked.topk(min(self.top_k, ranked.shape[-1]), dim=-1).indices
        return expert.masked_fill(forbidden.gather(-1, expert), PAD)

    def _limit(self, ranked: Tensor, forbidden: Tensor) -> Tensor:
        """Outside the best groups, ranks fall to ``fill``."""
        assert self.groups is not None
        count, kept = self.groups
        by_group = ranked.masked_fill(forbidden, -math.inf).unflatten(-1, (count, -1))
        best = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values
        group_score = best.sum(-1) if self.group_score == "top2" else best[..., 0]
        chosen = torch.zeros_like(group_score, dtype=torch.bool).scatter(
            -1, group_score.topk(kept, dim=-1).indices, True
        )
        return ranked.masked_fill(~chosen.repeat_interleave(by_group.shape[-1], dim=-1), self.fill)

    def weigh(self, logits: Tensor, expert: Tensor, expert_scale: Tensor | None = None) -> Tensor:
        """Weights [T, K] of the chosen; unused slots (PAD) take no part in the normalisation and weigh 0."""
        used, index = expert >= 0, expert.clamp(min=0)
        if self.weights == "softmax":
            chosen = logits.to(torch.promote_types(logits.dtype, torch.float32)).gather(-1, index)
            weight = torch.softmax(chosen.masked_fill(~used, -math.inf), dim=-1)
        else:
            weight = self.scores(logits).gather(-1, index).masked_fill(~used, 0)
        weight = self._normalised(weight) * self.scale
        if expert_scale is not None:
            weight = weight * expert_scale[index].to(weight.dtype)
        return weight.masked_fill(~used, 0)

    def _normalised(self, weight: Tensor) -> Tensor:
        if self.normalise is None:
            return weight
        kind, value = self.normalise
        if kind == "norm":
            return weight / weight.norm(p=value, dim=-1, keepdim=True)
        total = weight.sum(dim=-1, keepdim=True)
        return weight / (total.clamp(min=value) if kind == "clamp" else total + value)
