"""Scales moved through one layer's experts without changing what they compute: into their inputs, and inside them.

Shapes by suffix: S sampled tokens, E experts, N tokens of one, H hidden size, I hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moekit.algebra import channel_peaks, outlier_scales, smoothing_scales
from moekit.bank import Activation
from moekit.compress._sample import Sample, hidden_units
from moekit.formats import DenseBank


def input_scales(sample: Sample, bank: DenseBank, everyone: Sequence[Tensor], alpha: float) -> Tensor:
    """One scale [H] for all who read the experts' input: the experts of ``bank`` (all or none), each over its own
    sampled tokens, and the matrices ``everyone`` [R, H] that read every token (router, shared experts)."""
    all_H = channel_peaks(sample.x_SH)
    own = [channel_peaks(x) if len(x) else torch.zeros_like(all_H) for x in _inputs(sample)[: bank.num_experts]]
    activation_NH = torch.stack([*own, *(all_H for _ in everyone)])
    weight_NH = torch.stack([*(channel_peaks(w) for w in bank.gate_up), *(channel_peaks(w) for w in everyone)])
    return smoothing_scales(activation_NH, weight_NH, alpha)


def scaled_inputs(sample: Sample, bank: DenseBank, scale_H: Tensor) -> tuple[Sample, DenseBank]:
    """Inputs divided by the scales and experts that expect them so, in the dtype of their weights."""
    gate_up = torch.stack([(w.float() * scale_H).to(w.dtype) for w in bank.gate_up])
    scaled = DenseBank(gate_up, bank.down, bank.gate_up_bias, bank.down_bias, activation=bank.activation)
    return replace(sample, x_SH=sample.x_SH / scale_H), scaled


def scaled_units(sample: Sample, bank: DenseBank, alpha: float) -> tuple[DenseBank, int]:
    """Each expert's outlier hidden units divided in up's rows and multiplied in down's columns; how many there were.

    None are where the hidden units are not proportional to up's output (see :func:`linear_in_up`).
    """
    if not linear_in_up(bank.activation):
        return bank, 0
    gate_up, down = bank.gate_up.clone(), bank.down.clone()
    bias = None if bank.gate_up_bias is None else bank.gate_up_bias.clone()
    found = 0
    for e, x_NH in enumerate(_inputs(sample)):
        if not len(x_NH):
            continue
        scale_I = outlier_scales(channel_peaks(hidden_units(bank.expert(e), bank.activation, x_NH)), alpha)
        found += int((scale_I != 1).sum())
        up = slice(len(scale_I), None)
        gate_up[e, up] = (gate_up[e, up].float() / scale_I[:, None]).to(gate_up.dtype)
        down[e] = (down[e].float() * scale_I).to(down.dtype)
        if bias is not None:
            bias[e, up] = (bias[e, up].float() / scale_I).to(bias.dtype)
    return DenseBank(gate_up, down, bias, bank.down_bias, activation=bank.activation), found


def linear_in_up(activation: Activation) -> bool:
    """Whether scaling the up half scales every hidden unit alike, tried on random values large enough to clip."""
    if not activation.gated:
        return False
    draw = torch.Generator().manual_seed(0)
    gate, up = 20 * torch.randn(2, 64, 16, generator=draw)
    scale = torch.rand(16, generator=draw) + 0.5
    scaled = activation(torch.cat([gate, up / scale], dim=-1)) * scale
    return torch.allclose(scaled, activation(torch.cat([gate, up], dim=-1)), rtol=1e-4, atol=1e-4)


def _inputs(sample: Sample) -> list[Tensor]:
    return [sample.own(e).x_NH for e in range(sample.num_experts)]
