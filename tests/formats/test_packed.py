"""PackedBank: what is packed comes back, within half a step, in exactly the bytes announced."""

from __future__ import annotations

import json

import pytest
import torch
from banks import PLAIN, make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.formats import WIDTHS, DenseBank, PackedBank, packed_nbytes
from moekit.formats import _grid as grid
from moekit.formats.packed import Codes


@settings(max_examples=60)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_integers_survive_packing(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = grid.pack(integers, bits)
    assert packed.shape == (rows, grid.packed_columns(columns, bits))
    assert packed.numel() * 8 < rows * (columns * bits + 8 * bits + 8)
    assert torch.equal(grid.unpack(packed, bits, columns), integers)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 70),
    group=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 0.02, 30.0]),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_no_weight_moves_more_than_half_a_step(bits, columns, group, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, columns, generator=generator) + offset) * scale
    integers, scales, mins = grid.fit(weight, bits, group)
    assert scales.shape == mins.shape == (3, grid.groups(columns, group))
    decoded = grid.decode(integers, scales, mins, group, torch.float32)
    step = scales.float().repeat_interleave(group, dim=1)[:, :columns]
    assert ((decoded - weight).abs() <= 0.5001 * step + 1e-6 * weight.abs()).all()


def test_points_of_the_grid_are_reproduced():
    weight = torch.arange(16.0).repeat(2, 4) * 0.25 - 1
    for bits in (4, 8):
        integers, scales, mins = grid.fit(weight, bits, 16)
        decoded = grid.decode(integers, scales, mins, 16, torch.float32)
        assert (decoded - weight).abs().max() <= (0 if bits == 4 else 0.01)
    constant = torch.full((2, 8), 0.1)
    integers, scales, mins = grid.fit(constant, 4, 8)
    torch.testing.assert_close(grid.decode(integers, scales, mins, 8, torch.float32), constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner", "group"), [(32, 16, 16), (37, 19, 16), (8, 4, 64)])
@pytest.mark.parametrize(("bias", "activation"), [(False, "gated"), (True, "plain")])
def test_bank_round_trip(dtype, hidden, inner, group, bias, activation):
    kind = {} if activation == "gated" else {"activation": PLAIN}
    dense = make(6, hidden, inner, dtype, bias, **kind)
    bank = PackedBank.quantise(dense, list(WIDTHS), group)
    error = [
        float((bank.expert(e).gate_up.float() - dense.gate_up[e].float()).norm() / dense.gate_up[e].float().norm())
        for e in range(6)
    ]
    assert error == sorted(error, reverse=True)
    assert error[-1] == 0
    assert error[4] < 0.01
    assert bank.dequantise().gate_up.dtype == dtype
    expected = [packed_nbytes(hidden, inner, b, group, dense.activation.gated, bias, dtype) for b in WIDTHS]
    assert bank.nbytes == sum(expected)
    assert bank.nbytes == sum(t.nbytes for t in bank.tensors().values())
    if bias:
        assert torch.equal(bank.expert(0).down_bias, dense.down_bias[0])
    again = PackedBank.allocate(json.loads(json.dumps(bank.describe())), hidden, inner, dense.activation, "meta")
    shapes = {name: (t.shape, t.dtype) for name, t in bank.tensors().items()}
    assert {name: (t.shape, t.dtype) for name, t in again.tensors().items()} == shapes


def test_select_keeps_the_stored_bits():
    bank = PackedBank.quantise(make(6, 16, 8), list(WIDTHS), 8)
    chosen = bank.select([5, 2, 2])
    assert chosen.bits == (16, 3, 3)
    for new, old in enumerate([5, 2, 2]):
        for name, tensor in chosen.tensors().items():
            if name.startswith(f"{new}."):
                assert torch.equal(tensor, bank.tensors()[f"{old}{name[1:]}"])
        assert torch.equal(chosen.expert(new).down, bank.expert(old).down)


@settings(max_examples=40)
@given(columns=st.integers(2, 50), group=st.integers(2, 40), offset=st.floats(-2, 2), seed=st.integers(0, 99))
def test_one_bit_is_two_levels_about_the_mean(columns, group, offset, seed):
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) + offset
    integers, scales, mins = grid.fit(weight, 1, group)
    assert int(integers.max()) <= 1
    decoded = grid.decode(integers, scales, mins, group, torch.float32)
    for part, made in zip(weight.split(group, dim=1), decoded.split(group, dim=1), strict=True):
        middle = part.mean(1, keepdim=True)
        reach = (part - middle).abs().mean(1, keepdim=True)
        expected = torch.where((part - middle).abs() < 1e-6, made, middle + reach * (part - middle).sign())
        near = ((part - middle).abs() < 0.02 * reach) | (reach < 1e-6)  # which side may change with the rounding
        torch.testing.assert_close(made.masked_fill(near, 0), expected.masked_fill(near, 0), rtol=0.01, atol=0.02)


def test_two_valued_weights_are_exact_at_one_bit():
    weight = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [-1.0, 3.0, -1.0, 3.0]])
    assert torch.equal(grid.decode(*grid.fit(weight, 1, 4), 4, torch.float32), weight)


