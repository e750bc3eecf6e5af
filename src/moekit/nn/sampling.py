"""Choices of which some are drawn.

Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .parts import Site
from .ranking import best, ranked


class Sampled(nn.Module):
    """The ``k - drawn`` highest, and ``drawn`` more by chance while training, in proportion to their scores.

    ModuleFormer, its sampling gate: without replacement, from what is left; the k highest otherwise. Scores are
    probabilities and not negative; a selection bias only moves those that are not drawn.
    """

    def __init__(self, site: Site, *, drawn: int = 1, k: int | None = None) -> None:
        super().__init__()
        self.k, self.drawn = site.top_k if k is None else k, drawn
        if not 1 <= self.k <= site.choices:
            raise OptionError(f"k={self.k} among {site.choices} experts: give 1 to {site.choices}")
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
