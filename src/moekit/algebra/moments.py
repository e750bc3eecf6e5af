"""Second moments of inputs: what makes an error of the weights an error of the outputs.

With M = sum_t c_t x_t x_t^T, the squared output error of a changed weight is tr(D M D^T), D = W - W'.
Shapes by suffix: T tokens, C input columns, R output rows; leading axes (experts) batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.errors import OptionError

MAX_DAMPING = 1.0
PANEL = 512
"""Columns of moments multiplied at once."""


def second_moments(x_TC: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """``sum_t weight_t x_t x_t^T`` [C, C] in float32 (float64 for float64 inputs); zeros where there are no tokens.

    Sums, not means, so that the moments of two sets of tokens add. A weight enters once (the inputs are scaled by its
    root), as in MoEQuant's affinity-guided quantisation; without weights every token counts 1. Raises
    :class:`OptionError` on shapes that do not fit and on weights that are negative or not finite.
    """
    if x_TC.dim() != 2:
        raise OptionError(f"second moments need inputs [T, C], got {list(x_TC.shape)}")
    wide = x_TC.to(torch.promote_types(x_TC.dtype, torch.float32))
    if weight_T is None:
        return wide.T @ wide
    if weight_T.shape != x_TC.shape[:1]:
        raise OptionError(f"token weights have shape {list(weight_T.shape)}, but there are {len(x_TC)} tokens")
    if not torch.isfinite(weight_T).all() or (weight_T < 0).any():
        raise OptionError("token weights must be finite and at least 0")
    scaled = wide * weight_T.to(wide.dtype).sqrt()[:, None]
    return scaled.T @ scaled


def weighted_error(difference: Tensor, moments: Tensor) -> Tensor:
    """``tr(D M D^T)`` of differences [..., R, C] under moments [..., C, C]: float64 [...], never negative.

    M is symmetric, so of the blocks of columns that meet off its diagonal one side is computed and counted twice.
    """
    moments, columns = moments.to(difference.dtype), difference.shape[-1]
    total = difference.new_zeros(difference.shape[:-2], dtype=torch.float64)
    for start in range(0, columns, PANEL):
        run = slice(start, start + PANEL)
        half = difference[..., run] @ moments[..., run, run]
        if start:
            half += 2 * (difference[..., :start] @ moments[..., :start, run])
        total = total + (half * difference[..., run]).sum((-2, -1), dtype=torch.float64)
    return total.clamp_min(0.0)


def damped_factors(moments: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Upper triangular R [B, C, C] with ``R R^T = M + damping * mean(diag M) * I`` for moments [B, C, C].

    Where the damped moments are not positive definite, the damping grows tenfold (from at least 1e-6) up to 1. Returns
    R in float64, the damping used [B] and whether it worked [B]; where it did not, R is the identity. A column that no
    input touched gets its variance from the damping, or 1 where the damping is 0: nothing flows in or out of it.
    R is the inverse of the upper Cholesky factor of the damped inverse, which is never formed.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1).to(torch.float64)
    dead = diagonal == 0
    used = torch.full(moments.shape[:1], float(damping), dtype=torch.float64, device=moments.device)
    usable = torch.isfinite(moments).flatten(1).all(1) & ~dead.all(-1)
    todo, level = usable.nonzero()[:, 0], float(damping)
    made: dict[int, Tensor] = {}
    while len(todo):
        extra = level * diagonal[todo].mean(-1, keepdim=True) + (dead[todo] if level == 0 else 0.0)
        turned = moments[todo].to(torch.float64).flip(-2, -1)
        turned.diagonal(dim1=-2, dim2=-1).add_(extra.expand_as(dead[todo]).flip(-1))
        lower, info = torch.linalg.cholesky_ex(turned)
        found = (info == 0) & torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all(-1)
        used[todo] = level
        made |= {int(todo[at]): lower[at] for at in found.nonzero()[:, 0].tolist()}
        todo = todo[~found]
        if level >= MAX_DAMPING:
            break
        level = min(max(level * 10, 1e-6), MAX_DAMPING)
    worked = usable.clone()
    worked[todo] = False
    return _upper(made, moments), used, worked


def _upper(lower: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """The factors turned back, the identity in the place of those that are not there."""
    same = torch.eye(like.shape[-1], dtype=torch.float64, device=like.device)
    return torch.stack([lower[at].flip(-2, -1) if at in lower else same for at in range(len(like))])
