"""One forward pass without gradients, whichever way the two products of an expert are computed.

Shapes by suffix: T tokens, K slots, S pairs that hold an expert, M rows of one expert, H hidden size, I intermediate
size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..bank import Activation
from ._plan import Plan

FEW_ROWS = 4
"""Rows per active expert below which the activation runs once over all experts: the calls cost more than the rows."""


class Products(Protocol):
    """The two matrix products of every expert, biases included, and what lies between them."""

    num_experts: int
    activation: Activation
    finish: Callable[[Tensor], Tensor] | None

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        """The dtype in which rows are gathered and outputs are summed."""
        ...

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        """[M, G]"""
        ...

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        """[M, H]"""
        ...

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        """Outputs [M, H] of one expert for the rows that reached it: down(activation(up(x)))."""
        ...


def forward(products: Products, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, H] in the dtype of ``x_TH``; sums are kept in the products' dtype, in a fixed order."""
    plan = Plan.of(index_TK, products.num_experts)
    x = x_TH.to(products.dtype(x_TH))
    if plan.pair.numel() < FEW_ROWS * len(plan.segments) or not plan.segments:
        return plan.combine(_together(products, x, plan), weight_TK).to(x_TH.dtype)
    weight = plan.weights(weight_TK, x.dtype)
    out = torch.zeros_like(x)
    for expert, start, stop in plan.segments:
        token = plan.token[start:stop]
        rows = products.rows(expert, x.index_select(0, token))
        if products.finish:
            rows = products.finish(rows)
        out.index_add_(0, token, rows.mul_(weight[start:stop]))
    return out.to(x_TH.dtype)


def slots(products: Products, x_TH: Tensor, index_TK: Tensor) -> Tensor:
    """Unweighted outputs [T, K, H] in the dtype of ``x_TH``; zero where a slot holds no expert."""
    plan = Plan.of(index_TK, products.num_experts)
    x = x_TH.to(products.dtype(x_TH))
    rows_SH = _together(products, x, plan).to(x_TH.dtype)
    return plan.scatter(rows_SH, *index_TK.shape)


def _together(products: Products, x_TH: Tensor, plan: Plan) -> Tensor:
    """Outputs [S, H] of all pairs, the activation applied to all experts at once."""
    if not plan.segments:
        return x_TH.new_zeros(0, x_TH.shape[1])
    x_SH = x_TH if x_TH.shape[0] == plan.pair.numel() == 1 else x_TH.index_select(0, plan.token)
    z_SG = torch.cat([products.up(e, x_SH[start:stop]) for e, start, stop in plan.segments])
    h_SI = products.activation(z_SG)
    rows = torch.cat([products.down(e, h_SI[start:stop]) for e, start, stop in plan.segments])
    return products.finish(rows) if products.finish else rows
