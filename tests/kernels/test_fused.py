"""Fused kernels, compiled by Numba, against the oracle: every kind of weights, every number of rows, any routing."""

from __future__ import annotations

import pytest
import torch
from expert_modules import Flags, batch, make
from transformers.activations import ACT2FN

from moekit.bank import SILU_MUL
from moekit.contract import PAD
from moekit.formats import DenseBank, PackedBank
from moekit.kernels import _drive, _team, fused
from moekit.kernels._layer import Layer, activation_of
from moekit.kernels.integers import IntegerProducts
from moekit.kernels.integers import unfit as unfit_bank
from moekit.kernels.plain import PlainProducts
from moekit.kernels.reference import reference, reference_slots

pytestmark = pytest.mark.skipif(fused.lacking() is not None, reason=str(fused.lacking()))

ROUNDED = 1e-4
"""Packed integers take x with 16 bits where the CPU has the instructions for it."""
SIZES = {"experts": 5, "hidden": 96, "inner": 64}
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FLAGS = [Flags(), Flags(bias=True), Flags(gated=False, bias=True), Flags(norm=True), Flags(limit=0.3)]


def weighted(module, x, index, weights):
    layer = Layer.of_module(module.double())
    return reference(layer, x.double(), index, weights.double())


def close(got, expected, bound):
    assert (got.double() - expected).norm() <= bound * expected.norm() + 1e-12


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 150])
def test_plain_weights(flags, dtype, tokens):
    """Up to 90 rows for an expert: with and without turning its weights into panels first."""
    module = make(flags, dtype, **SIZES)
    arguments = batch(tokens, 5, 3, 96, dtype)
    assert PlainProducts(Layer.of_module(module)).fused is not None
    with torch.no_grad():
        got = module(*arguments)
    assert got.dtype == dtype
    close(got, weighted(module, *arguments), BOUND[dtype])


@pytest.mark.parametrize("rows", range(1, 26))
def test_every_number_of_rows(rows):
    """One expert alone gets 1 to 25 rows."""
    module = make(Flags(bias=True), **SIZES)
    x, _, weights = batch(rows, 5, 1, 96)
    index = torch.full((rows, 1), 3)
    got = fused.of_layer(Layer.of_module(module)).forward(x, index, weights)
    close(got, weighted(module, x, index, weights).detach(), 2e-6)


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_do_not_change_a_bit(monkeypatch, openmp):
    """Large enough that every call is shared, by torch's OpenMP and without it."""
    if not openmp:
        monkeypatch.setattr(_team, "_openmp", lambda: None)
    module, arguments = make(Flags(bias=True), **SIZES), batch(700, 5, 3, 96)
    products, before = fused.of_layer(Layer.of_module(module)), torch.get_num_threads()
    alone = products.forward(*arguments)
    try:
        torch.set_num_threads(3)
        shared = products.forward(*arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)


def test_more_pairs_than_a_window(monkeypatch):
    """Segments are cut where a window ends, and by rows within it; sums over windows add up."""
    monkeypatch.setattr(fused, "WINDOW", 70)
    module, arguments = make(Flags(bias=True), **SIZES), batch(120, 5, 4, 96)
    products = fused.of_layer(Layer.of_module(module))
    close(products.forward(*arguments), weighted(module, *arguments).detach(), 2e-6)


def test_one_expert_takes_all():
    module, (x, _, weights) = make(**SIZES), batch(700, 5, 1, 96)
    index = torch.full((700, 1), 4)
    products = fused.of_layer(Layer.of_module(module))
    close(products.forward(x, index, weights), weighted(module, x, index, weights).detach(), 2e-6)


@pytest.mark.parametrize("absent", [PAD, 5, 99])
def test_slots_without_an_expert(absent):
    module, (x, index, weights) = make(**SIZES), batch(9, 5, 3, 96)
    index[::2, 1] = absent
    layer = Layer.of_module(module)
    products = fused.of_layer(layer)
    slots = products.slots(x, index)
    assert not slots[::2, 1].any()
    torch.testing.assert_close(slots, reference_slots(layer, x, index).detach(), rtol=1e-4, atol=1e-5)
    assert not products.forward(x, torch.full_like(index, absent), weights).any()
    none = products.forward(x[:, :], index[:, :0], weights[:, :0])
    assert none.shape == x.shape
    assert not none.any()


def test_large_and_undefined_activations():
    """silu is computed by a series: it must saturate as the true one does, and pass NaN on."""
    module = make(**SIZES)
    x, index, weights = batch(4, 5, 2, 96)
    x[0] *= 1e4
    x[1] *= -1e4
    x[2, 0] = torch.nan
    got = fused.of_layer(Layer.of_module(module)).forward(x, index, weights)
    expected = weighted(module, x, index, weights).detach()
    for row in (0, 1, 3):
        close(got[row], expected[row], 2e-6)
    assert got[2].isnan().all()


def test_what_is_not_compiled_for_says_why(monkeypatch):
    layers = {
        "only multiples of 32": make(hidden=40, inner=64),
        "no compiled kernel for float64": make(dtype=torch.float64, **SIZES),
        "transposed": make(Flags(transposed=True), **SIZES),
        "on meta": make(**SIZES).to("meta"),
    }
    for reason, module in layers.items():
        layer = Layer.of_module(module)
        assert reason in fused.unfit(layer)
        assert fused.of_layer(layer) is None
    module, arguments = make(**SIZES), batch(5, 5, 3, 96)
    with torch.no_grad():
        compiled = module(*arguments)
        monkeypatch.setattr(fused, "lacking", lambda: "Numba is not installed")
        assert fused.unfit(Layer.of_module(module)) == "Numba is not installed"
        torch.testing.assert_close(module(*arguments), compiled, rtol=1e-5, atol=1e-5)


