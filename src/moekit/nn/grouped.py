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
        order = group_M.argsort(stable=True)
        none, *counts = torch.bincount(group_M.clamp(min=-1) + 1, minlength=len(self.weight) + 1).tolist()
        rest, *parts = x_MI[order].split([none, *counts])
        biases = [None] * len(parts) if self.bias is None else self.bias.unbind()
        products = [rest.new_zeros(none, self.weight.shape[1])]
        for x, weight, bias in zip(parts, self.weight.unbind(), biases, strict=True):
            products.append(F.linear(x, weight, bias).to(x_MI.dtype))
        return torch.cat(products)[order.argsort()]
