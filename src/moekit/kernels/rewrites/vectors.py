"""A rewrite that lets vectors stand in for the slots that do not run.

Shapes by suffix: T tokens, K slots, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ._rewrite import Rewrite, Routed, keep_slots, rank_of


class AuxiliaryVectors(Rewrite):
    """The ``main`` heaviest slots run; the others are stood in for by a vector each, which rescales the input.

    x' = x * (1 + sum_a w_a / (sum_a w_a) (theta[e_a] - 1)) over the slots a that do not run. ``theta`` [E, H]; with
    ones it is exactly :class:`TopSlots`.
    """

    KIND = "auxiliary-vectors"
    LEARNS: ClassVar[bool] = True

    def __init__(self, theta_EH: Tensor, main: int, *, renormalise: bool = True) -> None:
        super().__init__()
        if main < 1:
            raise OptionError(f"main={main} leaves nothing to run: keep at least 1 slot")
        self.theta = nn.Parameter(theta_EH, requires_grad=False)
        self.main, self.renormalise = main, renormalise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "main": self.main, "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(torch.empty(rows, hidden_size), describe["main"], renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        runs = rank_of(weight_TK) < self.main
        used = (index_TK >= 0) & (index_TK < len(self.theta))
        share = torch.where(runs | ~used, 0.0, weight_TK.float())
        share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
        change = (self.theta.float() - 1)[torch.where(used, index_TK, 0)]
        x = x_TH * (1 + (share[..., None] * change).sum(1)).to(x_TH.dtype)
        return x, *keep_slots(index_TK, weight_TK, runs, renormalise=self.renormalise)
