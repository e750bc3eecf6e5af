"""Auxiliary terms that keep routers healthy: each a number computed from what one layer routed.

Shapes by suffix: T tokens, E choices, B sequences.
"""
# ruff: noqa: N815 (shape suffixes in the names of fields)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .parts import Site, make
from .seen import Seen, share, variation

SCOPES = ("sequence", "micro", "accumulated", "global")
_PROBABILITIES = {"softmax": "probability_TE", "scores": "scores_TE", "chosen": "selected_TE"}


class Load(nn.Module):
    """``E * sum_i f_i P_i``: f the shares of assignments, P the mean probabilities; 1 at balance, E for one expert.

    Switch Transformer, equations 4 to 6, for any number of slots: f divides by all assignments. ``scope`` says over
    what f and P are taken: each "sequence" (then the mean), the "micro" batch, all micro-batches "accumulated" since
    the last update, or those of all ranks too ("global"; Demons in the Detail). The wider two widen f only: P is the
    micro-batch's, which gives the gradient of the whole. ``probability``: "softmax", the router's own "scores", or the
    softmax over those "chosen" alone.
    """

    count_E: Tensor

    def __init__(self, site: Site, *, scope: str = "micro", probability: str = "softmax") -> None:
        super().__init__()
        if scope not in SCOPES:
            raise OptionError(f"scope={scope!r} of a load-balancing loss: choose one of {', '.join(SCOPES)}")
        if probability not in _PROBABILITIES:
            raise OptionError(f"probability={probability!r} of a load-balancing loss: choose softmax, scores or chosen")
        self.scope, self.probability = scope, probability
        self.register_buffer("count_E", torch.zeros(site.choices), persistent=False)

    def forward(self, seen: Seen) -> Tensor:
        probability = getattr(seen, _PROBABILITIES[self.probability])
        if self.scope == "sequence":
            return self._by_sequence(seen, probability)
        count = seen.chosen_TE.sum(0)
        if self.scope != "micro":
            self.count_E += self._everywhere(count)
            count = self.count_E.clone()
        return probability.shape[1] * (self.shares(count) * seen.mean(probability)).sum()

    def shares(self, count_E: Tensor) -> Tensor:
        """f [.., E] of counts."""
        return share(count_E)

    def finish_step(self) -> None:
        """The optimizer has stepped: what was accumulated is forgotten."""
        self.count_E.zero_()

    def _everywhere(self, count_E: Tensor) -> Tensor:
        if self.scope == "global" and torch.distributed.is_available() and torch.distributed.is_initialized():
            count_E = count_E.clone()
            torch.distributed.all_reduce(count_E)
        return count_E

    def _by_sequence(self, seen: Seen, probability_TE: Tensor) -> Tensor:
        sequence = seen.context.sequence
        if sequence is None:
            sequence = torch.zeros(len(seen.x_TH), dtype=torch.int64, device=seen.x_TH.device)
        rows = int(sequence.max()) + 1 if len(sequence) else 1
        sums = probability_TE.new_zeros(rows, probability_TE.shape[1])
        count_BE = sums.index_add(0, sequence, seen.chosen_TE)
        mass_BE = sums.index_add(0, sequence, probability_TE * seen.real_T[:, None])
        length_B = sums[:, 0].index_add(0, sequence, seen.real_T)
        terms = (self.shares(count_BE) * mass_BE / length_B[:, None].clamp(min=1)).sum(1) * probability_TE.shape[1]
        return terms[length_B > 0].mean() if bool((length_B > 0).any()) else terms.sum()


class ZLoss(nn.Module):
    """The mean over tokens of ``logsumexp(logits)^2``: keeps logits small (ST-MoE, equation 5)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        return seen.mean(seen.logits_TE.logsumexp(-1, keepdim=True).square()).sum()


class Entropy(nn.Module):
    """The mean over tokens of the entropy of the softmax over all choices, in nats: minimising it sharpens."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        log = seen.logits_TE.log_softmax(-1)
        return -seen.mean((seen.probability_TE * log.masked_fill(log == -torch.inf, 0)).sum(-1, keepdim=True)).sum()


class Importance(nn.Module):
    """The squared coefficient of variation of the experts' summed probabilities (Shazeer 2017, equation 6)."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        return variation(seen.mean(seen.probability_TE))


BALANCES: dict[str, Callable[..., Any]] = {"load": Load, "z": ZLoss, "entropy": Entropy, "importance": Importance}
"""By the name a configuration gives; called with :class:`Seen`, returns a number that is minimised."""


def balance_term(name: str, spec: Mapping[str, Any] | float, site: Site) -> tuple[float, nn.Module]:
    """(weight, term): a number is the weight alone; ``kind`` is the name unless it says otherwise."""
    options = {"weight": spec} if isinstance(spec, int | float) else dict(spec)
    weight = options.pop("weight", None)
    if not isinstance(weight, int | float):
        raise OptionError(f"balance {name!r} needs a weight: {name} = 0.01, or {name} = {{weight = 0.01, ...}}")
    return float(weight), make("balance", BALANCES, {"kind": name, **options}, site)
