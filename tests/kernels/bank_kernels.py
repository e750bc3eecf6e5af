"""A random dense bank, a routing with unused slots, and what the decoded weights of a bank would compute."""

from __future__ import annotations

from dataclasses import replace

import torch

from moekit.bank import SILU_MUL, Activation
from moekit.formats import DenseBank
from moekit.kernels import _drive
from moekit.kernels._layer import Layer
from moekit.kernels.reference import reference, reference_slots

EXPERTS, SLOTS = 6, 3
RELU = Activation("relu", torch.relu, gated=False)


def dense(hidden=16, inner=8, dtype=torch.float32, bias=True, activation=SILU_MUL, seed=0) -> DenseBank:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * inner if activation.gated else inner

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    biases = (random(EXPERTS, rows), random(EXPERTS, hidden)) if bias else (None, None)
    return DenseBank(random(EXPERTS, rows, hidden), random(EXPERTS, hidden, inner), *biases, activation)


def batch(tokens: int, hidden=16, dtype=torch.float32, seed=1):
    """x [T, H], index [T, K] with slots that hold no expert, weight [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, EXPERTS + 1, generator=generator).argsort(dim=1)[:, :SLOTS]
    x, weight = (
        torch.randn(tokens, hidden, generator=generator).to(dtype),
        torch.rand(tokens, SLOTS, generator=generator),
    )
    return x, torch.where(index == EXPERTS, -1, index), weight


def check(products, bank, tokens: int, dtype=torch.float32, finish=None, run=_drive, bound=1e-5) -> None:
    """Weighted sums and slots against a loop over the decoded weights in float64; dtype and shapes too."""
    layer = Layer.of_bank(DenseBank(*(None if t is None else t.double() for t in _stack(bank)), bank.activation))
    layer = replace(layer, finish=finish)
    x, index, weight = batch(tokens, bank.hidden_size, dtype)
    with torch.no_grad():
        sums, slots = run.forward(products, x, index, weight), run.slots(products, x, index)
        expected = reference(layer, x.double(), index, weight.double())
        each = reference_slots(layer, x.double(), index)
    assert (sums.dtype, slots.dtype) == (dtype, dtype)
    assert slots.shape == each.shape
    for got, wanted in ((sums, expected), (slots, each)):
        assert (got.double() - wanted).norm() <= bound * wanted.norm() + 1e-9
    assert (slots[index < 0] == 0).all()


def _stack(bank):
    decoded = bank.dequantise()
    return decoded.gate_up, decoded.down, decoded.gate_up_bias, decoded.down_bias
