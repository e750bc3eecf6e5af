"""What makes scores [T, E] of logits [T, E]: the numbers that are ranked, and usually the weights too.

Shapes by suffix: T tokens, E choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.recipe import ACTIVATIONS as STOCK
from ..contract import Context
from .costs import NoisySoftmax
from .limits import positive
from .parts import Site
from .sinkhorn import SelectiveSinkhorn
from .stick_breaking import StickWeights


class Softmax(nn.Module):
    """Over all choices, in float32 at least, after division by ``temperature``."""

    temperature = positive("temperature={value} of a softmax must be positive")

    def __init__(self, site: Site, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        wide = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        return STOCK["softmax"](wide if self.temperature == 1 else wide / self.temperature)


class GumbelSoftmax(Softmax):
    """The softmax of logits plus Gumbel noise while training, without noise otherwise (EvoMoE, dense-to-sparse gate).

    The lower ``temperature``, the nearer it is to one choice drawn with the probabilities of the plain softmax.
    """

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        if self.training:
            wide = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
            logits_TE = wide - torch.empty_like(wide).exponential_().clamp(min=torch.finfo(wide.dtype).tiny).log()
        return super().forward(logits_TE, context)


class Sigmoid(nn.Module):
    """Each choice for itself, in float32 at least."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        return STOCK["sigmoid"](logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)))


class Identity(nn.Module):
    """The logits themselves, in float32 at least: of any sign, so no shares of a sum."""

    signed = True

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))


class StickBreaking(nn.Module):
    """Each choice breaks its share off what those before it have left: ``sigmoid(z_e) prod_{j<e} (1 - sigmoid(z_j))``.

    ModuleFormer's attention breaks the stick over keys; here it is broken over experts, in the order of their ids. No
    score is negative, and they sum to at most 1: what is left of the stick goes to nobody. In float32 at least.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        return StickWeights.apply(logits_TE)


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "softmax": Softmax,
    "gumbel-softmax": GumbelSoftmax,
    "sigmoid": Sigmoid,
    "identity": Identity,
    "stick-breaking": StickBreaking,
    "noisy-softmax": NoisySoftmax,
    "selective-sinkhorn": SelectiveSinkhorn,
}
"""By the name a configuration gives; called with (logits_TE, context)."""
