"""The stored experts of a layer plan, computed from the source's weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.bank import ExpertBank, ExpertWeights
from moekit.formats import DenseBank, PackedBank
from moekit.plan.layer import LayerPlan, Permutation, StoredExpert


def recombined(bank: DenseBank, plan: LayerPlan) -> DenseBank:
    """The M stored experts before quantisation. Untouched ones are copied bit for bit; sums are taken in float32.

    Computed values are decoded to the dtype of the source.
    """
    if plan.values is not None:
        return decoded(plan.values.bank(activation=bank.activation), bank.dtype)
    return DenseBank.stack([recombined_expert(bank, expert) for expert in plan.experts], bank.activation)


def stored(bank: DenseBank, plan: LayerPlan) -> DenseBank:
    """The M stored experts as they will compute: recombined, rounded to their precision, decoded again."""
    dense = recombined(bank, plan)
    bits = [expert.bits for expert in plan.experts]
    if set(bits) == {16}:
        return dense
    return PackedBank.quantise(dense, bits, [expert.group_size for expert in plan.experts]).dequantise()


def decoded(bank: ExpertBank, dtype: torch.dtype) -> DenseBank:
    """Any bank as plain weights of ``dtype``."""
    plain = (bank.expert(e) for e in range(bank.num_experts))
    cast = [ExpertWeights(*(None if t is None else t.to(dtype) for t in weights)) for weights in plain]
    return DenseBank.stack(cast, bank.activation)


def recombined_expert(bank: DenseBank, stored: StoredExpert) -> ExpertWeights:
    """``sum_i coefficient_i * expert_i``, hidden units reordered first."""
    parts = [reordered(bank.expert(source), stored.order(i)) for i, (source, _) in enumerate(stored.parts)]
    coefficients = [coefficient for _, coefficient in stored.parts]
    if len(parts) == 1 and coefficients[0] == 1.0:
        return parts[0]
    return ExpertWeights(*(_sum(tensors, coefficients) for tensors in zip(*parts, strict=True)))


def reordered(expert: ExpertWeights, order: Permutation | None) -> ExpertWeights:
    """The same function with unit j taken from unit ``order[j]``."""
    if order is None:
        return expert
    units = torch.from_numpy(order.array().copy()).long()
    size = expert.down.shape[1]
    rows = torch.cat([units + start for start in range(0, expert.gate_up.shape[0], size)])
    bias = expert.gate_up_bias
    return ExpertWeights(
        expert.gate_up[rows], expert.down[:, units], None if bias is None else bias[rows], expert.down_bias
    )


def _sum(tensors: tuple[Tensor | None, ...], coefficients: list[float]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    wide = torch.promote_types(present[0].dtype, torch.float32)
    total = torch.zeros(present[0].shape, dtype=wide, device=present[0].device)
    for tensor, coefficient in zip(present, coefficients, strict=True):
        total.add_(tensor.to(wide), alpha=coefficient)
    return total.to(present[0].dtype)
