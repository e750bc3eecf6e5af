"""Damaged weights are refused by the name of the tensor in the file, whatever the layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.errors import CheckpointError
from moekit.plan.finite import finite_experts


def damaged(folder: Path, name: str, index: tuple[int, ...], value: float) -> Checkpoint:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][index] = value
            save_file(tensors, file, metadata={"format": "pt"})
    return Checkpoint.open(folder)


def check(source: Checkpoint, experts: list[int]) -> None:
    layer = source.moe_layers[0]
    finite_experts(source, layer, experts, source.bank(layer.name, experts))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_an_expert_of_its_own_is_named_as_in_the_file(value: float, word: str, tmp_path: Path) -> None:
    folder = miniatures.plain(tmp_path / "source")
    name = Checkpoint.open(folder).moe_layers[0].expert_tensors[5].name
    expert = Checkpoint.open(folder).moe_layers[0].expert_tensors[5].expert
    source = damaged(folder, name, (1, 2), value)
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)} holds {word} values: the weights are damaged"):
        check(source, [expert])
    check(source, [e for e in range(8) if e != expert])


def test_a_scale_is_named_not_the_weight_it_spoils(tmp_path: Path) -> None:
    folder = miniatures.write("fp8", tmp_path / "source")
    tensor = Checkpoint.open(folder).moe_layers[0].expert_tensors[0]
    scale = next(name for name in tensor.stored.tensors.values() if "scale" in name)
    source = damaged(folder, scale, (0, 0), float("nan"))
    with pytest.raises(CheckpointError, match=f"^{re.escape(scale)} holds NaN values"):
        check(source, [tensor.expert])


def test_stacked_experts_are_named_with_the_one_that_is_damaged(tmp_path: Path) -> None:
    folder = miniatures.write("mxfp4", tmp_path / "source")
    layer = Checkpoint.open(folder).moe_layers[0]
    bias = next(t.name for t in layer.expert_tensors if t.part == "down_bias")
    source = damaged(folder, bias, (1, 0), float("nan"))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(bias)} \(expert 1\) holds NaN values"):
        check(source, [0, 1])
    check(source, [0, 2])


def test_what_only_decoding_spoils_is_still_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(miniatures.plain(tmp_path / "source"))
    layer = source.moe_layers[0]
    bank = source.bank(layer.name, [3])
    bank.down[0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=f"^{re.escape(layer.name)}, decoded down of experts 3 holds infinite"):
        finite_experts(source, layer, [3], bank)
