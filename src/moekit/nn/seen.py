"""What balance terms look at: one pass of one layer, with what several of them need worked out once.

Shapes by suffix: T tokens, H hidden size, E choices.
"""
# ruff: noqa: N802, N815 (shape suffixes in the names of fields)

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..contract import Context, Routing
from .flow import wanted


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
        scores = self.router.scores(self.routing.logits, self.context)
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    @cached_property
    def candidates_E(self) -> Tensor:
        """bool [E]: what the router may choose at present."""
        pool = getattr(self.router, "pool", None)
        every = torch.ones(self.logits_TE.shape[1], dtype=torch.bool, device=self.x_TH.device)
        return every if pool is None else pool.to(self.x_TH.device)

    @cached_property
    def real_T(self) -> Tensor:
        """1 for tokens, 0 for padding."""
        padding = self.context.padding
        one = torch.ones(len(self.x_TH), dtype=self.logits_TE.dtype, device=self.x_TH.device)
        return one if padding is None else one.masked_fill(padding, 0)

    @cached_property
    def chosen_TE(self) -> Tensor:
        """How often each token chose each expert (0 or 1), also where it was full; 0 for padding; no gradient."""
        marks, expert = torch.zeros_like(self.logits_TE), wanted(self.routing, self.context)
        marks.scatter_add_(1, expert.clamp(min=0), (expert >= 0).to(marks.dtype))
        return marks * self.real_T[:, None]

    @cached_property
    def selected_TE(self) -> Tensor:
        """The softmax over those that each token chose, 0 elsewhere."""
        out = self.logits_TE.masked_fill(self.chosen_TE == 0, -torch.inf)
        return out.masked_fill((self.chosen_TE == 0).all(1, keepdim=True), 0).softmax(-1) * self.chosen_TE

    def mean(self, values_TE: Tensor) -> Tensor:
        """[E]: the mean over tokens that are no padding."""
        return (values_TE * self.real_T[:, None]).sum(0) / self.real_T.sum().clamp(min=1)


def share(count_E: Tensor) -> Tensor:
    """[.., E]: counts as shares of their sum; zeros where there is nothing to share."""
    return count_E / count_E.sum(-1, keepdim=True).clamp(min=1)


def variation(value_E: Tensor) -> Tensor:
    """The squared coefficient of variation: ``var / mean^2``."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)
