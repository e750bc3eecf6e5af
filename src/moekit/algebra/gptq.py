"""GPTQ: rounding column by column, each rounding error made up for by the columns still to come.

One engine for every grid (Frantar et al., GPTQ, 2023; the batched form and its fallback: Frantar and Alistarh, QMoE,
2023). With U^T U = (H + damping)^-1, U upper triangular, the error of columns B, E = (W_B - Q_B) U_BB^-1, is taken
out of the later columns: W_later -= E U_B,later. This minimises tr((W - Q) H (W - Q)^T) over the later columns exactly.
Here a block of columns is brought up to date when its turn comes, with R = U^-1, R R^T = H + damping: of all errors
before it, W_B += (W - Q)_before R_before,B R_BB^-1, which is the same and needs no inverse of H or R. Only the small
diagonal blocks of R are inverted, for the columns inside one.
Shapes by suffix: E experts, R output rows, C input columns; inside, weights lie column-major as [E, C, R].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.algebra.grids import Grid, Points, Rounded, checked, group_bounds, round_to_nearest, stack_parameters
from moekit.algebra.moments import damped_factors, weighted_error
from moekit.errors import OptionError

WORK_BYTES = 2**29
"""How much the experts treated at once may need; the result does not depend on it."""
PACE = 64
"""With full feedback, columns that are brought up to date together: an update per column would read all before it."""
STRIDE = 16
"""Columns between two updates of the rest of their block."""


@dataclass(frozen=True)
class GptqReport:
    """Per expert: output errors ``tr(D H D^T)`` of the result and of plain rounding, damping, columns without inputs.

    ``fallbacks`` names the experts that were rounded to nearest instead, and why.
    """

    error: tuple[float, ...]
    rounding_error: tuple[float, ...]
    damping: tuple[float, ...]
    dead_columns: tuple[int, ...]
    fallbacks: Mapping[int, str] = field(default_factory=dict)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    block: int = 128,
    column_feedback: bool = True,
    block_feedback: bool = True,
) -> tuple[Rounded, GptqReport]:
    """Round weights [E, R, C] or [R, C] so that outputs change least under ``hessian`` [E, C, C] or [C, C].

    The Hessian is :func:`~moekit.algebra.second_moments` of the inputs; its scale does not matter, and one [C, C]
    serves all experts. A group's points are fitted when its first column is reached. ``column_feedback`` makes up for
    errors inside a block of ``block`` columns, ``block_feedback`` in the blocks after it (alone: the low-bit setting of
    MC-MoE and D2MoE; their code divides by the diagonal of U only, here it is the exact U_BB^-1); with neither this is
    rounding to nearest, with both ``block`` only sets the pace.

    Rounded to nearest and named in the report: experts without inputs, with moments that are not finite or not positive
    definite under any damping up to 1, and those whose error would otherwise exceed plain rounding's. A column without
    inputs keeps its weights, rounded (usual code zeroes them). Raises :class:`OptionError` on shapes that do not fit,
    on weights that are not finite, and on a negative damping.
    """
    single = weight.dim() == 2
    wide_ERC = checked(weight[None] if single else weight)
    hessian_ECC = hessian[None] if hessian.dim() == 2 else hessian
    _check(wide_ERC, hessian_ECC, damping, block)
    parts, reports = [], []
    experts, _, columns = wide_ERC.shape
    # Three float64 matrices of moments, and five of the weights' size: work, result, errors, codes, plain rounding.
    chunk = max(1, WORK_BYTES // (24 * columns**2 + 20 * wide_ERC[0].numel()))
    for start in range(0, experts, chunk):
        moments = hessian_ECC if len(hessian_ECC) == 1 else hessian_ECC[start : start + chunk]
        part, report = _some(
            wide_ERC[start : start + chunk], moments, grid, damping, block, column_feedback, block_feedback
        )
        parts.append(part)
        reports.append((start, report))
    return _joined(parts, single), _joined_reports(reports)


def _some(
    weight_ERC: Tensor, moments: Tensor, grid: Grid, damping: float, block: int, columns: bool, blocks: bool
) -> tuple[Rounded, GptqReport]:
    experts = len(weight_ERC)
    plain = round_to_nearest(weight_ERC, grid)
    factor, used, worked = damped_factors(moments, damping)
    result = plain
    if columns or blocks:
        result = _sweep(weight_ERC, factor, grid, block, columns, blocks)
    del factor
    sane = moments if worked.all() else torch.where(worked[:, None, None], moments, 0.0)
    error, rounding = (weighted_error(weight_ERC - r.weight, sane) for r in (result, plain))
    worked, used = worked.expand(experts), used.expand(experts)
    back = ~worked | (error > rounding)
    fallbacks = {int(e): _reason(moments[min(int(e), len(moments) - 1)], bool(worked[e])) for e in back.nonzero()[:, 0]}
    if fallbacks:
        pick = back[:, None, None]
        result = Rounded(
            torch.where(pick, plain.codes, result.codes),
            {name: torch.where(pick, plain.parameters[name], tensor) for name, tensor in result.parameters.items()},
            torch.where(pick, plain.weight, result.weight),
        )
    error = torch.where(back, rounding, error)
    dead = (moments.diagonal(dim1=-2, dim2=-1) == 0).sum(-1).expand(experts)
    return result, GptqReport(
        tuple(error.tolist()), tuple(rounding.tolist()), tuple(used.tolist()), tuple(dead.tolist()), fallbacks
    )


def _reason(moments_CC: Tensor, worked: bool) -> str:
    if worked:
        return "feedback was worse than rounding to nearest"
    if not torch.isfinite(moments_CC).all():
        return "the second moments of its inputs are not finite"
    if not moments_CC.diagonal().any():
        return "it got no inputs"
    return "the second moments of its inputs are not positive definite"


def _sweep(weight_ERC: Tensor, factor_ECC: Tensor, grid: Grid, block: int, columns: bool, blocks: bool) -> Rounded:
    """The pass over the columns; where the factor is diagonal it is rounding to nearest, bit for bit."""
    given_ECR = weight_ERC.transpose(1, 2).contiguous()
    error_ECR, value_ECR = torch.empty_like(given_ECR), torch.empty_like(given_ECR, dtype=torch.float32)
    code_ECR = torch.empty_like(given_ECR, dtype=torch.uint8)
    fitted: list[Points] = []
    for start, stop, pieces in _blocks(grid, given_ECR.shape[1], block, columns and blocks):
        # A group may go on beyond its block, and is fitted whole.
        reach = max(stop, *(group_end for _, _, group_end in pieces))
        work_ESR = given_ECR[:, start:reach].clone()
        if blocks and start:
            work_ESR += _correction(factor_ECC[:, :reach, start:reach], error_ECR[:, :start])
        ratio_ESS = _ratios(factor_ECC[:, start:stop, start:stop]).to(given_ECR.dtype) if columns else None
        for first, last, group_end in pieces:
            if group_end:
                fitted.append(grid.fit(work_ESR[:, first - start : group_end - start].transpose(1, 2)))
            run = slice(first - start, last - start)
            code, value = code_ECR[:, first:last], value_ECR[:, first:last]
            if ratio_ESS is None:
                _round(fitted[-1], work_ESR[:, run], code, value)
            else:
                _round_columns(fitted[-1], work_ESR[:, : stop - start], ratio_ESS, run, code, value)
        error_ECR[:, start:stop] = given_ECR[:, start:stop] - value_ECR[:, start:stop]
    return Rounded(
        code_ECR.transpose(1, 2).contiguous(), stack_parameters(fitted), value_ECR.transpose(1, 2).contiguous()
    )


def _correction(factor_ECS: Tensor, error_EDR: Tensor) -> Tensor:
    """What the errors of the first D columns ask of the S columns that end the factor's C: [E, S, R]."""
    done = error_EDR.shape[1]
    pull_ESR = factor_ECS[:, :done].to(error_EDR.dtype).transpose(1, 2) @ error_EDR
    corner = factor_ECS[:, done:].to(error_EDR.dtype).transpose(1, 2)
    return torch.linalg.solve_triangular(corner, pull_ESR, upper=False)


