"""Weights laid out in advance for compiled kernels: panels of 32 output columns, in their own dtype or as int8.

Products run down a panel and never add across a vector; int8 multiplies four bytes at once (AVX-512 VNNI). Inference
only. Shapes by suffix: E experts, N output and K input columns of a product, P panels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import fused
from ._layer import Layer
from .fused import UNIT, Fused, Matrices, with_bias

PANEL = 32


class PanelProducts(Fused):
    """The weights' own dtype, lossless; :meth:`plain` gives them back, bit for bit."""

    name, bits = "panels", None

    def __init__(self, layer: Layer) -> None:
        self._packed = [_panels(w.detach()) for w in (layer.gate_up, layer.down)]
        biases = (layer.gate_up_bias, layer.down_bias)
        up, down = (_matrices(w, bias) for w, bias in zip(self._packed, biases, strict=True))
        super().__init__(up, down, layer.activation, layer.finish)

    @property
    def nbytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self._packed)

    def plain(self) -> tuple[Tensor, Tensor]:
        """``gate_up`` [E, G, H] and ``down`` [E, H, I] as they were."""
        up, down = (w.transpose(2, 3).flatten(1, 2).contiguous() for w in self._packed)
        return up, down


class Int8Panels(Fused):
    """Symmetric int8 weights with a scale per output row; every row of the inputs is rounded to a grid of its own.

    About 1 % of a product's norm, 2 to 3 % of a layer's output (random weights and inputs).
    """

    name, bits = "int8", 8

    def __init__(self, layer: Layer) -> None:
        parts = (layer.gate_up, layer.gate_up_bias), (layer.down, layer.down_bias)
        up, down = (_int8(weight.detach(), bias) for weight, bias in parts)
        super().__init__(up, down, layer.activation, layer.finish)
        self.nbytes = sum(t.numel() * t.element_size() for m in (up, down) for t in m.kept)


def unfit(layer: Layer) -> str | None:
    """Why the weights of a layer cannot be laid out in panels, or None."""
    if layer.down.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no compiled kernel for {str(layer.down.dtype)[6:]}"
    for weight in (layer.gate_up, layer.down):
        if weight.shape[1] % UNIT or weight.shape[2] % UNIT:
            return f"matrices of {weight.shape[1]} x {weight.shape[2]}: only multiples of {UNIT} are compiled for"
    return fused.lacking()


def has_int8() -> bool:
    """Whether compiled int8 kernels run here: they multiply bytes by fours."""
    return fused.lacking() is None and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def _panels(weight_ENK: Tensor) -> Tensor:
    """[E, P, K, 32]"""
    return weight_ENK.unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous()


def _matrices(packed_EPK: Tensor, bias_EN: Tensor | None) -> Matrices:
    experts, panels, width = packed_EPK.shape[:3]
    size = packed_EPK.element_size()
    table, bias = with_bias(experts, panels * PANEL, bias_EN)
    table[:, 0] = packed_EPK.data_ptr() + np.arange(experts) * (packed_EPK.stride(0) * size)
    table[:, 1], table[:, 4] = PANEL * size, PANEL * size * width
    kinds = [str(packed_EPK.dtype)[6:]] * experts
    return Matrices(panels * PANEL, width, kinds, table, (packed_EPK, bias), "panels")


def _int8(weight_ENK: Tensor, bias_EN: Tensor | None) -> Matrices:
    experts, rows, width = weight_ENK.shape
    packed = torch.empty(experts, rows // PANEL, width // 4, PANEL, 4, dtype=torch.int8)
    scales, offsets = torch.empty(experts, rows), torch.empty(experts, rows, dtype=torch.int32)
    for e, weight in enumerate(weight_ENK):
        wide = weight.float()
        scales[e] = wide.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        integers = (wide / scales[e].unsqueeze(1)).round_().to(torch.int8)
        offsets[e] = 128 * integers.sum(1, dtype=torch.int32)
        packed[e] = integers.view(-1, PANEL, width // 4, 4).transpose(1, 2)
    table, bias = with_bias(experts, rows, bias_EN)
    for column, tensor in ((0, packed), (2, scales), (3, offsets)):
        table[:, column] = tensor.data_ptr() + np.arange(experts) * (tensor.stride(0) * tensor.element_size())
    return Matrices(rows, width, ["int8"] * experts, table, (packed, scales, offsets, bias), "int8")
