"""Nested bit planes: one base of few bits and planes of signs on top, each adding one bit (matryoshka quantisation).

W_0 = base(W), W_k = W_(k-1) + s_k sign(W - W_(k-1)), one s_k per group (D2MoE, 2025; the sign is never 0).
A weight of b + k bits is the base and its first k planes, so an expert stored once serves every width.
Shapes by suffix: E experts, R output rows, C input columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekit.algebra.gptq import GptqReport, gptq
from moekit.algebra.grids import Asymmetric, Grid, Rounded, Symmetric, checked, group_bounds, round_to_nearest
from moekit.algebra.moments import weighted_error
from moekit.errors import OptionError


@dataclass(frozen=True, eq=False)
class Planes:
    """``base`` and then ``signs``, the planes in ascending order; a plane's codes are 0 and 1 for -s and s.

    ``reports`` has one entry for the base and one for each plane where second moments were given, else none.
    """

    base: Rounded
    signs: tuple[Rounded, ...]
    reports: tuple[GptqReport, ...] = ()

    def expert(self, index: int) -> Planes:
        """One of several experts [E, R, C], as [R, C], without the reports."""
        return Planes(self.base.expert(index), tuple(plane.expert(index) for plane in self.signs))

    def weight(self, planes: int) -> Tensor:
        """The base and the first ``planes`` planes, added up in that order: float32 [..., R, C]."""
        if not 0 <= planes <= len(self.signs):
            raise OptionError(f"plane {planes} does not exist: these weights have a base and {len(self.signs)} planes")
        total = self.base.weight.clone()
        for plane in self.signs[:planes]:
            total += plane.weight
        return total


def nested(
    weight: Tensor,
    base: Asymmetric,
    planes: int,
    hessian: Tensor | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    column_feedback: bool = False,
) -> Planes:
    """Weights [..., R, C] as a base and ``planes`` sign planes on the groups of the base.

    Without second moments everything rounds to nearest and s_k = mean|W - W_(k-1)|, the least squares for signs. With
    them (as in :func:`~moekit.algebra.gptq`, weights then [E, R, C] or [R, C]) every plane is one sweep that hands each
    block's error to the later ones (in D2MoE there is no feedback inside a block), and then the s_k of a row are chosen
    together as the least squares of its outputs, so that no plane can add to the output error but by the rounding of
    s_k. Raises what `gptq` and `round_to_nearest` raise.
    """
    if planes < 0:
        raise OptionError(f"planes={planes} is not possible: it must be at least 0")
    residual = checked(weight)
    sign = Symmetric(bits=1, group_size=base.group_size)
    if hessian is None:
        levels = [round_to_nearest(residual, base)]
        for _ in range(planes):
            residual = residual - levels[-1].weight
            levels.append(round_to_nearest(residual, sign))
        return Planes(levels[0], tuple(levels[1:]))
    options = {"block": block, "damping": damping, "column_feedback": column_feedback}
    first, report = gptq(residual, hessian, base, **options)  # type: ignore[arg-type]
    levels, reports = [first], [report]
    for _ in range(planes):
        residual = residual - levels[-1].weight
        plane, report = gptq(residual, hessian, sign, **options)  # type: ignore[arg-type]
        plane, report = _rescaled(residual, plane, hessian, sign, report)
        levels.append(plane)
        reports.append(report)
    return Planes(levels[0], tuple(levels[1:]), tuple(reports))


def _rescaled(
    residual: Tensor, plane: Rounded, hessian: Tensor, grid: Grid, report: GptqReport
) -> tuple[Rounded, GptqReport]:
    """The plane with the scales that leave the least output error of each row, and its errors."""
    columns = residual.shape[-1]
    wide_ERC, code_ERC = residual.view(-1, *residual.shape[-2:]), plane.codes.view(-1, *residual.shape[-2:])
    moments_ECC = hessian.view(-1, columns, columns)
    bounds = group_bounds(grid, columns)
    weights, codes, scales, errors = [], [], [], []
    for expert, (wide_RC, code_RC) in enumerate(zip(wide_ERC, code_ERC, strict=True)):
        moments_CC = moments_ECC[min(expert, len(moments_ECC) - 1)]
        half_RG = plane.parameters["scales"].view(len(wide_ERC), -1, len(bounds))[expert].float() / 2
        if expert not in report.fallbacks:
            half_RG = _least_squares(wide_RC, code_RC, moments_CC, bounds)
        code_RC = torch.where(_spread(half_RG, bounds) < 0, 1 - code_RC, code_RC)
        half_RG = half_RG.abs().bfloat16()
        weights.append((code_RC.float() * 2 - 1) * _spread(half_RG.float(), bounds))
        codes.append(code_RC)
        scales.append(half_RG)
        kept = expert in report.fallbacks
        errors.append(report.error[expert] if kept else float(weighted_error(wide_RC - weights[-1], moments_CC)))
    shape, half = residual.shape, torch.stack(scales).view(*residual.shape[:-1], -1)
    scaled = Rounded(
        torch.stack(codes).view(shape), {"scales": half * 2, "mins": -half}, torch.stack(weights).view(shape)
    )
    return scaled, replace(report, error=tuple(errors))


def _least_squares(wide_RC: Tensor, code_RC: Tensor, moments_CC: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The scales s [R, G] of least ``(w - sum_g s_g sign_g) M (w - sum_g s_g sign_g)^T`` per row."""
    moments, sign = moments_CC.double(), code_RC.double() * 2 - 1
    seen = wide_RC.double() @ moments

    def sums(values_RC: Tensor) -> Tensor:
        return torch.stack([values_RC[:, start:stop].sum(-1) for start, stop in bounds], dim=-1)

    gram = torch.stack([sums((sign[:, start:stop] @ moments[start:stop]) * sign) for start, stop in bounds], dim=-1)
    # A ridge of a millionth keeps groups that no input touches solvable; their scale is then 0.
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * 1e-6
    same = torch.eye(len(bounds), dtype=torch.float64, device=gram.device)
    return torch.linalg.solve(gram + ridge * same, sums(seen * sign)).float()


def _spread(scale_RG: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """One value per group -> one per column, [R, C]."""
    sizes = torch.tensor([stop - start for start, stop in bounds], device=scale_RG.device)
    return scale_RG.repeat_interleave(sizes, dim=-1)
