"""A linear map that every row takes from a stack of them, by a known number.

Shapes by suffix: M rows, I inputs, O outputs, G maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..errors import OptionError


class GroupedLinear(nn.Module):
    """``y_m = W[g_m] x_m + b[g_m]``; a row whose number is negative gets zeros.

    ``weight`` [G, O, I], ``bias`` [G, O] where there is one. Raises :class:`OptionError` where there is no map at all.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        if groups < 1:
            raise OptionError(f"{groups} linear maps to choose from: give 1 or more")
        self.weight = nn.Parameter(torch.zeros(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(groups, outputs)) if bias else None

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def parameters_per_map(self) -> int:
        return sum(p.numel() for p in self.parameters()) // len(self.weight)

    def forward(self, x_MI: Tensor, group_M: Tensor) -> Tensor:
        """[M, O]."""
        out = x_MI.new_zeros(len(x_MI), self.weight.shape[1])
        for group in range(len(self.weight)):
            row = torch.where(group_M == group)[0]
            if len(row):
                bias = None if self.bias is None else self.bias[group]
                out = out.index_copy(0, row, F.linear(x_MI[row], self.weight[group], bias).to(out.dtype))
        return out
