"""The compressed-tensors layout: what the library itself decodes, and what stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from moekit.checkpoint.export import (
    check_shape,
    pack_weight,
    packed_specs,
    quantization_config,
    unpack_weight,
)
from moekit.checkpoint.shards import as_lazy
from moekit.errors import PlanError

pytest.importorskip("compressed_tensors")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


@settings(max_examples=30)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_library_decodes_what_we_pack(bits: int, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = torch.randn(rows, groups * 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_weight(weight, bits, 16)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == packed_specs(as_lazy(weight), bits, 16)
    integers = unpack_from_int32(packed["weight_packed"], bits, packed["weight_shape"])
    scale = packed["weight_scale"].repeat_interleave(16, dim=1)
    assert torch.equal(integers.to(dtype) * scale, unpack_weight(packed, bits))
    error = (unpack_weight(packed, bits).float() - weight.float()).abs()
    # Half a step, or one where the largest positive value meets the asymmetric end of the range; half precision rounds.
    assert bool((error <= 0.51 * scale.float() + (0 if dtype is torch.float32 else 0.01) * weight.float().abs()).all())


def test_zero_groups_and_extremes() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 0], weight[1, 1] = -5.0, 5.0
    packed = pack_weight(weight, 4, 16)
    assert torch.equal(unpack_weight(packed, 4)[0], torch.zeros(32))
    assert unpack_weight(packed, 4)[1, 0] < -4.9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**TINY, moe_intermediate_size=64, num_experts=4),
        MixtralConfig(**TINY, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_stock_loads_the_dequantised_reference(tmp_path: Path, config: PretrainedConfig, bits: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    packed, reference = {}, {}
    for name, tensor in load_file(tmp_path / "source" / "model.safetensors").items():
        if ".experts." not in name:
            packed[name] = reference[name] = tensor
            continue
        parts = pack_weight(tensor, bits, 32)
        packed |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        reference[name] = unpack_weight(parts, bits)
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    ignore = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    loaded = {}
    for kind, tensors, extra in (
        ("packed", packed, {"quantization_config": quantization_config(bits, 32, ignore)}),
        ("reference", reference, {}),
    ):
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / kind / "config.json").write_text(json.dumps(raw | extra))
        loaded[kind], info = AutoModelForCausalLM.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not any(info.values()), info
    x = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        logits = {kind: m(x).logits for kind, m in loaded.items()}
    assert torch.equal(logits["packed"], logits["reference"])
    assert not torch.equal(logits["packed"], model(x).logits)


def test_shapes_that_cannot_be_stored() -> None:
    with pytest.raises(PlanError, match=r"w stacks all experts in one tensor \[4, 8, 8\].*use --format moekit"):
        check_shape("w", (4, 8, 8), 8)
    with pytest.raises(PlanError, match=r"w has rows of 48, not a multiple of group_size 32.*choose a group_size"):
        check_shape("w", (8, 48), 32)
    with pytest.raises(
        PlanError, match=r"w has rows of 12, not a multiple of group_size 12 \(itself a multiple of 8\)"
    ):
        check_shape("w", (8, 12), 12)
