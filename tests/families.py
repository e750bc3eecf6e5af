"""Every Mixture-of-Experts family of the installed transformers, each as a tiny random float32 model.

Families are found by looking into transformers' source (`FAMILIES`), not from a list. `build(family)` returns a seeded
model with random router weights and selection biases, and the inputs for one forward pass. What a tiny configuration
needs beyond the common sizes stands in one table, `OVERRIDES`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

NUM_EXPERTS = 8
VOCAB = 96

_MODELS = Path(transformers.__file__).parent / "models"
_MARK = re.compile(r"^@use_experts_implementation|^class \w*(?:Experts|CDMoE|NaiveMoe)\(", re.MULTILINE)


def _looks_like_moe(source: str) -> bool:
    return "input_ids" in source and _MARK.search(source) is not None


FAMILIES: list[str] = sorted(
    path.parent.name for path in _MODELS.glob("*/modeling_*.py") if _looks_like_moe(path.read_text(encoding="utf-8"))
)
"""Folder names under transformers/models whose modeling file reads tokens and has an experts class."""

TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "dense_intermediate_size": 48,
    "num_hidden_layers": 3, "max_position_embeddings": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "n_group": 2, "num_expert_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "shared_expert_intermediate_size": 24,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8,
    "v_head_dim": 8, "sliding_window": 8, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_chunk_size": 8,
    "depth": 1, "num_heads": 4, "out_hidden_size": 32, "image_size": 32, "num_position_embeddings": 64,
    "projection_intermediate_size": 16, "adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_input_size": 32,
}  # fmt: skip
"""Sizes set wherever a configuration class has a field of that name."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_TEXT_DENSE_FIRST = {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"index_n_heads": 4},
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_ocr2": _TEXT_DENSE_FIRST,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": {"canvas_length": 16},
    "doge": {"num_experts": 16, "is_moe": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "use_sliding_window": False, "n_routed_experts": NUM_EXPERTS, "head_dim": 8, "index_n_heads": 4,
        "shared_experts_intermediate_size": 16,
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 24], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4v_moe": {"text_config": {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {
        "text_config": {"qk_rope_head_dim": 0, "qk_nope_head_dim": 8, "index_kpool": 2,
                        "mlp_layer_types": ["dense", "sparse", "sparse"], "index_n_heads": 4,
                        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"]}
    },
    "granitemoehybrid": {**_LINEAR, "shared_intermediate_size": 24},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "kimi_linear": _LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {
        "num_layers": 2, "zero_expert_num": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "head_dim": 4,
    },
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral_large4": _TEXT_DENSE_FIRST,
    "muse_spark": {
        "text_config": {"moe_hidden_size": 24},
        "audio_config": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [8], "depths": [1]},
        "out_hidden_size": 32, "projector_hidden_size": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": ...,
        "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "chunk_size": 8, "n_groups": 2,
    },
    "nllb_moe": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1,
    },
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_omni_moe": {
        "audio_config": {
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": 32,
            "downsample_hidden_size": 8, "num_mel_bins": 16,
        },
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen4_exp": {
        **_LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "share_expert_dim": 24}},
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
    },
    "unlimited_ocr": _TEXT_DENSE_FIRST,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What a family needs beyond TINY, by field; a dict value goes into the sub-configuration of that name; a value of
``...`` leaves the family's own default."""


def _modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def model_class(family: str) -> type[transformers.PreTrainedModel]:
    """The text-only causal class where there is one, else the smallest whole model that holds the experts."""
    module = _modeling(family)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and issubclass(value, transformers.PreTrainedModel)
        and value.config_class is not None
        and value.forward is not torch.nn.Module.forward
    ]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification", ""):
        for cls in classes:
            if cls.__name__.endswith(ending):
                return cls
    raise LookupError(f"{family}: no model class found")


def tiny_config(cls: type, overrides: dict[str, Any]) -> Any:
    """A configuration of class ``cls`` with the common tiny sizes, then the overrides."""
    names = {field.name for field in fields(cls)}
    values = {name: value for name, value in TINY.items() if name in names} | overrides
    values |= {name: tiny_config(sub, overrides.get(name, {})) for name, sub in _sub_configs(cls).items()}
    return cls(**{name: value for name, value in values.items() if value is not ...})


def _sub_configs(cls: Any) -> dict[str, type]:
    if not cls.sub_configs:
        return {}
    default = cls()
    return {name: type(getattr(default, name)) for name in cls.sub_configs if getattr(default, name, None) is not None}


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Clear and varied choices: wide router weights, non-zero selection biases, experts that matter to the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted((dict(model.named_parameters()) | dict(model.named_buffers())).items()):
        data = tensor.data
        if name.endswith("tid2eid"):
            # Only the first five experts are named, so that some can be removed without touching a token's experts.
            data.copy_(torch.rand(data.shape[0], 5, generator=generator).argsort(dim=1)[:, : data.shape[1]])
        elif not data.is_floating_point():
            continue
        elif re.search(r"correction_bias$|expert_bias$|balancing_biases$|router\.bias$", name):
            data.uniform_(-0.3, 0.3, generator=generator)
            if name.endswith("balancing_biases"):
                data[-1] = -1.0  # the skip class: loading resets it to this value
        elif re.search(r"per_expert_scale$|router\.scale$|router_states_scale$|global_scale$|post_expert_norm", name):
            data.uniform_(0.5, 1.5, generator=generator)
        elif re.search(r"\b(gate|router|router_gate)\b.*weight$", name) and data.dim() == 2:
            data.normal_(0.0, 0.5, generator=generator)
        elif re.search(r"\b(experts|input_linear|output_linear|down_embed|up_embed)\b", name):
            data.normal_(0.0, 0.2, generator=generator)


def build(family: str, seed: int = 0, **overrides: Any) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny random model in float32 and eval mode, and the inputs of one forward pass (2 sequences of 12 tokens)."""
    torch.manual_seed(seed)
    cls = model_class(family)
    config = tiny_config(cls.config_class, OVERRIDES.get(family, {}) | overrides)
    model = cls(config).float().eval()
    _randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 12), generator=generator)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        length = getattr(model.config, "canvas_length", 12)
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (2, length), generator=generator)
    return model, inputs
