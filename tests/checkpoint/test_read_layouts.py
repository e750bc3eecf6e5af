"""Every layout models are published in, as a miniature: opened, summarised, decoded exactly, written back plain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint, decode
from moekit.errors import CheckpointError, UnsupportedModelError

QUANTISED = {"fp8", "mxfp4", "compressed-tensors", "compressed-tensors-asymmetric", "moekit"}


@pytest.fixture(scope="module", params=list(miniatures.LAYOUTS))
def pair(request, tmp_path_factory):
    """(layout, the miniature, its twin in plain bfloat16)."""
    folder = tmp_path_factory.mktemp("layout")
    miniatures.write(request.param, folder / "published", folder / "plain")
    return request.param, Checkpoint.open(folder / "published"), Checkpoint.open(folder / "plain")


def test_banks_decode_to_the_twins_values(pair):
    _, published, plain = pair
    trunk = [layer for layer in published.moe_layers if not layer.extra]
    assert [layer.name for layer in trunk] == [layer.name for layer in plain.moe_layers]
    for layer in trunk:
        got, want = published.bank(layer.name), plain.bank(layer.name)
        for name, tensor in want.tensors().items():
            assert got.tensors()[name].dtype == tensor.dtype
            assert torch.equal(got.tensors()[name], tensor), (layer.name, name)


def test_written_back_it_is_the_plain_checkpoint(pair):
    _, published, plain = pair
    for layer in plain.moe_layers:
        back = published.write_bank(layer.name, published.bank(layer.name))
        assert back.keys() == {tensor.name for tensor in layer.expert_tensors}
        assert all(torch.equal(tensor, plain.read(name)) for name, tensor in back.items())


def test_plain_reads_match_the_twin(pair):
    layout, published, plain = pair
    packed = [name for name, stored in published.stored.items() if stored.carrier == "qweight"]
    assert bool(packed) == (layout == "moekit")
    for name in plain.stored.keys() - set(packed):
        if name in published.stored:
            assert torch.equal(published.read_plain(name), plain.read(name)), name
    assert published.read_plain("model.norm.weight", torch.float64).dtype == torch.float64
    if packed:
        with pytest.raises(CheckpointError, match="packed by moekit"):
            published.read_plain(packed[0])


def test_summary_counts_weights_not_scales(pair):
    layout, published, plain = pair
    ours, twin = published.summary(), plain.summary()
    assert (ours.total, ours.active) == (twin.total, twin.active)
    assert {k: v for k, v in ours.parts.items() if k != "extra"} == {
        k: v for k, v in twin.parts.items() if k != "extra"
    }
    assert ours.total_bytes == sum(info.nbytes for info in published.tensors.values())
    if layout in QUANTISED:
        assert ours.nbytes["experts"] < twin.nbytes["experts"]
        assert ours.quantisation


def test_one_expert_is_read_without_the_others(pair):
    _, published, _ = pair
    layer = published.moe_layers[0]
    before = published.counted_bytes
    expert = published.read_expert(layer.name, 3)
    read = published.counted_bytes - before
    names = {name for tensor in layer.expert_tensors for name in tensor.stored.tensors.values()}
    whole = sum(published.tensors[name].nbytes for name in names)
    assert read == sum(tensor.nbytes for tensor in expert.values()) == whole // layer.num_experts


def test_twin_runs_in_stock_transformers(pair):
    _, _, plain = pair
    model = AutoModelForCausalLM.from_pretrained(plain.path)
    tokens = plain.tokenizer()("if x: return 1", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


def test_prediction_layers_are_extra(tmp_path):
    miniatures.fp8(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    trunk, extra = checkpoint.moe_layers[:-1], checkpoint.moe_layers[-1]
    assert [layer.extra for layer in trunk] == [False, False]
    assert extra.extra
    assert (extra.name, extra.layer) == ("model.layers.3.mlp", 3)
    like = checkpoint.moe_layers[-2]
    assert len(extra.expert_tensors) == len(like.expert_tensors)
    assert [r.name.replace("layers.3", "layers.2") for r in extra.row_tensors] == [r.name for r in like.row_tensors]
    bank, expected = checkpoint.bank(extra.name), checkpoint.bank(like.name)
    assert torch.equal(bank.gate_up, expected.gate_up)
    assert checkpoint.rename_expert("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv", 2) == (
        "model.layers.3.mlp.experts.2.up_proj.weight_scale_inv"
    )
    summary = checkpoint.summary()
    outside = [name for name in checkpoint.stored if name.startswith("model.layers.3.")]
    assert summary.nbytes["extra"] == sum(
        checkpoint.tensors[t].nbytes for name in outside for t in checkpoint.stored[name].tensors.values()
    )


@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.mtp.layers.0."])
def test_prediction_layers_under_other_names(prefix, tmp_path):
    state, config = miniatures._base(tmp_path, "qwen3_moe")
    extra = {name.replace("model.layers.2.", prefix): t.clone() for name, t in state.items() if ".layers.2." in name}
    miniatures._put(tmp_path, state | extra, config)
    layer = Checkpoint.open(tmp_path).moe_layers[-1]
    assert (layer.name, layer.layer, layer.extra, layer.num_experts) == (prefix + "mlp", 0, True, 8)


def test_packed_by_compressed_tensors_loads_the_same_in_transformers(tmp_path):
    miniatures.packed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for layer in checkpoint.moe_layers:
        experts, bank = model.get_submodule(layer.name).experts, checkpoint.bank(layer.name)
        assert torch.equal(experts.gate_up_proj, bank.gate_up)
        assert torch.equal(experts.down_proj, bank.down)


def test_mixed_widths_of_moekits_format(tmp_path):
    miniatures.moekit(tmp_path / "a", tmp_path / "b", family="nemotron_h", bits=[2, 3, 4, 8, 16, 16, 8, 4])
    ours, twin = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    for layer in twin.moe_layers:
        assert torch.equal(ours.bank(layer.name).gate_up, twin.bank(layer.name).gate_up)
        assert torch.equal(ours.bank(layer.name, [5, 0]).down, twin.bank(layer.name, [5, 0]).down)


def test_moekits_format_may_store_fewer_experts_than_the_router_has_rows(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    miniatures.moekit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.1.mlp"
    config["quantization_config"]["layers"][name] |= {"experts": 6, "slots": [0, 1, 2, 3, 4, 5, 5, -1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in state.items() if not k.startswith((f"{name}.experts.6.", f"{name}.experts.7."))}
    save_file(kept, tmp_path / "model.safetensors")
    layer = Checkpoint.open(tmp_path).layer(name)
    assert layer.num_experts == 6
    assert [row.rows for row in layer.row_tensors] == [8]
    assert Checkpoint.open(tmp_path).bank(name).num_experts == 6


def test_fp8_equals_transformers_own_decoder():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4, 6)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(decode.blocks(weight, scale, (16, 16)), theirs)
    bytes_ = torch.randint(100, 150, (3, 4, 6), dtype=torch.uint8)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, bytes_, torch.float32)
    assert torch.equal(decode.blocks(weight, bytes_, (16, 16)), theirs)


def test_fp8_with_blocks_cut_at_the_edge():
    weight = torch.randn(20, 33).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    value = decode.blocks(weight, scale, (16, 16))
    for row, column in ((0, 0), (15, 16), (16, 32), (19, 31)):
        assert value[row, column] == weight[row, column].float() * scale[row // 16, column // 16]


def test_fp4_experts_count_two_weights_a_byte(tmp_path):
    state, config = miniatures._base(tmp_path, "qwen3_moe")
    total = Checkpoint.open(tmp_path).summary().total
    for name in [name for name in state if ".experts." in name]:
        rows, columns = state[name].shape
        state[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
        state[name.replace(".weight", ".scale")] = torch.full((rows, 1), 127, dtype=torch.uint8)
    miniatures._put(tmp_path, state, config | {"quantization_config": {"quant_method": "fp8"}})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.summary().total == total
    up = checkpoint.bank("model.layers.0.mlp", [3]).gate_up[0, 16:].float()
    assert torch.equal(up, decode.fp4(state["model.layers.0.mlp.experts.3.up_proj.weight"]))


def test_fp4_experts_with_scales_per_32_columns():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    scale = torch.randint(110, 140, (8, 2), dtype=torch.uint8)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(decode.blocks(weight, scale), theirs)


def test_a_grid_of_scales_that_fits_nothing():
    with pytest.raises(CheckpointError, match=r"scales \[3, 3\] do not fit a matrix \[20, 33\] in blocks"):
        decode.blocks(torch.zeros(20, 33).to(torch.float8_e4m3fn), torch.ones(3, 3), (16, 16))


def test_mxfp4_equals_transformers_own_decoder():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(decode.mxfp4(blocks, scales).transpose(1, 2), theirs)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=60)
def test_unpacking_equals_compressed_tensors_own(bits, rows, columns, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(decode.unpack(pack_to_int32(values, bits), columns, bits), values.long())


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6, 4)])
def test_scales_per_tensor_row_and_group(shape):
    weight = torch.randint(-128, 128, (6, 8), dtype=torch.int8)
    scale = torch.rand(shape)
    wide = scale.reshape(1, 1) if scale.numel() == 1 else scale
    want = weight.float() * wide.repeat_interleave(8 // wide.shape[1], 1).expand(6, 8)
    assert torch.equal(decode.scaled(weight, scale), want)


def test_layouts_that_are_not_read_say_so(tmp_path):
    state, config = miniatures._base(tmp_path, "qwen3_moe")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    parts = {f"{name}_packed": torch.zeros(16, 16, dtype=torch.uint8), f"{name}_scale": torch.ones(16, 2)}
    parts[f"{name}_global_scale"] = torch.ones(1)
    del state[name]
    miniatures._put(tmp_path, state | parts, config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    with pytest.raises(UnsupportedModelError, match="NVFP4"):
        Checkpoint.open(tmp_path).bank("model.layers.0.mlp", [0])
