"""Small random banks."""

from __future__ import annotations

import torch

from moekit.bank import SILU_MUL, Activation
from moekit.formats import DenseBank

PLAIN = Activation("relu", torch.relu, gated=False)


def make(experts=5, hidden=6, inner=4, dtype=torch.float32, bias=True, activation=SILU_MUL, seed=0) -> DenseBank:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * inner if activation.gated else inner

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    biases = (random(experts, rows), random(experts, hidden)) if bias else (None, None)
    return DenseBank(random(experts, rows, hidden), random(experts, hidden, inner), *biases, activation)
