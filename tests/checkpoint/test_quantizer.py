"""The quantisation method "moekit": plain ``from_pretrained`` gives a model that runs on packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import families
import moekit
from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.quantizer import MoekitConfig, describe_layer, expand_layer
from moekit.errors import CheckpointError
from moekit.formats import PackedBank
from moekit.kernels import BankExperts
from moekit.stream import StreamedModel

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint packed at mixed bits, and the same weights decoded."""
    folder = tmp_path_factory.mktemp(request.param)
    miniatures.moekit(folder / "packed", folder / "twin", family=request.param, bits=[2, 3, 4, 8, 16, 8, 4, 2])
    return folder / "packed", folder / "twin"


def test_loads_runs_and_generates_on_packed_weights(packed: tuple[Path, Path]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(packed[0], output_loading_info=True)
    assert not any(info.values()), info
    found = [module for module in model.modules() if isinstance(module, BankExperts)]
    assert len(found) == len(Checkpoint.open(packed[0]).moe_layers)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("qweight")} == {torch.uint8}
    twin = AutoModelForCausalLM.from_pretrained(packed[1])
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        apart = (model(ids).logits.float() - twin(ids).logits.float()).abs()
    # The twin's weights were rounded to bfloat16, so a near-tie of a router may fall the other way for a token or two;
    # tests/plan/test_apply.py holds float32 models to 1e-5.
    assert float((apart < 0.02).float().mean()) > 0.9
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)
    assert not model.hf_quantizer.is_trainable


def test_saving_what_was_loaded_gives_the_same_tensors(packed: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert layers == json.loads((packed[0] / "config.json").read_text())["quantization_config"]["layers"]


def test_streams_as_it_loads(packed: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[0])
    ids = torch.arange(3, 27).reshape(2, 12)
    (streamed,) = StreamedModel(Checkpoint.open(packed[0])).forward([{"input_ids": ids}])
    with torch.no_grad():
        assert torch.equal(streamed, model(ids).logits)


def test_descriptions_are_short_and_lossless() -> None:
    bank = PackedBank.allocate({"bits": [8] * 4, "group_size": [16] * 4, "dtype": "float32"}, 32, 16, device="meta")
    short = describe_layer(bank, [0, 1, 2, 3])
    assert short == {
        "experts": 4, "bits": 8, "group_size": 16, "dtype": "float32", "gated": True, "bias": False,
    }  # fmt: skip
    assert expand_layer(short) == (bank.describe(), [0, 1, 2, 3])
    mixed = PackedBank.allocate(bank.describe() | {"bits": [8, 4, 8, 8]}, 32, 16, device="meta")
    aliased = describe_layer(mixed, [0, 0, -1, 3])
    assert (aliased["bits"], aliased["slots"]) == ([8, 4, 8, 8], [0, 0, -1, 3])
    assert expand_layer(aliased) == (mixed.describe(), [0, 0, -1, 3])


def edited(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    miniatures.moekit(folder, bits=8)
    return folder


def test_the_base_model_loads_too(one: Path) -> None:
    model = AutoModel.from_pretrained(one)
    assert sum(isinstance(module, BankExperts) for module in model.modules()) == 3


def test_masked_rows_and_shared_experts(one: Path, tmp_path: Path) -> None:
    """Slots act after loading: rows that share an expert give its output, masked rows are never chosen."""
    layers = json.loads((one / "config.json").read_text())["quantization_config"]["layers"]
    name = next(iter(layers))
    slots = [0, 0, 2, 3, 4, 5, -1, 7]
    folder = edited(one, tmp_path, layers=layers | {name: layers[name] | {"slots": slots}})
    _, inputs = families.build("qwen3_moe")
    for model in (AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        block = next(b for b in moekit.blocks(model) if name.endswith(b.name))
        seen: list[torch.Tensor] = []
        with block.observe(lambda observation, seen=seen: seen.append(observation.routing.expert)), torch.no_grad():
            model(**inputs)
        assert 6 not in seen[0].unique().tolist()
        x = torch.randn(4, block.hidden_size)
        weight = torch.ones(4, 1)
        with torch.no_grad():
            first = block.experts(x, torch.zeros(4, 1, dtype=torch.long), weight)
            second = block.experts(x, torch.ones(4, 1, dtype=torch.long), weight)
        assert torch.equal(first, second)


def test_refusals(one: Path, tmp_path: Path) -> None:
    layers = json.loads((one / "config.json").read_text())["quantization_config"]["layers"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"packed with moekit format 9; this moekit reads format 1: update it"):
        AutoModelForCausalLM.from_pretrained(edited(one, tmp_path / "a", version=9))
    strange = {"model.layers.7.mlp": next(iter(layers.values()))}
    with pytest.raises(CheckpointError, match=r"names a layer model\.layers\.7\.mlp, which .* does not have"):
        AutoModelForCausalLM.from_pretrained(edited(one, tmp_path / "b", layers=strange))
    miniatures.plain(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"experts are packed by moekit compress or moekit\.prepare"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=MoekitConfig(layers))