WIDTHS = [1, 2, 3, 4, 8, 16]


def packed(dtype=torch.float32, bits=WIDTHS, group=64, bias=True, **sizes):
    """(bank of mixed widths, the same decoded)."""
    module = make(Flags(bias=bias), dtype, experts=len(bits), **{"hidden": 128, "inner": 64, **sizes})
    layer = Layer.of_module(module)
    dense = DenseBank(*(t if t is None else t.detach() for t in (layer.gate_up, layer.down)))
    if bias:
        dense = DenseBank(dense.gate_up, dense.down, layer.gate_up_bias.detach(), layer.down_bias.detach())
    bank = PackedBank.quantise(dense, bits, group)
    return bank, Layer.of_bank(bank.dequantise())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, 120])
def test_packed_integers_of_mixed_widths(dtype, bias, tokens):
    bank, layer = packed(dtype, bias=bias)
    products, arguments = IntegerProducts(bank), batch(tokens, 6, 4, 128, dtype)
    assert products.fused is not None
    x, index, weights = arguments
    wide = Layer(*(None if t is None else t.double() for t in layer_weights(layer)), layer.activation)
    close(
        _drive.forward(products, *arguments),
        reference(wide, x.double(), index, weights.double()),
        max(ROUNDED, BOUND[dtype]),
    )


def layer_weights(layer):
    return layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias


@pytest.mark.parametrize("bits", WIDTHS[:-1])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 60])
def test_every_width_and_number_of_rows(bits, rows):
    bank, layer = packed(bits=[bits, 4])
    x, _, weights = batch(rows, 2, 1, 128)
    index = torch.zeros(rows, 1, dtype=torch.long)
    wide = Layer(*(t.double() for t in layer_weights(layer)), layer.activation)
    expected = reference(wide, x.double(), index, weights.double())
    close(IntegerProducts(bank).fused.forward(x, index, weights), expected, ROUNDED)


@pytest.mark.parametrize("bits", WIDTHS[:-1])
@pytest.mark.parametrize("special", [False, True])
def test_unpacking_with_and_without_the_special_instruction(monkeypatch, bits, special):
    """Every byte is decoded alike by the plain vector code and by AVX-512 VBMI."""
    from numba import njit

    from moekit.kernels import _inner, _simd

    if special and not _simd.FEATURES.get("avx512vbmi"):
        pytest.skip("this CPU has no AVX-512 VBMI")
    monkeypatch.setitem(_simd.FEATURES, "avx512vbmi", special)
    kind, transpose, bank = f"q{bits}", _inner.transpose, packed(bits=[bits, bits])[0]
    q, scales, mins = (bank.stored[f"0.gate_up.{leaf}"] for leaf in ("qweight", "scales", "mins"))
    out, stride, groups = torch.empty(128, 32), q.stride(0), scales.stride(0) * 2

    @njit
    def turn(weight, scales, mins, out):
        transpose(kind, (weight, stride, scales, mins, groups, 6, 0, 0), 0, 128, out)

    turn(q.data_ptr(), scales.data_ptr(), mins.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out.t(), bank.matrix(0, "gate_up")[:32], rtol=1e-6, atol=1e-6)


def test_larger_groups_and_what_is_not_compiled_for(monkeypatch):
    bank, layer = packed(group=[64, 64, 64, 64, 64, 64], hidden=256, inner=128)
    larger, _ = packed(group=[128, 64, 128, 64, 128, 64], hidden=256, inner=128)
    assert unfit_bank(bank) is None
    arguments = batch(9, 6, 3, 256)
    decoded = Layer.of_bank(larger.dequantise())
    wide = Layer(*(t.double() for t in layer_weights(decoded)), layer.activation)
    x, index, weights = arguments
    expected = reference(wide, x.double(), index, weights.double())
    close(IntegerProducts(larger).fused.forward(*arguments), expected, ROUNDED)
    assert "groups of 32 in expert 0" in unfit_bank(packed(group=32)[0])
    assert "groups of 192 in expert 0" in unfit_bank(packed(group=192, hidden=192, inner=192)[0])
    assert "only multiples of 64" in unfit_bank(packed(hidden=96)[0])
    assert "no compiled kernel for float64" in unfit_bank(packed(torch.float64)[0])
    monkeypatch.setattr("moekit.kernels.stored_matrices.lacking", lambda: "Numba is not installed")
    assert unfit_bank(bank) == "Numba is not installed"
    assert IntegerProducts(bank).fused is None


def test_float64_inputs_keep_their_precision():
    """Fused kernels add in float32; packed integers under float64 inputs run by torch operations."""
    bank, layer = packed()
    x, index, weights = batch(7, 6, 3, 128, torch.float64)
    wide = Layer(*(t.double() for t in layer_weights(layer)), layer.activation)
    got = _drive.forward(IntegerProducts(bank), x, index, weights)
    close(got, reference(wide, x, index, weights), 1e-6)


@pytest.mark.parametrize("act", [ACT2FN["silu"], ACT2FN["swish"]])
def test_silu_is_known_by_all_its_names(act):
    module = make()
    module.act_fn = act
    assert activation_of(module) is SILU_MUL
    module.act_fn = ACT2FN["gelu"]
    assert activation_of(module) is not SILU_MUL
