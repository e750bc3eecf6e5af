"""Sizes of a model, from headers and config alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moekit.checkpoint.decode import FP4_BYTES
from moekit.checkpoint.layers import MoELayer
from moekit.checkpoint.storage import Stored

if TYPE_CHECKING:
    from moekit.checkpoint.checkpoint import Checkpoint

PARTS = ("experts", "shared", "router", "attention", "embeddings", "other", "extra")
_ATTENTION = re.compile(r"attn|attention|mamba|\.conv\.|mixer\.(in_proj|out_proj|conv1d|A_log|D$|dt_bias)")


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer: experts, experts per token, and bytes of one expert on disk."""

    name: str
    layer: int
    num_experts: int
    top_k: int
    expert_bytes: int
    extra: bool


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds. Parameters do not count scales of quantised weights; bytes count everything on disk.

    ``total`` and ``active`` (used for one token) leave prediction layers out, which ``parts`` and ``nbytes`` show as
    "extra". ``kv_bytes_per_token`` is the cache that grows with every token, ``kv_bytes_windowed`` what a token adds
    only while it is inside a layer's sliding window of ``window`` tokens.
    """

    model_type: str
    dtype: str
    quantisation: str | None
    total: int
    active: int
    parts: dict[str, int]
    nbytes: dict[str, int]
    kv_bytes_per_token: int
    kv_bytes_windowed: int
    window: int | None
    layers: tuple[LayerSummary, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes.values())

    def kv_bytes(self, context: int) -> int:
        """Bytes of the key-value cache for one sequence of ``context`` tokens."""
        return self.kv_bytes_per_token * context + self.kv_bytes_windowed * min(context, self.window or context)


def summarise(checkpoint: Checkpoint) -> Summary:
    """The summary of an open checkpoint."""
    kinds = _kinds(checkpoint)
    parts, nbytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    buffers = {name for name, _ in checkpoint.structure.model.named_buffers()}
    for name, stored in checkpoint.stored.items():
        if checkpoint.classified.parameters.get(name) not in buffers:
            parts[kinds[name]] += count(checkpoint, stored)
        nbytes[kinds[name]] += sum(checkpoint.tensors[tensor].nbytes for tensor in stored.tensors.values())
    layers = checkpoint.moe_layers
    total = sum(parts.values()) - parts["extra"]
    idle = sum(_idle(checkpoint, layer) for layer in layers if not layer.extra)
    full, windowed, window = kv_cache(checkpoint.transformers_config)
    quantisation = checkpoint.scheme.config.get("quant_method")
    return Summary(
        model_type=checkpoint.model_type,
        dtype=str(checkpoint.scheme.dtype).removeprefix("torch."),
        quantisation=quantisation,
        total=total,
        active=total - idle,
        parts=parts,
        nbytes=nbytes,
        kv_bytes_per_token=full,
        kv_bytes_windowed=windowed,
        window=window,
        layers=tuple(_layer(checkpoint, layer) for layer in layers),
    )


def count(checkpoint: Checkpoint, stored: Stored) -> int:
    """Parameters of one stored weight."""
    carrier = stored.carrier
    info = checkpoint.tensors[stored.tensors[carrier]]
    two_a_byte = carrier == "blocks" or ("scale_inv" in stored.tensors and info.dtype in FP4_BYTES)
    if two_a_byte:
        return info.numel * 2
    if carrier in ("packed", "qweight"):
        tensor, layer = checkpoint.expert_tensor(stored.name), checkpoint.layer_of(stored.name)
        if tensor is not None and layer is not None:
            inner = layer.intermediate_size * (2 if tensor.part == "gate_up" and layer.shape.gated else 1)
            return inner * layer.hidden_size
        groups = checkpoint.scheme.config.get("config_groups", {}).values()
        bits = next((group["weights"]["num_bits"] for group in groups if group.get("weights")), 4)
        return info.numel * 32 // int(bits)
    return info.numel


def _idle(checkpoint: Checkpoint, layer: MoELayer) -> int:
    """Parameters of a layer's experts that one token does not use."""
    shape = layer.shape
    rows = shape.intermediate_size * (3 if shape.gated else 2)
    bias = shape.intermediate_size * (2 if shape.gated else 1) + shape.hidden_size if shape.biased else 0
    used = min(layer.top_k * shape.users, layer.num_experts)
    return (layer.num_experts - used) * (rows * shape.hidden_size + bias)


def _layer(checkpoint: Checkpoint, layer: MoELayer) -> LayerSummary:
    names = {name for tensor in layer.expert_tensors for name in tensor.stored.tensors.values()}
    size = sum(checkpoint.tensors[name].nbytes for name in names)
    per_expert = math.ceil(size / layer.num_experts)
    return LayerSummary(layer.name, layer.layer, layer.num_experts, layer.top_k, per_expert, layer.extra)


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """The part each stored weight belongs to, by plain name."""
    classified = checkpoint.classified
    model = checkpoint.structure.model
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    named = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    special: dict[str, str] = {}
    for layer in classified.layers:
        special.update({tensor.stored.name: "experts" for tensor in layer.expert_tensors})
        special.update({row.name: "router" for row in layer.row_tensors})
        special.update(dict.fromkeys(layer.shared, "shared"))
    blocks = tuple(layer.name + "." for layer in classified.layers)
    kinds = {}
    for name, stored in checkpoint.stored.items():
        parameter = classified.parameters.get(name, name)
        known = special.get(name) or special.get(stored.tensors[stored.carrier])
        if name in classified.extra:
            kinds[name] = "extra"
        elif known is not None:
            kinds[name] = known
        elif parameter in named or "embed" in parameter:
            kinds[name] = "embeddings"
        elif re.search(r"\.(router|gate)\.", parameter) and parameter.startswith(blocks):
            kinds[name] = "router"
        else:
            kinds[name] = "attention" if _ATTENTION.search(parameter) else "other"
    return kinds


def kv_cache(config: Any) -> tuple[int, int, int | None]:
    """Bytes a token adds to the cache for good, bytes while inside the sliding window, and the window.

    Latent attention (MLA) counts its compressed vector and rotary key, as serving engines store it. Layers with a
    constant state (linear attention, Mamba, convolutions) add nothing. Where head sizes differ by layer, the config's
    general one counts.
    """
    text = config.get_text_config(decoder=True)
    field = text.to_dict()
    layers = int(field.get("num_hidden_layers") or field.get("num_layers") or 0)
    kinds = [str(kind) for kind in _layer_types(text) or ["full"] * layers]
    width = text.dtype.itemsize if isinstance(text.dtype, torch.dtype) else 2
    heads = int(field.get("num_attention_heads") or 1)
    if field.get("kv_lora_rank"):
        per_layer = (field["kv_lora_rank"] + (field.get("qk_rope_head_dim") or 0)) * width
    else:
        head = int(field.get("head_dim") or (field.get("hidden_size") or heads) // heads)
        per_layer = int(field.get("num_key_value_heads") or heads) * 2 * head * width
    windowed = sum("sliding" in kind or "chunked" in kind for kind in kinds)
    constant = sum(kind in ("mamba", "mamba2", "moe", "mlp", "conv", "hybrid") or "linear" in kind for kind in kinds)
    window = field.get("sliding_window") or field.get("attention_chunk_size")
    if windowed and not window:
        windowed = 0
    return (len(kinds) - windowed - constant) * per_layer, windowed * per_layer, window if windowed else None


def _layer_types(text: Any) -> Any:
    """What each layer is, where the config says; hybrid families compute it from a period."""
    return next((value for name in ("layer_types", "layers_block_type") if (value := getattr(text, name, None))), None)
