"""Products on packed integers: a tile of an expert is decoded in cache when tokens reach it, and never kept.

A weight is ``q * scale + min``; the product splits as ``x @ (q * scale).T + sums(x) @ min.T`` with the sums of x over
each group, so that decoding costs one conversion and one multiplication per weight. Packed columns are unpacked plane
by plane (all first integers of their bytes, then all second ones, ...) and the columns of x follow that order.
Shapes by suffix: M rows, N output and K input columns of a product, C groups of a row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import PackedBank
from . import stored_matrices
from ._tiles import TILE, Tiles
from .fused import Fused, Matrices

_PLANES = {8: 1, 4: 2, 3: 8, 2: 4, 1: 8}
"""Integers in the smallest whole unit of a packed row: 8 to three bytes at 3 bits, else as many as a byte holds."""

FEW_ROWS = 3
"""Rows up to which compiled kernels multiply the packed integers directly instead of decoding tiles."""


class IntegerProducts:
    """Both products of every expert of a :class:`PackedBank`; computes in float32 (float64 for float64 inputs)."""

    def __init__(self, bank: PackedBank, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self.bank = bank
        self.finish = finish
        self.num_experts, self.activation = bank.num_experts, bank.activation
        self.fused: Fused | None = None
        if unfit(bank) is None:
            up, down = (_matrices(bank, part) for part in bank.PARTS)
            self.fused = Fused(up, down, bank.activation, finish)

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return torch.promote_types(x_TH.dtype, torch.float32)

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._product(x_MH, expert, "gate_up")

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._product(h_MI, expert, "down")

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH))).contiguous()

    def _product(self, x_MK: Tensor, expert: int, part: str) -> Tensor:
        name, bits, group = f"{expert}.{part}", self.bank.bits[expert], self.bank.group_size[expert]
        bias = self.bank.stored.get(f"{name}.bias")
        columns = x_MK.shape[1]
        if bits == 16:
            weight = self.bank.stored[f"{name}.weight"]
            tiles = Tiles(weight)
            out = tiles.linear(x_MK.to(tiles.dtype), weight).to(x_MK.dtype)
        elif columns % group or group % _PLANES[bits]:
            out = F.linear(x_MK, self.bank.matrix(expert, part, x_MK.dtype))
        else:
            stored = (self.bank.stored[f"{name}.{leaf}"] for leaf in ("qweight", "scales", "mins"))
            out = _grouped(x_MK, *stored, bits=bits, group=group)
        return out if bias is None else out.add_(bias)


def _grouped(x_MK: Tensor, packed_NB: Tensor, scales_NC: Tensor, mins_NC: Tensor, *, bits: int, group: int) -> Tensor:
    """x @ W.T [M, N] where the group size divides the row and a unit divides the group."""
    (count, columns), rows, planes = x_MK.shape, packed_NB.shape[0], _PLANES[bits]
    scales = scales_NC.to(x_MK.dtype)
    x_KM = x_MK.view(count, -1, planes).transpose(1, 2).reshape(count, columns).t()
    out_NM = torch.mm(mins_NC.to(x_MK.dtype), x_MK.view(count, -1, group).sum(2).t())
    compiled = jit() if packed_NB.device.type == "cpu" and x_MK.dtype == torch.float32 else None
    if compiled and count <= FEW_ROWS:
        packed, scale = packed_NB.numpy(), scales.numpy()
        for x_K, out_N in zip(x_KM.t(), out_NM.t(), strict=True):
            compiled.multiply(bits)(packed, scale, x_K.view(planes, -1).numpy(), out_N.numpy(), group)
        return out_NM.t()
    step = max(64, TILE // columns)
    buffer = x_MK.new_empty(min(step, rows), planes, columns // planes)
    for start in range(0, rows, step):
        packed = packed_NB[start : start + step]
        tile = buffer[: len(packed)]
        _scaled(packed, scales[start : start + step], tile, bits, group, compiled)
        out_NM[start : start + step].addmm_(tile.view(len(packed), columns), x_KM)
    return out_NM.t()


def _scaled(packed_NB: Tensor, scales_NC: Tensor, tile: Tensor, bits: int, group: int, compiled: Any) -> None:
    """Integers times scales into ``tile`` [N, planes, K / planes]."""
    if compiled:
        compiled.fill(bits)(packed_NB.numpy(), scales_NC.numpy(), tile.numpy(), group)
    else:
        _unpack(packed_NB, bits, tile)
        planes = tile.shape[1]
        tile.view(len(tile), planes, -1, group // planes).mul_(scales_NC[:, None, :, None])


def _unpack(packed_NB: Tensor, bits: int, tile: Tensor) -> None:
    """Integers of every plane into ``tile`` [N, planes, K / planes]."""
    if bits == 8:
        tile[:, 0] = packed_NB
        return
    words = packed_NB
    if bits == 3:
        low, middle, high = packed_NB.view(len(packed_NB), -1, 3).to(torch.int32).unbind(2)
        words = low | (middle << 8) | (high << 16)
    for plane in range(tile.shape[1]):
        tile[:, plane] = (words >> (bits * plane)) & (2**bits - 1)


def unfit(bank: PackedBank) -> str | None:
    """Why the fused kernels cannot run a bank, or None."""
    if bank.dtype not in (torch.float32, torch.bfloat16, torch.float16) and 16 in bank.bits:
        return f"no compiled kernel for {str(bank.dtype)[6:]}"
    return stored_matrices.unfit(bank, {e: g for e, g in enumerate(bank.group_size) if bank.bits[e] != 16})


def _matrices(bank: PackedBank, part: str) -> Matrices:
    """One part of every expert, read where it lies."""
    table, kept = stored_matrices.table_of(bank, part)
    kinds = [str(bank.dtype)[6:] if bits == 16 else f"q{bits}" for bits in bank.bits]
    for expert, group in enumerate(bank.group_size):
        leaves = ("weight", "qweight", "scales", "mins")
        leaf = {n: t for n in leaves if (t := bank.stored.get(f"{expert}.{part}.{n}")) is not None}
        weight, *grid = leaf.values()
        table[expert, :2] = weight.data_ptr(), weight.stride(0) * weight.element_size()
        if grid:
            scales, mins = grid
            table[expert, 2:6] = scales.data_ptr(), mins.data_ptr(), scales.stride(0) * 2, group.bit_length() - 1
        kept += leaf.values()
    return Matrices(*bank.size(part), kinds, table, kept)


@cache
def jit() -> Any:
    """The module of compiled kernels, or None where Numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("moekit.kernels._jit")
