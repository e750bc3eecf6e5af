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
from torch.utils.checkpoint import checkpoint

QUERIES = 256
"""Queries from which on a text is taken in parts."""

LEAST = -60.0
"""Logarithm of a weight that is as good as none: smaller ones end subnormal, which slows products fourfold."""


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
) -> tuple[Tensor, None]:
    """([B, S, N, D], None); needs no positions: nearness decides.

    More than ``QUERIES`` queries are taken so many at a time, over the keys they can see, and computed again in the
    backward: what is held of a long text then grows with its length, not with the square of it.
    """
    groups, queries, before = query.shape[1] // key.shape[1], query.shape[2], key.shape[2] - query.shape[2]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    query = query * scaling
    mask = mask[:, -key.shape[2] :] if mask is not None and mask.dim() == 2 else mask
    if queries <= QUERIES:
        return _attended(query, key, value, mask), None
    parts = []
    for start in range(0, queries, QUERIES):
        stop = min(start + QUERIES, queries)
        keys = slice(before + stop)
        own = mask if mask is None else mask[:, keys] if mask.dim() == 2 else mask[..., start:stop, keys]
        some = query[:, :, start:stop], key[:, :, keys], value[:, :, keys], own
        parts.append(checkpoint(_attended, *some, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=1), None


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, N, D] of scaled queries [B, N, S, D] and as many heads of keys and values."""
    unseen = ~seen(mask, query.shape[2], key.shape[2], query.device).flip(-1)
    barred = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, -torch.inf)
    weight = StickWeights.apply(query @ key.flip(2).transpose(2, 3) + barred).to(query.dtype)
    return (weight @ value.flip(2)).transpose(1, 2).contiguous()
