"""Products on packed integers: an expert is decoded when tokens reach it, tile by tile, and never kept.

Shapes by suffix: M rows, N output and K input columns of a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import PackedBank


class IntegerProducts:
    """Both products of every expert of a :class:`PackedBank`; computes in float32."""

    def __init__(self, bank: PackedBank, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self.bank = bank
        self.finish = finish
        self.num_experts = bank.num_experts
        self.activation = bank.activation

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return torch.promote_types(x_TH.dtype, torch.float32)

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._product(x_MH, expert, "gate_up")

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._product(h_MI, expert, "down")

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH)))

    def _product(self, x_MK: Tensor, expert: int, part: str) -> Tensor:
        bias = self.bank.stored.get(f"{expert}.{part}.bias")
        weight_NK = self.bank.matrix(expert, part, x_MK.dtype)
        return F.linear(x_MK, weight_NK, None if bias is None else bias.to(x_MK.dtype))
