"""Balance in terms of information: how much a token says about its expert, and how many experts are in use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import Site
from .seen import Seen


def entropy(probability: Tensor) -> Tensor:
    """[..] in nats, of distributions over the last dimension."""
    return -(probability * probability.clamp(min=torch.finfo(probability.dtype).tiny).log()).sum(-1)


class MutualInformation(nn.Module):
    """``-(H(p(e)) - H(e|x))`` in nats: experts equally used on the whole, each token sure of its own (ModuleFormer).

    p(e) is the mean probability over the tokens of the micro-batch. 0 where all tokens are routed alike, ``-log E``
    where each is sure and all experts are used equally.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        each = seen.mean(entropy(seen.probability_TE)[:, None]).sum()
        return each - entropy(seen.mean(seen.probability_TE))


class Concentration(nn.Module):
    """``H(p(e))`` in nats: few experts in use, so that the others can be dropped (ModuleFormer, fine-tuning)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        return entropy(seen.mean(seen.probability_TE))
