"""Weights that are not the scores that selected: a second linear map of the token decides how much an expert says.

Shapes by suffix: T tokens, H hidden size, K slots, E choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Site
from .ranking import chosen

STARTS = ("lecun", "zero")


class Decoupled(nn.Module):
    """``w_i = s_i + (x W)_i`` of the chosen: scores plus a scale that selection never sees (AdaMoE-VLA).

    The weights are neither normalised nor bounded. ``start``: W is drawn ("lecun": deviation ``H^-1/2``) or "zero", at
    which the weights are the scores. With ``joint``, ``w = softmax([x, s] W)`` over all choices instead.
    """

    def __init__(self, site: Site, *, start: str = "lecun", joint: bool = False) -> None:
        super().__init__()
        if start not in STARTS:
            raise OptionError(f"start={start!r} of decoupled weights: choose one of {', '.join(STARTS)}")
        self.start, self.joint = start, joint
        size = site.hidden_size + (site.choices if joint else 0)
        self.weight = nn.Parameter(torch.zeros(site.choices, size))

    def initialise(self, std: float) -> None:
        if self.start == "lecun":
            init.normal_(self.weight, mean=0.0, std=self.weight.shape[1] ** -0.5)
        else:
            init.zeros_(self.weight)

    def forward(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        x_TH = context.extra.get("hidden")
        if x_TH is None:
            raise OptionError(
                "decoupled weights need the hidden states: run the whole router, not its last stage alone"
            )
        x_TH = x_TH.to(scores_TE.dtype)
        weight = self.weight.to(scores_TE.dtype)
        if self.joint:
            full_TE = F.linear(torch.cat((x_TH, scores_TE), dim=1), weight).softmax(-1)
        else:
            full_TE = scores_TE + F.linear(x_TH, weight)
        return chosen(full_TE, expert_TK)
