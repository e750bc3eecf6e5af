"""Any bank under any routing, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..bank import ExpertBank
from ..contract import Routing
from ..formats import DenseBank, LatentBank, LowRankBank, NestedBank, PackedBank, TernaryBank
from . import _drive
from ._layer import Layer
from .factored import LatentProducts, LowRankProducts
from .integers import IntegerProducts
from .plain import PlainProducts
from .planes import NestedProducts, TernaryProducts

Finish = Callable[[Tensor], Tensor]


PRODUCTS: dict[type[ExpertBank], Callable[..., _drive.Products]] = {
    PackedBank: IntegerProducts,
    LowRankBank: LowRankProducts,
    LatentBank: LatentProducts,
    TernaryBank: TernaryProducts,
    NestedBank: NestedProducts,
}
"""What runs each stored format."""


def products_of(bank: ExpertBank, finish: Finish | None = None) -> _drive.Products:
    """The products that run a bank where it lies; a format without kernels of its own is decoded.

    ``finish`` is applied to an expert's output before it is weighted (a post-expert norm).
    """
    if type(bank) in PRODUCTS:
        return PRODUCTS[type(bank)](bank, finish)
    if not isinstance(bank, DenseBank):
        bank = DenseBank.stack([bank.expert(e) for e in range(bank.num_experts)], bank.activation)
    return PlainProducts(replace(Layer.of_bank(bank), finish=finish))


@torch.no_grad()
def run(bank: ExpertBank, x_TH: Tensor, routing: Routing) -> Tensor:
    """Unweighted outputs [T, K, H] of every token's experts; zero where a slot is unused."""
    return _drive.slots(products_of(bank), x_TH, routing.expert)


@torch.no_grad()
def forward(bank: ExpertBank, x_TH: Tensor, routing: Routing) -> Tensor:
    """Weighted sums [T, H]."""
    return _drive.forward(products_of(bank), x_TH, routing.expert, routing.weight)


def warm_up(*dtypes: torch.dtype) -> None:
    """Run tiny layers of plain experts, few rows and many: what that loads or compiles is resident from then on.

    Compiled kernels with what compiles them are over 100 MB: a cap that was reckoned without them would be exceeded, or
    refused, once they are there. And nobody waits for them later.
    """
    for dtype in dtypes:
        bank = DenseBank(torch.zeros(2, 128, 64, dtype=dtype), torch.zeros(2, 64, 64, dtype=dtype))
        for rows in (1, 64):
            expert = torch.arange(rows)[:, None] % 2
            forward(bank, torch.zeros(rows, 64, dtype=dtype), Routing(expert, torch.ones(rows, 1, dtype=dtype)))
