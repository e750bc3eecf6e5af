"""How well routers know their experts: the table of router rows sent through experts, and the loss that makes them fit.

Nothing here reads tokens: :func:`measured` looks at any checkpoint whose router has one row per expert.
Shapes by suffix: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, UnsupportedModelError
from .parts import Site

if TYPE_CHECKING:
    from ..blocks import MoEBlock
    from .seen import Seen


def responses(rows_EH: Tensor, gate_EIH: Tensor) -> Tensor:
    """M [E, E], float32 at least: ``M_ij = |W_j r_i|``, how strongly expert j's gate projection answers row i.

    Of the linear product, before the activation (ERC loss, arXiv 2512.23447).
    """
    wide = torch.promote_types(rows_EH.dtype, torch.float32)
    out = F.linear(rows_EH.to(wide), gate_EIH.flatten(0, 1).to(wide))
    return torch.linalg.vector_norm(out.unflatten(1, gate_EIH.shape[:2]), dim=-1)


@torch.no_grad()
def margins(rows_EH: Tensor) -> Tensor:
    """[E]: ``eps_i = min_{j != i} |r_i - r_j| / (2 |r_i|)``: within a relative eps_i of row i no other row is nearer.

    A measure of specialisation. 0 where there is one expert, or a row is zero.
    """
    rows = rows_EH.to(torch.promote_types(rows_EH.dtype, torch.float32))
    if len(rows) < 2:
        return rows.new_zeros(len(rows))
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    size = rows.norm(dim=1)
    return torch.where(size > 0, apart.min(1).values / (2 * size), 0)


def excess(responses_EE: Tensor, alpha: float = 1.0) -> Tensor:
    """``1/E^2 sum_i sum_{j != i} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)``.

    Zero if and only if alpha times each diagonal entry is the largest of its row and of its column.
    """
    own_E = alpha * responses_EE.diagonal()
    over = (responses_EE - own_E[:, None]).relu() + (responses_EE.T - own_E[:, None]).relu()
    return over.masked_fill(torch.eye(len(over), dtype=torch.bool, device=over.device), 0).mean()


@torch.no_grad()
def measured(block: MoEBlock) -> tuple[Tensor, Tensor]:
    """(:func:`responses` [E, E], :func:`margins` [E]) of one MoE block of any model, in any format.

    ``excess`` of the first says how far router and experts are from coupled; no training is needed to ask.

    Raises:
        UnsupportedModelError: the router is not one matrix with a row per expert, of the width that experts read.
    """
    bank = block.bank()
    shape = (block.num_experts, bank.hidden_size)
    rows = [p for p in block.router_module.parameters() if tuple(p.shape) == shape]
    if len(rows) != 1:
        raise UnsupportedModelError(
            f"the router of {block.name} is not one matrix {list(shape)}: it cannot be measured"
        )
    columns = []
    for place in block.layout.stored(torch.arange(block.num_experts)).tolist():
        gate = bank.expert(place).gate_up[: bank.intermediate_size]
        columns.append(responses(rows[0], gate[None].to(rows[0].device)))
    return torch.cat(columns, dim=1), margins(rows[0])


class Coupling(nn.Module):
    """:func:`excess` of the router's rows through the experts (expert-router coupling loss); gradients reach both.

    ``noise``: while training, each row is multiplied by uniform numbers from ``1 - eps_i`` to ``1 + eps_i``, so that a
    row stands for the tokens around it. Other kinds of experts, and shared ones, have no part in it.
    """

    def __init__(self, site: Site, *, alpha: float = 1.0, noise: bool = True) -> None:
        super().__init__()
        if not alpha > 0:
            raise OptionError(f"alpha={alpha} of a coupling loss must be positive: 1 couples, less specialises")
        self.alpha, self.noise = alpha, noise

    def forward(self, seen: Seen) -> Tensor:
        rows, gate = coupled(seen.router, seen.experts)
        if self.noise and self.training:
            eps = margins(rows)[:, None].to(rows.dtype)
            rows = rows * (1 + eps * (2 * torch.rand_like(rows) - 1))
        return excess(responses(rows, gate), self.alpha)


def coupled(router: nn.Module, experts: nn.Module) -> tuple[Tensor, Tensor]:
    """(router rows [E, H], gate projections [E, I, H]) of one layer.

    Raises :class:`OptionError` for a router without one row per expert, or experts without gate projections.
    """
    rows, stacked = getattr(router.scorer, "weight", None), getattr(experts, "gate_up_proj", None)
    if stacked is None or stacked.dim() != 3:
        raise OptionError(f"a coupling loss needs experts with gate projections, and {type(experts).__name__} has none")
    count, double, size = stacked.shape
    if rows is None or rows.dim() != 2 or rows.shape[1] != size or len(rows) < count:
        kind = type(router.scorer).__name__
        raise OptionError(f"a coupling loss needs a router with one row per expert, and {kind} has none")
    return rows[:count], stacked[:, : double // 2]
