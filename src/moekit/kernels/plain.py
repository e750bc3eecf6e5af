"""Products on the plain weights: no preparation, any dtype and device, the weights read where they lie.

Shapes by suffix: M rows of one expert, H hidden size, I intermediate size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fused
from ._layer import Layer
from ._tiles import Tiles

TURN_FROM, TURN_TO = 12, 128
"""Rows between which ``W @ x.T`` beats ``x @ W.T`` by 10-25 % (AVX-512 Xeon, MKL); on converted tiles, no upper end."""


class PlainProducts:
    """Both products of every expert of a dense :class:`Layer`.

    ``apart``: by expert, its matrices [G, H] and [H, I] where they lie, for experts that are not stacked; of the
    layer's own only dtype and shape are read then.
    """

    def __init__(self, layer: Layer, apart: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> None:
        self.layer = layer
        self._up: Sequence[Tensor] | Tensor
        self._down: Sequence[Tensor] | Tensor
        self._up, self._down = apart or (layer.gate_up, layer.down)
        self.num_experts, self.activation, self.finish = layer.num_experts, layer.activation, layer.finish
        self.fused = None if apart else fused.of_layer(layer)
        self._tiles = Tiles(layer.down)

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return self._tiles.dtype

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._tiles.linear(x_MH, self._up[expert], _of(self.layer.gate_up_bias, expert))

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._tiles.linear(h_MI, self._down[expert], _of(self.layer.down_bias, expert))

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        if not self._turns(x_MH.shape[0]):
            return self.down(expert, self.activation(self.up(expert, x_MH)))
        layer, turned = self.layer, self._tiles.turned
        z_GM = turned(x_MH.t(), self._up[expert], _of(layer.gate_up_bias, expert))
        h_IM = self.activation(z_GM.t()).t()
        return turned(h_IM, self._down[expert], _of(layer.down_bias, expert)).t().contiguous()

    def path(self, rows: int) -> str:
        """How the products of an expert with so many rows are computed."""
        converted = " on tiles converted to float32" if self._tiles.converts else ""
        if self._turns(rows):
            return f"W @ x.T{converted}"
        return "x @ W.T in half precision" if converted and rows == 1 else f"x @ W.T{converted}"

    def _turns(self, rows: int) -> bool:
        return self._tiles.on_cpu and rows >= TURN_FROM and (rows < TURN_TO or self._tiles.converts)


def _of(bias_EN: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EN is None else bias_EN[expert]
