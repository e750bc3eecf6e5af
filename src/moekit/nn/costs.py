"""Experts that cost unequally: a noisy router, and a balance that gives each work in proportion to its speed.

Shapes by suffix: T tokens, E choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .flow import carry
from .parts import Site
from .seen import variation

if TYPE_CHECKING:
    from .seen import Seen

_NOISY = "noisy logits"


class NoisySoftmax(nn.Module):
    """The softmax of logits plus Gaussian ``noise`` (deviation; 1 / E where none is given) while training.

    The noisy logits go to the carry, where :class:`Cost` finds them.
    """

    def __init__(self, site: Site, *, noise: float | None = None) -> None:
        super().__init__()
        self.noise = 1 / site.choices if noise is None else noise
        if not self.noise > 0:
            raise OptionError(f"noise={self.noise:g} of a noisy softmax must be positive: softmax is the one without")

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        if self.training:
            logits = logits + self.noise * torch.randn_like(logits)
            carry(context).state[_NOISY] = logits
        return logits.softmax(-1)


def chance_of_choice(clean_TE: Tensor, noisy_TE: Tensor, k: int, noise: float) -> Tensor:
    """[T, E]: how likely each is among the k highest if its own noise is drawn again (Shazeer 2017, equation 9)."""
    if k >= clean_TE.shape[1]:
        return torch.ones_like(clean_TE)
    best_TK, _ = noisy_TE.topk(k + 1, dim=1)
    last, next_ = best_TK[:, k - 1 : k], best_TK[:, k : k + 1]
    threshold = torch.where(noisy_TE >= last, next_, last)
    threshold = threshold.clamp(min=torch.finfo(threshold.dtype).min / 2)  # where too few are allowed: chosen for sure
    return torch.special.ndtr((clean_TE - threshold) / noise)


class Cost(nn.Module):
    """``CV^2(a_i sum_x p_i(x)) + CV^2(a_i sum_x q_i(x))``: least where work is shared out in proportion to 1 / a_i.

    ShiftAddViT's latency-aware loss: p are probabilities without noise, q chances to be chosen under the router's noise
    (counts, without a gradient, where there is none), ``costs`` a of every choice, in any unit.
    """

    def __init__(self, site: Site, *, costs: Sequence[float]) -> None:
        super().__init__()
        if len(costs) != site.choices or not min(costs) > 0:
            raise OptionError(f"costs={list(costs)}: give {site.choices} positive numbers, one for each expert")
        self.costs = tuple(float(cost) * len(costs) / sum(costs) for cost in costs)

    def forward(self, seen: Seen) -> Tensor:
        cost_E = torch.tensor(self.costs, device=seen.logits_TE.device)
        noisy = carry(seen.context).state.pop(_NOISY, None)
        load_TE = seen.chosen_TE
        if noisy is not None:
            load_TE = chance_of_choice(seen.logits_TE, noisy, seen.router.top_k, seen.router.activation.noise)
        return variation(cost_E * seen.mean(seen.probability_TE)) + variation(cost_E * seen.mean(load_TE))
