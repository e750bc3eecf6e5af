"""The third stage of a router: combine weights [T, K] of the chosen.

Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import PAD, Context
from .decoupled import Decoupled
from .parts import Site
from .ranking import chosen


class Scores(nn.Module):
    """The scores of the chosen, made to sum to 1 with ``normalise`` (none is negative then), times ``scale``.

    ``own`` leaves experts without weights out of the sum: those with weights have all of it to themselves, and a token
    that chose none of them gets nothing (AdaMoE).
    """

    def __init__(self, site: Site, *, normalise: bool = True, scale: float = 1.0, own: bool = False) -> None:
        super().__init__()
        self.normalise, self.scale = normalise, scale
        self.first_other = site.num_experts if own else None

    def forward(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        weight = chosen(scores_TE, expert_TK)
        if self.first_other is not None:
            weight = weight.masked_fill(expert_TK >= self.first_other, 0)
        if self.normalise:
            weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return weight * self.scale


class Chosen(nn.Module):
    """A softmax over the logits of the chosen alone, times ``scale``."""

    def __init__(self, site: Site, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        wide = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        weight = chosen(wide, expert_TK, -math.inf).softmax(1)
        return weight.masked_fill(expert_TK == PAD, 0) * self.scale


class Ones(nn.Module):
    """1 for every chosen expert: a sum of slices (a dense layer cut in pieces), times ``scale``.

    ``straight_through`` lets the gradient of the scores pass as if they were the weights (MoH, continue-tuning).
    """

    def __init__(self, site: Site, *, scale: float = 1.0, straight_through: bool = False) -> None:
        super().__init__()
        self.scale, self.straight_through = scale, straight_through

    def forward(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        weight = (expert_TK != PAD).to(scores_TE.dtype)
        if self.straight_through:
            score = chosen(scores_TE, expert_TK)
            weight = weight + score - score.detach()
        return weight * self.scale


WEIGHERS: dict[str, Callable[..., Any]] = {
    "scores": Scores,
    "chosen": Chosen,
    "ones": Ones,
    "decoupled": Decoupled,
}
"""By the name a configuration gives; called with (logits_TE, scores_TE, expert_TK, context)."""
