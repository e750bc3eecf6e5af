"""Products with a weight matrix, in the dtype it has or, tile by tile, in float32.

On a CPU without units for half precision the four products below convert a tile of the weights that stays in cache to
float32 and multiply there: 1.2 to 5 times faster than the half-precision product from 2 rows on (measured, AVX-512
Xeon), with float32's accuracy. Shapes by suffix: M rows, N output and K input columns of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 262_144
"""Weights converted at a time: 1 MB in float32, half of a usual second-level cache."""

STRIPE, STRIPED_FROM, STRIPED_TO, STRIPED_SIZE = 256, 4, 12, 2**20
"""Float32 products of 4 to 11 rows with at least 2**20 weights go in stripes of 256 output columns: 25 % less time."""

MV_SIZE = 2**21
"""Half-precision weights from which a matrix-vector product beats a matrix product of one row, by up to 25 %."""


class Tiles:
    """The products of one layer; holds the buffer that converted tiles pass through."""

    def __init__(self, weight: Tensor) -> None:
        self.on_cpu = weight.device.type == "cpu"
        self.converts = self.on_cpu and weight.dtype in (torch.bfloat16, torch.float16) and not has_units(weight.dtype)
        self.dtype = torch.float32 if self.converts else weight.dtype
        self._buffer: Tensor | None = None

    def linear(
        self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x @ W.T + bias [M, N]; ``out`` may be given in the computing dtype."""
        if x_MK.shape[0] == 1 and self.converts:
            # reading the weights is all the work there is: half the bytes beat the missing units
            narrow = _one_row(x_MK.to(weight_NK.dtype), weight_NK, bias_N)
            return narrow.to(x_MK.dtype) if out is None else out.copy_(narrow)
        tiled = self.converts or self._stripes(x_MK, weight_NK)
        if not tiled and out is None:
            return F.linear(x_MK, weight_NK, bias_N)
        if out is None:
            out = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
        if not tiled:
            torch.mm(x_MK, weight_NK.t(), out=out)
        else:
            tiles = self._converted(weight_NK) if self.converts else _striped(weight_NK)
            for start, tile_NK in tiles:
                torch.mm(x_MK, tile_NK.t(), out=out[:, start : start + len(tile_NK)])
        return out if bias_N is None else out.add_(bias_N)

    def turned(self, x_KM: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """W @ x + bias [N, M]."""
        if self.converts:
            out = x_KM.new_empty(weight_NK.shape[0], x_KM.shape[1])
            for start, tile_NK in self._converted(weight_NK):
                torch.mm(tile_NK, x_KM, out=out[start : start + len(tile_NK)])
        else:
            out = torch.mm(weight_NK, x_KM)
        return out if bias_N is None else out.add_(bias_N.unsqueeze(1))

    def back(self, dout_MN: Tensor, weight_NK: Tensor, out: Tensor) -> None:
        """out = dout @ W [M, K], the gradient of the input."""
        if not self.converts:
            torch.mm(dout_MN, weight_NK, out=out)
            return
        out.zero_()
        for start, tile_NK in self._converted(weight_NK):
            out.addmm_(dout_MN[:, start : start + len(tile_NK)], tile_NK)

    def outer(self, target_NK: Tensor, dout_MN: Tensor, x_MK: Tensor) -> None:
        """target = dout.T @ x, the gradient of the weights."""
        if not self.converts:
            torch.mm(dout_MN.t(), x_MK, out=target_NK)
            return
        for start, tile_NK in self._parts(target_NK):
            torch.mm(dout_MN[:, start : start + len(tile_NK)].t(), x_MK, out=tile_NK)
            target_NK[start : start + len(tile_NK)] = tile_NK

    def _stripes(self, x_MK: Tensor, weight_NK: Tensor) -> bool:
        """Whether MKL's product is faster in stripes: with a few rows it copies weights, then still in cache."""
        few = STRIPED_FROM <= x_MK.shape[0] < STRIPED_TO
        return few and self.on_cpu and self.dtype == torch.float32 and weight_NK.numel() >= STRIPED_SIZE

    def _converted(self, weight_NK: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 rows) of the weights, tile by tile."""
        for start, tile_NK in self._parts(weight_NK):
            yield start, tile_NK.copy_(weight_NK[start : start + len(tile_NK)])

    def _parts(self, matrix_NK: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, buffer for the rows of a tile)."""
        rows, columns = matrix_NK.shape
        step = max(64, TILE // columns)
        if self._buffer is None or self._buffer.numel() < step * columns:
            self._buffer = torch.empty(step * columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield start, self._buffer[: count * columns].view(count, columns)


def _one_row(x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if weight_NK.numel() < MV_SIZE:
        return F.linear(x_1K, weight_NK, bias_N)
    out = torch.mv(weight_NK, x_1K[0])
    return (out if bias_N is None else out.add_(bias_N)).unsqueeze(0)


def _striped(weight_NK: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(weight_NK), STRIPE):
        yield start, weight_NK[start : start + STRIPE]


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a half-precision dtype natively (AVX-512 BF16 or FP16, AMX)."""
    names = {torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported")}
    return any(getattr(torch.cpu, name, lambda: False)() for name in names.get(dtype, ("_is_amx_fp16_supported",)))
