"""The oracle every kernel is tested against: a loop over tokens and slots, in any dtype, float64 included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layer import Layer


def reference_slots(layer: Layer, x_TH: Tensor, index_TK: Tensor) -> Tensor:
    """Unweighted outputs [T, K, H]; zero where a slot holds no expert."""
    tokens, slots = index_TK.shape
    rows = []
    for token in range(tokens):
        for slot in range(slots):
            expert = int(index_TK[token, slot])
            if not 0 <= expert < layer.num_experts:
                rows.append(torch.zeros_like(x_TH[token]))
                continue
            up_bias = None if layer.gate_up_bias is None else layer.gate_up_bias[expert]
            down_bias = None if layer.down_bias is None else layer.down_bias[expert]
            hidden = layer.activation(F.linear(x_TH[token : token + 1], layer.gate_up[expert], up_bias))
            out = F.linear(hidden, layer.down[expert], down_bias)
            rows.append((layer.finish(out) if layer.finish else out)[0])
    return torch.stack(rows).view(tokens, slots, -1) if rows else x_TH.new_zeros(tokens, slots, x_TH.shape[1])


def reference(layer: Layer, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, H]: the weighted sum over slots; differentiable by autograd alone."""
    slots = reference_slots(layer, x_TH, index_TK)
    return (slots * weight_TK.to(slots.dtype).unsqueeze(-1)).sum(1)
