"""A selector that looks at groups of experts first, so that a token needs few devices.

Shapes by suffix: T tokens, G groups, N experts of a group, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .limits import slots
from .parts import Site
from .ranking import best, ranked


class GroupLimited(nn.Module):
    """The ``k`` highest among the best ``keep`` of ``groups`` equal groups of neighbours (group-limited routing).

    DeepSeek-V3, section 2.1.2: groups are ranked by the sum of their two highest scores, with the bias of loss-free
    balancing added; ``highest = 1`` is DeepSeek-V2, whose groups are ranked by their best. (The paper of V3 sums
    ``k / keep``; two is what its model has.) The ``k`` of the layer where none is given. Scores that forbid a choice
    (-inf) count for nothing in a group; one with nothing to choose comes last.

    Raises:
        OptionError: groups that do not divide the experts, or more groups, scores or slots than there are.
    """

    k = slots("top-k of {value} among the {at.choices} experts of {at.keep} groups")

    def __init__(self, site: Site, *, groups: int, keep: int, highest: int = 2, k: int | None = None) -> None:
        super().__init__()
        if groups < 1 or site.choices % groups:
            raise OptionError(f"{groups} groups do not divide {site.choices} experts evenly")
        size = site.choices // groups
        if not 1 <= keep <= groups:
            raise OptionError(f"keep={keep} of {groups} groups: give 1 to {groups}")
        if not 1 <= highest <= size:
            raise OptionError(f"highest={highest} scores of a group of {size} experts: give 1 to {size}")
        self.groups, self.keep, self.highest = groups, keep, highest
        self.choices = keep * size
        self.k = site.top_k if k is None else k

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks_TGN = ranked(scores_TE, bias).unflatten(1, (self.groups, -1))
        high = ranks_TGN.topk(self.highest, dim=-1).values
        score_TG = high.masked_fill(high == -math.inf, 0).sum(-1).masked_fill(high[..., 0] == -math.inf, -math.inf)
        kept = score_TG.topk(self.keep, dim=1).indices
        left_out = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, kept, False)
        return best(ranks_TGN.masked_fill(left_out[..., None], -math.inf).flatten(1), self.k)
