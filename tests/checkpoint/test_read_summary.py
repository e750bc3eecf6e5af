"""Sizes of public models, from their configurations alone, against what their makers publish."""

from pathlib import Path

import pytest
import torch
import transformers

from moekit.checkpoint import Checkpoint, TensorInfo
from moekit.checkpoint.skeleton import build
from moekit.checkpoint.summary import kv_cache


def headers(config, architecture):
    """The checkpoint a config describes, in bfloat16, as headers without files."""
    config.architectures, config.dtype = [architecture], torch.bfloat16
    state = build(config).state_dict(keep_vars=True)
    seen, infos = set(), {}
    for name, tensor in state.items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            infos[name] = TensorInfo(name, "x", tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            seen.add(id(tensor))
    return Checkpoint(Path("x"), config.to_dict() | {"architectures": [architecture]}, infos)


@pytest.mark.parametrize(
    ("config", "architecture", "total", "active"),
    [
        # OLMoE technical report: 6.9 B total, 1.3 B active.
        (transformers.OlmoeConfig(intermediate_size=1024, num_hidden_layers=16), "OlmoeForCausalLM", 6.92, 1.28),
        # Mixtral of Experts: 47 B total, 13 B active.
        (transformers.MixtralConfig(), "MixtralForCausalLM", 46.70, 12.88),
        # DeepSeek-V3 technical report: 671 B total, 37 B active.
        (transformers.DeepseekV3Config(), "DeepseekV3ForCausalLM", 671.03, 37.55),
    ],
    ids=["olmoe", "mixtral", "deepseek-v3"],
)
def test_public_models(config, architecture, total, active):
    summary = headers(config, architecture).summary()
    assert round(summary.total / 1e9, 2) == total
    assert round(summary.active / 1e9, 2) == active
    layer = summary.layers[-1]
    per_expert = 3 * config.hidden_size * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    assert layer.expert_bytes == 2 * per_expert
    assert summary.total_bytes >= 2 * summary.total


def test_gpt_oss_cache_is_half_windowed():
    config = transformers.GptOssConfig(dtype="bfloat16")
    full, windowed, window = kv_cache(config)
    assert full == windowed == 18 * 8 * 64 * 2 * 2
    assert window == 128
    summary = headers(config, "GptOssForCausalLM").summary()
    assert summary.kv_bytes(100) == 100 * (full + windowed)
    assert summary.kv_bytes(10_000) == 10_000 * full + 128 * windowed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.MixtralConfig(dtype="bfloat16"), 32 * 8 * 128 * 2 * 2),
        (transformers.DeepseekV3Config(dtype="bfloat16"), 61 * (512 + 64) * 2),
        (transformers.Qwen3NextConfig(dtype="bfloat16"), 12 * 2 * 256 * 2 * 2),
        (transformers.JambaConfig(dtype="bfloat16"), 4 * 8 * 128 * 2 * 2),
    ],
    ids=["grouped heads", "latent", "one layer in four", "one layer in eight"],
)
def test_cache_per_token(config, expected):
    assert kv_cache(config)[0] == expected