def _round_columns(
    points: Points, work_ESR: Tensor, ratio_ESS: Tensor, run: slice, code_ENR: Tensor, value_ENR: Tensor
) -> None:
    """Round the columns ``run`` of a block one by one, each error taken out of the block's later columns."""
    for first in range(run.start, run.stop, STRIDE):
        last = min(first + STRIDE, run.stop)
        error_ENR = torch.empty_like(work_ESR[:, first:last])
        for at in range(first, last):
            one, out = slice(at, at + 1), slice(at - run.start, at - run.start + 1)
            _round(points, work_ESR[:, one], code_ENR[:, out], value_ENR[:, out])
            error = torch.sub(work_ESR[:, one], value_ENR[:, out], out=error_ENR[:, at - first : at - first + 1])
            work_ESR[:, at + 1 : last].addcmul_(ratio_ESS[:, at, at + 1 : last, None], error, value=-1)
        work_ESR[:, last:] -= ratio_ESS[:, first:last, last:].transpose(1, 2) @ error_ENR


def _round(points: Points, work_ENR: Tensor, code_ENR: Tensor, value_ENR: Tensor) -> None:
    """Codes and values of some columns of one group."""
    codes = points.encode(work_ENR.transpose(1, 2))
    code_ENR[:] = codes.transpose(1, 2)
    value_ENR[:] = points.decode(codes).transpose(1, 2)


