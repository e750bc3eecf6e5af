"""Fused kernels on ternary and nested experts against the oracle: every width, every number of rows, what they keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bank_kernels import RELU, check, dense

import moekit
from moekit.errors import CheckpointError
from moekit.formats import NestedBank, TernaryBank, _code
from moekit.kernels import BankExperts, fused, planes
from moekit.kernels.planes import NestedProducts, TernaryProducts

needs_fused = pytest.mark.skipif(fused.lacking() is not None, reason=str(fused.lacking()))
ROUNDED = 1e-4
"""A base without planes is packed integers, for which x is rounded to 16 bits."""


@needs_fused
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 30, 120])
@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"activation": RELU}], ids=["gated", "unbiased", "plain"])
def test_every_number_of_rows(kind, tokens):
    """Mixed widths, groups of one and two chunks, a row of groups that fills no register."""
    source = dense(192, 64, **kind)
    nested = NestedBank.quantise(source, [2, 3, 4, 5, 3, 4], 2, 64)
    ternary = TernaryBank.quantise(source)
    for bank, products in ((nested, NestedProducts(nested)), (ternary, TernaryProducts(ternary))):
        assert products.fused is not None
        check(products, bank, tokens, bound=ROUNDED)


@needs_fused
@pytest.mark.parametrize(("base", "bits", "group"), [(1, 4, 128), (2, 8, 64), (3, 4, 64), (4, 6, 128)])
def test_widths_are_exact_in_float32(base, bits, group):
    """Every place of the index, and a second table above four bits; x is never rounded."""
    bank = NestedBank.quantise(dense(128, 128), bits, base, group)
    for tokens in (1, 16, 110):
        check(NestedProducts(bank), bank, tokens, bound=2e-6)


@needs_fused
def test_grids_of_many_groups():
    """More groups than a register holds, and some left over."""
    bank = NestedBank.quantise(dense(1216, 64), 4, 2, 64)
    check(NestedProducts(bank), bank, 9, bound=2e-6)


@needs_fused
def test_ternary_rows_keep_their_own_levels():
    """Levels of either sign, both of one sign, and rows without any."""
    symbols = torch.randint(-1, 2, (64, 64), generator=torch.Generator().manual_seed(0))
    low = torch.linspace(-2, 1, 64).bfloat16().float()
    matrix = torch.where(symbols < 0, low[:, None], torch.where(symbols > 0, low.abs()[:, None] + 1, 0))
    matrix[5] = 0
    source = dense(64, 64, bias=False, activation=RELU)
    exact = replace(
        source, gate_up=matrix.bfloat16().float().expand(6, -1, -1), down=matrix.bfloat16().float().expand(6, -1, -1)
    )
    bank = TernaryBank.exact(exact)
    for tokens in (1, 40):
        check(TernaryProducts(bank), bank, tokens, bound=2e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("zero", [0.0, 0.7, 1.0])
def test_codes_expand_to_two_bits(monkeypatch, compiled, zero):
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(_code, "jit", lambda: None)
    generator = torch.Generator().manual_seed(1)
    symbols = torch.randint(1, 3, (9, 84), generator=generator) * (torch.rand(9, 84, generator=generator) >= zero)
    codes, offsets = _code.encode(symbols.to(torch.uint8))
    expanded = _code.unpack(codes, offsets, 84)
    shifts = torch.arange(0, 8, 2)
    assert torch.equal((expanded[..., None] >> shifts & 3).flatten(1), symbols)
    for wrong in (offsets + 1, torch.cat([offsets[:1], offsets[2:], offsets[-1:]]), offsets.flip(0)):
        assert _code.unpack(codes, wrong.to(torch.int32), 84) is None
    assert _code.unpack(codes[:-1], offsets, 84) is None


@needs_fused
def test_damaged_codes_are_refused_before_anything_runs():
    bank = TernaryBank.quantise(dense(64, 64))
    stored = dict(bank.stored)
    stored["2.down.offsets"] = stored["2.down.offsets"] + 1
    with pytest.raises(CheckpointError, match=r"codes of 2\.down do not add up to rows of 64 weights"):
        TernaryProducts(replace(bank, stored=stored))


@needs_fused
def test_memory_is_what_is_said():
    bank = TernaryBank.quantise(dense(128, 64))
    kept = [t for m in (TernaryProducts(bank).fused.up, TernaryProducts(bank).fused.down) for t in m.kept]
    symbols = sum(t.nbytes for t in kept if t.dtype == torch.uint8)
    assert symbols == planes.expanded_nbytes(bank) == 6 * 3 * 128 * 64 // 4
    nested = NestedBank.quantise(dense(128, 64), 4, 2, 64)
    own = {t.data_ptr() for t in nested.stored.values()}
    matrices = NestedProducts(nested).fused.up
    assert all(t.data_ptr() in own for t in matrices.kept if isinstance(t, torch.Tensor) and t.dtype != torch.float32)


@needs_fused
def test_explained_as_fused():
    ternary, nested = TernaryBank.quantise(dense(64, 64)), NestedBank.quantise(dense(64, 64), 4, 2, 64)
    text = moekit.explain(BankExperts(ternary))
    assert "fused: a few calls" in text
    assert "codes are expanded to two bits a weight: 0.0 MB beside them" in text
    assert "expanded" not in moekit.explain(BankExperts(nested))
    assert planes.unfit(NestedBank.quantise(dense(64, 64), 4, 2, 32)).startswith("groups of 32 in expert 0")
    assert "only multiples of 64" in planes.unfit(TernaryBank.quantise(dense(96, 64)))


@needs_fused
def test_without_what_fused_kernels_need(monkeypatch):
    nested, ternary = NestedBank.quantise(dense(64, 64), 4, 2, 64), TernaryBank.quantise(dense(64, 64))
    monkeypatch.setattr("moekit.kernels.stored_matrices.lacking", lambda: "Numba is not installed")
    for bank, kind in ((nested, NestedProducts), (ternary, TernaryProducts)):
        assert kind(bank).fused is None
        check(kind(bank), bank, 7, bound=2e-5)


@needs_fused
def test_with_and_without_the_special_instruction(monkeypatch):
    """Bytes of an index are put together alike by the plain vector code and by AVX-512 VBMI."""
    from numba import njit

    from moekit.kernels import _inner, _simd

    bank = NestedBank.quantise(dense(128, 64), 6, 3, 64)
    matrices, transpose = NestedProducts(bank).fused.up, _inner.transpose
    weight, stride, scales, mins, groups, shift, _, more = map(int, matrices.table[0])
    room, out = torch.empty(16 * 18 * groups, dtype=torch.uint8), torch.empty(128, 32)

    def turned():
        @njit
        def turn(weight, scales, mins, more, room, out):
            transpose("n3.6", (weight, stride, scales, mins, groups, shift, more, 0), room, 128, out)

        turn(weight, scales, mins, more, room.data_ptr(), out.data_ptr())
        return out.t().clone()

    expected = bank.matrix(0, "gate_up")[:32]
    torch.testing.assert_close(turned(), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setitem(_simd.FEATURES, "avx512vbmi", False)
    torch.testing.assert_close(turned(), expected, rtol=1e-5, atol=1e-6)
