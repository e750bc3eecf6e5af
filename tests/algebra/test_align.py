"""Alignment preserves what an expert computes and undoes a permutation exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.algebra import align, alignment
from moekit.bank import SILU_MUL, Activation
from moekit.formats import DenseBank

RELU = Activation("relu", torch.relu, gated=False)


def bank(experts: int = 3, hidden: int = 5, inner: int = 6, activation: Activation = SILU_MUL, bias: bool = False):
    torch.manual_seed(0)
    rows = 2 * inner if activation.gated else inner
    return DenseBank(
        torch.randn(experts, rows, hidden),
        torch.randn(experts, hidden, inner),
        torch.randn(experts, rows) if bias else None,
        torch.randn(experts, hidden) if bias else None,
        activation,
    )


def output(bank: DenseBank, expert: int, x_TH: torch.Tensor) -> torch.Tensor:
    weights = bank.expert(expert)
    up_bias = 0 if weights.gate_up_bias is None else weights.gate_up_bias
    down_bias = 0 if weights.down_bias is None else weights.down_bias
    return bank.activation(x_TH @ weights.gate_up.T + up_bias) @ weights.down.T + down_bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SILU_MUL, RELU])
def test_aligned_experts_compute_the_same(activation: Activation, bias: bool) -> None:
    before = bank(activation=activation, bias=bias)
    orders = align(before)
    after = before.permute(orders)
    x_TH = torch.randn(7, 5)
    for expert in range(3):
        torch.testing.assert_close(output(after, expert, x_TH), output(before, expert, x_TH), atol=1e-6, rtol=1e-6)
    assert orders[0].tolist() == list(range(6))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SILU_MUL, RELU])
def test_a_permuted_copy_is_undone_exactly(activation: Activation, bias: bool) -> None:
    single = bank(1, activation=activation, bias=bias)
    turned = single.permute(torch.randperm(6)[None])
    order = alignment(single.expert(0), turned.expert(0))
    back = turned.permute(order[None])
    assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in single.tensors().items())


def test_no_order_comes_closer() -> None:
    pair = bank(2, inner=4)
    found = align(pair)[1]

    def distance(order: torch.Tensor) -> float:
        turned = pair.permute(torch.stack([torch.arange(4), order]))
        return sum(float((t[0] - t[1]).square().sum()) for t in turned.tensors().values())

    every = [distance(torch.tensor(order)) for order in itertools.permutations(range(4))]
    assert distance(found) == pytest.approx(min(every))
    assert max(every) > min(every)
