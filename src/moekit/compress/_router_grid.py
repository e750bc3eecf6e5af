"""A router's rows rounded to a grid whose range is chosen by what the router would choose.

Shapes by suffix: S sampled tokens, E router rows, H hidden size, K experts chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.algebra import Asymmetric

RATIOS = tuple(torch.linspace(1.0, 0.35, 101, dtype=torch.float64).tolist())
"""Shares of a row's range, the whole first: it wins ties."""


class Aligned(NamedTuple):
    """``weight`` [E, H] on its grid, in the dtype it came in; the ratio chosen; the divergence there and at ratio 1."""

    weight: Tensor
    ratio: float
    divergence: float
    unshrunk: float


def aligned(weight_EH: Tensor, x_SH: Tensor, top_k: int, bits: int) -> Aligned:
    """Every row at ``bits`` between its extremes times one ratio, that of least divergence over the tokens ``x_SH``.

    The divergence is ``sum_i p_i log(p_i / q_i) - p_i + q_i`` over the K experts of largest logit before, p and q the
    softmax over all rows before and after, mean over tokens. EAQuant's has no ``- p_i + q_i``; over some of the experts
    only it could then fall below zero, and the most distorted router would win.
    """
    logits_SE = x_SH.float() @ weight_EH.float().T
    log_p_SE = logits_SE.log_softmax(-1)
    chosen_SK = logits_SE.topk(top_k, dim=-1).indices
    log_p_SK = log_p_SE.gather(1, chosen_SK).double()
    grid = Asymmetric(bits=bits)
    tried = []
    for ratio in RATIOS:
        points = grid.at(weight_EH, ratio)
        rounded_EH = points.decode(points.encode(weight_EH.float())).to(weight_EH.dtype)
        log_q_SK = (x_SH.float() @ rounded_EH.float().T).log_softmax(-1).gather(1, chosen_SK).double()
        each_SK = log_p_SK.exp() * (log_p_SK - log_q_SK) - log_p_SK.exp() + log_q_SK.exp()
        tried.append(float(each_SK.sum(-1).mean()))
    best = min(range(len(RATIOS)), key=lambda i: (tried[i], i))
    points = grid.at(weight_EH, RATIOS[best])
    rounded_EH = points.decode(points.encode(weight_EH.float())).to(weight_EH.dtype)
    return Aligned(rounded_EH, RATIOS[best], tried[best], tried[0])
