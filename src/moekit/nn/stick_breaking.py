"""Stick-breaking weights: every key takes its share of what nearer keys have left.

Shapes by suffix: B sequences, N heads, S queries, K keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def stick_weights(score_BNSK: Tensor, seen_BNSK: Tensor) -> Tensor:
    """``a_ij = sigmoid(z_ij) prod_{j<m<=i} (1 - sigmoid(z_im))`` over the keys seen, in float32 at least.

    ModuleFormer, section 3.2. The nearest key breaks off first; weights are no negative and sum to at most 1, since
    what is left of the stick goes to nobody. Computed as ``exp`` of sums of log-sigmoids.
    """
    score = score_BNSK.to(torch.promote_types(score_BNSK.dtype, torch.float32))
    kept = F.logsigmoid(-score).masked_fill(~seen_BNSK, 0)
    after = kept.flip(-1).cumsum(-1).flip(-1) - kept
    return (F.logsigmoid(score) + after).exp().masked_fill(~seen_BNSK, 0)


def seen(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool, to be broadcast to [B, N, S, K]: what transformers' masks of every kind let a query see."""
    row, column = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    causal = column <= row + (keys - queries)
    if mask is None:
        return causal
    if mask.dim() == 2:
        return causal & (mask[:, None, None, -keys:] != 0)
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask == 0


def stick_breaking(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """([B, S, N, D], weights [B, N, S, K]); needs no positions: nearness decides."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    score = query @ key.transpose(2, 3) * scaling
    weight = stick_weights(score, seen(mask, query.shape[2], key.shape[2], query.device)).to(query.dtype)
    return (weight @ value).transpose(1, 2).contiguous(), weight
