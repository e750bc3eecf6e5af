"""Products on the plain weights: no preparation, any dtype and device, the weights read where they lie.

On a CPU the same product is several calls of very different speed. Measured (AVX-512 Xeon, MKL): with 6 to 127 rows
``W @ x.T`` beats ``x @ W.T`` by 10-25 %; and where the CPU has no bfloat16 (or float16) units, converting a tile of the
weights that stays in cache to float32 and multiplying there beats the half-precision product 1.5 to 5 times from
3 rows on, with float32's accuracy. Shapes by suffix: M rows, N output and K input columns of a product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layer import Layer

TILE = 262_144
"""Weights converted at a time: 1 MB in float32, half of a usual second-level cache."""

TURN_FROM, TURN_TO = 6, 128
"""Rows for which the product is computed transposed (float32; half precision has no upper bound)."""


class PlainProducts:
    """Both products of every expert of a dense :class:`Layer`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.num_experts = layer.num_experts
        self.activation = layer.activation
        self.finish = layer.finish
        self._tiles: Tensor | None = None

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return torch.float32 if self._converts() else self.layer.down.dtype

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._product(x_MH, self.layer.gate_up[expert], self.layer.gate_up_bias, expert)

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._product(h_MI, self.layer.down[expert], self.layer.down_bias, expert)

    def path(self, rows: int) -> str:
        """How the products of an expert with so many rows are computed."""
        if self._turns(rows):
            return "W @ x.T on tiles converted to float32" if self._converts() else "W @ x.T"
        if not self._converts():
            return "x @ W.T"
        return "one matrix-vector product per row" if rows <= 2 else "x @ W.T on tiles converted to float32"

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        layer = self.layer
        if not self._turns(x_MH.shape[0]):
            return self.down(expert, self.activation(self.up(expert, x_MH)))
        z_GM = self._turned(layer.gate_up[expert], x_MH.t())
        if layer.gate_up_bias is not None:
            z_GM += layer.gate_up_bias[expert].unsqueeze(1)
        out_HM = self._turned(layer.down[expert], self.activation(z_GM.t()).t())
        if layer.down_bias is not None:
            out_HM += layer.down_bias[expert].unsqueeze(1)
        return out_HM.t().contiguous()

    def _turns(self, rows: int) -> bool:
        on_cpu = self.layer.down.device.type == "cpu"
        return on_cpu and rows >= TURN_FROM and (rows < TURN_TO or self._converts())

    def _converts(self) -> bool:
        down = self.layer.down
        return down.device.type == "cpu" and down.dtype in (torch.bfloat16, torch.float16) and not has_units(down.dtype)

    def _product(self, x_MK: Tensor, weight_NK: Tensor, bias_EN: Tensor | None, expert: int) -> Tensor:
        bias = None if bias_EN is None else bias_EN[expert]
        if not self._converts():
            return F.linear(x_MK, weight_NK, bias)
        if x_MK.shape[0] <= 2:
            # reading the weights is all the work there is: half the bytes beat the missing units
            narrow = x_MK.to(weight_NK.dtype)
            out = torch.stack([torch.mv(weight_NK, row) for row in narrow]).float()
        else:
            out = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
            for start, tile_NK in self._converted(weight_NK):
                torch.mm(x_MK, tile_NK.t(), out=out[:, start : start + tile_NK.shape[0]])
        return out if bias is None else out.add_(bias)

    def _turned(self, weight_NK: Tensor, x_KM: Tensor) -> Tensor:
        if not self._converts():
            return torch.mm(weight_NK, x_KM)
        out = x_KM.new_empty(weight_NK.shape[0], x_KM.shape[1])
        for start, tile_NK in self._converted(weight_NK):
            torch.mm(tile_NK, x_KM, out=out[start : start + tile_NK.shape[0]])
        return out

    def _converted(self, weight_NK: Tensor):  # type: ignore[no-untyped-def]
        """(first row, float32 rows) of the weights, tile by tile, in one buffer."""
        rows, columns = weight_NK.shape
        step = max(64, TILE // columns)
        if self._tiles is None or self._tiles.numel() < step * columns:
            self._tiles = torch.empty(step * columns)
        for start in range(0, rows, step):
            part = weight_NK[start : start + step]
            yield start, self._tiles[: part.numel()].view(part.shape).copy_(part)


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a half-precision dtype natively (AVX-512 BF16 or FP16, AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if dtype == torch.bfloat16:
        return supported() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)()
