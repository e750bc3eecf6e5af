"""Any bank under any routing, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bank import ExpertBank
from ..contract import Routing
from ..formats import DenseBank, PackedBank
from . import _drive
from ._layer import Layer
from .integers import IntegerProducts
from .plain import PlainProducts


def products_of(bank: ExpertBank) -> _drive.Products:
    """The products that run a bank where it lies; a format without kernels of its own is decoded."""
    if isinstance(bank, PackedBank):
        return IntegerProducts(bank)
    if not isinstance(bank, DenseBank):
        bank = DenseBank.stack([bank.expert(e) for e in range(bank.num_experts)], bank.activation)
    return PlainProducts(Layer.of_bank(bank))


@torch.no_grad()
def run(bank: ExpertBank, x_TH: Tensor, routing: Routing) -> Tensor:
    """Unweighted outputs [T, K, H] of every token's experts; zero where a slot is unused."""
    return _drive.slots(products_of(bank), x_TH, routing.expert)


@torch.no_grad()
def forward(bank: ExpertBank, x_TH: Tensor, routing: Routing) -> Tensor:
    """Weighted sums [T, H]."""
    return _drive.forward(products_of(bank), x_TH, routing.expert, routing.weight)
