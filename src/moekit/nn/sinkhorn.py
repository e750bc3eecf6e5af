"""Balanced assignment by optimal transport, on some training steps only.

Shapes by suffix: T tokens, E choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Context
from ..errors import OptionError
from .parts import Site


def transport(
    gain_TE: Tensor, temperature: float, *, tolerance: float = 1e-4, iterations: int = 100
) -> tuple[Tensor, int]:
    """(plan [T, E], iterations): the plan that maximises ``<plan, gain> + temperature * entropy(plan)``, rows summing
    to 1 and columns to T / E.

    Alternate scaling in the log domain (Cuturi 2013), until the 2-norms of both residuals are below ``tolerance``. Rows
    are exact, columns as near as ``iterations`` allow. -inf forbids a pair.
    """
    kernel = gain_TE.to(torch.promote_types(gain_TE.dtype, torch.float32)) / temperature
    tokens, choices = kernel.shape
    if not tokens:
        return kernel, 0
    target = tokens / choices
    row, done = kernel.new_zeros(tokens, 1), 0
    plan = kernel.softmax(1)
    while done < iterations:
        column = math.log(target) - (kernel + row).logsumexp(0, keepdim=True)
        row = -(kernel + column).logsumexp(1, keepdim=True)
        plan, done = (kernel + row + column).exp(), done + 1
        if residual(plan) < tolerance:
            break
    return plan, done


def residual(plan_TE: Tensor) -> float:
    """The larger 2-norm of the two marginals' errors."""
    plan_TE = plan_TE.detach()
    tokens, choices = plan_TE.shape
    return max(float((plan_TE.sum(1) - 1).norm()), float((plan_TE.sum(0) - tokens / choices).norm()))


class SelectiveSinkhorn(nn.Module):
    """The softmax, but at a random ``share`` of training steps the rows of a balanced :func:`transport` plan.

    Selective Sinkhorn routing (arXiv 2511.08972): choices and weights then both follow the plan, and no other balance
    term is needed. Gains are the "logits" or their "softmax", ``noise`` is the deviation of what is added to them.
    With ``detach`` no gradient passes the plan. Padding takes no part in it, nor do barred choices. Draws come from
    torch's global generator, one a pass, so a pass that is run again (recomputation) draws the same.
    """

    def __init__(
        self,
        site: Site,
        *,
        share: float = 0.01,
        temperature: float = 0.5,
        gain: str = "logits",
        noise: float = 0.0,
        detach: bool = True,
        tolerance: float = 1e-4,
        iterations: int = 100,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise OptionError(f"share={share:g} is a share of the training steps: give 0 to 1")
        if not temperature > 0 or noise < 0 or iterations < 1:
            raise OptionError(
                "optimal transport needs temperature > 0, noise >= 0 and 1 iteration or more, "
                f"got {temperature:g}, {noise:g} and {iterations}"
            )
        if gain not in ("logits", "softmax"):
            raise OptionError(f"gain={gain!r} of optimal transport: choose logits or softmax")
        self.share, self.temperature, self.gain, self.noise, self.detach = share, temperature, gain, noise, detach
        self.tolerance, self.iterations = tolerance, iterations

    def forward(self, logits_TE: Tensor, context: Context) -> Tensor:
        logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        scores = logits.softmax(-1)
        if not self.training or float(torch.rand(())) >= self.share:
            return scores
        live_T = (logits > -torch.inf).any(1) & ~logits.isnan().any(1)
        if context.padding is not None:
            live_T = live_T & ~context.padding
        token = live_T.nonzero().squeeze(1)
        choice = (logits[token] > -torch.inf).any(0).nonzero().squeeze(1)
        plan = self._plan(logits[token][:, choice], scores[token][:, choice])
        return scores.index_put((token[:, None], choice[None, :]), plan)

    def _plan(self, logits: Tensor, scores: Tensor) -> Tensor:
        gain = logits if self.gain == "logits" else scores.masked_fill(logits == -torch.inf, -torch.inf)
        gain = gain + self.noise * torch.randn_like(gain) if self.noise else gain
        gain = gain.detach() if self.detach else gain
        return transport(gain, self.temperature, tolerance=self.tolerance, iterations=self.iterations)[0]
