"""The process of one device: maps experts from their owner's memory and computes the rows it is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.bank import SILU_MUL
from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.kernels import run
from moekit.run._scaling_owner import starts
from moekit.run._virtual import Reserved


class Device:
    """Answers ``attach``, ``run`` and ``release``. Several epochs, each a set of mapped experts, may be there."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[DenseBank | None]] = {}

    def attach(self, message: dict[str, Any], fd: int) -> None:
        """Map the experts of ``frames`` [L, E] (-1: elsewhere) one after the other into stacked tensors; no copy."""
        self.epochs[message["epoch"]] = [
            mapped(shapes, [first for first in frames if first >= 0], message["page"], fd)
            for shapes, frames in zip(message["shapes"], message["frames"], strict=True)
        ]

    def run(self, message: dict[str, Any], data: bytearray) -> Tensor:
        """Outputs [S, H] of rows [S, H], each for one expert, by its number among those mapped."""
        rows, dtype = message["rows"], getattr(torch, message["dtype"])
        slot_S = torch.frombuffer(data, dtype=torch.int64, count=rows)
        x_SH = torch.frombuffer(data, dtype=dtype, offset=8 * rows).view(rows, -1)
        bank = self.epochs[message["epoch"]][message["layer"]]
        assert bank is not None
        return run(bank, x_SH, Routing(slot_S[:, None], torch.ones(rows, 1)))[:, 0]

    def release(self, message: dict[str, Any]) -> None:
        del self.epochs[message["epoch"]]


def mapped(shapes: list[Any], firsts: list[int], page: int, fd: int) -> DenseBank | None:
    """A bank whose experts lie at frames ``firsts`` of a file, in that order; None for none."""
    if not firsts:
        return None
    parts: dict[str, Tensor] = {}
    bounds = starts(shapes, page)
    for (name, shape, kind), low, high in zip(shapes, bounds, bounds[1:], strict=False):
        dtype, stride = getattr(torch, kind), high - low
        space = Reserved(stride * len(firsts))
        for slot, first in enumerate(firsts):
            space.map(slot * stride, stride, fd, first * page + low)
        flat = space.tensor(dtype, (len(firsts), stride // dtype.itemsize))
        size = torch.Size(shape).numel()
        parts[name] = flat[:, :size].unflatten(1, shape)
    return DenseBank(**parts, activation=SILU_MUL)