def codes_of(bank: PackedBank, expert: int) -> dict:
    made = {}
    for part, columns in (("gate_up", bank.hidden_size), ("down", bank.intermediate_size)):
        stored = {leaf: bank.stored[f"{expert}.{part}.{leaf}"] for leaf in ("qweight", "scales", "mins")}
        integers = grid.unpack(stored["qweight"], bank.bits[expert], columns)
        made[part] = Codes(integers.int(), stored["scales"].float(), stored["mins"].float())
    return made


def test_codes_are_stored_as_given():
    dense = make(6, 24, 8, torch.bfloat16)
    bank = PackedBank.quantise(dense, list(WIDTHS), 8)
    w = dense.expert(5)
    experts = [*(codes_of(bank, e) for e in range(5)), {"gate_up": w.gate_up, "down": w.down}]
    biases = [{"gate_up": dense.gate_up_bias[e], "down": dense.down_bias[e]} for e in range(6)]
    again = PackedBank.from_codes(experts, list(WIDTHS), 8, dtype=torch.bfloat16, biases=biases)
    assert again.describe() == bank.describe()
    assert again.tensors().keys() == bank.tensors().keys()
    assert all(torch.equal(tensor, bank.tensors()[name]) for name, tensor in again.tensors().items())


def test_one_level_either_side_of_zero_is_exact_at_two_bits():
    """{-a, 0, a}: the plain alternative to the ternary code where few weights are zero."""
    generator = torch.Generator().manual_seed(0)
    signs = {"gate_up": torch.randint(-1, 2, (16, 24), generator=generator), "down": torch.ones(24, 8, dtype=torch.int)}
    level = {part: torch.rand(len(s), 1, generator=generator).bfloat16() for part, s in signs.items()}
    codes = {part: Codes(s + 1, level[part], -level[part]) for part, s in signs.items()}
    bank = PackedBank.from_codes([codes], 2, 24, dtype=torch.bfloat16)
    for part, sign in signs.items():
        assert torch.equal(bank.matrix(0, part), sign * level[part])


def test_codes_that_cannot_be_stored():
    good = codes_of(PackedBank.quantise(make(1, 16, 8), 4, 8), 0)

    def made(bits=4, group=8, **change):
        parts = dict(good, gate_up=good["gate_up"]._replace(**change))
        return PackedBank.from_codes([parts], bits, group, dtype=torch.float32)

    assert made().num_experts == 1
    with pytest.raises(OptionError, match=r"0\.gate_up holds the integer \d+, but 2 bits hold 0 to 3"):
        made(bits=2)
    with pytest.raises(OptionError, match="holds the integer -1"):
        made(integers=good["gate_up"].integers - 1 - good["gate_up"].integers)
    with pytest.raises(OptionError, match=r"scales of 0\.gate_up are no bfloat16 numbers"):
        made(scales=good["gate_up"].scales + 1e-6)
    with pytest.raises(OptionError, match=r"mins of 0\.gate_up are no bfloat16 numbers"):
        made(mins=good["gate_up"].mins * 1.0001)
    with pytest.raises(OptionError, match=r"packed experts need 0\.down\.mins of shape \(16, 2\), got \(16, 1\)"):
        made(group=4)
    with pytest.raises(OptionError, match="at bits=16 must be a plain weight"):
        made(bits=16)
    with pytest.raises(OptionError, match="at least one expert"):
        PackedBank.from_codes([], 4, dtype=torch.float32)


def test_group_size_per_expert():
    bank = PackedBank.quantise(make(2, 16, 8), 4, [8, 16])
    assert bank.group_size == (8, 16)
    assert bank.tensors()["0.gate_up.scales"].shape[1] == 2 * bank.tensors()["1.gate_up.scales"].shape[1]


def test_small_weights_keep_their_digits():
    dense = make(1, 64, 32, bias=False)
    tiny = DenseBank(dense.gate_up * 1e-6, dense.down * 1e-6)
    errors = [
        float((PackedBank.quantise(b, 8).expert(0).down - b.down[0]).norm() / b.down[0].norm()) for b in (dense, tiny)
    ]
    assert errors[1] < 1.1 * errors[0]


def test_errors_say_what_to_do():
    dense = make(2, 16, 8)
    with pytest.raises(OptionError, match="bits=5 is not a width"):
        PackedBank.quantise(dense, 5)
    with pytest.raises(OptionError, match="bits lists 3 experts, but the bank has 2"):
        PackedBank.quantise(dense, [4, 4, 4])
    with pytest.raises(OptionError, match="group_size=0 is not possible"):
        PackedBank.quantise(dense, 4, 0)
    with pytest.raises(OptionError, match="bits=6 is not a width"):
        packed_nbytes(16, 8, 6)
    bank = PackedBank.quantise(dense, 4)
    with pytest.raises(OptionError, match="expert 2 does not exist"):
        bank.expert(2)
    with pytest.raises(OptionError, match="expert 7 does not exist"):
        bank.select([7])
    dense.down[1, 0, 0] = float("inf")
    with pytest.raises(OptionError, match=r"1\.down hold NaN or infinite"):
        PackedBank.quantise(dense, 4)
