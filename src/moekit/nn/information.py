"""Balance in terms of information: how much a token says about its expert, and how many experts are in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .limits import positive
from .parts import Site
from .seen import Seen


def entropy(probability: Tensor) -> Tensor:
    """[..] in nats, of distributions over the last dimension."""
    return -(probability * probability.clamp(min=torch.finfo(probability.dtype).tiny).log()).sum(-1)


def tsallis(probability: Tensor, q: float) -> Tensor:
    """[..] ``S_q = (1 - sum p^q) / (q - 1)`` of distributions over the last dimension, in nats at q = 1 (Shannon's).

    Written as ``-sum p expm1((q - 1) log p) / (q - 1)``, which is as exact near 1 as far from it.
    """
    if q == 1:
        return entropy(probability)
    log = probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
    return -(probability * ((q - 1) * log).expm1()).sum(-1) / (q - 1)


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


class Tsallis(nn.Module):
    """The mean over tokens of ``S_q(p) / S_q(1/E)``: 0 where a token is sure, 1 where it is not at all.

    DynMoLE's hybrid routing (q = 1.1), minimised to sharpen; p is the softmax over all choices, of which E are
    candidates. See :func:`tsallis`. Raises :class:`OptionError` for a q that is not positive.
    """

    q = positive("q={value} of a Tsallis entropy must be positive")

    def __init__(self, site: Site, *, q: float = 1.1) -> None:
        super().__init__()
        self.q = q

    def forward(self, seen: Seen) -> Tensor:
        count = int(seen.candidates_E.sum())
        most = math.log(count) if self.q == 1 else -math.expm1((1 - self.q) * math.log(count)) / (self.q - 1)
        return seen.mean(tsallis(seen.probability_TE, self.q)[:, None]).sum() / (most or 1)
