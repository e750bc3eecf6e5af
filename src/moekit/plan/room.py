"""How much memory fitting takes after the profile, told beforehand: the largest of its steps, on the high side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moekit.blocks import blocks
from moekit.measure import LENGTH
from moekit.plan.cost import tried_experts
from moekit.plan.live_streamed import FEWEST_POSITIONS, rewriting_bytes

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer
    from moekit.stream import StreamedModel

COPIES = 6
"""Float32 copies of the weights that are tried at each precision and rank: wide, rounded, decoded, and their like."""
TOGETHER = 4
"""Large experts that are rounded together with calibration, a little more than are; many small ones take less than
:data:`CALIBRATING`."""
CALIBRATING = 150_000_000


def fitting_bytes(checkpoint: Checkpoint, runner: StreamedModel) -> int:
    """The most bytes beyond the profile that weighing, measuring, calibrating, writing and comparing take.

    Measuring streams at least in the dtype on disk; where the cap leaves more room it takes more.
    """
    vocabulary = runner.model.config.get_text_config().vocab_size
    window = {"input_ids": torch.empty(1, LENGTH, dtype=torch.int64, device="meta")}
    live = {block.name: block for block in blocks(runner.model)}
    layers = [layer for layer in checkpoint.moe_layers if layer.name in live]
    dense = max(layer.num_experts * _weights(layer) for layer in layers) * runner.model.dtype.itemsize
    running = runner.needed_bytes(window)
    return max(
        max(4 * COPIES * len(tried_experts(layer)) * _weights(layer) for layer in layers),
        running + max(rewriting_bytes(layer, live[layer.name]) for layer in layers) + 8 * vocabulary * FEWEST_POSITIONS,
        running + 4 * 4 * LENGTH * vocabulary,
        2 * dense + max(CALIBRATING, *(TOGETHER * _calibrating(layer) for layer in layers)),
    )


def _weights(layer: MoELayer) -> int:
    """Of one expert."""
    return (3 if layer.shape.gated else 2) * layer.shape.hidden_size * layer.shape.intermediate_size


def _calibrating(layer: MoELayer) -> int:
    """Bytes of one expert's second moments, their factors in float64, and its weights in five forms."""
    shape = layer.shape
    return 28 * (shape.hidden_size**2 + shape.intermediate_size**2) + 20 * _weights(layer)
