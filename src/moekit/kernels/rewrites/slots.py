"""Rewrites that let fewer of a token's slots run: a fixed number, those that weigh enough, or as a head says.

Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ._rewrite import Rewrite, Routed, keep_slots, rank_of


class TopSlots(Rewrite):
    """Only the ``count`` heaviest slots of each token run."""

    KIND = "top-slots"

    def __init__(self, count: int, *, renormalise: bool = True) -> None:
        super().__init__()
        if count < 1:
            raise OptionError(f"{count} slots per token leave nothing to run: keep at least 1")
        self.count, self.renormalise = count, renormalise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "count": self.count, "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(describe["count"], renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        keep = rank_of(weight_TK) < self.count
        return x_TH, *keep_slots(index_TK, weight_TK, keep, renormalise=self.renormalise)


class RatioSkip(Rewrite):
    """The lightest slots do not run where together they weigh less than ``ratio`` times those before them.

    A token keeps the shortest run of its heaviest slots for which that holds, at least one; with two slots the second
    goes where w2 / w1 < ``ratio``. Tokens whose input has an L1 norm of ``protect`` or more keep all their slots.
    """

    KIND = "ratio-skip"

    def __init__(self, ratio: float, protect: float | None = None, *, renormalise: bool = True) -> None:
        super().__init__()
        if not 0 <= ratio < float("inf"):
            raise OptionError(f"ratio={ratio} must be a number from 0 (nothing is skipped) up")
        self.ratio, self.protect, self.renormalise = ratio, protect, renormalise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "ratio": self.ratio, "protect": self.protect, "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(describe["ratio"], describe["protect"], renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        rank = rank_of(weight_TK)
        heavy = weight_TK.float().sort(dim=1, descending=True, stable=True).values
        rest = heavy.flip(1).cumsum(1).flip(1)
        runs = torch.ones_like(heavy, dtype=torch.bool)
        runs[:, 1:] = rest[:, 1:] >= self.ratio * heavy.cumsum(1)[:, :-1]
        if self.protect is not None:
            runs |= (x_TH.float().abs().sum(1) >= self.protect)[:, None]
        return x_TH, *keep_slots(index_TK, weight_TK, runs.gather(1, rank), renormalise=self.renormalise)


class PrefixMask(Rewrite):
    """A linear head on the input and the sorted weights' logarithms says how many of the heaviest slots run: 1 to K.

    Trained (``train()``) its choice is a Gumbel-softmax at ``temperature``: slots are weighted by the share of prefixes
    that hold them, and ``cost`` is the expected number of slots per token, as a share of K. Otherwise it is the argmax.
    Parameters: ``weight`` [K, H + K], ``bias`` [K].
    """

    KIND = "prefix-mask"

    def __init__(self, weight: Tensor, bias: Tensor, *, renormalise: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        self.renormalise = renormalise
        self.temperature, self.cost = 1.0, torch.zeros(())
        self.eval()

    @classmethod
    def whole(cls, slots: int, hidden_size: int, *, renormalise: bool = True) -> Self:
        """A head that keeps every slot: where training begins."""
        bias = torch.zeros(slots)
        bias[-1] = 2.0
        return cls(torch.zeros(slots, hidden_size + slots), bias, renormalise=renormalise)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "slots": len(self.bias), "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        slots = describe["slots"]
        weight, bias = torch.empty(slots, hidden_size + slots), torch.empty(slots)
        return cls(weight, bias, renormalise=describe["renormalise"])

    def logits(self, x_TH: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, K]: of keeping 1, 2 ... K slots."""
        heavy = weight_TK.float().sort(dim=1, descending=True, stable=True).values.clamp(min=1e-6).log()
        return nn.functional.linear(torch.cat([x_TH.float(), heavy], 1), self.weight.float(), self.bias.float())

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        rank, logits_TK = rank_of(weight_TK), self.logits(x_TH, weight_TK)
        if not self.training:
            keep = rank <= logits_TK.argmax(1, keepdim=True)
            return x_TH, *keep_slots(index_TK, weight_TK, keep, renormalise=self.renormalise)
        lengths = torch.arange(1, len(self.bias) + 1, device=logits_TK.device) / len(self.bias)
        self.cost = (logits_TK.softmax(1) * lengths).sum(1).mean()
        chosen = nn.functional.gumbel_softmax(logits_TK, self.temperature)
        kept = weight_TK * chosen.flip(1).cumsum(1).flip(1).gather(1, rank).to(weight_TK.dtype)
        if self.renormalise:
            kept = kept * (weight_TK.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1e-20))
        return x_TH, index_TK, kept
