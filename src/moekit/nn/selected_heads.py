"""Attention heads that each read and write a part of the tokens only.

Shapes by suffix: B sequences, S positions, T = B S tokens, N heads, D head size, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import Context
from ..errors import OptionError
from .attention import WEIGHTINGS, Attention, eager, rotated
from .heads import HeadRouter, site_of_heads
from .stick_breaking import seen


class SelectedHeads(Attention):
    """Selective multi-head attention (Union of Experts): a head attends from its own tokens to its own tokens.

    A router gives every token some heads; in each head the tokens that chose it form a sequence of their own, with
    positions counted anew, and the rest get nothing from it. The gate multiplies what a head adds (the router's
    ``weigh`` "ones" leaves it out). Computed on whole rows under a mask: exact, and no faster than all heads. What a
    token's neighbours chose is needed to go on, so no key-value cache.

    Raises:
        OptionError: positions that are scaled for longer texts, which places counted anew are not.
    """

    cached = False

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        k: int,
        router: dict[str, Any] | None = None,
        balance: dict[str, Any] | None = None,
        weights: str = "softmax",
    ) -> None:
        super().__init__(config, layer, weights=weights)
        self.num_heads = config.num_attention_heads
        self.router = HeadRouter(site_of_heads(config, layer, self.num_heads, k), router, balance, "attention")
        self.groups, self.num_key_value_groups = self.num_key_value_groups, 1
        rotary = config.rope_parameters or {}
        if rotary.get("rope_type", "default") != "default":
            raise OptionError(f"selected heads count their own places, and know no rope_type {rotary['rope_type']!r}")
        self.theta = rotary.get("rope_theta", 10000.0)

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
        routing = self.router(hidden_BSH.reshape(-1, size), context)
        gate_BNS = routing.dense(self.num_heads).view(batch, length, -1).transpose(1, 2)
        chosen = torch.zeros(len(routing.expert), self.num_heads + 1, dtype=torch.bool, device=gate_BNS.device)
        chosen[torch.arange(len(chosen), device=chosen.device)[:, None], routing.expert] = True  # PAD is the last
        own_BNS = chosen[:, :-1].view(batch, length, -1).transpose(1, 2)
        query, key, value = self._projected(hidden_BSH, own_BNS)
        mask = own_BNS[:, :, :, None] & own_BNS[:, :, None, :] & seen(attention_mask, length, length, key.device)
        # a query without any key would be nothing over nothing: it sees itself, and its gate is 0
        mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
        attend = WEIGHTINGS.get(self.weights, eager)
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        out, _ = attend(self, query, key, value, bias, scaling=self.scaling)
        out = out * (gate_BNS * own_BNS).transpose(1, 2)[..., None].to(out.dtype)
        return self.o_proj(out.flatten(2))

    def _projected(self, hidden_BSH: Tensor, own_BNS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all query heads [B, N, S, D], in places counted among a head's own tokens."""
        query, key, value = (
            project(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = self.q_norm(query), self.k_norm(key), value
        key, value = (t.repeat_interleave(self.groups, dim=1) for t in (key, value))
        if self.weights in WEIGHTINGS:
            return query, key, value
        place = (own_BNS.cumsum(-1) - 1).clamp(min=0).to(torch.float32)
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float, device=place.device) / self.head_dim
        angle = place[..., None] / self.theta**exponent
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
        return _turned(query, cos, sin), _turned(key, cos, sin), value


def _turned(x_BNSD: Tensor, cos_BNSD: Tensor, sin_BNSD: Tensor) -> Tensor:
    flat = x_BNSD.flatten(0, 1)[:, None]
    return rotated(flat, cos_BNSD.flatten(0, 1), sin_BNSD.flatten(0, 1))[:, 0].view_as(x_BNSD)
