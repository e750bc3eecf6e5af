"""DenseBank: selection, recombination and permutation are exact where they claim to be."""

from __future__ import annotations

import pytest
import torch
from banks import PLAIN, make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.bank import SILU_MUL, ExpertWeights
from moekit.errors import OptionError
from moekit.formats import DenseBank


def outputs(bank: DenseBank, expert: int, x: torch.Tensor) -> torch.Tensor:
    w = bank.expert(expert)
    up = x @ w.gate_up.T + (0 if w.gate_up_bias is None else w.gate_up_bias)
    return bank.activation(up) @ w.down.T + (0 if w.down_bias is None else w.down_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_rows_copy_bit_for_bit(dtype):
    bank = make(dtype=dtype)
    picks = [3, 0, 3, 1]
    recombined = bank.recombine(torch.eye(5)[picks])
    for name, tensor in bank.tensors().items():
        assert torch.equal(recombined.tensors()[name], tensor[picks])
        assert torch.equal(bank.recombine(torch.eye(5)).tensors()[name], tensor)
        assert torch.equal(bank.select(picks).tensors()[name], tensor[picks])


def test_recombine_sums_and_never_touches_unused_experts():
    bank = make()
    bank.gate_up[4] = float("nan")
    matrix = torch.tensor([[0.25, 0.75, 0, 0, 0], [0, 0, 0, -2.0, 0]])
    merged = bank.recombine(matrix)
    assert merged.num_experts == 2
    torch.testing.assert_close(merged.gate_up[0], 0.25 * bank.gate_up[0] + 0.75 * bank.gate_up[1])
    torch.testing.assert_close(merged.down_bias[1], -2 * bank.down_bias[3])


@settings(max_examples=20)
@given(seed=st.integers(0, 99), gated=st.booleans())
def test_permute_preserves_the_function(seed, gated):
    bank = make(activation=SILU_MUL if gated else PLAIN, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(5)])
    permuted, x = bank.permute(order), torch.randn(3, 6, generator=generator)
    assert torch.equal(permuted.down[2], bank.down[2][:, order[2]])
    for expert in range(5):
        torch.testing.assert_close(outputs(permuted, expert, x), outputs(bank, expert, x))


def test_stack_and_expert_are_inverse():
    bank = make()
    again = DenseBank.stack([bank.expert(e) for e in range(5)], bank.activation)
    assert all(torch.equal(again.tensors()[n], t) for n, t in bank.tensors().items())
    assert again.nbytes == bank.nbytes == sum(t.nbytes for t in bank.tensors().values())
    assert (bank.num_experts, bank.hidden_size, bank.intermediate_size) == (5, 6, 4)


def test_errors_say_what_to_do():
    bank = make()
    with pytest.raises(OptionError, match=r"matrix \[M, 5\]"):
        bank.recombine(torch.eye(4))
    with pytest.raises(OptionError, match="expert 5 does not exist"):
        bank.select([0, 5])
    with pytest.raises(OptionError, match="expert -1 does not exist"):
        bank.expert(-1)
    with pytest.raises(OptionError, match="rows are permutations"):
        bank.permute(torch.zeros(5, 4, dtype=torch.long))
    with pytest.raises(OptionError, match="gate_up has shape"):
        DenseBank(torch.zeros(5, 4, 6), torch.zeros(5, 6, 4))
    with pytest.raises(OptionError, match="down_bias has shape"):
        DenseBank(torch.zeros(5, 8, 6), torch.zeros(5, 6, 4), down_bias=torch.zeros(5, 4))
    with pytest.raises(OptionError, match="needs gate_up"):
        DenseBank(torch.zeros(8, 6), torch.zeros(6, 4))
    with pytest.raises(OptionError, match="at least one expert"):
        DenseBank.stack([])
    w = bank.expert(0)
    with pytest.raises(OptionError, match="1 of 2 experts have a bias"):
        DenseBank.stack([w, ExpertWeights(w.gate_up, w.down)])
