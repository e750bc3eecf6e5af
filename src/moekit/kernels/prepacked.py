"""Products on weights laid out in advance for the CPU: oneDNN's own blocking (lossless) or FBGEMM's int8.

Inference only. Shapes by suffix: M rows, E experts, N output and K input columns of a product.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ._layer import Layer

SMALLEST = 262_144
"""Weights in a down projection below which oneDNN's call costs more than its layout saves (measured)."""


class ReorderedProducts:
    """oneDNN's blocked layout in the weights' own dtype; :meth:`plain` gives the weights back, bit for bit."""

    name, bits = "reordered", None

    def __init__(self, layer: Layer) -> None:
        self.num_experts, self.activation, self.finish = layer.num_experts, layer.activation, layer.finish
        self._dtype = layer.down.dtype
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._up = [reorder(w.detach().contiguous()) for w in layer.gate_up]
        self._down = [reorder(w.detach().contiguous()) for w in layer.down]
        self._up_bias = _unbound(layer.gate_up_bias, layer.num_experts)
        self._down_bias = _unbound(layer.down_bias, layer.num_experts)

    @property
    def nbytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in (*self._up, *self._down))

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return self._dtype

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return _pointwise(x_MH, self._up[expert], self._up_bias[expert])

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return _pointwise(h_MI, self._down[expert], self._down_bias[expert])

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH)))

    def plain(self) -> tuple[Tensor, Tensor]:
        """``gate_up`` [E, G, H] and ``down`` [E, H, I] as they were before the reordering."""
        up, down = (torch.stack([w.to_dense() for w in packed]) for packed in (self._up, self._down))
        return up, down


class Int8Products:
    """FBGEMM: symmetric int8 weights with a scale per output row, activations rounded to int8 at each call.

    About 1 % of a product's norm, 2 to 3 % of a layer's output (random weights and inputs).
    """

    name, bits = "int8", 8

    def __init__(self, layer: Layer) -> None:
        self.num_experts, self.activation, self.finish = layer.num_experts, layer.activation, layer.finish
        up_bias = _unbound(layer.gate_up_bias, layer.num_experts)
        self._down_bias = _unbound(layer.down_bias, layer.num_experts, torch.float32)
        self._up = [_int8(w, b) for w, b in zip(layer.gate_up, up_bias, strict=True)]
        self._down = [_int8(w, None) for w in layer.down]
        rows = layer.gate_up.shape[1] + layer.down.shape[1]
        self.nbytes = layer.num_experts * (layer.gate_up[0].numel() + layer.down[0].numel() + 8 * rows)
        # without VNNI the int8 products saturate unless the activations use 7 bits
        self._narrow = not getattr(torch.cpu, "_is_vnni_supported", lambda: True)()

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return torch.float32

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x_MH, self._up[expert], self._narrow)

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._biased(expert, torch.ops.quantized.linear_dynamic(h_MI, self._down[expert], self._narrow))

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        hidden = self.activation(self.up(expert, x_MH))
        if x_MH.shape[0] == 1:
            return self.down(expert, hidden)
        # FBGEMM rounds a call's activations to one grid, and the products of a gated unit have long tails: without a
        # scale per row, one token's outlier costs all others their digits (layer error 4 instead of 3 %)
        largest = hidden.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        out = torch.ops.quantized.linear_dynamic(hidden / largest, self._down[expert], self._narrow)
        return self._biased(expert, out.mul_(largest))

    def _biased(self, expert: int, out_MH: Tensor) -> Tensor:
        bias = self._down_bias[expert]
        return out_MH if bias is None else out_MH.add_(bias)


def has_reorder() -> bool:
    """Whether this build of torch has the (private) oneDNN operators."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def has_int8() -> bool:
    """Whether this build of torch has FBGEMM's int8 operators."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, "linear_dynamic")


def _pointwise(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")


def _int8(weight_NK: Tensor, bias_N: Tensor | None):  # type: ignore[no-untyped-def]
    weight = weight_NK.detach().float()
    scale = weight.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    integers = (weight / scale.unsqueeze(1)).round_().to(torch.int8)
    zero = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        # the quantised tensor only lives here: torch deprecates it, and names no successor for FBGEMM's layout
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch._make_per_channel_quantized_tensor(integers, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(quantised, None if bias_N is None else bias_N.detach().float())


def _unbound(bias_EN: Tensor | None, experts: int, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None] * experts if bias_EN is None else [b.detach().to(dtype or b.dtype) for b in bias_EN]
