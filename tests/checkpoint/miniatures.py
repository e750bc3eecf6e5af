"""Tiny random checkpoints in every layout that models are published in. `write(layout, folder)` makes one.

Each is written with code of its own, not with moekit's readers, so that the two can be held against each other. With
`twin`, a second folder receives the same model as plain bfloat16 weights: exactly the values the first decodes to.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import families

State = dict[str, Tensor]
FP8_BLOCK = 16
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def write(layout: str, folder: Path, twin: Path | None = None) -> Path:
    """A checkpoint of the layout (a key of `LAYOUTS`), with a tokenizer; returns `folder`."""
    LAYOUTS[layout](folder, twin)
    return folder


def plain(folder: Path, family: str = "qwen3_moe", shard: str | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Any family as `save_pretrained` writes it, in float32; `shard`: the largest file ("20KB") for several shards."""
    model, _ = families.build(family, seed, **overrides)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are characters, within the families' vocabulary of 96."""
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    words = ["<pad>", "<s>", "</s>", "<unk>", *letters][: families.VOCAB]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def _base(folder: Path, family: str, **overrides: Any) -> tuple[State, dict[str, Any]]:
    """A bfloat16 model saved to `folder`: its tensors on disk, and its config."""
    model, _ = families.build(family, **overrides)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def _put(folder: Path, state: State, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(folder)


def _finish(folder: Path, twin: Path | None, stored: State, dense: State, config: dict[str, Any], how: Any) -> None:
    if twin is not None:
        _put(twin, dense, config)
    _put(folder, stored, config | {"quantization_config": how})


def _is_linear(name: str, tensor: Tensor) -> bool:
    """Matrices that published checkpoints quantise: neither embeddings, nor routers, nor norms."""
    return tensor.dim() == 2 and name.endswith(
        ("_proj.weight", "_proj_with_mqa.weight", "w1.weight", "w2.weight", "w3.weight")
    )


def fp8(folder: Path, twin: Path | None = None) -> None:
    """DeepSeek-V3: float8 e4m3 with `weight_scale_inv` per block, one prediction layer beyond the trunk."""
    state, config = _base(folder, "deepseek_v3", num_nextn_predict_layers=1)
    last = config["num_hidden_layers"] - 1
    extra = {
        n.replace(f"layers.{last}.", f"layers.{last + 1}."): t.clone() for n, t in state.items() if f".{last}." in n
    }
    prefix = f"model.layers.{last + 1}."
    norm = state["model.norm.weight"]
    extra |= {prefix + "enorm.weight": norm.clone(), prefix + "hnorm.weight": norm.clone()}
    extra |= {
        prefix + "eh_proj.weight": torch.randn(32, 64).to(torch.bfloat16),
        prefix + "shared_head.norm.weight": norm.clone(),
    }
    extra |= {prefix + "embed_tokens.weight": state["model.embed_tokens.weight"].clone()}
    extra |= {prefix + "shared_head.head.weight": state["lm_head.weight"].clone()}
    stored: State = {}
    dense: State = {}
    for name, tensor in (state | extra).items():
        dense[name] = stored[name] = tensor
        if _is_linear(name, tensor) and not name.endswith("eh_proj.weight"):
            stored[name], stored[name + "_scale_inv"], dense[name] = _to_fp8(tensor.float())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK] * 2}
    _finish(folder, twin, stored, {name: dense[name] for name in state}, config, how)


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    quantised, decoded = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
    scales = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            where = (slice(r * FP8_BLOCK, (r + 1) * FP8_BLOCK), slice(c * FP8_BLOCK, (c + 1) * FP8_BLOCK))
            scales[r, c] = weight[where].abs().max() / 448
            quantised[where] = (weight[where] / scales[r, c]).to(torch.float8_e4m3fn)
            decoded[where] = quantised[where].float() * scales[r, c]
    return quantised, scales, decoded.to(torch.bfloat16)


