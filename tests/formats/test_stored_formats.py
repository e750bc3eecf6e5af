"""What every stored format owes: true sizes, exact allocation and selection, biases, ungated experts, clear errors."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from banks import PLAIN
from safetensors.torch import load_file, save_file
from stored import MADE, bank_of

from moekit.bank import SILU_MUL
from moekit.errors import OptionError
from moekit.formats import FORMATS, allocate, with_tensors

KINDS = [{}, {"bias": False}, {"activation": PLAIN}, {"dtype": torch.bfloat16}]
NAMES = ["gated", "unbiased", "plain", "bfloat16"]
every = pytest.mark.parametrize("name", MADE)


def specs(bank) -> dict:
    return {name: (tuple(t.shape), t.dtype) for name, t in bank.tensors().items()}


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def test_every_format_is_tried():
    assert {bank_of(name)[0].describe().get("format", "packed") for name in MADE} == set(FORMATS)


@every
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_sizes_are_those_on_disk(name, kind, tmp_path):
    bank, dense = bank_of(name, **kind)
    path = tmp_path / "bank.safetensors"
    save_file(dict(bank.tensors()), path)
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size - 8 - header == bank.nbytes
    again = with_tensors(allocate(bank.describe(), 16, 8, dense.activation, "meta"), load_file(path))
    for expert in range(6):
        assert same(again.expert(expert), bank.expert(expert))


@every
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_allocates_what_it_describes(name, kind, device):
    bank, dense = bank_of(name, **kind)
    described = json.loads(json.dumps(bank.describe()))
    empty = allocate(described, 16, 8, dense.activation, device)
    assert specs(empty) == specs(bank)
    assert empty.describe() == bank.describe() == described
    assert (empty.nbytes, empty.num_experts, empty.hidden_size, empty.intermediate_size) == (bank.nbytes, 6, 16, 8)
    assert {t.device.type for t in empty.tensors().values()} == {device}
    assert all(len(value) == 6 for value in described.values() if isinstance(value, list))


@every
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_decodes_to_what_it_was_made_from(name, kind):
    bank, dense = bank_of(name, **kind)
    for expert in range(6):
        got, source = bank.expert(expert), dense.expert(expert)
        assert [None if t is None else (t.shape, t.dtype) for t in got] == [
            None if t is None else (t.shape, t.dtype) for t in source
        ]
        assert same(got[2:], source[2:])
        assert (got.down - source.down).float().norm() < source.down.float().norm()
        assert torch.equal(bank.matrix(expert, "down", torch.float32).to(got.down.dtype), got.down)
    assert torch.equal(bank.dequantise().gate_up[3], bank.expert(3).gate_up)


@every
@pytest.mark.parametrize("experts", [[5, 2, 2], [0], [], [5, 4, 3, 2, 1, 0]])
def test_selecting_is_slicing(name, experts):
    bank, _ = bank_of(name)
    chosen = bank.select(experts)
    assert chosen.num_experts == len(experts)
    for new, old in enumerate(experts):
        assert same(chosen.expert(new), bank.expert(old))
        stored = {n.partition(".")[2]: t for n, t in chosen.tensors().items() if n.startswith(f"{new}.")}
        expected = {n.partition(".")[2]: t for n, t in bank.tensors().items() if n.startswith(f"{old}.")}
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[leaf], expected[leaf]) for leaf in stored)
    if experts:
        again = allocate(chosen.describe(), 16, 8, chosen.activation, "meta")
        assert specs(again) == specs(chosen)


@every
def test_weights_of_the_source_are_not_held(name):
    bank, dense = bank_of(name)
    before = [bank.expert(e) for e in range(6)]
    for tensor in dense.tensors().values():
        tensor.zero_()
    assert all(same(bank.expert(e), before[e]) for e in range(6))


@every
def test_errors_of_every_format(name):
    bank, dense = bank_of(name)
    with pytest.raises(OptionError, match="expert 6 does not exist: this bank has experts 0 to 5"):
        bank.expert(6)
    with pytest.raises(OptionError, match="expert -1 does not exist"):
        bank.select([0, -1])
    described = bank.describe()
    with pytest.raises(OptionError, match="says gated=True, but the activation relu has gated=False"):
        allocate(described, 16, 8, PLAIN)
    lists = [key for key, value in described.items() if isinstance(value, list) and key != "group_size"]
    with pytest.raises(OptionError, match=f"experts lacks '{lists[0]}'"):
        allocate({k: v for k, v in described.items() if k != lists[0]}, 16, 8, SILU_MUL, "meta")
    stored = dict(bank.tensors())
    first = next(n for n in stored if n.startswith("3.down") and "bias" not in n)
    with pytest.raises(OptionError, match=f"need {first} of shape .*, got nothing"):
        with_tensors(bank, {n: t for n, t in stored.items() if n != first}).checked()
    with pytest.raises(OptionError, match=r"need 9\.down\.x of shape nothing, got \(2,\)"):
        with_tensors(bank, stored | {"9.down.x": torch.zeros(2)}).checked()
    dense.down[3, 0, 0] = float("nan")
    if name != "low-rank":
        with pytest.raises(OptionError, match=r"3\.down hold NaN or infinite"):
            bank_of(name, dense)


def test_unknown_formats_are_refused():
    with pytest.raises(OptionError, match="format 'gold' that this moekit does not know"):
        allocate({"format": "gold"}, 16, 8)
