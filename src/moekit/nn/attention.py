"""Attention over earlier tokens: the plain kind, and what the kinds with routed heads have in common with it.

Shapes by suffix: B sequences, S positions, N heads, D head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..contract import Context
from ..errors import OptionError
from .stick_breaking import seen, stick_breaking


class Attention(nn.Module):
    """Causal attention with grouped keys and values.

    ``weights``: "softmax" with rotary positions, run by transformers' own backends, or "stick-breaking" without any.
    ``window``: a token sees itself and the ``window - 1`` before it, all of them where none is given.
    Raises :class:`OptionError` for others.
    """

    is_causal = True

    def __init__(self, config: Any, layer: int, *, weights: str = "softmax", window: int | None = None) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise OptionError(f"window={window} of attention: give 1 token or more, or leave it out to see all")
        if weights not in ("softmax", *WEIGHTINGS):
            raise OptionError(f"attention weights {weights!r}: choose one of softmax, {', '.join(WEIGHTINGS)}")
        self.weights, self.window = weights, window
        self.config, self.layer_idx = config, layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

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
        heads_BSND = self.heads(hidden_BSH, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.o_proj(heads_BSND.flatten(2))

    def heads(
        self, hidden_BSH: Tensor, position: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> Tensor:
        """What each head attends to [B, S, N, D], before the output projection."""
        query, key, value = self.projected(hidden_BSH, position)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.attend(query, key, value, mask, **kwargs)

    def projected(self, hidden_BSH: Tensor, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, S, D], in their places."""
        query, key, value = (
            project(hidden_BSH).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        return self.placed(query, position), self.placed(key, position), value.transpose(1, 2)

    def placed(self, x_BNSD: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
        """Told where it stands, unless the weights follow from nearness anyway."""
        return x_BNSD if self.weights in WEIGHTINGS else rotated(x_BNSD, *position)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[B, S, N, D] of queries [B, N, S, D], keys and values [B, groups, keys, D]."""
        own = WEIGHTINGS.get(self.weights)
        attend = own or ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if self.window is not None:
            kwargs["sliding_window"] = self.window  # flash attention masks by itself
            if own or not str(self.config._attn_implementation).startswith("flash"):
                mask = near(mask, query, key, self.window)
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return out


def near(mask: Tensor | None, query: Tensor, key: Tensor, window: int) -> Tensor:
    """Added to scores [B or 1, 1, S, keys]: 0 for what ``mask`` lets a query see among its last ``window`` keys."""
    queries, keys = query.shape[2], key.shape[2]
    first = torch.arange(queries, device=key.device)[:, None] + (keys - queries - window + 1)
    kept = seen(mask, queries, keys, key.device) & (torch.arange(keys, device=key.device) >= first)
    kept = kept if kept.dim() == 4 else kept[None, None]
    return torch.zeros_like(kept, dtype=query.dtype).masked_fill(~kept, torch.finfo(query.dtype).min)


def rotated(x_BNSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): the second half of a head turns against the first."""
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


def eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention, for those who want to see the weights: ([B, S, N, D], [B, N, S, keys])."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    score = query @ key.transpose(2, 3) * scaling
    weight = (score if mask is None else score + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weight @ value).transpose(1, 2).contiguous(), weight


WEIGHTINGS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"stick-breaking": stick_breaking}
"""What weighs earlier tokens otherwise than by a softmax, by the name a configuration gives."""
