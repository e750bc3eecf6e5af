"""Running stacked experts with gradients, one after another on tokens sorted by expert.

Shapes by suffix: T tokens, K slots, E experts, I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Callable[[Tensor], Tensor]
"""What happens between the two products: [N, 2I] -> [N, I]."""


def run_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_EGH: Tensor,
    down_EHI: Tensor,
    gate: Gate,
    rounded: Gate = lambda x: x,
) -> Tensor:
    """[T, H]: the weighted sum of the chosen experts' outputs; an id outside 0..E-1 adds nothing.

    ``rounded`` is applied to the input of each product (activation quantisation). `unbind` gives the gradient one
    buffer per stack; indexing would give it one per expert.
    """
    count = down_EHI.shape[0]
    pairs = index_TK.reshape(-1)
    order = pairs.argsort(stable=True)
    order = order[(pairs[order] >= 0) & (pairs[order] < count)]
    token = order // index_TK.shape[1]
    counts = torch.bincount(pairs[order], minlength=count).tolist()
    outputs = []
    inputs = rounded(x_TH).index_select(0, token).split(counts)
    for x, gate_up, down in zip(inputs, gate_up_EGH.unbind(0), down_EHI.unbind(0), strict=True):
        outputs.append(F.linear(rounded(gate(F.linear(x, gate_up))), down))
    weighted = torch.cat(outputs) * weight_TK.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x_TH).index_add(0, token, weighted.to(x_TH.dtype))
