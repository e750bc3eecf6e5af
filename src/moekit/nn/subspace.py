"""Experts as choices of columns of one wide backbone, and the terms that prune what they have in common.

Shapes by suffix: T tokens, H hidden size, D columns of the backbone, N experts, R columns of one expert, K slots.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..errors import OptionError
from .parts import Site

if TYPE_CHECKING:
    from .seen import Seen


@use_experts_implementation(has_gate=False)
class SubspaceExperts(nn.Module):
    """``y_i = act(x U[:, S_i]) V[S_i] mean(I_i[S_i])``: S_i are the R columns that expert i is most connected to.

    CDSP-MoE: the D columns (``width``; 4 H where none is given) lie in N equal blocks; ``topology`` [N, N] connects
    experts to blocks, with 1 on the diagonal and about 0.1 elsewhere at first; the influence I of a column is the
    sigmoid of its block's connection, and R = floor(D / sqrt(N)) unless ``columns`` says otherwise. The mean influence
    is how the loss reaches the topology. ``conflict`` [N, N] is how far the gradients of two experts opposed one
    another at the last step, where they share columns: ``relu(-cos)``.
    """

    conflict: Tensor

    def __init__(self, config: Any, site: Site, *, width: int | None = None, columns: int | None = None) -> None:
        super().__init__()
        count, width = site.num_experts, 4 * site.hidden_size if width is None else width
        if width < count or width % count:
            raise OptionError(f"a backbone of {width} columns does not divide into {count} equal blocks, one an expert")
        self.columns = math.floor(width / math.sqrt(count)) if columns is None else columns
        if not 1 <= self.columns <= width:
            raise OptionError(f"columns={self.columns} of an expert: the backbone has {width}")
        self.num_experts, self.width, self.top_k = count, width, site.top_k
        self.up, self.down = (nn.Parameter(torch.empty(width, site.hidden_size)) for _ in range(2))
        self.topology = nn.Parameter(torch.empty(count, count))
        self.act_fn = ACT2FN[site.activation]
        self.register_buffer("conflict", torch.zeros(count, count))
        self._grad: tuple[Tensor, Tensor] | None = None

    def initialise(self, std: float) -> None:
        init.orthogonal_(self.up)
        init.orthogonal_(self.down)
        start = 0.1 + 0.02 * torch.randn_like(self.topology)
        init.copy_(self.topology, start.fill_diagonal_(1.0))
        init.zeros_(self.conflict)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """(int64 [N, R] columns, [N] mean influence): ties go to the lower column."""
        influence_ND = self.topology.sigmoid().repeat_interleave(self.width // self.num_experts, dim=1)
        order = influence_ND.detach().sort(dim=1, descending=True, stable=True).indices[:, : self.columns]
        return order, influence_ND.gather(1, order).mean(1)

    @property
    def up_proj(self) -> Tensor:
        """[N, R, H]."""
        order, _ = self.chosen()
        up = self.up[order]
        if self.training and up.requires_grad:
            up.register_hook(partial(self._listen, order))
        return up

    @property
    def down_proj(self) -> Tensor:
        """[N, H, R], the mean influence folded in."""
        order, strength = self.chosen()
        return (self.down[order] * strength[:, None, None]).transpose(1, 2)

    def active_parameters(self) -> int:
        """What one token uses."""
        return self.top_k * (2 * self.columns * self.up.shape[1] + self.num_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], expert by expert."""
        up, down, out = self.up_proj, self.down_proj, torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                rows = self.act_fn(hidden_states[token] @ up[expert].T) @ down[expert].T
                out = out.index_add(0, token, (rows * top_k_weights[token, slot, None]).to(out.dtype))
        return out

    def finish_step(self) -> None:
        """The optimizer has stepped: what the gradients of this step said is what the next one prunes by."""
        if self._grad is not None:
            self.conflict.copy_(self._opposed(*self._grad))
            self._grad = None

    def _listen(self, order_NR: Tensor, grad_NRH: Tensor) -> None:
        """Gradients of one step are added up; those of another choice of columns are forgotten."""
        before = self._grad
        if before is not None and torch.equal(before[0], order_NR):
            grad_NRH = before[1] + grad_NRH
        self._grad = (order_NR, grad_NRH.detach())

    def _opposed(self, order_NR: Tensor, grad_NRH: Tensor) -> Tensor:
        """[N, N]: ``relu(-cos)`` of the gradients over the columns that two experts share; 0 on the diagonal."""
        grad = self.up.new_zeros(self.num_experts, *self.up.shape)
        grad.scatter_(1, order_NR[:, :, None].expand_as(grad_NRH), grad_NRH.to(grad.dtype))
        own_ND = grad.new_zeros(grad.shape[:2]).scatter_(1, order_NR, 1.0)
        product = grad.flatten(1) @ grad.flatten(1).T
        square = grad.square().sum(-1) @ own_ND.T
        norm = (square.sqrt() * square.T.sqrt()).clamp(min=torch.finfo(grad.dtype).tiny)
        return (-product / norm).clamp(min=0).fill_diagonal_(0)


def subspace_of(seen: Seen) -> SubspaceExperts:
    if not isinstance(seen.experts, SubspaceExperts):
        kind = type(seen.experts).__name__
        raise OptionError(f"this balance term needs experts of the kind subspace, and the layer has {kind}")
    return seen.experts


class Conflict(nn.Module):
    """``sum_ij sigmoid(a_ij) conflict_ij`` over ordered pairs of experts that this batch uses (CDSP-MoE)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        experts = subspace_of(seen)
        used = seen.chosen_TE.sum(0)[: experts.num_experts] > 0
        pair = used[:, None] & used[None, :]
        return (experts.topology.sigmoid() * experts.conflict * pair).sum()


class Connections(nn.Module):
    """``mean |a| + undecided * mean s (1 - s)``, s = sigmoid(a): few connections, each clearly on or off (CDSP-MoE)."""

    def __init__(self, site: Site, *, undecided: float = 10.0) -> None:
        super().__init__()
        self.undecided = undecided

    def forward(self, seen: Seen) -> Tensor:
        topology = subspace_of(seen).topology
        share = topology.sigmoid()
        return topology.abs().mean() + self.undecided * (share * (1 - share)).mean()
