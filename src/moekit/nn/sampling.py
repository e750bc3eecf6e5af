"""Choices of which some are drawn.

Shapes by suffix: T tokens, K slots, E choices.
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


class Sampled(nn.Module):
    """The ``k - drawn`` highest, and ``drawn`` more by chance while training, in proportion to their scores.

    ModuleFormer, its sampling gate: without replacement, from what is left; the k highest otherwise. Scores are
    probabilities and not negative; a selection bias only moves those that are not drawn.
    """

    k = slots("k={value} among {at.choices} experts")

    def __init__(self, site: Site, *, drawn: int = 1, k: int | None = None) -> None:
        super().__init__()
        self.choices, self.drawn = site.choices, drawn
        self.k = site.top_k if k is None else k
        if not 0 <= drawn <= self.k:
            raise OptionError(f"drawn={drawn} of k={self.k} choices: give 0 to {self.k}")

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks = ranked(scores_TE, bias)
        if not self.training or not self.drawn:
            return best(ranks, self.k)
        # log p plus Gumbel noise, sorted: a draw without replacement
        uniform = torch.rand_like(scores_TE, dtype=torch.float64).clamp(min=1e-300)
        chance = ranked(scores_TE, None).clamp(min=0).to(torch.float64).log() - (-uniform.log()).log()
        sure = torch.zeros_like(ranks, dtype=torch.bool)
        if self.k > self.drawn:
            sure.scatter_(1, ranks.topk(self.k - self.drawn, dim=1).indices, True)
        chance = chance.masked_fill(ranks == -math.inf, -math.inf)
        highest = ranks.to(torch.float64).sigmoid() + 1e4  # above any chance, in the order of their ranks
        return best(torch.where(sure & (ranks > -math.inf), highest, chance), self.k)
