"""Selectors by the value of a score, so that every token uses as many experts as it needs.

Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import real, recomputed
from .limits import Limited, portion, slots
from .parts import Site
from .ranking import kept, ranked

SCOPES = ("token", "batch")


class Percentile(nn.Module):
    """Every choice at or above the percentile ``share`` of scores, and the best in any case.

    DynaMoE leaves open whose scores are ranked. ``scope``: each "token" its own, which uses about ``(1 - share) E``
    everywhere, ties apart; or those of the whole "batch" together, where tokens that are sure use fewer. A percentile
    of a batch tells tokens about later ones: outside training the mean of earlier batches' (weight ``pace`` for the
    last) stands for it, so that a text can be gone on with. Padding has no say in it.
    """

    share = Limited(float, lambda share, part: 0 <= share < 1, "share={value} of a percentile: give 0 to below 1")
    pace = portion("pace={value} of a running mean")
    threshold: Tensor

    def __init__(self, site: Site, *, share: float = 0.75, scope: str = "token", pace: float = 0.05) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise OptionError(f"scope={scope!r} of a percentile: choose one of {', '.join(SCOPES)}")
        self.share, self.scope, self.pace = share, scope, pace
        self.register_buffer("threshold", torch.full((), math.nan) if scope == "batch" else None)

    def initialise(self, std: float) -> None:
        if self.threshold is not None:
            init.constant_(self.threshold, math.nan)

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks = ranked(scores_TE, bias)
        if not len(ranks):
            return kept(ranks, ranks > 0)
        least = self._of_batch(ranks, context) if self.scope == "batch" else percentile(ranks, self.share)
        return kept(ranks, (ranks >= least).scatter(1, ranks.argmax(1, keepdim=True), True))

    def _of_batch(self, ranks_TE: Tensor, context: Context) -> Tensor:
        if not self.training and not bool(self.threshold.isnan()):
            return self.threshold.to(ranks_TE.dtype)
        counted_TE = (ranks_TE > -math.inf) & real(ranks_TE, context)[:, None]
        now = percentile(ranks_TE[counted_TE][None], self.share)[0, 0]
        if self.training and not recomputed() and bool(now.isfinite()):
            before = torch.where(self.threshold.isnan(), now, self.threshold)
            self.threshold.copy_(before + self.pace * (now - before))
        return now


def percentile(values_RN: Tensor, share: float) -> Tensor:
    """[R, 1]: the least value of each row that at least ``share`` of the way up its finite values; inf for no values.

    That is ``numpy.quantile(..., method="higher")``; -inf marks what does not count.
    """
    rows, count = values_RN.shape
    if not count:
        return values_RN.new_full((rows, 1), math.inf)
    rising = values_RN.sort(1).values
    finite = (values_RN > -math.inf).sum(1, keepdim=True)
    place = count - finite + torch.ceil(share * (finite - 1).double()).to(torch.int64)
    return rising.gather(1, place.clamp(0, count - 1))


class Threshold(nn.Module):
    """Every choice with a score above ``least``, the best in any case and ``most`` at most (EvoMoE: 0.001)."""

    most = slots("most={value} of {at.choices} experts")

    def __init__(self, site: Site, *, least: float = 1e-3, most: int | None = None) -> None:
        super().__init__()
        self.choices = site.choices
        self.least, self.most = least, site.choices if most is None else most

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks = ranked(scores_TE, bias)
        if not len(ranks):
            return kept(ranks, ranks > 0)
        above = (scores_TE > self.least).scatter(1, ranks.argmax(1, keepdim=True), True)
        return kept(ranks, above & (ranks > -math.inf))[:, : self.most]


class Support(nn.Module):
    """Every choice with a positive score: for scores that are exactly 0 where nothing is wanted. ``most``: no more."""

    most = slots("most={value} of {at.choices} experts")

    def __init__(self, site: Site, *, most: int | None = None) -> None:
        super().__init__()
        self.choices = site.choices
        self.most = site.choices if most is None else most

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        ranks = ranked(scores_TE, bias)
        positive = (scores_TE > 0) | scores_TE.isnan()  # see ``ranked``
        return kept(ranks, positive & (ranks > -math.inf))[:, : self.most]
