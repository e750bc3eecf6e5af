"""From quantised tensors, as published, to floating-point matrices. Each scheme is a few exact lines.

All take tensors whose last two axes are a matrix [out, in] and return float32 of that shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import CheckpointError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The eight magnitudes of FP4 E2M1 (OCP Microscaling Formats v1.0); bit 3 is the sign."""


FP4_BYTES = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
"""Dtypes in which two FP4 values share a byte."""


def blocks(weight: Tensor, scale_inv: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """FP8 (or FP4, two a byte) with a scale per block of rows and columns (DeepSeek-V3, section 3.3):
    ``weight * scale_inv``.

    ``scale_inv`` is [ceil(out / block rows), ceil(in / block columns)], in floats or as powers of two (E8M0, also
    stored as bytes); the last blocks may be cut. A grid that ``block`` does not explain divides the matrix evenly.

    Raises:
        CheckpointError: a grid that does neither.
    """
    values = fp4(weight) if weight.dtype in FP4_BYTES else weight.to(torch.float32)
    rows, columns = values.shape[-2:]
    grid = tuple(scale_inv.shape[-2:])
    if grid != (-(-rows // block[0]), -(-columns // block[1])):
        if rows % grid[0] or columns % grid[1]:
            raise CheckpointError(f"scales {list(grid)} do not fit a matrix [{rows}, {columns}] in blocks of {block}")
        block = (rows // grid[0], columns // grid[1])
    scale = power_of_two(scale_inv) if scale_inv.dtype == torch.uint8 else scale_inv.to(torch.float32)
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return values * scale


def fp4(packed: Tensor) -> Tensor:
    """FP4 E2M1 values, two a byte, low nibble first: the last axis doubles."""
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    data = packed.view(torch.uint8)
    return table[torch.stack([data & 0xF, data >> 4], -1).flatten(-2).long()]


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
    return (fp4(blocks) * power_of_two(scales)[..., None]).flatten(-2)


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 scales held as bytes: ``2 ** (byte - 127)``, and NaN for 255."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)
