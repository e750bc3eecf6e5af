"""Experts choose tokens: each takes its share of every sequence.

Shapes by suffix: T tokens, E choices, B sequences, S positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Context
from .flow import by_sequence, real
from .limits import portion, slots
from .parts import Site
from .ranking import best, kept, ranked


class ExpertChoice(nn.Module):
    """Every expert takes the best ``share`` of a sequence's tokens, of those that rank it among their ``most`` best.

    ``causal``: a token is taken if it stands in the best share of the tokens so far, itself among them, which needs no
    look ahead. Not causal is expert choice as published (Zhou et al. 2022; Union of Experts, data selection, there
    with a normalisation over the batch that is left out here): exactly ``ceil(share n)`` tokens of n, and whether one
    is among them depends on later ones. A token may be taken by no expert.

    Raises:
        OptionError: a share outside (0, 1], or less than one expert for a token.
    """

    cached = False
    share = portion("share={value} of a sequence's tokens")
    most = slots("most={value} of {at.choices} experts")

    def __init__(self, site: Site, *, share: float, most: int | None = None, causal: bool = True) -> None:
        super().__init__()
        self.choices = site.choices
        self.share, self.most, self.causal = share, site.choices if most is None else most, causal

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks_TE = ranked(scores_TE, bias)
        if not len(ranks_TE):
            return best(ranks_TE, 1)
        allowed = ranks_TE > -math.inf
        if self.most < self.choices:
            allowed &= torch.zeros_like(allowed).scatter(1, ranks_TE.topk(self.most, dim=1).indices, True)
        real_BS = by_sequence(real(ranks_TE, context), context)
        ranks_BSE = by_sequence(ranks_TE.masked_fill(~allowed, -math.inf), context)
        taken = torch.stack([self._taken(one, real_BS) for one in ranks_BSE.unbind(2)], dim=2)
        return kept(ranks_TE, taken.reshape(ranks_TE.shape) & allowed)

    def _taken(self, rank_BS: Tensor, real_BS: Tensor) -> Tensor:
        """bool [B, S]: fewer than ``share`` of the tokens that count stand above; earlier ones win ties."""
        number = torch.arange(rank_BS.shape[1], device=rank_BS.device)
        earlier = number < number[:, None]
        mine, theirs = rank_BS[:, :, None], rank_BS[:, None, :]
        above = (theirs > mine) | (theirs == mine) & earlier
        if self.causal:
            above &= earlier
        count = real_BS.cumsum(1) if self.causal else real_BS.sum(1, keepdim=True)
        return (above & real_BS[:, None, :]).sum(2) < self.share * count
