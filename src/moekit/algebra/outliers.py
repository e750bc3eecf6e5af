"""Outliers of activations: scales that move them from activations into weights.

Shapes by suffix: N consumers of one input, R output rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import OptionError


def channel_peaks(weight: Tensor) -> Tensor:
    """``max_r |w[r, c]|`` of weights [..., R, C]: float32 [..., C]."""
    return weight.detach().abs().amax(dim=-2).float()


def smoothing_scales(activation_NC: Tensor, weight_NC: Tensor, alpha: float = 0.6) -> Tensor:
    """One scale [C] per input channel that all consumers of an input (router and experts) can share.

    ``s[i, c] = a[i, c]^alpha / w[i, c]^(1 - alpha)`` for each consumer i, with a the largest absolute activation among
    its tokens and w that of its weights' column (gate and up together), and then the largest over i (EAQuant, 2025,
    after SmoothQuant, 2023). Divide the norm's weight by it and multiply every consumer's columns.
    A consumer without tokens (a = 0) does not count; a channel silent for all keeps a scale of 1. float32.

    Raises :class:`OptionError` on shapes that differ, values negative or not finite, and alpha outside 0 to 1.
    """
    if activation_NC.shape != weight_NC.shape or activation_NC.dim() != 2:
        raise OptionError(
            f"smoothing needs peaks [N, C] of activations and weights, got {list(activation_NC.shape)} "
            f"and {list(weight_NC.shape)}"
        )
    _check(activation_NC, weight_NC, alpha=alpha)
    tiny = 1e-5
    each_NC = activation_NC.float().pow(alpha) / weight_NC.float().clamp_min(tiny).pow(1 - alpha)
    scale_C = torch.where(activation_NC > 0, each_NC, 0.0).amax(dim=0)
    return torch.where(scale_C > 0, scale_C.clamp_min(tiny), 1.0)


def outlier_scales(activation_C: Tensor, alpha: float = 0.7) -> Tensor:
    """Scales [C] of one expert's down projection: 1 but for outlier channels, ``(a[c] / largest normal a)^alpha``.

    A channel is an outlier above both the upper quartile plus 1.5 interquartile ranges and the threshold that best
    splits the peaks in two (Otsu, 1979), as in EAQuant's code. Divide the rows of up by it, multiply down's columns.
    """
    _check(activation_C, alpha=alpha)
    peak_C = activation_C.double()
    low, high = torch.quantile(peak_C, torch.tensor([0.25, 0.75], dtype=torch.float64, device=peak_C.device))
    outlier_C = peak_C > torch.maximum(high + 1.5 * (high - low), _otsu(peak_C))
    normal = peak_C[~outlier_C].max()
    if not outlier_C.any() or normal <= 0:
        return torch.ones_like(activation_C, dtype=torch.float32)
    return torch.where(outlier_C, (peak_C / normal).pow(alpha), 1.0).float()


def _otsu(value_C: Tensor) -> Tensor:
    """The largest value of the lower of the two groups with the greatest variance between them."""
    ordered = value_C.sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64, device=value_C.device)
    if not len(below):
        return ordered[-1]
    sums = ordered.cumsum(0)
    above = len(ordered) - below
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above).square()
    return ordered[between.argmax()]


def _check(*peaks: Tensor, alpha: float) -> None:
    for peak in peaks:
        if not torch.isfinite(peak).all() or (peak < 0).any():
            raise OptionError("peaks of activations and weights must be finite and at least 0")
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha={alpha} must lie between 0 (all in the weights) and 1 (all in the activations)")
