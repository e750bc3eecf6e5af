"""Bad input: one clear line each, nothing else."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import families
from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.errors import CheckpointError, MoekitError, OptionError, UnsupportedModelError

LAYER = "model.layers.1.mlp"


@pytest.fixture
def folder(tmp_path):
    return miniatures.plain(tmp_path / "model", num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path):
    return miniatures.plain(tmp_path / "model", shard="40KB", num_hidden_layers=2)


def refused(ref, message, error=CheckpointError):
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(ref)
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_paths_that_are_no_model(tmp_path):
    refused(tmp_path, "is no model: it has no config.json")
    refused(tmp_path / "nowhere" / "at" / "all", "does not exist; name a folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file; name the folder")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no weights")


def test_names_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused("nobody/nothing-at-all", "neither a folder nor in the local cache; download it first")
    refused("moekit:nothing", "moekit:nothing does not exist; models in this package:")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{not json", "config.json is not valid JSON"), ("[1]", "holds a JSON list"), (b"\xff\xfe", "not valid JSON")],
)
def test_unreadable_config(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


def test_config_that_transformers_does_not_know(folder):
    edit(folder, model_type="a-new-one")
    with pytest.raises(UnsupportedModelError, match=r"'a-new-one', which transformers .* does not know"):
        _ = Checkpoint.open(folder).moe_layers
    edit(folder, model_type=None)
    with pytest.raises(CheckpointError, match="names no model_type"):
        _ = Checkpoint.open(folder).moe_layers
    edit(folder, model_type="qwen3_moe", hidden_size="wide")
    with pytest.raises(CheckpointError, match="is no valid qwen3_moe config") as caught:
        _ = Checkpoint.open(folder).moe_layers
    assert "\n" not in str(caught.value)


def test_dense_models(tmp_path, folder):
    config = transformers.Qwen3Config(**{k: v for k, v in families.TINY.items() if "expert" not in k})
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="qwen3 with this config is a dense model"):
        _ = Checkpoint.open(tmp_path / "dense").moe_layers
    edit(folder, mlp_only_layers=[0, 1])
    with pytest.raises(UnsupportedModelError, match="none of its layers has experts that can be told apart"):
        _ = Checkpoint.open(folder).moe_layers


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only pickled weights .pytorch_model.bin., which can run code")


def test_truncated_and_corrupt_shards(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(sharded, f"{shard.name} is truncated")
    shard.write_bytes(b"\0" * len(whole))
    refused(sharded, f"{shard.name} is no whole safetensors file")
    shard.unlink()
    refused(sharded, f"{shard.name} is missing: the download is incomplete")


def test_index_that_names_what_is_absent(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = next(iter(index["weight_map"].values()))
    for changed, message in (
        (index["weight_map"] | {"model.ghost": file}, f"the index places model.ghost in {file}"),
        (index["weight_map"] | {"model.ghost": "../other.safetensors"}, "no file name of its folder"),
        ({}, "has no weight_map"),
    ):
        path.write_text(json.dumps(index | {"weight_map": changed}))
        refused(sharded, re.escape(message))


def test_one_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    refused(sharded, f"is in both {first.name} and {second.name}")


def test_an_expert_without_its_weights(folder):
    state = load_file(folder / "model.safetensors")
    del state[f"{LAYER}.experts.6.down_proj.weight"]
    save_file(state, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    for call in (checkpoint.check, lambda: checkpoint.bank(LAYER), lambda: checkpoint.bank(LAYER, [0])):
        with pytest.raises(CheckpointError, match=rf"{LAYER}: expert 6 has no down weights on disk"):
            call()


def test_a_layer_without_its_experts(folder):
    state = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in state.items() if f"{LAYER}.experts" not in n}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"no expert of {LAYER} is on disk .1 of 2 MoE layers are absent"):
        _ = Checkpoint.open(folder).moe_layers


def test_other_quantisation_methods(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantised by gptq; moekit reads fp8, mxfp4"):
        _ = Checkpoint.open(folder).moe_layers


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_named(folder, value, kind, dtype):
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    name = f"{LAYER}.experts.3.up_proj.weight"
    Checkpoint.open(folder).scan_finite()
    state[name][2, 5] = value
    save_file(state, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=rf"{name} in model.safetensors holds {kind}"):
        checkpoint.scan_finite()
    checkpoint.scan_finite(other for other in checkpoint.tensors if other != name)


def test_nan_in_float8_is_found(tmp_path):
    miniatures.fp8(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    state[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} in model.safetensors holds NaN"):
        Checkpoint.open(tmp_path).scan_finite()


def test_asking_for_what_does_not_exist(folder):
    checkpoint = Checkpoint.open(folder)
    for call, error, message in (
        (lambda: checkpoint.layer("model.layers.9.mlp"), CheckpointError, "no MoE layer model.layers.9.mlp"),
        (lambda: checkpoint.bank(LAYER, [0, 8]), OptionError, "expert 8 does not exist: .* experts 0 to 7"),
        (lambda: checkpoint.read_expert(LAYER, -1), OptionError, "expert -1 does not exist"),
        (lambda: checkpoint.read("nothing"), CheckpointError, "has no tensor nothing"),
        (lambda: checkpoint.read_plain("nothing"), CheckpointError, "has no weight nothing"),
        (lambda: checkpoint.rename_expert("lm_head.weight", 1), CheckpointError, "not one expert's tensor"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert issubclass(error, MoekitError)


def test_no_tokenizer(folder):
    assert Checkpoint.open(folder).tokenizer()("abc").input_ids == [4, 5, 6]
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer: no file beside the weights"):
        Checkpoint.open(folder).tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load") as caught:
        Checkpoint.open(folder).tokenizer()
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_config_and_headers(folder, tmp_path):
    first = Checkpoint.open(folder).fingerprint
    assert Checkpoint.open(folder).fingerprint == first
    state = load_file(folder / "model.safetensors")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(state, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(tmp_path / "copy").fingerprint == first
    save_file(state | {"extra": torch.ones(1)}, tmp_path / "copy" / "model.safetensors")
    assert Checkpoint.open(tmp_path / "copy").fingerprint != first
    edit(folder, rope_theta=5.0)
    assert Checkpoint.open(folder).fingerprint != first
