"""Ternary experts beside a frozen layer: what is trained, what is written, and that both compute the same."""

import pytest
import torch
from building import dense, logits, rows
from transformers import AutoModelForCausalLM

from moekit.blocks import blocks
from moekit.build import Material, build
from moekit.build.mote_ternary import MoteTernary, two_bits
from moekit.errors import MoekitError, OptionError
from moekit.formats import DenseBank
from moekit.train.activations import int8_activations

MATERIAL = Material(rows=rows(), batch_size=4)
METHOD = MoteTernary(experts=3, steps=3, learning_rate=1e-2)


def levels(matrix):
    """Different magnitudes in a matrix, zero apart."""
    return {value for value in matrix.abs().unique().tolist() if value}


def test_only_experts_and_routers_are_trained_and_experts_are_ternary():
    source = dense()
    built = METHOD.build(dense(), MATERIAL)
    for number, block in enumerate(blocks(built.model)):
        before = source.model.layers[number].mlp
        (shared,) = block.shared
        assert torch.equal(shared.gate_proj.weight, before.gate_proj.weight)
        assert torch.equal(shared.down_proj.weight, before.down_proj.weight)
        for expert in range(3):
            weights = block.bank().expert(expert)
            for part in (*weights.gate_up.chunk(2), weights.down):
                (level,) = levels(part)
                assert level == torch.tensor(level).bfloat16().item()  # stored without a further rounding
    assert built.report["difference_with_silent_experts"] < 1e-6
    assert built.report["difference_after_upcycling"] > 1e-3  # a copy is added: not the dense output, as in the paper


@pytest.mark.parametrize("form", ["stock", "moekit"])
def test_what_is_written_is_what_was_trained(folder, tmp_path, form):
    built = build(folder, METHOD, MATERIAL, tmp_path / "out", format=form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(built.model), atol=1e-5)
    if form == "stock":  # with 8-bit activations again, the written weights repeat the forward of the training
        with int8_activations(built.model), int8_activations(loaded):
            assert torch.equal(logits(loaded), logits(built.model))
    else:
        assert {str(t.dtype) for n, t in loaded.state_dict().items() if "qweight" in n} == {"torch.uint8"}


def test_two_bits_hold_ternary_experts_exactly_and_nothing_else():
    symbols = torch.randint(-1, 2, (2, 8, 6), generator=torch.Generator().manual_seed(0)).float()
    gate_up, down = symbols * 0.5, symbols[:, :6, :4] * 0.25
    bank = two_bits(DenseBank(gate_up, down))
    for expert in range(2):
        assert torch.equal(bank.expert(expert).gate_up, gate_up[expert])
        assert torch.equal(bank.expert(expert).down, down[expert])
    with pytest.raises(OptionError, match="are not ternary"):
        two_bits(DenseBank(gate_up + torch.arange(6.0), down))


def test_full_precision_for_comparison_has_no_two_bit_form(folder, tmp_path):
    method = MoteTernary(experts=2, steps=1, ternary=False, kl=0.5)
    with pytest.raises(OptionError, match="needs none: give --format stock"):
        build(folder, method, MATERIAL, tmp_path / "out", format="moekit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoteTernary(experts=1), "experts=1: a router needs 2 or more"),
        (lambda: MoteTernary(steps=0), "steps=0: ternary experts must be trained"),
        (lambda: METHOD.build(dense(), Material()), "mote-ternary trains on text: give --text"),
    ],
)
def test_what_is_not_possible(make, message):
    with pytest.raises(MoekitError, match=message):
        make()
