"""What a forward pass takes besides weights, estimated on the high side from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

_PARKED_COPIES = 4
"""Residual stream plus what some families carry along: embeddings, a second stream, router states, positions."""


def _size(config: PretrainedConfig, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(entry, int) for entry in value):
            return max(value)
    return default


def shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(sequences, length) of a batch: of its token ids, or of the widest tensor where it has none."""
    tensors = [batch["input_ids"]] if "input_ids" in batch else [v for v in batch.values() if isinstance(v, Tensor)]
    largest = max(tensors, key=lambda t: t.numel())
    return largest.shape[0], largest.shape[1] if largest.dim() > 1 else 1


def parked_bytes(config: PretrainedConfig, batch: Mapping[str, Any], itemsize: int) -> int:
    """Bytes one batch holds while it waits between two layers: its hidden states and its masks."""
    rows, length = shape(batch)
    hidden = _size(config.get_text_config(), "hidden_size", "d_model", default=1024)
    return rows * length * hidden * itemsize * _PARKED_COPIES + 2 * rows * length * length


def running_bytes(config: PretrainedConfig, batch: Mapping[str, Any], itemsize: int) -> int:
    """Bytes the batch that runs takes on top in a layer: attention, expert slots and their observation."""
    text = config.get_text_config()
    rows, length = shape(batch)
    hidden = _size(text, "hidden_size", "d_model", default=1024)
    inner = _size(text, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", default=4 * hidden)
    dense = _size(text, "intermediate_size", "ffn_hidden_size", default=4 * hidden)
    slots = _size(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", default=8)
    heads = _size(text, "num_attention_heads", "n_heads", default=8)
    stream = 6 * hidden * max(itemsize, 4) + 3 * dense * itemsize
    # Gathered inputs, hidden units and outputs of every slot; then the same outputs observed, and widened to float32.
    routed = slots * (itemsize * (3 * inner + 4 * hidden) + 4 * hidden)
    attention = min(rows, 1) * heads * length * length * max(itemsize, 4)
    return rows * length * (stream + routed) + attention


def head_bytes(config: PretrainedConfig, batch: Mapping[str, Any], itemsize: int, last_only: bool) -> int:
    """Bytes the batch that runs takes on top in the head: its logits, of every position or of the last, as they are
    and in float32."""
    text = config.get_text_config()
    rows, length = shape(batch)
    hidden = _size(text, "hidden_size", "d_model", default=1024)
    positions = rows if last_only else rows * length
    return rows * length * 2 * hidden * max(itemsize, 4) + positions * _size(text, "vocab_size", default=32000) * (
        itemsize + 4
    )
