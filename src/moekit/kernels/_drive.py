"""One forward pass without gradients, whichever way the two products of an expert are computed.

Shapes by suffix: T tokens, K slots, S pairs that hold an expert, M rows of one expert, H hidden size, I intermediate
size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..bank import Activation
from ._arrivals import Arrivals
from ._plan import Plan

FEW_ROWS = 12
"""Rows of an expert below which it shares the row-wise work with its neighbours."""

SMALL = 2**20
"""Outputs up to which all rows are kept and combined in one call; more rows than that no longer stay in the caches."""


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


class Whole(Protocol):
    """Products that take all tokens of a batch at once; see :func:`forward` and :func:`slots`."""

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, **arrivals: Arrivals) -> Tensor:
        """``arrivals``, under that name, only where weights come while the layer runs."""
        ...

    def slots(self, x_TH: Tensor, index_TK: Tensor) -> Tensor: ...


def forward(
    products: Products, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, *, arrivals: Arrivals | None = None
) -> Tensor:
    """[T, H] in the dtype of ``x_TH``; sums are kept in the products' dtype, in a fixed order.

    With ``arrivals`` an expert's weights are read only once it has been asked for; the result is the same.
    """
    if (fused := _fused(products, x_TH)) is not None:
        return fused.forward(x_TH, index_TK, weight_TK, **({} if arrivals is None else {"arrivals": arrivals}))
    plan = Plan.of(index_TK, products.num_experts)
    x = x_TH.to(products.dtype(x_TH))
    if plan.pair.numel() * x.shape[1] <= SMALL:
        return plan.combine(_all_rows(products, x, plan, arrivals), weight_TK).to(x_TH.dtype)
    weight = plan.weights(weight_TK, x.dtype)
    out = torch.zeros_like(x)
    for chunk in plan.chunks(FEW_ROWS):
        start, stop = chunk[0][1], chunk[-1][2]
        rows = _rows(products, x, plan, chunk, arrivals)
        out.index_add_(0, plan.token[start:stop], rows.mul_(weight[start:stop]))
    return out.to(x_TH.dtype)


def slots(products: Products, x_TH: Tensor, index_TK: Tensor) -> Tensor:
    """Unweighted outputs [T, K, H] in the dtype of ``x_TH``; zero where a slot holds no expert."""
    if (fused := _fused(products, x_TH)) is not None:
        return fused.slots(x_TH, index_TK)
    plan = Plan.of(index_TK, products.num_experts)
    x = x_TH.to(products.dtype(x_TH))
    return plan.scatter(_all_rows(products, x, plan).to(x_TH.dtype), *index_TK.shape)


def _fused(products: Products, x_TH: Tensor) -> Whole | None:
    """What runs a whole batch in one go, where the products have it for these inputs."""
    return None if products.dtype(x_TH) == torch.float64 else getattr(products, "fused", None)


def _all_rows(products: Products, x_TH: Tensor, plan: Plan, arrivals: Arrivals | None = None) -> Tensor:
    """Outputs [S, H] of all pairs, in the order of the plan."""
    parts = [_rows(products, x_TH, plan, chunk, arrivals) for chunk in plan.chunks(FEW_ROWS)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else x_TH.new_zeros(0, x_TH.shape[1])


def _rows(
    products: Products, x_TH: Tensor, plan: Plan, chunk: list[tuple[int, int, int]], arrivals: Arrivals | None
) -> Tensor:
    """Outputs of one chunk, finished but not weighted."""
    first, last = chunk[0][1], chunk[-1][2]
    one = x_TH.shape[0] == 1
    x = x_TH.expand(last - first, -1) if one else x_TH.index_select(0, plan.token[first:last])
    experts, counts = [e for e, _, _ in chunk], [stop - start for _, start, stop in chunk]
    if len(chunk) == 1:
        rows = products.rows(next(_arrived(experts, arrivals)), x)
    else:
        z = torch.cat([products.up(e, p) for e, p in zip(_arrived(experts, arrivals), x.split(counts), strict=True)])
        # Over the whole chunk, however few experts are there at once: bits depend on what is computed together.
        h = products.activation(z).split(counts)
        rows = torch.cat([products.down(e, p) for e, p in zip(_arrived(experts, arrivals), h, strict=True)])
    return products.finish(rows) if products.finish else rows


def _arrived(experts: list[int], arrivals: Arrivals | None) -> Iterator[int]:
    """Each expert when its weights are there, as many of them asked for together as can be."""
    most = len(experts) if arrivals is None else arrivals.most
    for start in range(0, len(experts), most):
        part = experts[start : start + most]
        if arrivals is not None:
            arrivals(part)
        yield from part
