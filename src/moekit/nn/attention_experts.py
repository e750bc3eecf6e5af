"""Attention whose experts own queries and outputs, and share keys and values.

Shapes by suffix: B sequences, S positions, T = B S tokens, K slots, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .attention import Attention
from .grouped import GroupedLinear
from .heads import HeadRouter, site_of_heads


class AttentionExperts(Attention):
    """``y = sum_i g_i W_o^i attend(W_q^i x, W_k X, W_v X)`` over the ``k`` experts a token chooses (ModuleFormer; MoA).

    Every expert has ``heads`` heads of the model's head size; keys and values are computed once, for all of them.
    Raises :class:`OptionError` for more experts to choose than there are, or experts without heads.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        experts: int,
        k: int,
        heads: int = 1,
        router: dict[str, Any] | None = None,
        balance: dict[str, Any] | None = None,
        weights: str = "softmax",
    ) -> None:
        super().__init__(config, layer, weights=weights)
        if heads < 1:
            raise OptionError(f"heads={heads} of an attention expert: give 1 or more")
        self.num_heads, self.num_key_value_groups = heads, 1
        self.router = HeadRouter(site_of_heads(config, layer, experts, k), router, balance, "attention")
        width = heads * self.head_dim
        self.q_proj: GroupedLinear = GroupedLinear(experts, config.hidden_size, width)
        self.o_proj: GroupedLinear = GroupedLinear(experts, width, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)

    def active_parameters(self) -> int:
        """What one token uses: ``k`` experts, and all that they share."""
        owned = (self.q_proj, self.o_proj)
        rest = sum(p.numel() for p in self.parameters()) - sum(p.numel() for own in owned for p in own.parameters())
        return rest + self.router.gate.top_k * sum(own.parameters_per_map() for own in owned)

    def forward(
        self,
        hidden_BSH: Tensor,
        context: Context,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, H]."""
        batch, length, size = hidden_BSH.shape
        x_TH = hidden_BSH.reshape(-1, size)
        routing = self.router(x_TH, context)
        slots = routing.expert.shape[1]
        expert = routing.expert.reshape(-1)
        query = self.q_proj(x_TH.repeat_interleave(slots, dim=0), expert)
        query = self.q_norm(query.view(batch, length, slots, self.num_heads, self.head_dim)).flatten(2, 3)
        key = self.k_norm(self.k_proj(hidden_BSH).unflatten(-1, (-1, self.head_dim)))
        value = self.v_proj(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = (self.placed(t.transpose(1, 2), position_embeddings) for t in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # each slot has all the heads: heads of the keys in order, once per slot
        key, value = (t.repeat(1, slots, 1, 1) for t in (key, value))
        out = self.attend(query, key, value, attention_mask, **kwargs).reshape(len(expert), -1)
        rows = self.o_proj(out, expert).view(len(x_TH), slots, size)
        return torch.einsum("tkh,tk->th", rows, routing.weight.to(rows.dtype)).view(batch, length, size)
