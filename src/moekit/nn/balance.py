"""Auxiliary terms that keep routers healthy: each a number computed from what one layer routed.

Shapes by suffix: T tokens, H hidden size, E choices, B sequences.
"""
# ruff: noqa: N802, N815 (shape suffixes in the names of fields)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Context, Routing
from ..errors import OptionError
from .parts import Site, make

SCOPES = ("sequence", "micro", "accumulated", "global")


@dataclass(frozen=True, eq=False)
class Seen:
    """One pass of one layer, as a balance term sees it. ``experts`` is the module with the stacked weights."""

    x_TH: Tensor
    routing: Routing
    router: Any
    experts: Any
    context: Context

    @cached_property
    def logits_TE(self) -> Tensor:
        """float32 at least."""
        logits = self.routing.logits
        assert logits is not None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def probability_TE(self) -> Tensor:
        """The softmax over all choices."""
        return self.logits_TE.softmax(-1)

    @cached_property
    def scores_TE(self) -> Tensor:
        """The router's own scores, made to sum to 1."""
        scores = self.router.activation(self.routing.logits, self.context)
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    @cached_property
    def real_T(self) -> Tensor:
        """1 for tokens, 0 for padding."""
        padding = self.context.padding
        one = torch.ones(len(self.x_TH), dtype=self.logits_TE.dtype, device=self.x_TH.device)
        return one if padding is None else one.masked_fill(padding, 0)

    @cached_property
    def chosen_TE(self) -> Tensor:
        """How often each token chose each expert (0 or 1), 0 for padding; no gradient."""
        marks = torch.zeros_like(self.logits_TE)
        marks.scatter_add_(1, self.routing.expert.clamp(min=0), self.routing.used.to(marks.dtype))
        return marks * self.real_T[:, None]

    def mean(self, values_TE: Tensor) -> Tensor:
        """[E]: the mean over tokens that are no padding."""
        return (values_TE * self.real_T[:, None]).sum(0) / self.real_T.sum().clamp(min=1)


def share(count_E: Tensor) -> Tensor:
    """[.., E]: counts as shares of their sum; zeros where there is nothing to share."""
    return count_E / count_E.sum(-1, keepdim=True).clamp(min=1)


class Load(nn.Module):
    """``E * sum_i f_i P_i``: f the shares of assignments, P the mean probabilities; 1 at balance, E for one expert.

    Switch Transformer, equations 4 to 6, for any number of slots: f divides by all assignments. ``scope`` says over
    what f and P are taken: each "sequence" (then the mean), the "micro" batch, all micro-batches "accumulated" since
    the last update, or those of all ranks too ("global"; Demons in the Detail). The wider two widen f only: P is the
    micro-batch's, which gives the gradient of the whole. ``probability``: "softmax", or the router's own "scores".
    """

    count_E: Tensor

    def __init__(self, site: Site, *, scope: str = "micro", probability: str = "softmax") -> None:
        super().__init__()
        if scope not in SCOPES:
            raise OptionError(f"scope={scope!r} of a load-balancing loss: choose one of {', '.join(SCOPES)}")
        if probability not in ("softmax", "scores"):
            raise OptionError(f"probability={probability!r} of a load-balancing loss: choose softmax or scores")
        self.scope, self.probability = scope, probability
        self.register_buffer("count_E", torch.zeros(site.choices), persistent=False)

    def forward(self, seen: Seen) -> Tensor:
        probability = seen.probability_TE if self.probability == "softmax" else seen.scores_TE
        if self.scope == "sequence":
            return self._by_sequence(seen, probability)
        count = seen.chosen_TE.sum(0)
        if self.scope != "micro":
            self.count_E += self._everywhere(count)
            count = self.count_E.clone()
        return probability.shape[1] * (share(count) * seen.mean(probability)).sum()

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
        terms = (share(count_BE) * mass_BE / length_B[:, None].clamp(min=1)).sum(1) * probability_TE.shape[1]
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


def variation(value_E: Tensor) -> Tensor:
    """The squared coefficient of variation: ``var / mean^2``."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)


BALANCES: dict[str, Callable[..., Any]] = {"load": Load, "z": ZLoss, "entropy": Entropy, "importance": Importance}
"""By the name a configuration gives; called with :class:`Seen`, returns a number that is minimised."""


def balance_term(name: str, spec: Mapping[str, Any] | float, site: Site) -> tuple[float, nn.Module]:
    """(weight, term): a number is the weight alone; ``kind`` is the name unless it says otherwise."""
    options = {"weight": spec} if isinstance(spec, int | float) else dict(spec)
    weight = options.pop("weight", None)
    if not isinstance(weight, int | float):
        raise OptionError(f"balance {name!r} needs a weight: {name} = 0.01, or {name} = {{weight = 0.01, ...}}")
    return float(weight), make("balance", BALANCES, {"kind": name, **options}, site)
