"""Experts whose matrices read inputs that each token scales in its own way: gate and up apart, and down.

Everything that runs a bank gives every matrix of an expert the same rows; here the first product is run twice, and half
of each result is used. Gradients pass where the products let them.
Shapes by suffix: T tokens, K slots, M rows of one expert, H hidden size, I intermediate size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import Activation
from ..formats import DenseBank
from ._plan import Plan
from .rewrites import Scales


class Matrices(Protocol):
    """The part of :class:`~moekit.kernels._drive.Products` that is needed here."""

    num_experts: int
    activation: Activation
    finish: Callable[[Tensor], Tensor] | None

    def dtype(self, x_TH: Tensor) -> torch.dtype: ...

    def up(self, expert: int, x_MH: Tensor) -> Tensor: ...

    def down(self, expert: int, h_MI: Tensor) -> Tensor: ...


def scaled(matrices: Matrices, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, scales: Scales) -> Tensor:
    """[T, H]: sum_k w_k down(activation(gate(x * s_gate), up(x * s_up)) * s_down), in the dtype of ``x_TH``."""
    plan, x = Plan.of(index_TK, matrices.num_experts), x_TH.to(matrices.dtype(x_TH))
    gate, up, down = (scale.to(x.dtype) for scale in scales)
    weight, out = plan.weights(weight_TK, x.dtype), torch.zeros_like(x)
    for e, start, stop in plan.segments:
        token = plan.token[start:stop]
        rows = x[token]
        z_MG = matrices.up(e, rows * up[token])
        if matrices.activation.gated:
            half = z_MG.shape[1] // 2
            z_MG = torch.cat([matrices.up(e, rows * gate[token])[:, :half], z_MG[:, half:]], dim=1)
        made = matrices.down(e, matrices.activation(z_MG) * down[token])
        made = matrices.finish(made) if matrices.finish else made
        out = out.index_add(0, token, made * weight[start:stop])
    return out.to(x_TH.dtype)


class LiveMatrices:
    """The matrices of a dense bank whose tensors may be parameters that learn."""

    def __init__(self, bank: DenseBank, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self.num_experts, self.activation, self.finish = bank.num_experts, bank.activation, finish
        self._dtype = bank.dtype
        # One gradient per expert: indexing a stack under autograd would add a whole stack of zeros for each.
        self._parts = {name: tensor.unbind(0) for name, tensor in bank.tensors().items()}

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return self._dtype

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._linear("gate_up", expert, x_MH)

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._linear("down", expert, h_MI)

    def _linear(self, part: str, expert: int, rows: Tensor) -> Tensor:
        bias = self._parts.get(f"{part}_bias")
        return F.linear(rows, self._parts[part][expert], None if bias is None else bias[expert])