def mxfp4(folder: Path, twin: Path | None = None) -> None:
    """gpt-oss: experts as `_blocks` (two FP4 values a byte) and `_scales` (powers of two), biases in bfloat16."""
    state, config = _base(folder, "gpt_oss", hidden_size=32, intermediate_size=64)
    generator = torch.Generator().manual_seed(5)
    stored, dense = dict(state), dict(state)
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape  # [E, in, out] in the plain layout
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            del stored[name]
            stored |= {name + "_blocks": blocks, name + "_scales": scales}
            values = torch.empty(experts, rows, columns // 32, 32)
            values[..., 0::2], values[..., 1::2] = FP4[(blocks % 16).long()], FP4[(blocks // 16).long()]
            values = values * 2.0 ** (scales.double() - 127)[..., None].float()
            dense[name] = values.reshape(experts, rows, columns).transpose(1, 2).to(torch.bfloat16)
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    _finish(folder, twin, stored, dense, config, how)


def packed(
    folder: Path,
    twin: Path | None = None,
    *,
    family: str = "qwen3_moe",
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = True,
) -> None:
    """compressed-tensors "pack-quantized": `weight_packed`, `weight_scale`, `weight_shape` (and zero points)."""
    state, config = _base(folder, family)
    stored, dense = dict(state), dict(state)
    for name, tensor in state.items():
        if _is_linear(name, tensor):
            del stored[name]
            base = name.removesuffix("weight")
            parts, dense[name] = _to_packed(tensor.float(), bits, group_size, symmetric)
            stored |= {base + part: value for part, value in parts.items()}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    how = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$"],
    }
    _finish(folder, twin, stored, dense, config, how)


def _to_packed(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[State, Tensor]:
    rows, columns = weight.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.reshape(rows, -1, group_size)
    if symmetric:
        scale = (groups.abs().amax(-1) / high).to(torch.bfloat16)
        zero = torch.zeros_like(scale)
    else:
        scale = ((groups.amax(-1) - groups.amin(-1)) / (high - low)).to(torch.bfloat16)
        zero = (low - groups.amin(-1) / scale.float()).round().clamp(low, high)
    integers = (groups / scale.float()[..., None] + zero.float()[..., None]).round().clamp(low, high)
    decoded = ((integers - zero.float()[..., None]) * scale.float()[..., None]).reshape(rows, columns)
    parts = {
        "weight_packed": _words(integers.reshape(rows, columns), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        parts["weight_zero_point"] = _words(zero.T, bits).T
    return parts, decoded.to(torch.bfloat16)


def _words(integers: Tensor, bits: int) -> Tensor:
    """Every row as one little-endian stream of bits, cut into int32 words."""
    rows = []
    for row in integers.tolist():
        stream = sum((int(value) + 2 ** (bits - 1)) << (place * bits) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append(torch.frombuffer(bytearray(stream.to_bytes(4 * count, "little")), dtype=torch.int32))
    return torch.stack(rows)


def moekit(folder: Path, twin: Path | None = None, *, family: str = "qwen3_moe", bits: Any = 4) -> None:
    """moekit's own packed format, on every layer of a family with per-expert keys."""
    from moekit.checkpoint import Checkpoint
    from moekit.checkpoint.quantizer import describe_layer
    from moekit.formats import PackedBank

    state, config = _base(folder, family)
    source = Checkpoint.open(folder)
    layers, stored, dense = {}, dict(state), dict(state)
    for layer in source.moe_layers:
        bank = PackedBank.quantise(source.bank(layer.name), bits, 16)
        for tensor in layer.expert_tensors:
            stored.pop(tensor.name, None)
        stored |= {f"{layer.name}.experts.{name}": tensor for name, tensor in bank.tensors().items()}
        dense |= source.write_bank(layer.name, bank.dequantise())
        layers[layer.name] = describe_layer(bank, range(layer.num_experts))
    _finish(folder, twin, stored, dense, config, {"quant_method": "moekit", "version": 1, "layers": layers})


def _plain_layout(family: str) -> Callable[[Path, Path | None], None]:
    def layout(folder: Path, twin: Path | None = None) -> None:
        state, config = _base(folder, family)
        if twin is not None:
            _put(twin, state, config)

    return layout


def _asymmetric(folder: Path, twin: Path | None = None) -> None:
    packed(folder, twin, family="mixtral", symmetric=False)


LAYOUTS: dict[str, Callable[[Path, Path | None], None]] = {
    "per-expert": _plain_layout("qwen3_moe"),
    "per-expert-w123": _plain_layout("mixtral"),
    "fused": _plain_layout("granitemoe"),
    "fused-transposed": _plain_layout("gpt_oss"),
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": packed,
    "compressed-tensors-asymmetric": _asymmetric,
    "moekit": moekit,
}
"""Layout name -> what writes it."""
