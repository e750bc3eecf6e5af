"""Matrices of stored experts as the fused kernels read them: in the bytes they are stored in, codes expanded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..formats import NestedBank, TernaryBank
from ..formats._stored import StoredBank
from .fused import FIELDS, Matrices, lacking

CHUNK = 64
"""Columns that the fused kernels decode together; the group size must be this times a power of two."""


def unfit(bank: StoredBank, groups: Mapping[int, int]) -> str | None:
    """Why the fused kernels cannot run a bank, or None; ``groups`` are the group sizes of experts that have any."""
    if any(size % CHUNK for size in bank.shape):
        return f"sizes of {bank.hidden_size} and {bank.intermediate_size}: only multiples of {CHUNK} are compiled for"
    for expert, group in groups.items():
        if group % CHUNK or group & (group - 1) or any(size % group for size in bank.shape):
            return f"groups of {group} in expert {expert}: only {CHUNK}, {2 * CHUNK}, {4 * CHUNK} .. are compiled for"
    if any(t.device.type != "cpu" or not t.is_contiguous() for t in bank.stored.values()):
        return "the experts are not in this machine's memory"
    return lacking()


def table_of(bank: StoredBank, part: str) -> tuple[np.ndarray, list[Any]]:
    """A table of experts in which only the biases are filled in, and what they point to."""
    table, kept = np.zeros((bank.num_experts, len(FIELDS)), np.int64), []
    for expert in range(bank.num_experts):
        bias = bank.stored.get(f"{expert}.{part}.bias")
        kept.append(torch.zeros(bank.size(part)[0]) if bias is None else bias.to(torch.float32))
        table[expert, 6] = kept[-1].data_ptr()
    return table, kept


def nested(bank: NestedBank, part: str) -> Matrices:
    """One part of every expert at the bits the bank is read at; a base without planes is packed integers."""
    base, (table, kept) = bank.base_bits, table_of(bank, part)
    kinds = [f"n{base}.{bits}" if bits > base else f"q{base}" for bits in bank.bits]
    for expert, (bits, group) in enumerate(zip(bank.bits, bank.group_size, strict=True)):
        name, widths = f"{expert}.{part}", range(base + 1, bits + 1)
        packed, scales, mins = (bank.stored[f"{name}.{leaf}"] for leaf in ("qweight", "scales", "mins"))
        planes = [bank.stored[f"{name}.{leaf}{width}"] for width in widths for leaf in ("sign", "step")]
        places = np.array([t.data_ptr() for t in planes], np.int64)
        table[expert, :2] = packed.data_ptr(), packed.stride(0)
        table[expert, 2:6] = scales.data_ptr(), mins.data_ptr(), scales.stride(0) * 2, group.bit_length() - 1
        table[expert, 7] = places.ctypes.data
        kept += [packed, scales, mins, *planes, places]
    return Matrices(*bank.size(part), kinds, table, kept)


def ternary(bank: TernaryBank, part: str) -> Matrices:
    """One part of every expert at two bits a weight. Raises :class:`CheckpointError` on damaged codes."""
    table, kept = table_of(bank, part)
    for expert in range(bank.num_experts):
        symbols, levels = bank.symbols(expert, part), bank.stored[f"{expert}.{part}.levels"]
        table[expert, :5] = symbols.data_ptr(), symbols.stride(0), levels.data_ptr(), 0, levels.stride(0) * 2
        kept += [symbols, levels]
    return Matrices(*bank.size(part), ["ternary"] * bank.num_experts, table, kept)
