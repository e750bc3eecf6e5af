"""NestedBank: planes add up, every width is read from the same bytes, and more bits never hurt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from banks import make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.formats import Codes, NestedBank, PackedBank, Plane
from moekit.formats import _grid as grid


@settings(max_examples=40)
@given(
    columns=st.integers(1, 50),
    group=st.integers(1, 40),
    base=st.integers(1, 4),
    planes=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_every_plane_adds_its_signs(columns, group, base, planes, seed):
    dense = make(1, columns, 5, bias=False, seed=seed)
    bank = NestedBank.quantise(dense, base + planes, base, group)
    built, errors = None, []
    for bits in range(base, base + planes + 1):
        got = bank.at(bits).matrix(0, "gate_up")
        if built is None:
            built = grid.decode(*grid.fit(dense.gate_up[0], base, group), group, torch.float32)
        else:
            rest = dense.gate_up[0] - built
            for start in range(0, columns, group):
                part = rest[:, start : start + group]
                step = part.abs().mean(1, keepdim=True).bfloat16().float()
                built[:, start : start + group] += torch.where(part >= 0, step, -step)
        torch.testing.assert_close(got, built, rtol=1e-4, atol=1e-5)
        errors.append(float((got - dense.gate_up[0]).norm()))
    assert all(more <= fewer * 1.0001 + 1e-6 for fewer, more in pairwise(errors))


def test_widths_share_their_bytes():
    dense = make(3, 256, 128, torch.bfloat16)
    nested = NestedBank.quantise(dense, 4, 2, 128)
    narrow = nested.at(2)
    assert all(tensor is nested.stored[name] for name, tensor in narrow.stored.items())
    packed = {bits: PackedBank.quantise(dense, bits, 128).nbytes for bits in (2, 3, 4)}
    assert narrow.nbytes == packed[2]
    assert torch.equal(narrow.expert(1).down, PackedBank.quantise(dense, 2, 128).expert(1).down)
    assert narrow.nbytes < nested.at(3).nbytes < nested.nbytes < sum(packed.values())
    assert nested.nbytes < 1.07 * packed[4]  # two steps of 16 bits a group more
    mixed = nested.at([2, 4, 3])
    assert torch.equal(mixed.expert(2).gate_up, nested.at(3).expert(2).gate_up)
    assert mixed.describe()["bits"] == [2, 4, 3]
    assert torch.equal(nested.at(3).at(2).expert(0).down, narrow.expert(0).down)
    assert torch.equal(mixed.expert(0).down_bias, dense.down_bias[0])


def given_planes(bank: NestedBank, expert: int) -> dict:
    made = {}
    for part in bank.parts:
        leaf = {name.split(".")[2]: t for name, t in bank.stored.items() if name.startswith(f"{expert}.{part}.")}
        columns = bank.size(part)[1]
        base = Codes(grid.unpack(leaf["qweight"], bank.base_bits, columns).int(), leaf["scales"], leaf["mins"])
        widths = range(bank.base_bits + 1, bank.bits[expert] + 1)
        made[part] = base, [Plane(grid.unpack(leaf[f"sign{b}"], 1, columns), leaf[f"step{b}"]) for b in widths]
    return made


def test_planes_are_stored_as_given():
    bank = NestedBank.quantise(make(2, 24, 10, bias=False), [3, 5], 2, [8, 5])
    experts = [given_planes(bank, e) for e in range(2)]
    again = NestedBank.from_planes(experts, 2, [8, 5], dtype=torch.float32)
    assert again.describe() == bank.describe()
    assert again.tensors().keys() == bank.tensors().keys()
    assert all(torch.equal(tensor, bank.tensors()[name]) for name, tensor in again.tensors().items())


def test_errors_say_what_is_possible():
    dense = make(2, 16, 8)
    with pytest.raises(OptionError, match="base_bits=5 is not possible: a base has 1 to 4 bits"):
        NestedBank.quantise(dense, 6, 5)
    for bits in (1, 9):
        with pytest.raises(OptionError, match=f"bits={bits} is not possible on a base of 2: use 2 to 8"):
            NestedBank.quantise(dense, [4, bits])
    with pytest.raises(OptionError, match="group_size=0 is not possible"):
        NestedBank.quantise(dense, 4, 2, 0)
    with pytest.raises(OptionError, match="bits lists 3 experts, but the bank has 2"):
        NestedBank.quantise(dense, [2, 3, 4])
    bank = NestedBank.quantise(dense, [3, 4], group_size=8)
    for wanted in (4, [1, 4]):
        with pytest.raises(OptionError, match="expert 0 holds 2 to 3 bits, not"):
            bank.at(wanted)
    described = bank.describe()
    for change, match in (
        ({"bits": [4, 9]}, "bits=9 is not possible"),
        ({"base_bits": 0}, "base_bits=0"),
        ({"group_size": [8, 0]}, "group_size=0"),
    ):
        with pytest.raises(OptionError, match=match):
            NestedBank.allocate(described | change, 16, 8, device="meta")
    with pytest.raises(OptionError, match="at least one expert"):
        NestedBank.from_planes([], 2, 8, dtype=torch.float32)
    experts = [given_planes(bank, e) for e in range(2)]
    base, planes = experts[0]["down"]
    for change, match in (
        ((base, [Plane(planes[0].signs + 1, planes[0].steps)]), r"signs of 0\.down must be 0 \(minus\) or 1"),
        ((base, [Plane(planes[0].signs, planes[0].steps.float() + 1e-6)]), r"steps of 0\.down are no bfloat16"),
        ((base._replace(integers=base.integers + 4), planes), "but 2 bits hold 0 to 3"),
        (
            (base, [Plane(planes[0].signs, planes[0].steps[:3])]),
            r"need 0\.down\.step3 of shape \(16, 1\), got \(3, 1\)",
        ),
        ((base, []), r"need 0\.gate_up\.sign3 of shape nothing, got"),
    ):
        with pytest.raises(OptionError, match=match):
            NestedBank.from_planes([{**experts[0], "down": change}, experts[1]], 2, 8, dtype=torch.float32)
