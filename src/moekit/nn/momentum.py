"""Sublayers as steps of an optimizer over depth: what a token's earlier layers added goes on moving it.

The momentum of a token runs from MoE layer to MoE layer of one forward pass; attention between them keeps its plain
residual. Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import carry
from .parts import Site

STATE = "momentum"


class Momentum(nn.Module):
    """Heavy ball: ``p = mu p + f(norm(h))``, then ``h + gamma p``, with p = 0 before the first layer (MomentumSMoE).

    ``learnt`` makes parameters of ``mu`` and ``gamma``, one of each per layer.
    """

    def __init__(
        self, site: Site, sublayer: nn.Module, *, mu: float = 0.7, gamma: float = 1.0, learnt: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= mu < 1:
            raise OptionError(f"mu={mu:g} of momentum: give 0 or more and less than 1")
        self.start = (mu, gamma)
        self.mu: float | Tensor = nn.Parameter(torch.tensor(mu)) if learnt else mu
        self.gamma: float | Tensor = nn.Parameter(torch.tensor(gamma)) if learnt else gamma

    def initialise(self, std: float) -> None:
        for parameter, value in zip((self.mu, self.gamma), self.start, strict=True):
            if isinstance(parameter, nn.Parameter):
                init.constant_(parameter, value)

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        out = sublayer(norm(hidden_BSH), context)
        state = carry(context).state
        last = state[STATE] if STATE in state else torch.zeros_like(out)
        state[STATE] = self.mu * last + out
        return hidden_BSH + self.gamma * state[STATE]


class AdamStart(Momentum):
    """The first MoE layer takes a step of Adam, the later ones go on with the heavy ball (AdamSMoE).

    There ``p = (1 - beta1) u`` and ``v = (1 - beta2) u^2`` of ``u = f(norm(h))``, from zero and uncorrected, and
    ``(1 - kappa) h + gamma_first p / sqrt(v + eps)`` leaves; the heavy ball starts from u.
    """

    def __init__(
        self,
        site: Site,
        sublayer: nn.Module,
        *,
        mu: float = 0.7,
        gamma: float = 1.0,
        gamma_first: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        kappa: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(site, sublayer, mu=mu, gamma=gamma)
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise OptionError(f"beta1={beta1:g}, beta2={beta2:g} of Adam: give 0 or more and less than 1")
        if not eps > 0:
            raise OptionError(f"eps={eps:g} of Adam must be positive")
        self.gamma_first, self.beta1, self.beta2, self.kappa, self.eps = gamma_first, beta1, beta2, kappa, eps

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        if STATE in carry(context).state:
            return super().forward(hidden_BSH, norm, sublayer, context)
        out = sublayer(norm(hidden_BSH), context)
        carry(context).state[STATE] = out
        # squares of small numbers vanish in half precision
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        step = (1 - self.beta1) * wide * torch.rsqrt((1 - self.beta2) * wide.square() + self.eps)
        return (1 - self.kappa) * hidden_BSH + self.gamma_first * step.to(out.dtype)


class RobustMomentum(nn.Module):
    """``p = m p + g f(norm(h + a p))``, then ``h + p``: the robust momentum method (Cyrus et al. 2018) over depth.

    With ``ratio`` k (the largest curvature over the smallest), ``rho`` and ``smoothness`` L:
    ``g = k (1 - rho)^2 (1 + rho) / L``, ``m = k rho^3 / (k - 1)``, ``a = rho^3 / ((k - 1)(1 - rho)^2 (1 + rho))``. The
    last step p stands for the difference of two iterates, since attention moves the stream between them.
    """

    def __init__(
        self, site: Site, sublayer: nn.Module, *, rho: float = 0.7, ratio: float = 10.0, smoothness: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 <= rho < 1 or not ratio > 1 or not smoothness > 0:
            found = f"{rho:g}, {ratio:g} and {smoothness:g}"
            raise OptionError(f"robust momentum needs 0 <= rho < 1, ratio > 1 and smoothness > 0, got {found}")
        across = (1 - rho) ** 2 * (1 + rho)
        self.gamma, self.mu = ratio * across / smoothness, ratio * rho**3 / (ratio - 1)
        self.alpha = rho**3 / ((ratio - 1) * across)

    def forward(self, hidden_BSH: Tensor, norm: nn.Module, sublayer: nn.Module, context: Context) -> Tensor:
        state = carry(context).state
        last = state.get(STATE)
        ahead = hidden_BSH if last is None else hidden_BSH + self.alpha * last
        step = self.gamma * sublayer(norm(ahead), context)
        state[STATE] = step if last is None else self.mu * last + step
        return hidden_BSH + state[STATE]
