"""Kernels read an expert's weights only after asking for them, and compute the same bits however few are there."""

import pytest
import torch

from moekit.bank import SILU_MUL
from moekit.formats import DenseBank
from moekit.kernels._drive import forward
from moekit.kernels._layer import Layer
from moekit.kernels.plain import PlainProducts

E, H = 12, 64


class Poisoned:
    """Weights that are NaN but for the experts asked for last."""

    def __init__(self, bank, most):
        self.bank, self.most, self.asked = bank, most, []
        self.weights = [torch.full_like(t, torch.nan) for t in (bank.gate_up, bank.down)]

    def __call__(self, experts):
        assert 0 < len(experts) <= self.most
        assert list(experts) == sorted(set(experts))
        self.asked.append(list(experts))
        for weight, real in zip(self.weights, (self.bank.gate_up, self.bank.down), strict=True):
            weight.fill_(torch.nan)
            weight[experts] = real[experts]


def products(gate_up, down, compiled):
    made = PlainProducts(Layer(gate_up, down, None, None, SILU_MUL))
    if not compiled:
        made.fused = None
    elif made.fused is None:
        pytest.skip("no compiled kernels on this machine")
    return made


@pytest.mark.parametrize(("compiled", "inner"), [(True, 96), (False, 96), (False, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 60, 900])
def test_same_bits_however_few_are_there(tokens, dtype, compiled, inner):
    generator = torch.Generator().manual_seed(tokens)
    bank = DenseBank(
        torch.randn(E, 2 * inner, H, generator=generator).to(dtype) / 8,
        torch.randn(E, H, inner, generator=generator).to(dtype) / 8,
        None,
        None,
        SILU_MUL,
    )
    x = torch.randn(tokens, H, generator=generator).to(dtype)
    index = torch.rand(tokens, E, generator=generator).topk(4).indices
    index[:, 3] = torch.where(torch.arange(tokens) % 3 == 0, -1, index[:, 3])
    weight = torch.rand(tokens, 4, generator=generator)
    whole = forward(products(bank.gate_up, bank.down, compiled), x, index, weight)
    for most in (1, 3, E):
        arrivals = Poisoned(bank, most)
        out = forward(products(*arrivals.weights, compiled), x, index, weight, arrivals=arrivals)
        assert torch.equal(out, whole)
        assert {expert for experts in arrivals.asked for expert in experts} == set(index[index >= 0].tolist())
