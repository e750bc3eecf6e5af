"""A bound on how many tokens each expert takes in a training step, by kind of expert.

Shapes by suffix: T tokens, K slots, E choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import PAD, Context
from ..errors import OptionError
from .flow import want
from .parts import Site, Spec, make


class Capped(nn.Module):
    """Another selector whose choices are dropped where an expert is full; only while training.

    Of N assignments a choice of weight eta takes at most ``factor * N * eta / sum(eta)``: 1 for experts of other kinds
    and ``share`` for those with weights (MoE++, its heterogeneous expert capacity, with tau = ``share``). First slots
    come before second ones, and earlier tokens before later ones (GShard). Padding takes no room. Balance terms are
    told what was wanted, or a full expert would look no fuller than it may be.
    """

    def __init__(self, site: Site, *, of: Spec = "top-k", factor: float = 1.1, share: float = 1.0) -> None:
        super().__init__()
        from .selectors import SELECTORS

        if not factor > 0 or not share > 0:
            raise OptionError(f"capacities need a positive factor and share, got {factor:g} and {share:g}")
        self.of = make("selector", SELECTORS, of, site)
        self.factor = factor
        other = site.choices - site.num_experts
        self.shares = [share] * site.num_experts + [1.0] * other

    @property
    def k(self) -> int:
        """The most slots a token uses."""
        return getattr(self.of, "k", len(self.shares))

    @k.setter
    def k(self, value: int) -> None:
        if not hasattr(self.of, "k"):
            raise OptionError(f"{type(self.of).__name__} has no number of slots that could be {value}")
        self.of.k = value

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        expert_TK = self.of(scores_TE, context, bias)
        if not self.training:
            return expert_TK
        if context.padding is not None:
            expert_TK = expert_TK.masked_fill(context.padding[:, None], PAD)
        want(expert_TK, context)
        place_TK = arrival(expert_TK, len(self.shares))
        most_E = self.capacity(int((expert_TK != PAD).sum())).to(expert_TK.device)
        return expert_TK.masked_fill(place_TK >= most_E[expert_TK], PAD)

    def capacity(self, assignments: int) -> Tensor:
        """int64 [E]: how many of so many assignments each choice takes at most, 1 at least."""
        share = torch.tensor(self.shares, dtype=torch.float64)
        return (self.factor * assignments * share / share.sum()).ceil().clamp(min=1).to(torch.int64)


def arrival(expert_TK: Tensor, choices: int) -> Tensor:
    """[T, K]: how many came to the same expert before, slot by slot and token by token; unused slots count apart."""
    flat = expert_TK.T.flatten().clamp(min=PAD) % (choices + 1)
    order = flat.argsort(stable=True)
    start = torch.bincount(flat, minlength=choices + 1).cumsum(0).roll(1)
    start[0] = 0
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) - start[flat[order]]
    return place.view(expert_TK.shape[1], -1).T
