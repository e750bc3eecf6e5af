"""Stick-breaking weights: every key takes its share of what nearer keys have left.

Shapes by suffix: B sequences, N heads, S queries, K keys, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = -60.0
"""Logarithm of a weight that is as good as none: smaller ones end as subnormal numbers, which slow products tenfold."""


class StickWeights(torch.autograd.Function):
    """``a_ij = sigmoid(z_ij) prod_{j<m<=i} (1 - sigmoid(z_im))``, in float32 at least; z is -inf for a key not seen.

    ModuleFormer, section 3.2. The nearest key breaks off first; weights are not negative and sum to at most 1, since
    what is left of the stick goes to nobody. The last axis is keys, the LAST of the text first: then what nearer keys
    have left is a plain cumulative sum, ``log a = z - cumsum(softplus(z))``, and with ``g`` the gradient of ``log a``,
    ``dz = g - sigmoid(z) * (g of this key and of all farther ones)``. Scores and weights are all that is kept for the
    backward (first order only).
    """

    @staticmethod
    def forward(ctx: Any, score_BNSK: Tensor) -> Tensor:
        score = score_BNSK.to(torch.promote_types(score_BNSK.dtype, torch.float32))
        log = F.softplus(score).cumsum(-1).neg_().add_(score)
        weight = torch.threshold_(log.clamp_(min=LEAST).exp_(), 2 * math.exp(LEAST), 0.0)
        ctx.save_for_backward(score, weight)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        score, weight = ctx.saved_tensors
        g = grads[0] * weight
        farther = g.sum(-1, keepdim=True) - g.cumsum(-1) + g
        return g.sub_(score.sigmoid().mul_(farther))


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
    """([B, S, N, D], weights [B, N, S, K]); needs no positions: nearness decides. Keeps a score for every pair."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.flip(2).repeat_interleave(groups, dim=1) for t in (key, value))
    unseen = ~seen(mask, query.shape[2], key.shape[2], query.device).flip(-1)
    barred = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, -torch.inf)
    weight = StickWeights.apply((query * scaling) @ key.transpose(2, 3) + barred).to(query.dtype)
    return (weight @ value).transpose(1, 2).contiguous(), weight.flip(-1)
