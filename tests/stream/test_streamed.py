"""What a streamed model promises besides its logits: hooks, edits, caps, and clear words when files are wrong."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import families
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, CheckpointError, OptionError, UnsupportedModelError
from moekit.kernels import BankExperts
from moekit.stream import LoadedModel, StreamedModel, open_model, pick_device, rss, smallest_cap
from moekit.stream import streamed as module


@pytest.fixture
def saved(tmp_path):
    model, inputs = families.build("qwen3_moe")
    model.save_pretrained(tmp_path)
    return tmp_path, model, inputs


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_observers_and_masks_act_as_on_a_live_model(saved):
    folder, _, inputs = saved
    outcomes = []
    for runner in (LoadedModel.load(Checkpoint.open(folder)), StreamedModel(Checkpoint.open(folder))):
        seen = []
        block = blocks(runner.model)[-1]
        with block.mask([0, 1, 5]), block.observe(lambda o, seen=seen: seen.append((o.routing.expert, o.slots_TKH))):
            logits = next(runner.forward([inputs]))
        assert set(seen[0][0].unique().tolist()) <= {0, 1, 5}
        outcomes.append((logits, *seen[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_the_running_batch_is_known_while_layers_run(saved):
    folder, _, inputs = saved
    streamed, seen = StreamedModel(Checkpoint.open(folder)), []
    for block in blocks(streamed.model):
        block.observe(lambda o: seen.append((o.layer, streamed.batch))).attach()
    list(streamed.forward([inputs, inputs]))
    layers = sorted({layer for layer, _ in seen})
    assert seen == [(layer, batch) for layer in layers for batch in (0, 1)]
    assert streamed.batch == -1


def test_each_layer_is_read_once_per_pass_and_again_per_group(saved, monkeypatch):
    folder, _, inputs = saved
    checkpoint = Checkpoint.open(folder)
    streamed = StreamedModel(checkpoint)
    expected = list(streamed.forward([inputs] * 4))
    once = checkpoint.counted_bytes
    assert once == sum(info.nbytes for info in checkpoint.tensors.values())
    monkeypatch.setattr(streamed, "_groups", lambda every, logits: [every[:3], every[3:]])
    progress = []
    found = list(streamed.forward([inputs] * 4, on_layer=lambda *at: progress.append(at)))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert checkpoint.counted_bytes == 3 * once
    assert progress == [(n, 6) for n in range(1, 7)]


def test_under_a_cap_fewer_batches_wait_and_nothing_is_read_ahead(saved, monkeypatch):
    folder, _, inputs = saved
    streamed = StreamedModel(Checkpoint.open(folder), max_ram="64GB")
    expected = list(streamed.forward([inputs] * 3))
    parked = module.footprint.parked_bytes(streamed.model.config, inputs, 4)
    fixed = streamed.needed_bytes(inputs) - parked
    monkeypatch.setattr(module.memory.Cap, "room", lambda self: fixed + 2 * parked)
    assert [len(group) for group in streamed._groups([inputs] * 3, True)] == [2, 1]
    assert not streamed._reads_ahead([inputs] * 2, True)
    found = list(streamed.forward([inputs] * 3))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_logits_only_the_last_position_is_computed(saved):
    folder, _, inputs = saved
    streamed = StreamedModel(Checkpoint.open(folder))
    full, last = next(streamed.forward([inputs])), next(streamed.forward([inputs], logits=False))
    assert last.shape[1] == 1
    assert torch.allclose(full[:, -1:], last, atol=1e-6)


def test_another_dtype_is_the_loaded_models(saved):
    folder, _, inputs = saved
    checkpoint = Checkpoint.open(folder)
    loaded = LoadedModel.load(checkpoint, dtype=torch.bfloat16)
    streamed = StreamedModel(checkpoint, dtype=torch.bfloat16)
    a, b = next(loaded.forward([inputs])), next(streamed.forward([inputs]))
    assert a.dtype == b.dtype == torch.bfloat16
    assert torch.equal(a, b)


def test_a_missing_tensor_is_named(saved):
    folder, _, inputs = saved
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"has nothing for model\.layers\.1\.self_attn\.q_proj\.weight"):
        list(StreamedModel(Checkpoint.open(folder)).forward([inputs]))


def test_a_missing_expert_is_named(saved):
    folder, _, inputs = saved
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts"):
        list(StreamedModel(Checkpoint.open(folder)).forward([inputs]))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved):
    folder, _, inputs = saved
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has shape \[7\], its configuration asks for \[32\]"
    ):
        list(StreamedModel(Checkpoint.open(folder)).forward([inputs]))


def test_experts_the_configuration_does_not_know_are_refused(saved):
    folder, _, inputs = saved
    config = json.loads((folder / "config.json").read_text())
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    (folder / "config.json").write_text(json.dumps(config | {name: 6}))
    with pytest.raises(CheckpointError, match="has shape"):
        list(StreamedModel(Checkpoint.open(folder)).forward([inputs]))


def test_inputs_moved_to_absent_weights_are_caught(saved):
    folder, *_ = saved
    streamed = StreamedModel(Checkpoint.open(folder))
    hooked = module._Residency(streamed, False)
    with pytest.raises(UnsupportedModelError, match="cannot be run layer by layer"):
        hooked._bring(streamed.model.model.norm, (torch.zeros(1, device="meta"),))


def test_a_small_model_is_loaded_and_one_that_does_not_fit_streams(saved, monkeypatch):
    folder, _, inputs = saved
    assert isinstance(open_model(folder, device="cpu"), LoadedModel)
    monkeypatch.setattr("moekit.stream.runner._available", lambda device, limit: 10)
    streamed = open_model(folder, device="cpu")
    assert isinstance(streamed, StreamedModel)
    assert next(streamed.forward([inputs])).shape == (2, 12, families.VOCAB)


def test_a_hopeless_cap_is_refused_at_once_and_the_named_one_works(saved):
    folder, _, inputs = saved
    with pytest.raises(BudgetError, match="the smallest cap that works is") as caught:
        open_model(folder, max_ram="1MB")
    assert "\n" not in str(caught.value)
    assert smallest_cap(Checkpoint.open(folder), inputs) > rss()


def test_devices():
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(OptionError, match="unknown device 'tpu': use auto, cpu or cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="has none: use --device cpu"):
            pick_device("cuda")


@pytest.mark.parametrize("layout", ["fp8", "mxfp4", "compressed-tensors", "compressed-tensors-asymmetric"])
def test_published_layouts_run_as_their_plain_twins(layout, tmp_path):
    import miniatures

    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    miniatures.write(layout, quantised, plain)
    inputs = {"input_ids": torch.arange(24).view(2, 12) + 3}
    expected = next(LoadedModel.load(Checkpoint.open(plain)).forward([inputs]))
    assert torch.equal(expected, next(StreamedModel(Checkpoint.open(quantised)).forward([inputs])))


def test_packed_experts_stream_as_they_load(tmp_path):
    import miniatures

    miniatures.write("moekit", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    inputs = {"input_ids": torch.arange(24).view(2, 12) + 3}
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
    assert any(isinstance(module, BankExperts) for module in stock.modules())
    streamed = StreamedModel(checkpoint)
    for runner in (streamed, streamed, LoadedModel.load(checkpoint)):
        assert torch.equal(expected, next(runner.forward([inputs])))
    packed = [m for m in streamed.model.modules() if isinstance(m, BankExperts)]
    assert packed
    assert all(parameter.is_meta for module in packed for parameter in module.parameters())
    seen = []
    with blocks(streamed.model)[0].observe(lambda o: seen.append(o.slots_TKH)):
        next(streamed.forward([inputs]))
    assert torch.isfinite(seen[0]).all()


def test_threads_are_bounded_by_running_in_groups(saved, monkeypatch):
    folder, _, inputs = saved
    streamed = StreamedModel(Checkpoint.open(folder))
    monkeypatch.setattr(module, "MAX_THREADS", 2 * torch.get_num_threads())
    assert [len(group) for group in streamed._groups([inputs] * 5, True)] == [2, 2, 1]
    assert streamed._groups([], True) == []
