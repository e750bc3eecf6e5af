"""What a forward pass takes beside weights, so that it can be kept free of experts."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint
from moekit.stream import footprint


def working_bytes(model: PreTrainedModel, checkpoint: Checkpoint, context: int) -> int:
    """Bytes that a batch of ``context`` tokens takes at once: its keys and values, what a layer computes in, and the
    logits of its last position.

    Only eager attention holds all scores of all heads; the fused kernels hold a strip of them.
    """
    eager = model.config._attn_implementation == "eager"
    shape = (1, context) if eager else (context, 1)
    batch = {"input_ids": torch.empty(shape, dtype=torch.int64, device="meta")}
    size = model.dtype.itemsize
    layer = footprint.running_bytes(model.config, batch, size)
    one = {"input_ids": torch.empty(1, 1, dtype=torch.int64, device="meta")}
    head = footprint.head_bytes(model.config, one, size, last_only=True)
    # A step of generation makes the next cache beside the present one.
    return 2 * checkpoint.summary().kv_bytes(context) + max(layer, head)
