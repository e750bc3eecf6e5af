"""Group-wise integer grids: rounding weights to them, and packing their integers into dense bytes.

Shapes by suffix: N output rows, K input columns, C groups of a row. A group is ``group_size`` neighbouring columns of
one row; the last group of a row is short where the group size does not divide K. An integer q of a group stands for
``q * scale + min``. Scales and mins are bfloat16, whose range is float32's: a float16 scale of a small weight is
subnormal and loses the very digits it is for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import OptionError

SCALE = torch.bfloat16


def groups(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns``; the last may be short."""
    return -(-columns // group_size)


def packed_columns(columns: int, bits: int) -> int:
    """Bytes in a packed row: dense to the bit, each row padded to a whole unit of 8 integers at 3 bits, else a byte."""
    return 3 * -(-columns // 8) if bits == 3 else -(-columns * bits // 8)


def fit(weight_NK: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on an asymmetric grid: integers uint8 [N, K], scales and mins bfloat16 [N, C].

    The min is rounded down and the scale up, so that the grid always covers its group: no weight is clipped, and none
    moves by more than half a step. A constant group gets a scale of 1 or of what its rounded min leaves over.
    One bit has two levels only, which are not the extremes but m - a and m + a, m the mean of the group and a the mean
    of abs(w - m): the least squares where each weight goes to the side of m it is on.
    """
    rows, columns = weight_NK.shape
    parts = grouped(weight_NK, group_size)
    low, high = _two_levels(parts, columns) if bits == 1 else parts.aminmax(dim=-1)
    mins = _round_towards(low, -torch.inf)
    levels = 2**bits - 1
    scales = _round_towards((high - mins.float()) / levels, torch.inf)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = (parts - mins.float()[..., None]) / scales.float()[..., None]
    integers = steps.round_().clamp_(0, levels).to(torch.uint8).view(rows, -1)[:, :columns]
    return integers.contiguous(), scales, mins


def grouped(weight_NK: Tensor, group_size: int) -> Tensor:
    """float32 [N, C, group size]; a short last group is filled with its last weight."""
    rows, columns = weight_NK.shape
    count = groups(columns, group_size)
    fill = count * group_size - columns
    wide = weight_NK.float()
    return (pad(wide, (0, fill), mode="replicate") if fill else wide).reshape(rows, count, group_size)


def group_mean(grouped_NCg: Tensor, columns: int) -> Tensor:
    """Means [N, C] of groups, without what fills a short last one."""
    _, count, size = grouped_NCg.shape
    short = columns - (count - 1) * size
    if short == size:
        return grouped_NCg.mean(-1)
    return torch.cat([grouped_NCg[:, :-1].mean(-1), grouped_NCg[:, -1:, :short].mean(-1)], dim=1)


def _two_levels(grouped_NCg: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    middle = group_mean(grouped_NCg, columns)
    reach = group_mean((grouped_NCg - middle[..., None]).abs(), columns)
    return middle - reach, middle + reach


def decode(integers_NK: Tensor, scales_NC: Tensor, mins_NC: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, K]: ``q * scale + min`` in float32, rounded once to ``dtype``."""
    rows, columns = integers_NK.shape
    fill = scales_NC.shape[1] * group_size - columns
    grouped = pad(integers_NK, (0, fill)) if fill else integers_NK
    grouped = grouped.view(rows, -1, group_size).float()
    weight = torch.addcmul(mins_NC.float()[..., None], grouped, scales_NC.float()[..., None])
    return weight.view(rows, -1)[:, :columns].to(dtype)


def pack(integers_NK: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] below 2**bits -> uint8 [N, packed_columns]; low bits first."""
    if bits == 8:
        return integers_NK
    per_unit = 8 // bits if bits != 3 else 8
    columns = integers_NK.shape[1]
    padded = pad(integers_NK, (0, -columns % per_unit)).view(integers_NK.shape[0], -1, per_unit)
    shifts = torch.arange(per_unit, dtype=torch.int32, device=padded.device) * bits
    words = (padded.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    if bits != 3:
        return words.to(torch.uint8)
    octets = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16)], dim=-1)
    return octets.flatten(1).to(torch.uint8)


def unpack(packed_NB: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [N, K]."""
    if bits == 8:
        return packed_NB
    rows = packed_NB.shape[0]
    if bits == 3:
        octets = packed_NB.view(rows, -1, 3).to(torch.int32)
        words = octets[..., 0] | (octets[..., 1] << 8) | (octets[..., 2] << 16)
        shifts = torch.arange(8, dtype=torch.int32, device=words.device) * 3
        integers = ((words[..., None] >> shifts) & 7).to(torch.uint8)
    else:
        shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed_NB.device) * bits
        integers = (packed_NB[..., None] >> shifts) & (2**bits - 1)
    return integers.flatten(1)[:, :columns]


def _round_towards(values: Tensor, limit: float) -> Tensor:
    """float32 -> the nearest bfloat16 on the side of ``limit`` (the value itself where it is one)."""
    rounded = values.to(SCALE)
    short = rounded.float() < values if limit > 0 else rounded.float() > values
    return torch.where(short, torch.nextafter(rounded, torch.full_like(rounded, limit)), rounded)


def exactly(values: Tensor, what: str) -> Tensor:
    """Values as bfloat16, once they are found to be bfloat16 numbers. Raises :class:`OptionError` otherwise."""
    rounded = values.to(SCALE)
    if not torch.equal(rounded.to(values.dtype), values):
        raise OptionError(f"{what} are no bfloat16 numbers: round them before the integers are chosen, not after")
    return rounded


def check_group_size(*sizes: int) -> None:
    for size in sizes:
        if size < 1:
            raise OptionError(f"group_size={size} is not possible: it must be at least 1 (64 is usual)")
