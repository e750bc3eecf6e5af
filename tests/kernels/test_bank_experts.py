"""BankExperts: in place of a family's own module, on the packed weights, loaded and cast like any module."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_modules import ALL_FLAGS, EXPERTS, Flags, batch, make
from torch import nn

import moekit
from moekit.errors import OptionError, UnsupportedModelError
from moekit.formats import DenseBank, PackedBank
from moekit.kernels import BankExperts, integers
from moekit.kernels._layer import Layer

BITS = [2, 3, 4, 8, 16, 4]


def canonical(module, flags: Flags) -> DenseBank:
    """The bank in canonical order: gate rows first, whatever the family stores."""
    layer = Layer.of_module(module)
    up, bias = layer.gate_up, layer.gate_up_bias
    if not flags.concatenated:
        up = torch.cat([up[:, ::2], up[:, 1::2]], 1)
        bias = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
    activation = moekit.Activation("relu", torch.relu, gated=False) if not flags.gated else layer.activation
    return DenseBank(up, layer.down, bias, layer.down_bias, activation)


def filled(module, flags: Flags, bits=BITS, slots=None) -> tuple[BankExperts, PackedBank]:
    bank = PackedBank.quantise(canonical(module, flags), bits, 8)
    packed = BankExperts.like(module, bank.describe(), slots)
    packed.load_state_dict(dict(bank.tensors()), strict=not flags.norm)
    return packed, bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", ALL_FLAGS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 4, 60])
def test_computes_what_its_decoded_weights_would(flags, dtype, tokens):
    module = make(flags, dtype)
    packed, bank = filled(module, flags)
    decoded = bank.dequantise()
    with torch.no_grad():
        up = decoded.gate_up
        if not flags.concatenated:
            up = torch.stack(up.chunk(2, 1), 2).flatten(1, 2)
        stored = getattr(module, "gate_up_proj" if flags.gated else "up_proj")
        stored.copy_(up.transpose(1, 2) if flags.transposed else up)
        module.down_proj.copy_(decoded.down.transpose(1, 2) if flags.transposed else decoded.down)
        arguments = batch(tokens, dtype=dtype)
        expected, got = module(*arguments), packed(*arguments)
    assert got.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - expected).float().norm() <= bound * expected.float().norm() + 1e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [16, 24, 64])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_on_packed_integers(monkeypatch, compiled, dtype, group, rows):
    """Compiled and not, groups that divide the row and one that does not, against the decoded weights."""
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(integers, "jit", lambda: None)
    torch.manual_seed(rows)
    bank = PackedBank.quantise(DenseBank(torch.randn(5, 1280, 64), torch.randn(5, 64, 640)), [2, 3, 4, 8, 16], group)
    products = integers.IntegerProducts(bank)
    x, h = torch.randn(rows, 64, dtype=dtype), torch.randn(rows, 640, dtype=dtype)
    for expert in range(5):
        weights = bank.expert(expert)
        torch.testing.assert_close(products.up(expert, x), x @ weights.gate_up.to(dtype).T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(products.down(expert, h), h @ weights.down.to(dtype).T, rtol=1e-4, atol=1e-3)


def test_slots_share_and_mask_experts():
    module = make(Flags(bias=True))
    slots = [2, 0, -1, 2, 1, 0, 3, 3]
    bank = PackedBank.quantise(canonical(module, Flags()).select([0, 1, 2, 3]), 8, 8)
    packed = BankExperts(bank, slots)
    plain = BankExperts(bank)
    x, index, weights = batch(9, experts=8)
    table = torch.tensor([*slots, -1])
    with torch.no_grad():
        got = packed(x, index, weights)
        torch.testing.assert_close(got, plain(x, table[index].where(table[index] >= 0, 4), weights))
        index[:, 0] = 8  # the sentinel of the router's rows, which is no stored expert's id
        torch.testing.assert_close(packed(x, index, weights), packed(x, index[:, 1:], weights[:, 1:]))
    assert packed.num_experts == 8


def test_names_dtypes_and_sizes_on_disk():
    module = make(Flags(bias=True), torch.bfloat16)
    packed, bank = filled(module, Flags(bias=True))
    state = packed.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in bank.stored.items()}
    assert {"0.gate_up.qweight", "0.gate_up.scales", "0.down.mins", "4.down.weight", "4.down.bias"} <= state.keys()
    assert not any(p.requires_grad for p in packed.parameters())
    meta = BankExperts.like(copy.deepcopy(module).to("meta"), bank.describe())
    assert all(p.is_meta for p in meta.parameters())


def test_keeps_its_grids_when_the_model_is_cast():
    packed, _ = filled(make(), Flags())
    model = nn.ModuleList([packed, nn.Linear(2, 2)])
    before = {n: t.clone() for n, t in packed.state_dict().items()}
    model.to(torch.float16)
    assert model[1].weight.dtype == torch.float16
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in packed.state_dict().items())


def test_loading_after_a_forward_takes_effect():
    packed, bank = filled(make(), Flags())
    arguments = batch(5)
    with torch.no_grad():
        first = packed(*arguments)
        other = PackedBank.quantise(canonical(make(seed=1), Flags()), BITS, 8)
        packed.load_state_dict(dict(other.tensors()), assign=True)
        assert not torch.allclose(packed(*arguments), first)
        packed.load_state_dict(dict(bank.tensors()))
        assert torch.equal(packed(*arguments), first)


def test_does_not_hold_the_float_weights():
    import gc
    import weakref

    flags = Flags(limit=0.5)
    module = make(flags)
    weight = weakref.ref(module.gate_up_proj)
    packed, bank = filled(module, flags)
    del module, bank
    gc.collect()
    assert weight() is None
    assert packed(*batch(3)).shape == (3, 12)


def test_explained_as_integers():
    packed, _ = filled(make(), Flags())
    assert "integers (packed integers" in moekit.explain(packed)
    assert "not fused: sizes of 12 and 8" in moekit.explain(packed)
    assert moekit.prepare(packed).shared == {"": "already stored as they run"}


def test_refusals():
    module = make(Flags(bias=True))
    bank = PackedBank.quantise(canonical(module, Flags()), 4, 8)
    with pytest.raises(OptionError, match="bias=False, but Experts has bias=True"):
        BankExperts.like(module, {**bank.describe(), "bias": False})
    with pytest.raises(OptionError, match="gated=False, but Experts has gated=True"):
        BankExperts.like(module, {**bank.describe(), "gated": False})
    with pytest.raises(UnsupportedModelError, match="Linear is no experts module"):
        BankExperts.like(nn.Linear(2, 2), bank.describe())
    with pytest.raises(OptionError, match="slot 6 names no stored expert"):
        BankExperts(bank, [0, EXPERTS])
    x, index, weights = batch(2)
    with pytest.raises(OptionError, match="no backward"):
        BankExperts(bank)(x.requires_grad_(), index, weights)
