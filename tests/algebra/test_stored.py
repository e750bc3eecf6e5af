"""What the parts compute is what the bank formats store: no weight changes on the way."""

from __future__ import annotations

import pytest
import torch

from moekit.algebra import (
    Asymmetric,
    Symmetric,
    TernaryAbsmean,
    TernaryMinMax,
    as_codes,
    as_planes,
    as_ternary,
    gptq,
    low_rank,
    nested,
    round_to_nearest,
    second_moments,
    shared_columns,
    shared_rows,
)
from moekit.formats import DenseBank, Factors, LatentBank, LowRankBank, NestedBank, PackedBank, TernaryBank

EXPERTS, HIDDEN, UNITS = 3, 20, 6


def dense() -> DenseBank:
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * UNITS, HIDDEN, generator=draw) * 0.05
    return DenseBank(gate_up, torch.randn(EXPERTS, HIDDEN, UNITS, generator=draw) * 0.05)


def moments(columns: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(columns)
    x = torch.randn(EXPERTS, 40, columns, generator=draw)
    return torch.stack([second_moments(part @ torch.randn(columns, columns, generator=draw)) for part in x])


def parts(bank: DenseBank) -> dict[str, torch.Tensor]:
    return {"gate_up": bank.gate_up, "down": bank.down}


def same(a, b) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items()
    )


def decodes_to(bank, weights) -> None:
    for expert in range(EXPERTS):
        found = bank.expert(expert)
        assert torch.equal(found.gate_up, weights["gate_up"][expert])
        assert torch.equal(found.down, weights["down"][expert])


@pytest.mark.parametrize("grid", [Asymmetric, Symmetric])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gptq_into_a_packed_bank(grid, bits: int) -> None:
    source = dense()
    made = {
        name: gptq(weight, moments(weight.shape[-1]), grid(bits=bits, group_size=8))[0]
        for name, weight in parts(source).items()
    }
    experts = [{name: as_codes(rounded.expert(e)) for name, rounded in made.items()} for e in range(EXPERTS)]
    bank = PackedBank.from_codes(experts, bits, 8, dtype=torch.float32)
    decodes_to(bank, {name: rounded.weight for name, rounded in made.items()})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [3, 8, 64])
def test_rounding_is_the_packed_banks_own(bits: int, group_size: int) -> None:
    source = dense()
    made = {n: round_to_nearest(w, Asymmetric(bits=bits, group_size=group_size)) for n, w in parts(source).items()}
    experts = [{name: as_codes(rounded.expert(e)) for name, rounded in made.items()} for e in range(EXPERTS)]
    bank = PackedBank.from_codes(experts, bits, group_size, dtype=torch.float32)
    assert same(bank, PackedBank.quantise(source, bits, group_size))


@pytest.mark.parametrize("grid", [TernaryMinMax(), TernaryAbsmean()])
def test_gptq_into_a_ternary_bank(grid) -> None:
    source = dense()
    made = {name: gptq(weight, moments(weight.shape[-1]), grid)[0] for name, weight in parts(source).items()}
    experts = [{name: as_ternary(rounded.expert(e)) for name, rounded in made.items()} for e in range(EXPERTS)]
    bank = TernaryBank.from_symbols(experts, dtype=torch.float32)
    decodes_to(bank, {name: rounded.weight for name, rounded in made.items()})


def test_ternary_rounding_is_the_ternary_banks_own() -> None:
    source = dense()
    made = {name: round_to_nearest(weight, TernaryMinMax()) for name, weight in parts(source).items()}
    experts = [{name: as_ternary(rounded.expert(e)) for name, rounded in made.items()} for e in range(EXPERTS)]
    assert same(TernaryBank.from_symbols(experts, dtype=torch.float32), TernaryBank.quantise(source))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("base_bits", [1, 2])
def test_planes_into_a_nested_bank(whitened: bool, base_bits: int) -> None:
    source = dense()
    grid = Asymmetric(bits=base_bits, group_size=8)
    made = {n: nested(w, grid, 2, moments(w.shape[-1]) if whitened else None) for n, w in parts(source).items()}
    experts = [{name: as_planes(planes.expert(e)) for name, planes in made.items()} for e in range(EXPERTS)]
    bank = NestedBank.from_planes(experts, base_bits, 8, dtype=torch.float32)
    for planes in range(3):
        decodes_to(bank.at(base_bits + planes), {name: found.weight(planes) for name, found in made.items()})
    assert same(bank, NestedBank.quantise(source, base_bits + 2, base_bits, 8)) is not whitened


def test_factors_into_a_low_rank_bank() -> None:
    source = dense()
    split = {"gate": source.gate_up[:, :UNITS], "up": source.gate_up[:, UNITS:], "down": source.down}
    made = {name: low_rank(weight, 3, moments(weight.shape[-1])) for name, weight in split.items()}
    experts = [{name: Factors(f.left[e], f.right[e]) for name, f in made.items()} for e in range(EXPERTS)]
    bank = LowRankBank.from_factors(experts, dtype=torch.float64)
    for expert in range(EXPERTS):
        torch.testing.assert_close(bank.expert(expert).down, made["down"].weight()[expert])
    plain = LowRankBank.factorise(source, 3)
    torch.testing.assert_close(plain.expert(1).down.double(), low_rank(source.down[1], 3).weight(), atol=1e-6, rtol=0)


def test_shared_bases_into_a_latent_bank() -> None:
    source = dense()
    gate, up = shared_rows(source.gate_up[:, :UNITS], 4), shared_rows(source.gate_up[:, UNITS:], 4)
    down = shared_columns(source.down, 5)
    bases = {"gate": gate.basis[None], "up": up.basis[None], "down": down.basis[None]}
    cores = [{"gate": gate.cores[e], "up": up.cores[e], "down": down.blocks[e]} for e in range(EXPERTS)]
    bank = LatentBank.from_factors(bases, cores, [0] * EXPERTS, dtype=torch.float64)
    for expert in range(EXPERTS):
        torch.testing.assert_close(bank.expert(expert).down, down.weight()[expert])
    torch.testing.assert_close(bank.expert(1).gate_up, torch.cat([gate.weight()[1], up.weight()[1]]))
    own = LatentBank.factorise(source, EXPERTS, 4, share_down=5)
    torch.testing.assert_close(own.expert(2).gate_up.double(), bank.expert(2).gate_up, atol=1e-6, rtol=0)
