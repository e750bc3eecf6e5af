"""From quantised tensors, as published, to floating-point matrices. Each scheme is a few exact lines.

All take tensors whose last two axes are a matrix [out, in] and return float32 of that shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The eight magnitudes of FP4 E2M1 (OCP Microscaling Formats v1.0); bit 3 is the sign."""


def float8_blocks(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """FP8 with one scale per block of rows and columns: ``weight * scale_inv`` (DeepSeek-V3, section 3.3).

    ``scale_inv`` is [ceil(out / block rows), ceil(in / block columns)], in floats or as powers of two (E8M0, also
    stored as bytes); the last blocks may be cut.
    """
    rows, columns = weight.shape[-2:]
    scale = power_of_two(scale_inv) if scale_inv.dtype == torch.uint8 else scale_inv.to(torch.float32)
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.to(torch.float32) * scale


def scaled(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """FP8 or INT8 with a scale per tensor, per row or per group of columns: ``(weight - zero_point) * scale``."""
    values = weight.to(torch.float32)
    scale = scale.to(torch.float32)
    if scale.numel() == 1:
        zero = 0.0 if zero_point is None else zero_point.to(torch.float32).reshape(())
        return (values - zero) * scale.reshape(())
    groups = values.unflatten(-1, (scale.shape[-1], -1))
    zero = 0.0 if zero_point is None else zero_point.to(torch.float32)[..., None]
    return ((groups - zero) * scale[..., None]).flatten(-2)


def packed_integers(packed: Tensor, scale: Tensor, columns: int, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """compressed-tensors "pack-quantized": int32 words of ``value + 2^(bits-1)``, lowest bits first.

    ``zero_point``, where there is one, is packed the same way along the rows ([out * bits / 32, groups]).
    """
    values = unpack(packed, columns, bits)
    if zero_point is not None:
        zero_point = unpack(zero_point.mT, values.shape[-2], bits).mT
    return scaled(values, scale, zero_point)


def unpack(words: Tensor, count: int, bits: int) -> Tensor:
    """Signed values from int32 words, ``count`` per row; a row is one stream of bits, words padded at its end."""
    position = torch.arange(count, dtype=torch.int64) * bits
    stream = words.to(torch.int64) & 0xFFFFFFFF
    stream = torch.cat([stream, torch.zeros_like(stream[..., :1])], -1)
    word, shift = position // 32, position % 32
    low = stream[..., word] >> shift
    high = stream[..., word + 1] << (32 - shift)
    return ((low | high) & (2**bits - 1)) - 2 ** (bits - 1)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 (gpt-oss): ``blocks`` uint8 [.., out, in / 32, 16], low nibble first; ``scales`` [.., out, in / 32]."""
    table = torch.tensor([*MXFP4_VALUES, *(-value for value in MXFP4_VALUES)])
    nibbles = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2)
    return (table[nibbles.long()] * power_of_two(scales)[..., None]).flatten(-2)


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 scales held as bytes: ``2 ** (byte - 127)``, and NaN for 255."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)
