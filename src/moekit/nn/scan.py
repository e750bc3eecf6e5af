"""A linear recurrence over positions, forward and backward in plain torch.

Shapes by suffix: B sequences, S positions; whatever follows is elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Scan(torch.autograd.Function):
    """``h_t = a_t h_{t-1} + b_t`` along dimension 1, from ``h_0 = 0``; keeps only a and h for the way back."""

    @staticmethod
    def forward(ctx: Any, decay_BS: Tensor, entry_BS: Tensor) -> Tensor:
        state_BS = torch.empty_like(entry_BS)
        state = torch.zeros_like(entry_BS[:, 0])
        for step in range(entry_BS.shape[1]):
            state = torch.addcmul(entry_BS[:, step], decay_BS[:, step], state)
            state_BS[:, step] = state
        ctx.save_for_backward(decay_BS, state_BS)
        return state_BS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        decay_BS, state_BS = ctx.saved_tensors
        entry_grad, decay_grad = torch.empty_like(state_BS), torch.zeros_like(state_BS)
        flow = torch.zeros_like(state_BS[:, 0])
        for step in range(state_BS.shape[1] - 1, -1, -1):
            flow = grads[0][:, step] + flow
            entry_grad[:, step] = flow
            if step:
                decay_grad[:, step] = flow * state_BS[:, step - 1]
            flow = flow * decay_BS[:, step]
        return decay_grad, entry_grad


def scan(decay_BS: Tensor, entry_BS: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` [B, S, ..]; no positions, nothing returned."""
    if not entry_BS.shape[1]:
        return entry_BS
    out: Tensor = Scan.apply(decay_BS, entry_BS)
    return out
