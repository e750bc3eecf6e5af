"""From what is ranked [T, E] to ids [T, K]: what selectors share.

Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract import PAD


def ranked(scores_TE: Tensor, bias: Tensor | None) -> Tensor:
    """What is sorted: scores plus bias.

    NaN, which no comparison orders, counts as least, and yet may be chosen: a token all of whose scores are NaN gets a
    NaN weight and not silently nothing, so that whoever trains or runs the model finds out.
    """
    out = scores_TE if bias is None else scores_TE + bias.to(scores_TE.dtype)
    return out.masked_fill(out.isnan(), torch.finfo(out.dtype).min)


def best(ranks_TE: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the highest ranks, highest first; PAD where fewer are allowed."""
    values, expert = ranks_TE.topk(k, dim=1)
    return expert.masked_fill(values == -math.inf, PAD)


def kept(scores_TE: Tensor, keep_TE: Tensor) -> Tensor:
    """int64 [T, K]: every choice marked in a bool mask, highest score first; K is the most that any token keeps."""
    width = int(keep_TE.sum(1).max()) if keep_TE.numel() else 0
    return best(scores_TE.masked_fill(~keep_TE, -math.inf), max(width, 1))


def chosen(values_TE: Tensor, expert_TK: Tensor, fill: float = 0.0) -> Tensor:
    """Values of the chosen [T, K]; ``fill`` in unused slots."""
    return values_TE.gather(1, expert_TK.clamp(min=0)).masked_fill(expert_TK == PAD, fill)
