"""Kernels on ternary and nested experts, compiled and not: what the decoded weights would compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bank_kernels import RELU, batch, check, dense

from moekit.errors import CheckpointError
from moekit.formats import NestedBank, TernaryBank
from moekit.kernels import _drive, planes
from moekit.kernels.planes import NestedProducts, TernaryProducts

KINDS = [{}, {"bias": False}, {"activation": RELU}, {"dtype": torch.bfloat16}]
NAMES = ["gated", "unbiased", "plain", "bfloat16"]
tokens = pytest.mark.parametrize("tokens", [0, 1, 4, 60])
kinds = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


@pytest.fixture(params=[False, True], ids=["portable", "compiled"])
def compiled(request, monkeypatch):
    if request.param:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(planes, "jit", lambda: None)
    return request.param


def bound(kind) -> float:
    return 1e-2 if "dtype" in kind else 2e-5


@pytest.mark.usefixtures("compiled")
@tokens
@pytest.mark.parametrize(("hidden", "inner"), [(16, 8), (37, 19)])
def test_ternary(tokens, hidden, inner):
    bank = TernaryBank.quantise(dense(hidden, inner))
    check(TernaryProducts(bank), bank, tokens)


@pytest.mark.usefixtures("compiled")
@tokens
@pytest.mark.parametrize(("base", "bits"), [(1, [1, 2, 3, 4, 1, 2]), (2, [2, 3, 4, 5, 6, 8]), (3, 5), (4, [4, 5] * 3)])
@pytest.mark.parametrize(("hidden", "inner", "group"), [(64, 32, [8, 16, 32, 8, 8, 16]), (24, 20, 6)])
def test_nested(tokens, base, bits, hidden, inner, group):
    bank = NestedBank.quantise(dense(hidden, inner), bits, base, group)
    check(NestedProducts(bank), bank, tokens, bound=2e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tokens", [1, 30])
@kinds
def test_every_kind_of_expert(tokens, kind):
    dtype = kind.get("dtype", torch.float32)
    ternary, nested = TernaryBank.quantise(dense(**kind)), NestedBank.quantise(dense(**kind), 4, 2, 8)
    check(TernaryProducts(ternary), ternary, tokens, dtype, bound=bound(kind))
    check(NestedProducts(nested), nested, tokens, dtype, bound=bound(kind))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_than_one_tile(monkeypatch, rows, dtype):
    monkeypatch.setattr(planes, "TILE", 640)
    source = dense(hidden=80, inner=80)
    for bank, kind in (
        (TernaryBank.quantise(source), TernaryProducts),
        (NestedBank.quantise(source, 4, 2, 16), NestedProducts),
    ):
        products, x = kind(bank), torch.randn(rows, 80, dtype=dtype)
        for expert in (0, 5):
            weights = bank.expert(expert)
            for got, weight, bias in (
                (products.up(expert, x), weights.gate_up, weights.gate_up_bias),
                (products.down(expert, x), weights.down, weights.down_bias),
            ):
                assert got.dtype == dtype
                expected = x @ weight.to(dtype).T + bias
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 30])
def test_compiled_kernels_are_used_and_nothing_else(monkeypatch, rows):
    pytest.importorskip("numba")

    def refused(*args):
        raise AssertionError("decoded by torch")

    for bank, kind in (
        (TernaryBank.quantise(dense()), TernaryProducts),
        (NestedBank.quantise(dense(), 4, 2, 8), NestedProducts),
    ):
        monkeypatch.setattr(type(bank), "some", refused)
        assert kind(bank).up(2, torch.randn(rows, 16)).shape == (rows, 16)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 30])
def test_damaged_codes_never_reach_the_loops(rows):
    bank = TernaryBank.quantise(dense())
    stored = dict(bank.stored)
    stored["2.down.offsets"] = stored["2.down.offsets"] + 1
    products = TernaryProducts(replace(bank, stored=stored))
    with pytest.raises(CheckpointError, match=r"codes of 2\.down do not add up"):
        products.rows(2, torch.randn(rows, 16))
    assert products.rows(1, torch.randn(rows, 16)).shape == (rows, 16)


def test_results_do_not_depend_on_the_run():
    products = NestedProducts(NestedBank.quantise(dense(64, 32), 4, 2, 16))
    arguments = batch(33, 64)
    assert torch.equal(_drive.forward(products, *arguments), _drive.forward(products, *arguments))


def test_narrower_experts_run_from_the_same_bytes():
    bank = NestedBank.quantise(dense(64, 32), 4, 2, 16)
    for bits in (2, 3, [2, 3, 4, 2, 3, 4]):
        narrow = bank.at(bits)
        check(NestedProducts(narrow), narrow, 20, bound=2e-5)


def test_what_follows_an_expert_is_applied_before_the_weights():
    def finish(rows):
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:])

    bank = TernaryBank.quantise(dense())
    check(TernaryProducts(bank, finish), bank, 30, finish=finish)
