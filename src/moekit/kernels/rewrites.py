"""Changes to a routing at run time, between a family's own router and the stored experts: the second half of a router.

A rewrite sees what the experts would see and returns it changed: fewer slots (-1 pads), other weights, another input.
It is stored with the experts it belongs to, so that a checkpoint routes the same wherever it is loaded.

Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import OptionError

PAD = -1
Routed = tuple[Tensor, Tensor, Tensor]
"""Input [T, H], expert ids [T, K] and combine weights [T, K]."""


class Rewrite(nn.Module, ABC):
    """``KIND`` names it in descriptions; parameters are named as on disk under ``experts.rewrite``."""

    KIND: ClassVar[str]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Ready for JSON; with "kind"."""

    @classmethod
    @abstractmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        """Uninitialised, on the current device. ``rows`` is the number of router rows."""

    @abstractmethod
    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed: ...


def keep_slots(index_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Slots that are not kept become PAD; with ``renormalise`` each token's weights keep their sum."""
    kept = torch.where(keep_TK, weight_TK, 0.0)
    if renormalise:
        kept = kept * (weight_TK.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1e-20))
    return torch.where(keep_TK, index_TK, PAD), kept.to(weight_TK.dtype)


def rank_of(weight_TK: Tensor) -> Tensor:
    """[T, K]: 0 for a token's heaviest slot, 1 for the next; ties go to the earlier slot."""
    return weight_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)


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


class ResidualGate(Rewrite):
    """The choice is made anew: the ``count`` rows of highest logit r = W x, each with weight 1 + r.

    With W = 0 and every row chosen, experts that are slices of a dense layer add up to that layer exactly.
    """

    KIND = "residual-gate"

    def __init__(self, weight_EH: Tensor, count: int) -> None:
        super().__init__()
        if not 1 <= count <= weight_EH.shape[0]:
            raise OptionError(f"{count} slots of {weight_EH.shape[0]} experts are not possible")
        self.count = count
        self.weight = nn.Parameter(weight_EH, requires_grad=False)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "count": self.count}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(torch.empty(rows, hidden_size), describe["count"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        logits = nn.functional.linear(x_TH.float(), self.weight.float())
        chosen = logits.topk(self.count, dim=-1)
        return x_TH, chosen.indices, (1 + chosen.values).to(weight_TK.dtype)


REWRITES: dict[str, type[Rewrite]] = {kind.KIND: kind for kind in (TopSlots, ResidualGate)}


def allocate_rewrite(describe: Mapping[str, Any], rows: int, hidden_size: int, device: torch.device | str) -> Rewrite:
    """An uninitialised rewrite as ``describe`` says. OptionError for a kind this moekit does not know."""
    kind = describe.get("kind")
    if kind not in REWRITES:
        raise OptionError(
            f"the checkpoint changes its routing by '{kind}', which this moekit does not know (it knows "
            f"{', '.join(REWRITES)}): update moekit"
        )
    with torch.device(device):
        return REWRITES[kind].allocate(describe, rows, hidden_size)
