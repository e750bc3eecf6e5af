"""The second stage of a router: which experts, as ids [T, K] padded with PAD, from scores [T, E].

A selection bias ([E] or [T, E]) is added to what is ranked and touches nothing else. -inf forbids a choice, and a token
that may choose nothing gets PAD. Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import PAD, Context
from .capacity import Capped
from .expert_choice import ExpertChoice
from .group_limited import GroupLimited
from .limits import Limited, portion, slots
from .parts import Site
from .ranking import best, ranked
from .sampling import Sampled
from .thresholds import Percentile, Support, Threshold


class TopK(nn.Module):
    """The ``k`` highest; the layer's own k where none is given."""

    k = slots("top-k of {value} among {at.choices} experts")

    def __init__(self, site: Site, *, k: int | None = None) -> None:
        super().__init__()
        self.choices = site.choices
        self.k = site.top_k if k is None else k

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        return best(ranked(scores_TE, bias), self.k)


class TopP(nn.Module):
    """The smallest set whose scores reach a share ``p`` of their sum, one choice at least and ``most`` at most.

    Harder Tasks Need More Experts: t = min{m : sum of the m highest >= p}, where the sum is 1 as of a softmax.
    """

    p = portion("p={value} is a share of the probability")
    of_sum = True  # so no score may be negative
    most = slots("most={value} of {at.choices} experts")

    def __init__(self, site: Site, *, p: float = 0.4, most: int | None = None) -> None:
        super().__init__()
        self.choices = site.choices
        self.p, self.most = p, site.choices if most is None else most

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        expert = best(ranked(scores_TE, bias), self.most)
        mass = scores_TE.gather(1, expert.clamp(min=0)).masked_fill(expert == PAD, 0)
        before = mass.cumsum(1) - mass
        enough = self.p * scores_TE.clamp(min=0).sum(1, keepdim=True)
        expert = expert.masked_fill((before >= enough) & (before > 0), PAD)
        used = int((expert != PAD).sum(1).max()) if len(expert) else 1
        return expert[:, : max(used, 1)]


class Grouped(nn.Module):
    """The ``k / groups`` highest in each of ``groups`` equal groups of neighbours: all groups equally loaded (MoGE)."""

    groups: Any = Limited(
        int,
        lambda groups, part: groups >= 1 and not (part.choices % groups or vars(part).get("k", groups) % groups),
        "{value} groups do not divide {at.choices} experts and their slots evenly",
    )
    k: Any = Limited(
        int,
        lambda k, part: 1 <= k <= part.choices and not k % part.groups,
        "{at.groups} groups do not divide {at.choices} experts and {value} slots evenly",
    )

    def __init__(self, site: Site, *, groups: int, k: int | None = None) -> None:
        super().__init__()
        self.choices, self.groups = site.choices, groups
        self.k = site.top_k if k is None else k

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks = ranked(scores_TE, bias).unflatten(1, (self.groups, -1))
        values, inner = ranks.topk(self.k // self.groups, dim=-1)
        first = torch.arange(self.groups, device=ranks.device)[:, None] * ranks.shape[-1]
        return (inner + first).masked_fill(values == -math.inf, PAD).flatten(1)


SELECTORS: dict[str, Callable[..., Any]] = {
    "top-k": TopK,
    "top-p": TopP,
    "grouped": Grouped,
    "group-limited": GroupLimited,
    "percentile": Percentile,
    "threshold": Threshold,
    "support": Support,
    "capped": Capped,
    "expert-choice": ExpertChoice,
    "sampled": Sampled,
}
"""By the name a configuration gives; called with (scores_TE, context, bias)."""
