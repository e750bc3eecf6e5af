"""A router that knows when it is unsure: several passes under dropout, and less weight to what they disagree on.

Shapes by suffix: T tokens, H hidden size, E choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from .limits import Limited, positive
from .parts import Site


class Calibrated(nn.Module):
    """Logits ``log(m / (s + floor))`` while training, mean m and deviation s of the softmax over ``passes`` passes.

    Each pass drops a share ``dropout`` of the inputs (Monte Carlo dropout). One plain pass otherwise, as everywhere.
    Our reading of MoFME's uncertainty-aware router, of which no workable formula is published: the ensemble's mean over
    its deviation, made to sum to 1 by the softmax that follows. ``floor`` bounds how much agreement is worth.
    """

    passes = Limited(int, lambda n, part: n >= 2, "passes={value} of a calibrated router: a deviation needs 2 or more")
    dropout = Limited(float, lambda share, part: 0 <= share < 1, "dropout={value} of a router: give 0 to below 1")
    floor = positive("floor={value} of a calibrated router must be positive")

    def __init__(self, site: Site, *, passes: int = 5, dropout: float = 0.1, floor: float = 0.1) -> None:
        super().__init__()
        self.passes, self.dropout, self.floor = passes, dropout, floor
        self.weight = nn.Parameter(torch.zeros(site.choices, site.hidden_size))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        if not self.training:
            return F.linear(x_TH, self.weight)
        mean_TE, deviation_TE = self.ensemble(x_TH)
        return mean_TE.clamp(min=torch.finfo(mean_TE.dtype).tiny).log() - (deviation_TE + self.floor).log()

    def ensemble(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) [T, E] of the softmax over the passes, float32 at least."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        runs = [F.linear(F.dropout(x_TH, self.dropout), self.weight).to(wide).softmax(-1) for _ in range(self.passes)]
        mean = sum(runs[1:], runs[0]) / self.passes
        square = sum(((run - mean).square() for run in runs[1:]), (runs[0] - mean).square()) / (self.passes - 1)
        return mean, (square + torch.finfo(wide).tiny).sqrt()
