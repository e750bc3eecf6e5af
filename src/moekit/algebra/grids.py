"""Quantisation grids: which values a weight may take, fitted to the weights of a group of columns.

A grid is fitted to one group of neighbouring columns of every row and gives :class:`Affine` or :class:`Ternary` points,
which encode weights as integer codes and decode these again. Parameters are bfloat16, as the packed formats store them,
so rounding to a grid and storing the result loses nothing.
Shapes by suffix: R output rows, C input columns, G groups of a row, S columns of a group; leading axes (experts) batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moekit.errors import OptionError
from moekit.formats import _grid


class Points(Protocol):
    """A grid fitted to one group of columns."""

    def encode(self, weight: Tensor) -> Tensor:
        """Weights [..., R, S] -> the codes of their nearest points, uint8 [..., R, S]; any number of columns S."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [..., R, S] -> their values, float32."""

    def parameters(self) -> dict[str, Tensor]:
        """What must be stored beside the codes, by name: bfloat16 [..., R]."""


class Grid(Protocol):
    """``group_size`` columns share parameters; None for the whole row."""

    @property
    def group_size(self) -> int | None: ...

    def fit(self, weight: Tensor) -> Points:
        """The points for one group of weights [..., R, S]."""


@dataclass(frozen=True, eq=False)
class Affine:
    """Points ``code * scale + min`` for codes 0 to ``levels``; ``scales`` and ``mins`` bfloat16 [..., R, 1]."""

    scales: Tensor
    mins: Tensor
    levels: int

    def encode(self, weight: Tensor) -> Tensor:
        scales = self.scales.to(weight.dtype)
        steps = (weight - self.mins.to(weight.dtype)) / torch.where(scales > 0, scales, 1.0)
        return steps.round_().clamp_(0, self.levels).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.addcmul(self.mins.float(), codes.float(), self.scales.float())

    def parameters(self) -> dict[str, Tensor]:
        return {"scales": self.scales[..., 0], "mins": self.mins[..., 0]}


@dataclass(frozen=True, eq=False)
class Signs:
    """Codes 0 and 1 for -``step`` and ``step``, bfloat16 [..., R, 1]; a zero is plus. Stored as affine points."""

    step: Tensor

    def encode(self, weight: Tensor) -> Tensor:
        return (weight >= 0).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.where(codes == 1, self.step.float(), -self.step.float())

    def parameters(self) -> dict[str, Tensor]:
        return {"scales": self.step[..., 0] * 2, "mins": -self.step[..., 0]}


@dataclass(frozen=True, eq=False)
class Ternary:
    """Three points, codes 0, 1, 2 for ``low`` <= 0, 0 and ``high`` >= 0; both bfloat16 [..., R, 1].

    The thresholds are the halves. A row without negative (positive) points never uses code 0 (2), so that zeros always
    have code 1 and an entropy coder sees them as what they are.
    """

    low: Tensor
    high: Tensor

    def encode(self, weight: Tensor) -> Tensor:
        low, high = self.low.to(weight.dtype), self.high.to(weight.dtype)
        above = (weight > high / 2) & (high > 0)
        below = (weight < low / 2) & (low < 0)
        return above.to(torch.uint8) + 1 - below.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        zero = torch.zeros((), device=codes.device)
        return torch.where(codes == 0, self.low.float(), torch.where(codes == 2, self.high.float(), zero))

    def parameters(self) -> dict[str, Tensor]:
        return {"low": self.low[..., 0], "high": self.high[..., 0]}


@dataclass(frozen=True, kw_only=True)
class Asymmetric:
    """From the smallest to the largest weight of a group in 2**bits points, the min stored unrounded to a step.

    With ``ratios`` other than 1 the range (both ends times the ratio) is searched for the least sum of
    ``|error| ** norm`` (norm 2.4 in GPTQ's code); the earliest ratio wins ties. At 1 bit the two points are the least
    squares around the group's mean, and ``ratios`` do not apply. At ratio 1 codes, scales and mins are those of the
    packed bank, bit for bit.
    """

    bits: int
    group_size: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    norm: float = 2.4

    def __post_init__(self) -> None:
        _check(self.bits, self.group_size, self.ratios)

    def at(self, weight: Tensor, ratio: float) -> Affine:
        """The points for one group [..., R, S] at one ratio of its range."""
        low, high = weight.float().aminmax(dim=-1)
        return self._points(torch.stack([low * ratio, high * ratio], dim=-1))

    def fit(self, weight: Tensor) -> Affine:
        return self._points(weight.float()) if self.bits == 1 else _search(self, weight)

    def _points(self, weight: Tensor) -> Affine:
        """By the packed format's own rule, which looks at the ends of the range only: bfloat16, rounded outwards."""
        *rows, columns = weight.shape
        _, scales, mins = _grid.fit(weight.reshape(-1, columns), self.bits, columns)
        return Affine(scales.view(*rows, 1), mins.view(*rows, 1), 2**self.bits - 1)