def _ratios(upper_ESS: Tensor) -> Tensor:
    """The rows of a triangular inverse, each divided by its diagonal: what an error is multiplied by."""
    same = torch.eye(upper_ESS.shape[-1], dtype=upper_ESS.dtype, device=upper_ESS.device)
    inverse = torch.linalg.solve_triangular(upper_ESS, same.expand_as(upper_ESS), upper=True)
    return inverse * upper_ESS.diagonal(dim1=-2, dim2=-1)[..., None]


def _blocks(
    grid: Grid, columns: int, block: int, flush_at_groups: bool
) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Blocks as (start, stop, pieces); a piece is (first, last, end of the group that begins there, or 0).

    With full feedback blocks also end where groups do, so that a group is fitted to columns that know of every error.
    """
    groups = dict(group_bounds(grid, columns))
    pace = min(block, PACE) if flush_at_groups else block
    edges = set(range(0, columns, pace)) | ({*groups} if flush_at_groups else set())
    for start, stop in _runs(edges, columns):
        inside = {start} | {group for group in groups if start < group < stop}
        yield start, stop, [(first, last, groups.get(first, 0)) for first, last in _runs(inside, stop)]


def _runs(edges: set[int], end: int) -> list[tuple[int, int]]:
    ordered = [*sorted(edges), end]
    return list(itertools.pairwise(ordered))


def _joined(parts: list[Rounded], single: bool) -> Rounded:
    def join(tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors)
        return whole[0] if single else whole

    names = parts[0].parameters
    return Rounded(
        join([part.codes for part in parts]),
        {name: join([part.parameters[name] for part in parts]) for name in names},
        join([part.weight for part in parts]),
    )


def _joined_reports(reports: list[tuple[int, GptqReport]]) -> GptqReport:
    columns = ("error", "rounding_error", "damping", "dead_columns")
    joined = {name: tuple(value for _, report in reports for value in getattr(report, name)) for name in columns}
    fallbacks = {start + expert: why for start, report in reports for expert, why in report.fallbacks.items()}
    return GptqReport(**joined, fallbacks=fallbacks)


def _check(weight_ERC: Tensor, hessian_ECC: Tensor, damping: float, block: int) -> None:
    experts, _, columns = weight_ERC.shape
    if hessian_ECC.shape not in ((experts, columns, columns), (1, columns, columns)):
        raise OptionError(
            f"weights of {experts} experts with {columns} columns need second moments "
            f"[{experts}, {columns}, {columns}] or [{columns}, {columns}], got {list(hessian_ECC.shape)}"
        )
    if not damping >= 0:
        raise OptionError(f"damping={damping} must be at least 0 (0.01 of the mean variance is usual)")
    if block < 1:
        raise OptionError(f"block={block} must be at least 1 column (128 is usual)")
