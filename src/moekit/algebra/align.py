"""Aligning hidden units: the order of one expert's units that makes it most like another's.

An expert computes the same function under any order of its I hidden units, so two experts may only be averaged unit by
unit once their orders agree (the permutation matching of weight-space merging; Ainsworth et al., Git Re-Basin, 2023).
Shapes by suffix: E experts, I hidden units, H hidden size.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit.bank import ExpertWeights
from moekit.formats import DenseBank


def alignment(reference: ExpertWeights, expert: ExpertWeights) -> Tensor:
    """The order [I] of ``expert``'s hidden units closest to ``reference``'s: unit j of the result is unit order[j].

    Maximises the summed inner products of matched units (gate and up rows, down columns, unit biases) exactly, by
    linear assignment; equal to minimising the squared distance between the aligned weights.
    """
    similarity_II = _units(reference) @ _units(expert).T
    _, order = linear_sum_assignment(similarity_II.numpy(), maximize=True)
    return torch.from_numpy(order).long()


def align(bank: DenseBank, reference: int = 0) -> Tensor:
    """Orders [E, I] for ``bank.permute`` that align every expert to the reference expert; its own is the identity."""
    target = bank.expert(reference)
    same = torch.arange(bank.intermediate_size)
    orders = [same if e == reference else alignment(target, bank.expert(e)) for e in range(bank.num_experts)]
    return torch.stack(orders)


def _units(expert: ExpertWeights) -> Tensor:
    """One row per hidden unit: everything that moves with it. [I, 3H] if gated (plus biases), float64."""
    size = expert.down.shape[1]
    columns = [*expert.gate_up.split(size), expert.down.T]
    if expert.gate_up_bias is not None:
        columns += [bias[:, None] for bias in expert.gate_up_bias.split(size)]
    return torch.cat([column.detach().cpu().double() for column in columns], dim=1)