@dataclass(frozen=True, kw_only=True)
class Symmetric:
    """2**bits points with steps of 2 max|w| / (2**bits - 1) from -2**(bits - 1) steps up, zero among them.

    At 1 bit the two points are -mean|w| and mean|w|, the least squares for signs, and ``ratios`` do not apply.
    All are stored as affine points, so they pack like asymmetric ones.
    """

    bits: int
    group_size: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    norm: float = 2.4

    def __post_init__(self) -> None:
        _check(self.bits, self.group_size, self.ratios)

    def at(self, weight: Tensor, ratio: float) -> Affine:
        """The points for one group [..., R, S] at one ratio of its range."""
        levels = 2**self.bits - 1
        scales = (weight.float().abs().amax(dim=-1, keepdim=True) * (2 * ratio / levels)).to(_grid.SCALE)
        return Affine(scales, scales * -(2 ** (self.bits - 1)), levels)

    def fit(self, weight: Tensor) -> Affine | Signs:
        if self.bits == 1:
            return Signs(weight.float().abs().mean(dim=-1, keepdim=True).to(_grid.SCALE))
        return _search(self, weight)


@dataclass(frozen=True, kw_only=True)
class TernaryMinMax:
    """{min, 0, max} of a whole row (QMoE's "1.5 bit" grid): most weights become zero, which is what compresses."""

    group_size: int | None = None

    def __post_init__(self) -> None:
        _check(1, self.group_size, (1.0,))

    def fit(self, weight: Tensor) -> Ternary:
        low, high = weight.float().aminmax(dim=-1, keepdim=True)
        return Ternary(low.clamp_max(0).to(_grid.SCALE), high.clamp_min(0).to(_grid.SCALE))


@dataclass(frozen=True, kw_only=True)
class TernaryAbsmean:
    """{-a, 0, a} with a = mean|w| of each expert's whole matrix, rounded at a / 2 (BitNet b1.58, MoTE).

    With a ``group_size`` the mean is that of a row's group instead.
    """

    group_size: int | None = None

    def __post_init__(self) -> None:
        _check(1, self.group_size, (1.0,))

    def fit(self, weight: Tensor) -> Ternary:
        axes = (-2, -1) if self.group_size is None else (-1,)
        mean = weight.float().abs().mean(dim=axes, keepdim=True).to(_grid.SCALE)
        mean = mean.expand(*weight.shape[:-1], 1)
        return Ternary(-mean, mean)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Weights [..., R, C] on a grid: ``codes`` uint8, ``weight`` their values in float32.

    ``parameters``, bfloat16 [..., R, G] each: ``scales`` and ``mins`` of affine points (as the packed bank has them),
    ``low`` and ``high`` of ternary ones.
    """

    codes: Tensor
    parameters: Mapping[str, Tensor]
    weight: Tensor

    def expert(self, index: int) -> Rounded:
        """One of several experts [E, R, C], as [R, C]."""
        parameters = {name: tensor[index] for name, tensor in self.parameters.items()}
        return Rounded(self.codes[index], parameters, self.weight[index])


def round_to_nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Every weight [..., R, C] to the nearest point of its group; the last group of a row may be short.

    Raises :class:`OptionError` on weights that are NaN or infinite.
    """
    wide = checked(weight)
    fitted, codes, values = [], [], []
    for start, stop in group_bounds(grid, wide.shape[-1]):
        part = wide[..., start:stop]
        points = grid.fit(part)
        fitted.append(points)
        codes.append(points.encode(part))
        values.append(points.decode(codes[-1]))
    return Rounded(torch.cat(codes, -1), stack_parameters(fitted), torch.cat(values, -1))


def group_bounds(grid: Grid, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of every group in a row of ``columns``."""
    size = grid.group_size or columns
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def stack_parameters(fitted: list[Points]) -> dict[str, Tensor]:
    """The parameters of a row's groups, side by side: [..., R, G]."""
    each = [points.parameters() for points in fitted]
    return {name: torch.stack([parameters[name] for parameters in each], dim=-1) for name in each[0]}


def checked(weight: Tensor) -> Tensor:
    """The weights in float32 (float64 stays), refused where they are NaN or infinite."""
    if not torch.isfinite(weight).all():
        raise OptionError("weights hold NaN or infinite values: they cannot be quantised")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _search(grid: Asymmetric | Symmetric, weight: Tensor) -> Affine:
    best = grid.at(weight, grid.ratios[0])
    least = _distance(best, weight, grid.norm)
    for ratio in grid.ratios[1:]:
        points = grid.at(weight, ratio)
        distance = _distance(points, weight, grid.norm)
        closer = distance < least
        least = torch.where(closer, distance, least)
        best = Affine(
            torch.where(closer, points.scales, best.scales), torch.where(closer, points.mins, best.mins), best.levels
        )
    return best


def _distance(points: Affine, weight: Tensor, norm: float) -> Tensor:
    return (points.decode(points.encode(weight)) - weight).abs().pow(norm).sum(-1, keepdim=True)


def _check(bits: int, group_size: int | None, ratios: tuple[float, ...]) -> None:
    if not 1 <= bits <= 8:
        raise OptionError(f"bits={bits} is not a width of a grid: use 1 to 8")
    if group_size is not None and group_size < 1:
        raise OptionError(f"group_size={group_size} is not possible: it must be at least 1, or None for whole rows")
    if not ratios or min(ratios) <= 0:
        raise OptionError(f"ratios={ratios} must be one or more numbers above 0 (1 is the whole range)")
