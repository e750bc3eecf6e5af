"""Second moments of inputs: what makes an error of the weights an error of the outputs.

With M = sum_t c_t x_t x_t^T, the squared output error of a changed weight is tr(D M D^T), D = W - W'.
Shapes by suffix: T tokens, C input columns, R output rows; leading axes (experts) batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import OptionError

MAX_DAMPING = 1.0


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
    """``tr(D M D^T)`` of differences [..., R, C] under moments [..., C, C]: float64 [...], never negative."""
    return ((difference @ moments.to(difference.dtype)) * difference).sum((-2, -1), dtype=torch.float64).clamp_min(0.0)


def inverse_factors(moments: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Upper triangular U [B, C, C] with ``U^T U = (M + damping * mean(diag M) * I)^-1`` for moments [B, C, C].

    Where the damped moments are not positive definite, the damping grows tenfold (from at least 1e-6) up to 1. Returns
    U in float64, the damping used [B] and whether it worked [B]; where it did not, U is the identity. A column that no
    input touched gets its variance from the damping, or 1 where the damping is 0: nothing flows in or out of it.
    One Cholesky factor of the reversed matrix and its triangular inverse, so that no explicit inverse is formed.
    """
    wide = moments.to(torch.float64)
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    used = torch.full(wide.shape[:1], float(damping), dtype=torch.float64, device=wide.device)
    usable = torch.isfinite(wide).all(-1).all(-1) & ~dead.all(-1)
    factors = torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device).expand_as(wide).clone()
    todo, level = usable.nonzero()[:, 0], float(damping)
    while len(todo):
        extra = level * diagonal[todo].mean(-1, keepdim=True) + (dead[todo] if level == 0 else 0.0)
        lower, info = torch.linalg.cholesky_ex(
            (wide[todo] + torch.diag_embed(extra.expand_as(dead[todo]))).flip(-2, -1)
        )
        found = (info == 0) & torch.isfinite(lower).all(-1).all(-1)
        used[todo] = level
        if found.any():
            factors[todo[found]] = _invert_upper(lower[found].flip(-2, -1))
        todo = todo[~found]
        if level >= MAX_DAMPING:
            break
        level = min(max(level * 10, 1e-6), MAX_DAMPING)
    worked = usable.clone()
    worked[todo] = False
    return factors, used, worked


def _invert_upper(upper: Tensor) -> Tensor:
    same = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    return torch.linalg.solve_triangular(upper, same, upper=True)
