"""Changes to a routing at run time, between a family's own router and the stored experts: the second half of a router.

A rewrite sees what the experts would see and returns it changed: fewer slots (-1 pads), other weights, another input.
It is stored with the experts it belongs to, so that a checkpoint routes the same wherever it is loaded.

Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..formats import NestedBank

PAD = -1
Routed = tuple[Tensor, Tensor, Tensor]
"""Input [T, H], expert ids [T, K] and combine weights [T, K]."""


class Rewrite(nn.Module, ABC):
    """``KIND`` names it in descriptions; parameters are named as on disk under ``experts.rewrite``.

    ``EXPANDS`` says whether rewritten ids name more than the layer's own experts (:meth:`runs`).
    """

    KIND: ClassVar[str]
    EXPANDS: ClassVar[bool] = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Ready for JSON; with "kind"."""

    @classmethod
    @abstractmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        """Uninitialised, on the current device. ``rows`` is the number of router rows."""

    @abstractmethod
    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed: ...

    def runs(self, bank: Any) -> Any:
        """The bank whose experts the rewritten ids name: the layer's own, unless a rewrite chooses more than slots."""
        return bank


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


class AuxiliaryVectors(Rewrite):
    """The ``main`` heaviest slots run; the others are stood in for by a vector each, which rescales the input.

    x' = x * (1 + sum_a w_a / (sum_a w_a) (theta[e_a] - 1)) over the slots a that do not run. ``theta`` [E, H]; with
    ones it is exactly :class:`TopSlots`.
    """

    KIND = "auxiliary-vectors"

    def __init__(self, theta_EH: Tensor, main: int, *, renormalise: bool = True) -> None:
        super().__init__()
        if main < 1:
            raise OptionError(f"main={main} leaves nothing to run: keep at least 1 slot")
        self.theta = nn.Parameter(theta_EH, requires_grad=False)
        self.main, self.renormalise = main, renormalise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "main": self.main, "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(torch.empty(rows, hidden_size), describe["main"], renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        runs = rank_of(weight_TK) < self.main
        used = (index_TK >= 0) & (index_TK < len(self.theta))
        share = torch.where(runs | ~used, 0.0, weight_TK.float())
        share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
        change = (self.theta.float() - 1)[torch.where(used, index_TK, 0)]
        x = x_TH * (1 + (share[..., None] * change).sum(1)).to(x_TH.dtype)
        return x, *keep_slots(index_TK, weight_TK, runs, renormalise=self.renormalise)


class BitWidths(Rewrite):
    """A linear head per expert says at which of its nested widths it runs a token: the argmax, the narrower of equals.

    Expert e at the w-th width has the id e * W + w among those of :meth:`runs`. Parameters: ``weight`` [E, W, H],
    ``bias`` [E, W].
    """

    KIND = "bit-widths"
    EXPANDS = True

    def __init__(self, widths: Sequence[int], weight_EWH: Tensor, bias_EW: Tensor) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight_EWH, bias_EW))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "widths": list(self.widths)}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        widths = describe["widths"]
        return cls(widths, torch.empty(rows, len(widths), hidden_size), torch.empty(rows, len(widths)))

    def choice(self, x_TH: Tensor, index_TK: Tensor) -> Tensor:
        """[T, K]: which width each slot runs at, as index into ``widths``."""
        experts, widths = self.bias.shape
        logits = nn.functional.linear(x_TH.float(), self.weight.float().flatten(0, 1), self.bias.float().flatten())
        best_TE = logits.view(-1, experts, widths).argmax(-1)
        return best_TE.gather(1, index_TK.clamp(0, experts - 1))

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        used = (index_TK >= 0) & (index_TK < len(self.bias))
        at = index_TK * len(self.widths) + self.choice(x_TH, index_TK)
        return x_TH, torch.where(used, at, PAD), weight_TK

    def runs(self, bank: Any) -> Any:
        """Every expert at every width; planes are shared, nothing is copied."""
        if not isinstance(bank, NestedBank):
            raise OptionError(f"widths per token need experts stored as nested planes, not as {type(bank).__name__}")
        stored, count = {}, len(self.widths)
        for place, width in enumerate(self.widths):
            for name, tensor in bank.at(width).stored.items():
                expert, _, rest = name.partition(".")
                stored[f"{int(expert) * count + place}.{rest}"] = tensor
        sizes = tuple(size for size in bank.group_size for _ in self.widths)
        return replace(bank, stored=stored, bits=self.widths * bank.num_experts, group_size=sizes)


REWRITES: dict[str, type[Rewrite]] = {
    kind.KIND: kind for kind in (TopSlots, ResidualGate, RatioSkip, PrefixMask, AuxiliaryVectors, BitWidths)
}


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
